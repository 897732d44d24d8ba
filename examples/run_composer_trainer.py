"""Train with Composer what a YAML file describes, and keep all that it makes in a store of your own.

::

    python examples/run_composer_trainer.py examples/digits.yaml
    python examples/run_composer_trainer.py examples/digits.yaml run_name=wide model.hidden=512 trainer.max_duration=8ep

The same command again goes on from the newest checkpoint, on this machine or on another one. The configuration is in
every version as ``hparams.yaml``. Model and data are a small example: replace `Classifier` and `dataloaders`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
import yaml
from composer import Trainer
from composer.loggers import LoggerDestination
from composer.models import ComposerClassifier
from composer.utils import dist, reproducibility
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from mandapa.run.hparams import plain, to_yaml
from mandapa.run.secrets import redact

LOGGERS = {
    "object_store": "mandapa.trainers.composer.ObjectStoreLogger",
    "wandb": "mandapa.trainers.composer.WandBLogger",
    "tensorboard": "composer.loggers.TensorboardLogger",
    "file": "composer.loggers.FileLogger",
}
SECTIONS = ("run_name", "seed", "model", "data", "optimizer", "loggers", "trainer")
OURS = ("model", "train_dataloader", "eval_dataloader", "optimizers", "loggers", "run_name", "seed")  # of the Trainer's


class ConfigError(ValueError):
    """The configuration cannot be used; the message is one line that says what to change."""


# -- what is trained ---------------------------------------------------------------------------------------------------


class Classifier(ComposerClassifier):
    """A small network for 8 x 8 images of ten digits."""

    def __init__(self, *, hidden: int = 128, dropout: float = 0.1) -> None:
        layers = [torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(hidden, 10)]
        super().__init__(torch.nn.Sequential(*layers), num_classes=10)


def dataloaders(*, batch_size: int = 64, test_images: int = 384) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """To train and to evaluate on: the 1,797 images that scikit-learn ships, always split the same way."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]

    def loader(part: slice, *, shuffle: bool) -> DataLoader[Any]:
        images_and_labels = TensorDataset(images[part], labels[part])
        sampler = dist.get_sampler(images_and_labels, shuffle=shuffle)  # each rank has its share
        return DataLoader(images_and_labels, batch_size, sampler=sampler, drop_last=shuffle)

    return loader(slice(test_images, None), shuffle=True), loader(slice(test_images), shuffle=False)


# -- the configuration -------------------------------------------------------------------------------------------------


def read_config(path: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What the file says, changed by ``key.sub=value``; every section is there, every value still to be checked."""
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a mapping of keys to values")
    for override in overrides:
        key, equals, text = override.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            raise ConfigError(f"{override}: an override is key.sub=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{override}: the value is no YAML") from None
        place = config
        for depth, name in enumerate(names[:-1], start=1):
            if place.get(name) is None:
                place[name] = {}
            place = place[name]
            if not isinstance(place, dict):
                raise ConfigError(f"{override}: {'.'.join(names[:depth])} is a value, and has no keys")
        place[names[-1]] = value
    check_names("", config, SECTIONS)
    for section in SECTIONS[2:]:
        config[section] = {} if config.get(section) is None else config[section]
        if not isinstance(config[section], dict):
            raise ConfigError(f"{section}: not a mapping of keys to values")
    if not isinstance(config.get("run_name"), str):
        raise ConfigError("run_name: every run has a name, a string")
    return config


def check_names(section: str, given: Iterable[Any], known: Iterable[str]) -> None:
    """Each is one of those that are known."""
    for name in given:
        if name not in known:
            where = f"{section}.{name}" if section else name
            raise ConfigError(f"{where}: unknown; there are: {', '.join(known)}")


def call(section: str, function: Callable[..., Any], arguments: Any, **more: Any) -> Any:
    """Call it with the arguments of a section, and with more of them; what it refuses is an error of the section."""
    if not isinstance(arguments, dict):
        raise ConfigError(f"{section}: not a mapping of arguments to values")
    check_names(section, arguments, [name for name in inspect.signature(function).parameters if name not in more])
    try:
        return function(**arguments, **more)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{section}: {' '.join(str(error).split())}") from error


def named(dotted: str) -> Any:
    """What a module has under a name."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def make_loggers(section: dict[str, Any]) -> list[LoggerDestination]:
    """One for each name; none for a name that is false."""
    check_names("loggers", section, LOGGERS)
    loggers = []
    for name, given in section.items():
        if given is not False:
            arguments = {} if given is None else given
            where = f"loggers.{name}"
            if isinstance(arguments, dict) and re.fullmatch(r"\w+(\.\w+)+", str(arguments.get("object_store_cls"))):
                try:
                    arguments = {**arguments, "object_store_cls": named(arguments["object_store_cls"])}
                except (ImportError, AttributeError) as error:
                    raise ConfigError(f"{where}.object_store_cls: {error}") from None
            loggers.append(call(where, named(LOGGERS[name]), arguments))
    return loggers


def make_trainer(config: dict[str, Any]) -> Trainer:
    """Composer's trainer as the configuration says; it has already found the checkpoint from which it goes on."""
    check_names(
        "trainer", config["trainer"], [name for name in inspect.signature(Trainer).parameters if name not in OURS]
    )
    if isinstance(config.get("seed"), int):
        reproducibility.seed_all(config["seed"])  # the weights are drawn before there is a trainer
    train, evaluate = call("data", dataloaders, config["data"])
    model = call("model", Classifier, config["model"])
    return Trainer(
        model=model,
        train_dataloader=train,
        eval_dataloader=evaluate,
        optimizers=call("optimizer", torch.optim.Adam, config["optimizer"], params=model.parameters()),
        loggers=make_loggers(config["loggers"]),
        run_name=config["run_name"],
        seed=config.get("seed"),
        **config["trainer"],
    )


def log_hparams(trainer: Trainer, config: dict[str, Any]) -> None:
    """Hand the configuration that is really used to all loggers, without its secrets, as ``hparams.yaml``."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "hparams.yaml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(to_yaml(redact(plain(config))))
        trainer.logger.upload_file("{run_name}/hparams.yaml", path, overwrite=True)


def main(*arguments: str) -> None:
    """Train as the command line says."""
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError("usage: run_composer_trainer.py CONFIG.yaml [key.sub=value ...]")
    config = read_config(arguments[0], arguments[1:])
    trainer = make_trainer(config)
    try:
        if dist.get_global_rank() == 0:
            log_hparams(trainer, config)
        if trainer.state.timestamp < trainer.state.max_duration:  # else it was resumed from its end
            trainer.fit()
    finally:
        trainer.close()  # waits until all that was handed over is in the store


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ConfigError as error:
        print(f"run_composer_trainer.py: {error}", file=sys.stderr)
        sys.exit(2)
