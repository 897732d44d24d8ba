"""A plain PyTorch loop with a `mandapa.Run` around it; run as a program by `mandapa demo`.

This is what a training script looks like with mandapa: `train` is all there is to it, the rest is PyTorch as always.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from mandapa import CheckpointSaver, Run
from mandapa.loggers import FileLogger, ObjectStoreLogger, TensorboardLogger

__all__ = ["ARTIFACT", "Config", "evaluate", "load_data", "load_model", "main"]

ARTIFACT = "digits"
TEST_IMAGES = 360


@dataclass(frozen=True)
class Config:
    """The hyperparameters: ``hparams.yaml`` in every version."""

    epochs: int
    seed: int
    lr: float = 0.001
    batch_size: int = 32
    channels: int = 32
    hidden: int = 256


def make_model(config: Config) -> Any:
    """A small convolutional network for 8 x 8 images of ten digits."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, config.channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(config.channels, 2 * config.channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * config.channels * 16, config.hidden),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(config.hidden, 10),
    )


def load_data() -> tuple[Any, Any, Any, Any]:
    """Images and labels to train on, and images and labels to test with, always split the same way."""
    import torch
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.tensor(found.target)[order]
    return images[TEST_IMAGES:], labels[TEST_IMAGES:], images[:TEST_IMAGES], labels[:TEST_IMAGES]


def evaluate(model: Any, images: Any, labels: Any) -> float:
    """The part of the images that the model names right."""
    import torch

    model.eval()
    with torch.no_grad():
        right = int((model(images).argmax(1) == labels).sum())
    return right / len(labels)


def load_model(folder: str) -> tuple[Any, Config]:
    """The model of a version that was restored to ``folder``."""
    import torch
    import yaml

    with open(os.path.join(folder, "hparams.yaml"), encoding="utf-8") as file:
        config = Config(**yaml.safe_load(file))
    state = torch.load(os.path.join(folder, "checkpoint", "state.pt"), weights_only=True)
    model = make_model(config)
    model.load_state_dict(state["model"])
    return model, config


def train(url: str, name: str, folder: str, config: Config) -> None:
    """Train the run ``name``, from its newest checkpoint if it has one."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    images, labels, test_images, test_labels = load_data()
    model = make_model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    start = 1

    run = Run(
        name,
        hparams=config,
        loggers=[
            TensorboardLogger(),  # these write files,
            FileLogger("train.log"),
            CheckpointSaver(best=("accuracy", "max")),
            ObjectStoreLogger(url, artifact=ARTIFACT),  # and this one makes versions of them
        ],
        resume="auto",
        dir=folder,
    )
    with run:
        if checkpoint := run.latest_checkpoint():
            state = checkpoint.load()
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            start = state["epoch"] + 1
            what = f"model, optimizer and random state of epoch {state['epoch']}"
            print(f"resumed from {checkpoint.version}: {what}", flush=True)

        for epoch in range(start, config.epochs + 1):
            loss, step = train_epoch(model, optimizer, images, labels, epoch, config)
            accuracy = evaluate(model, test_images, test_labels)
            metrics = {"loss": loss, "accuracy": accuracy}
            run.log_metrics(metrics, step=step)

            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "epoch": epoch,
            }
            began = time.perf_counter()
            run.save_checkpoint(state, step=step, epoch=epoch, metrics=metrics)
            took = f"handed over in {1000 * (time.perf_counter() - began):.0f} ms"
            print(f"epoch {epoch}  step {step}  loss {loss:.4f}  accuracy {accuracy:.4f}  {took}", flush=True)


def train_epoch(model: Any, optimizer: Any, images: Any, labels: Any, epoch: int, config: Config) -> tuple[float, int]:
    """One pass over the images in random order; gives the mean loss, and the steps so far."""
    import torch
    from torch.nn.functional import cross_entropy

    model.train()
    total = 0.0
    batches = torch.randperm(len(labels)).split(config.batch_size)
    for batch in batches:
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(labels), epoch * len(batches)


def main() -> None:
    """``python -m mandapa.cli.demo.training URL NAME FOLDER CONFIG``."""
    url, name, folder, config = sys.argv[1:]
    train(url, name, folder, Config(**json.loads(config)))


if __name__ == "__main__":
    main()
