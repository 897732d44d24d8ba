"""A Composer run and its `mandapa.Run`: what becomes of the files that Composer uploads."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.loggers import FileLogger, TensorboardLogger, WandBLogger
from composer.utils import format_name_with_dist_and_time

from mandapa.errors import InvalidInputError
from mandapa.run.directory import RunDirectory
from mandapa.run.hparams import plain
from mandapa.run.listeners import check_metrics
from mandapa.run.logger import BackendLogger
from mandapa.run.run import Run

__all__ = ["SYMLINK", "Training"]

SYMLINK = ".symlink"
"""How the name of a file ends that leads to another one, whose name is its text."""

_NAME_MAX = 200  # characters of a hyperparameter whose name is too long
_METRICS_MAX = 12_000  # bytes: they are metadata of the version


class Training:
    """A Composer run and its `mandapa.Run`, which is made when it is first needed: other loggers have begun then."""

    def __init__(self, state: Any, destinations: Sequence[Any], backends: Sequence[BackendLogger], folder: str) -> None:
        self.backends = backends
        self._fitting = False
        self._state = state
        self._name: str = state.run_name
        self._destinations = destinations
        self._folder = folder
        self._metrics: dict[str, float] = {}
        self._events: dict[str, int] = {}  # path in the version -> bytes that were handed over
        self._gathered = ""  # the place of a checkpoint whose files lie ready
        self._hparams: dict[str, Any] = {}  # that the run does not have yet
        self._own_hparams = False
        self._exiting = False
        savers = [one for one in state.callbacks if isinstance(one, CheckpointSaver)]
        self.saver = savers[0] if savers else None
        for saver in savers:
            if saver.remote_uploader is not None:
                warnings.warn(
                    f"Composer uploads the checkpoints of {saver.folder!r} by itself, and no logger gets them: give it "
                    "a local save_folder, and they are in the versions of this run",
                    RuntimeWarning,
                    stacklevel=2,
                )

    @cached_property
    def run(self) -> Run:
        """What everything is handed to; raises as `mandapa.Run` when it is asked for first."""
        run = Run(self._name, loggers=self.backends, dir=self._folder)
        # Composer closes its loggers at exit, later than what was registered after it; `close` is called then.
        atexit.unregister(run._at_exit)  # noqa: SLF001
        atexit.register(self._at_exit)
        return run

    def _at_exit(self) -> None:
        self._exiting = True

    @property
    def latest(self) -> str:
        """What Composer calls the newest checkpoint; empty where it does not."""
        pattern = self.saver and self.saver.latest_remote_file_name
        return pattern.format(self._state).lstrip("/") if pattern else ""

    def place(self, name: str) -> str:
        """Where a file of Composer's is in a version."""
        return name.removeprefix(f"{self._name}/")

    def log_hparams(self, given: Mapping[str, Any]) -> None:
        """Take hyperparameters in: Composer tells them in several calls, before training."""
        _ = self.run  # whoever may not write is told before training
        self._hparams |= _plain(given)

    def hand_over_hparams(self) -> None:
        """Give the run those that it does not have yet; the user's own ``hparams.yaml``, once uploaded, stays."""
        given, self._hparams = self._hparams, {}
        if given and not self._own_hparams:
            self.run.log_hparams(given)

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Give the run the numbers among them; Composer's own `WandBLogger` has told W&B already."""
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            with suppress(InvalidInputError):
                numbers |= check_metrics({name: value})
        self._metrics |= {name: value for name, value in numbers.items() if name.startswith(("metrics/", "loss/"))}
        if not any(isinstance(one, WandBLogger) for one in self._destinations):
            self.run.log_metrics(numbers, step)

    # -- files --------------------------------------------------------------------------------------------------------

    def upload(self, name: str, path: str) -> None:
        """Own a file that Composer uploads; raises `OSError` when that cannot be."""
        if name.endswith(SYMLINK):
            return  # what is newest, the versions know
        place = self.place(name)
        if checkpoint := self._checkpoint_of(name):
            self._gather(checkpoint, place, path)
        elif "tfevents" in os.path.basename(path):
            # Composer's name lacks the counter that tells two files of one second apart.
            self._log_events(f"{os.path.dirname(place)}/{os.path.basename(path)}", path)
        elif any(
            isinstance(one, FileLogger) and one.remote_file_name.lstrip("/") == name for one in self._destinations
        ):
            self.run.log_asset(self._appended(place, path), at=place, take="grow")
        else:
            if place == "hparams.yaml":
                self.hand_over_hparams()
                self._own_hparams = True
            self.run.log_asset(path, at=place)

    def _checkpoint_of(self, name: str) -> str:
        """The name of the checkpoint that a file is or belongs to, if it does."""
        if self.saver is None or self.saver.remote_file_name is None:
            return ""
        if not self._state.fsdp_sharded_state_dict_enabled:
            return name if name == self.saver.remote_file_name.format(self._state).lstrip("/") else ""
        pattern = self.saver.remote_file_name.format(self._state, keep_placeholders=True).lstrip("/")
        folder = os.path.join(os.path.dirname(pattern), self._state.fsdp_config.sharded_ckpt_prefix_dir)
        found: str = format_name_with_dist_and_time(folder, self._name, self._state.timestamp)
        return found if os.path.dirname(name) == found else ""

    def _appended(self, place: str, path: str) -> str:
        """An own copy of this attempt's log, to which what is new is appended.

        Composer empties its file when the run is started again, though bytes of it may still wait.
        """
        target = os.path.join(self.run.dir, "composer", f"attempt-{self.run.attempt}", place)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(path, "rb") as source, open(target, "ab") as sink:
            source.seek(sink.tell())
            shutil.copyfileobj(source, sink)
        return target

    def _log_events(self, place: str, path: str) -> None:
        size = os.stat(path).st_size
        if self._events.get(place) != size:
            self.run.log_asset(path, at=place, take="grow")
            self._events[place] = size

    def _find_events(self) -> None:
        """Those that Composer uploads under one name, or, in folders of their own, not at all."""
        folders = [one.log_dir for one in self._destinations if isinstance(one, TensorboardLogger) and one.log_dir]
        for top in [os.path.join(folder, self._name) for folder in folders if self.run.rank == 0]:
            for folder, _, names in os.walk(top):
                for name in sorted(names):
                    if "tfevents" in name:
                        path = os.path.join(folder, name)
                        inside = os.path.relpath(path, top).replace(os.sep, "/")
                        self._log_events(f"tensorboard_logs/{self._name}/{inside}", path)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @cached_property
    def _scratch(self) -> str:
        return os.path.join(RunDirectory(self.run.dir).unfinished(self.run.rank), "gathered")

    def _gather(self, checkpoint: str, place: str, path: str) -> None:
        """Keep a file until its event; nobody writes into it before that."""
        if self._gathered != self.place(checkpoint):
            self.commit_checkpoint()
        os.makedirs(self._scratch, mode=0o700, exist_ok=True)
        self._gathered = self.place(checkpoint)
        target = os.path.join(self._scratch, os.path.basename(place))
        with suppress(FileNotFoundError):
            os.unlink(target)
        try:
            os.link(os.path.realpath(path), target)
        except OSError:
            shutil.copyfile(path, target)

    def commit_checkpoint(self) -> None:
        """Hand over the checkpoint that was gathered, with all event files."""
        if not self._gathered:
            return
        place, self._gathered = self._gathered, ""
        self.hand_over_hparams()
        self._find_events()
        sharded = self._state.fsdp_sharded_state_dict_enabled
        self.run.log_checkpoint(
            self._scratch if sharded else os.path.join(self._scratch, os.path.basename(place)),
            step=int(self._state.timestamp.batch),
            epoch=int(self._state.timestamp.epoch),
            metrics=_newest_metrics(self._metrics),
            at=place,
            whole=not sharded,
        )
        shutil.rmtree(self._scratch, ignore_errors=True)

    def begin(self) -> None:
        """Training begins."""
        self._fitting = True
        self.hand_over_hparams()

    def end(self) -> None:
        """It has come to its end."""
        self._fitting = False
        self.commit()

    def commit(self) -> None:
        """Let everything become a version; nothing is waited for."""
        if "run" in self.__dict__:
            self.commit_checkpoint()
            self.hand_over_hparams()
            self._find_events()
            self.run.flush(timeout=0)

    def close(self) -> None:
        """End the run; it has failed when an exception is on its way, or when training did not come to its end."""
        if "run" not in self.__dict__:
            return
        with suppress(OSError):
            self._find_events()
        error = sys.exc_info()[1] or (getattr(sys, "last_value", None) if self._exiting else None)
        if error is None and self._fitting:
            error = RuntimeError("the Trainer was closed before its fit had come to its end")
        self.run.__exit__(type(error) if error else None, error, None)
        atexit.unregister(self._at_exit)


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as they can be written down; one that cannot is its text, or the name of its kind."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        try:
            found |= plain({name: value})
        except InvalidInputError:
            text = f"<{type(value).__name__}>"
            with suppress(Exception):  # its own code may raise anything
                text = str(value)
            found |= plain({str(name)[:_NAME_MAX]: text})
    return found


def _newest_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """As many as fit into a version's metadata."""
    found, left = {}, _METRICS_MAX
    for name, value in metrics.items():
        left -= len(name.encode()) + 32
        if left < 0:
            break
        found[name] = value
    return found
