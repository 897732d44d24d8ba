"""What the tests of this folder train: a small network, on one thread, so that equal trainings have equal weights.

::

    python training.py <run name> <epoch in which it dies, 0: none>
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
from composer import Callback, Trainer
from composer.loggers import FileLogger, TensorboardLogger
from composer.models import ComposerClassifier
from torch.utils.data import DataLoader, TensorDataset

from mandapa.object_store import S3ObjectStore
from mandapa.trainers.composer import ObjectStoreLogger

EPOCHS, BATCHES = 3, 4


def store(**options: Any) -> ObjectStoreLogger:
    """The logger of all tests, to the server that the environment names."""
    place = {"bucket": os.environ["LAB_BUCKET"], "endpoint_url": os.environ["LAB_URL"]}
    return ObjectStoreLogger(S3ObjectStore, place, **options)


def loader() -> Any:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    dataset = TensorDataset(inputs, labels)
    if "RANK" in os.environ:
        from composer.utils import dist

        return DataLoader(dataset, batch_size=64 // BATCHES // 2, sampler=dist.get_sampler(dataset, shuffle=True))
    return DataLoader(dataset, batch_size=64 // BATCHES, shuffle=True)


def trainer(name: str, *, loggers: list[Any] | None = None, **given: Any) -> Trainer:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(16, 3))
    options = {
        "run_name": name,
        "save_folder": "{run_name}/checkpoints",
        "save_interval": "1ep",
        "max_duration": f"{EPOCHS}ep",
        "eval_dataloader": loader(),
        "optimizers": torch.optim.Adam(model.parameters(), lr=0.01),
        "seed": 7,
        "device": "cpu",
        "progress_bar": False,
        "loggers": [store(), TensorboardLogger(flush_interval=3), FileLogger()] if loggers is None else loggers,
    }
    return Trainer(model=ComposerClassifier(model, num_classes=3), train_dataloader=loader(), **{**options, **given})


class Dies(Callback):
    """As the kernel does when memory is short; in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def batch_end(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.epoch) + 1 == self.epoch and int(state.timestamp.batch_in_epoch) == 2:
            os._exit(9)


KEPT: list[Trainer] = []  # a Trainer that nobody refers to any more is closed at once


def main(name: str, dies: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    made = trainer(name, autoresume=True, callbacks=[Dies(int(dies))])
    KEPT.append(made)
    print("begins at", int(made.state.timestamp.batch), flush=True)
    made.logger.upload_file("{run_name}/notes-rank{rank}.txt", __file__)
    made.logger.upload_file("{run_name}/same.txt", __file__)
    made.fit()
    print("the last line", flush=True)  # Nothing is closed: Composer does that at exit, and hands over its log.


if __name__ == "__main__":
    main(*sys.argv[1:])
