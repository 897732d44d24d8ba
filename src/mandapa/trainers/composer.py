"""Loggers for Composer's `Trainer`: what it uploads becomes versions of the run's artifact.

::

    from composer import Trainer
    from mandapa.object_store import S3ObjectStore
    from mandapa.trainers.composer import ObjectStoreLogger

    logger = ObjectStoreLogger(S3ObjectStore, {"bucket": "team-bucket", "prefix": "runs"})
    trainer = Trainer(..., run_name="resnet-7", loggers=[logger], save_folder="checkpoints", autoresume=True)

Composer's own checkpoint saver, `TensorboardLogger` and `FileLogger` make the files. All of our loggers of a `Trainer`
share one `mandapa.Run`, whose name is that of Composer's run.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from mandapa import loggers
from mandapa.errors import InvalidInputError, NotFoundError
from mandapa.object_store import ObjectStore
from mandapa.run.backend import value_of
from mandapa.run.directory import RunDirectory
from mandapa.run.hparams import plain
from mandapa.run.listeners import check_metrics
from mandapa.run.logger import BackendLogger
from mandapa.run.reader import fetch, newest_checkpoint
from mandapa.run.resume import one_at_a_time
from mandapa.run.run import Run

try:
    from composer.callbacks import CheckpointSaver
    from composer.loggers import FileLogger, LoggerDestination, TensorboardLogger
    from composer.loggers import WandBLogger as ComposersWandBLogger
    from composer.utils import format_name_with_dist_and_time
except ImportError as error:
    raise ImportError("mandapa.trainers.composer needs Composer: pip install 'mandapa[composer]'") from error

__all__ = ["ObjectStoreLogger", "WandBLogger"]

_SYMLINK = ".symlink"
_METRICS_MAX = 12_000  # bytes: they are metadata of the version


class _Destination(LoggerDestination):  # type: ignore[misc]
    """What Composer calls; the first of ours among the loggers of a `Trainer` hands everything to the run."""

    def __init__(self, backend: BackendLogger, folder: str | os.PathLike[str]) -> None:
        self._backend = backend
        self._folder = os.path.abspath(os.fspath(folder))
        self._training: _Training | None = None
        self._leads = False

    def init(self, state: Any, logger: Any) -> None:
        ours = [one for one in logger.destinations if isinstance(one, _Destination)]
        self._leads = ours[0] is self
        if self._leads:
            backends, folders = [one._backend for one in ours], {one._folder for one in ours}  # noqa: SLF001 - of one kind
            if len(folders) > 1:
                raise InvalidInputError(f"loggers of one Trainer share a run: one dir=, not {sorted(folders)}")
            training = _Training(state, logger.destinations, backends, self._folder)
            for one in ours:
                one._training = training  # noqa: SLF001

    @property
    def _led(self) -> _Training | None:
        return self._training if self._leads else None

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if self._led:
            self._led.log_hparams(hyperparameters)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._led and step is not None:
            self._led.log_metrics(metrics, step)

    def upload_file(self, state: Any, remote_file_name: str, file_path: Path, *, overwrite: bool) -> None:
        """Own the file before this returns; what is there already is in an older version, whatever ``overwrite``."""
        if self._led:
            try:
                self._led.upload(remote_file_name.lstrip("/"), str(file_path))
            except OSError as error:
                warnings.warn(f"{remote_file_name} is not logged: {error}", RuntimeWarning, stacklevel=2)

    def download_file(
        self, remote_file_name: str, destination: str, overwrite: bool = False, progress_bar: bool = True
    ) -> None:
        """Fetch a file: from the newest checkpoint, the run's artifact, another artifact, or by its address.

        Raises:
            FileNotFoundError: There is no such file.
            FileExistsError: ``destination`` is there, and is not to be overwritten.
            StorageError: The store failed.
        """
        if os.path.lexists(destination) and not overwrite:
            raise FileExistsError(f"{destination} is there already: use overwrite=True")
        name = remote_file_name.lstrip("/")
        backends = self._training.backends if self._training else [self._backend]
        readable = [one for one in backends if isinstance(one, loggers.ObjectStoreLogger)]
        _Reader(self._training, readable[0] if readable else None).get(name, destination)

    def can_upload_files(self) -> bool:
        return True

    def fit_start(self, state: Any, logger: Any) -> None:
        if self._led:
            self._led.fitting = True
            self._led.hand_over_hparams()

    def batch_checkpoint(self, state: Any, logger: Any) -> None:
        if self._led:
            self._led.commit_checkpoint()

    epoch_checkpoint = iteration_checkpoint = batch_checkpoint

    def fit_end(self, state: Any, logger: Any) -> None:
        if self._led:
            self._led.fitting = False
            self._led.commit()

    def close(self, state: Any, logger: Any) -> None:
        if self._led:
            self._led.commit()

    def post_close(self) -> None:
        training, self._training = self._training, None
        if self._leads and training:
            training.close()


class ObjectStoreLogger(_Destination):
    """Makes versions of what a Composer run uploads, in a repository: see `mandapa.loggers.ObjectStoreLogger`.

    A version holds the newest checkpoint of the run's (first) `CheckpointSaver` under Composer's name for it, and
    everything else that was uploaded, with all TensorBoard event files; older checkpoints are in older versions. Files
    of further savers stay. Names are Composer's, less a leading ``{run_name}/``.

    ``autoresume=True`` goes on from the newest checkpoint, on any machine. As a ``load_object_store`` it serves the
    artifact of any run: ``run-name/checkpoints/ep1-ba4-rank0.pt``, or, after a slash, an address, as in
    ``/run-name:best/checkpoints/ep1-ba4-rank0.pt``; ``latest...`` leads to the newest checkpoint. (Without the slash
    Composer takes what is before a colon for the scheme of a URL, and away.)

    Args:
        object_store_cls: A class of `mandapa.object_store`, or a URL.
        object_store_kwargs: Arguments of the class, or further ones of the URL's.
        artifact: The artifact's name; may hold ``{run_name}``.
        should_log_asset: Takes the path that an asset has in the version; False leaves it out.
        dir: Where the run's directory is made.

    Raises:
        InvalidInputError: As `mandapa.loggers.ObjectStoreLogger`.
    """

    def __init__(
        self,
        object_store_cls: type[ObjectStore] | str | os.PathLike[str],
        object_store_kwargs: Mapping[str, Any] | None = None,
        *,
        artifact: str = "{run_name}",
        should_log_asset: Callable[[str], bool] | None = None,
        dir: str | os.PathLike[str] = "mandapa-runs",  # noqa: A002 - as of a run
    ) -> None:
        backend = loggers.ObjectStoreLogger(
            object_store_cls, object_store_kwargs, artifact=artifact, should_log_asset=should_log_asset
        )
        super().__init__(backend, dir)


class WandBLogger(_Destination):
    """Makes W&B artifact versions of what a Composer run uploads: see `mandapa.loggers.WandBLogger`.

    It joins the W&B run of Composer's own `WandBLogger` where there is one, to which it leaves the metrics then. It
    downloads what the run's directory has.

    Args:
        project: Of W&B.
        log_artifacts: False: only metrics and hyperparameters.
        artifact: The artifact's name; may hold ``{run_name}``.
        init_kwargs: Further arguments of ``wandb.init``.
        dir: Where the run's directory is made.

    Raises:
        InvalidInputError: As `mandapa.loggers.WandBLogger`.
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        log_artifacts: bool = True,
        artifact: str = "{run_name}",
        init_kwargs: Mapping[str, Any] | None = None,
        dir: str | os.PathLike[str] = "mandapa-runs",  # noqa: A002 - as of a run
    ) -> None:
        backend = loggers.WandBLogger(project, log_artifacts=log_artifacts, artifact=artifact, init_kwargs=init_kwargs)
        super().__init__(backend, dir)


class _Training:
    """A Composer run and its `mandapa.Run`, which is made when it is first needed: other loggers have begun then."""

    def __init__(self, state: Any, destinations: Sequence[Any], backends: Sequence[BackendLogger], folder: str) -> None:
        self.backends = backends
        self.fitting = False
        self._state = state
        self._name: str = state.run_name
        self._destinations = destinations
        self._folder = folder
        self._metrics: dict[str, float] = {}
        self._events: dict[str, int] = {}  # path in the version -> bytes that were handed over
        self._gathered = ""  # the place of a checkpoint whose files lie ready
        self._hparams: dict[str, Any] = {}  # that the run does not have yet: Composer tells them in several calls
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
        _ = self.run  # whoever may not write is told before training
        self._hparams |= _plain(given)

    def hand_over_hparams(self) -> None:
        given, self._hparams = self._hparams, {}
        if given and not self._own_hparams:
            self.run.log_hparams(given)

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            with suppress(InvalidInputError):
                numbers |= check_metrics({name: value})
        self._metrics |= {name: value for name, value in numbers.items() if name.startswith(("metrics/", "loss/"))}
        if not any(isinstance(one, ComposersWandBLogger) for one in self._destinations):
            self.run.log_metrics(numbers, step)

    # -- files --------------------------------------------------------------------------------------------------------

    def upload(self, name: str, path: str) -> None:
        if name.endswith(_SYMLINK):
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
        self._find_events()
        error = sys.exc_info()[1] or (getattr(sys, "last_value", None) if self._exiting else None)
        if error is None and self.fitting:
            error = RuntimeError("the Trainer was closed before its fit had come to its end")
        self.run.__exit__(type(error) if error else None, error, None)
        atexit.unregister(self._at_exit)


class _Reader:
    """Finds what a `Trainer` asks for: by Composer's names, or by addresses, which have a ``:`` before any ``/``."""

    def __init__(self, training: _Training | None, logger: loggers.ObjectStoreLogger | None) -> None:
        self._training = training
        name = "any" if training is None else training.run.name
        self._spec = None if logger is None else logger.spec(name)

    def get(self, name: str, destination: str) -> None:
        """Raises `FileNotFoundError` and `StorageError`."""
        if name.endswith(_SYMLINK):
            target = self._newest(name.removesuffix(_SYMLINK))
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
            raise NotFoundError(f"there is no {name}{_SYMLINK}")
        with _named(name):
            address, place = newest_checkpoint(value_of(self._spec), name)
            return f"{address}/{place}"

    def _find(self, name: str, folder: str) -> str:
        """A file here with these bytes; in ``folder`` if nobody else keeps it."""
        training, head = self._training, name.partition("/")[0]
        if training and name == training.latest:
            raise NotFoundError(f"there is no file {name}, but {name}{_SYMLINK}")
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


def _plain(value: Any) -> Any:
    """A hyperparameter as it can be written down; what cannot is its text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    try:
        return plain({"value": value})["value"]
    except InvalidInputError:
        return str(value)


def _newest_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """As many as fit into a version's metadata."""
    found, left = {}, _METRICS_MAX
    for name, value in metrics.items():
        left -= len(name.encode()) + 32
        if left < 0:
            break
        found[name] = value
    return found
