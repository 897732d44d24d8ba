"""A plain PyTorch loop that makes one version of its artifact an epoch; run as a program by `mandapa demo`.

This is what a training script looks like with mandapa: everything above the transaction is PyTorch as always.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

import mandapa

__all__ = ["ARTIFACT", "Config", "evaluate", "load_model", "main"]

ARTIFACT = "digits"
TEST_IMAGES = 360


@dataclass(frozen=True)
class Config:
    """The hyperparameters: ``hparams.yaml`` in every version."""

    run: str
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
    model = make_model(config)
    model.load_state_dict(torch.load(os.path.join(folder, "checkpoint", "model.pt"), weights_only=True))
    return model, config


def train(url: str, out: str, config: Config) -> None:
    """Train; when the newest version is of this run, go on from it."""
    import torch
    import yaml
    from torch.utils.tensorboard import SummaryWriter

    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    images, labels, test_images, test_labels = load_data()
    model = make_model(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    checkpoint = os.path.join(out, "checkpoint")
    start = 1

    # Resume: an epoch is in a version as a whole or not at all, so the newest version is always a good one.
    repo = mandapa.open(url, codec="dense")  # smallest; the time that takes is nothing beside an epoch
    digits = mandapa.Artifact(repo, ARTIFACT, run=config.run)
    newest = digits.version("latest") if digits.exists() else None
    if newest is not None and newest.run == config.run:
        newest.download(out)
        model.load_state_dict(torch.load(f"{checkpoint}/model.pt", weights_only=True))
        state = torch.load(f"{checkpoint}/training.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        start = state["epoch"] + 1
        tell(resumed=newest.address, epoch=state["epoch"])

    os.makedirs(checkpoint, exist_ok=True)
    with open(os.path.join(out, "hparams.yaml"), "w", encoding="utf-8") as file:
        yaml.safe_dump(asdict(config), file)
    best = digits.version("best").metadata["accuracy"] if newest and "best" in digits.aliases() else 0.0
    board = SummaryWriter(os.path.join(out, "tensorboard"), purge_step=start)
    log = open(os.path.join(out, "train.log"), "a", encoding="utf-8")  # noqa: SIM115 - open as long as the program

    for epoch in range(start, config.epochs + 1):
        loss = train_epoch(model, optimizer, images, labels, config)
        accuracy = evaluate(model, test_images, test_labels)

        board.add_scalar("train/loss", loss, epoch)
        board.add_scalar("test/accuracy", accuracy, epoch)
        board.flush()
        print(f"epoch {epoch}  loss {loss:.4f}  accuracy {accuracy:.4f}", file=log, flush=True)
        torch.save(model.state_dict(), f"{checkpoint}/model.pt")
        random = torch.get_rng_state()
        torch.save({"optimizer": optimizer.state_dict(), "random": random, "epoch": epoch}, f"{checkpoint}/training.pt")

        metadata = {"epoch": epoch, "loss": loss, "accuracy": accuracy}
        with digits.transaction(message=f"epoch {epoch}", metadata=metadata) as txn:
            tell(committing=epoch)
            txn.add(out)
            if accuracy > best:
                best = accuracy
                txn.alias("best")
        assert txn.version is not None
        tell(version=txn.version.address, **metadata)


def train_epoch(model: Any, optimizer: Any, images: Any, labels: Any, config: Config) -> float:
    """One pass over the images in random order; gives the mean loss."""
    import torch
    from torch.nn.functional import cross_entropy

    model.train()
    total = 0.0
    for batch in torch.randperm(len(labels)).split(config.batch_size):
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(labels)


def tell(**event: Any) -> None:
    """Report to the demo, which reads this program's output."""
    print(json.dumps(event), flush=True)


def main() -> None:
    """``python -m mandapa.cli.demo.training URL FOLDER CONFIG``."""
    url, out, config = sys.argv[1:]
    train(url, out, Config(**json.loads(config)))


if __name__ == "__main__":
    main()
