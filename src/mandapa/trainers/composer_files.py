"""What a Composer `Trainer` downloads: checkpoints and other files of this run and of others."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mandapa.errors import InvalidInputError, NotFoundError
from mandapa.loggers import ObjectStoreLogger
from mandapa.run.backend import value_of
from mandapa.run.directory import RunDirectory
from mandapa.run.reader import fetch, newest_checkpoint
from mandapa.run.resume import one_at_a_time
from mandapa.trainers.composer_run import SYMLINK, Training

__all__ = ["Reader"]


class Reader:
    """Finds what a `Trainer` asks for: by Composer's names, or by addresses, which have a ``:`` before any ``/``."""

    def __init__(self, training: Training | None, logger: ObjectStoreLogger | None) -> None:
        self._training = training
        name = "any" if training is None else training.run.name
        self._spec = None if logger is None else logger.spec(name)

    def get(self, name: str, destination: str) -> None:
        """Raises `FileNotFoundError` and `StorageError`."""
        if name.endswith(SYMLINK):
            target = self._newest(name.removesuffix(SYMLINK))
            _put(destination, lambda path: Path(path).write_text(target))
        else:
            with tempfile.TemporaryDirectory() as folder:
                found = self._find(name, folder)
                _put(destination, lambda path: shutil.copyfile(found, path))

    def _newest(self, name: str) -> str:
        """The name of the newest checkpoint, which one that Composer keeps up to date leads to."""
        training = self._training
        if training and name == training.latest:
            checkpoint = training.run.latest_checkpoint()
            if checkpoint is None:
                raise NotFoundError(f"the run {training.run.name!r} has no checkpoint")
            own = name.startswith(f"{training.run.name}/")
            return f"{training.run.name}/{checkpoint.place}" if own else checkpoint.place
        if self._spec is None or not os.path.basename(name).startswith("latest"):
            raise NotFoundError(f"there is no {name}{SYMLINK}")
        with _named(name):
            address, place = newest_checkpoint(value_of(self._spec), name)
            folder = os.path.dirname(name.partition("/")[2])
            if folder and not f"/{os.path.dirname(place)}".endswith(f"/{folder}"):  # of another saver
                raise NotFoundError(f"the newest checkpoint of {address} is {place}: there is no {name}")
            return f"{address}/{place}"

    def _find(self, name: str, folder: str) -> str:
        """A file here with these bytes; in ``folder`` if nobody else keeps it."""
        training, head = self._training, name.partition("/")[0]
        if training and name == training.latest:
            raise NotFoundError(f"there is no file {name}, but {name}{SYMLINK}")
        if training and ":" not in head:
            place = training.place(name)
            checkpoint = training.run.latest_checkpoint()
            if checkpoint and (place == checkpoint.place or place.startswith(f"{checkpoint.place}/")):
                inside = place[len(checkpoint.place) + 1 :] or os.path.basename(place)
                return _file(os.path.join(checkpoint.download(), inside), name)
            if self._spec is not None:
                folder = os.path.join(training.run.dir, "resume", "files", os.path.dirname(name))
                with suppress(NotFoundError), one_at_a_time(RunDirectory(training.run.dir)):
                    return self._fetch(self._spec.artifact, place, folder, newest=True)
        if self._spec is None:
            raise NotFoundError(f"there is no {name} in the run's directory")
        with _named(name):
            path = name.partition("/")[2]
            return self._fetch(name if ":" in head else head, path, folder, newest=":" not in head)

    def _fetch(self, address: str, path: str, folder: str, *, newest: bool) -> str:
        assert self._spec is not None
        fetch(value_of(self._spec), address, folder, folder=path, newest=newest)
        return _file(os.path.join(folder, os.path.basename(path)), f"{address}/{path}")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What can be no artifact's name is no file of one."""
    try:
        yield
    except NotFoundError as error:
        raise NotFoundError(f"{error} (a load_path that is an address begins with a slash: /name:v1/path)") from error
    except InvalidInputError as error:
        if ":" in name.partition("/")[0]:
            raise
        raise NotFoundError(f"there is no {name}: {error}") from error


def _file(path: str, name: str) -> str:
    if not os.path.isfile(path):
        raise NotFoundError(f"{name} is not a file")
    return path


def _put(destination: str, write: Callable[[str], object]) -> None:
    """Replace a file, whole or not at all."""
    temporary = f"{destination}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, destination)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
