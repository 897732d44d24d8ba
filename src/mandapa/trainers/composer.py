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

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

try:
    from composer.loggers import LoggerDestination
except ImportError as error:
    raise ImportError("mandapa.trainers.composer needs Composer: pip install 'mandapa[composer]'") from error

from mandapa import loggers
from mandapa.errors import InvalidInputError, MandapaError
from mandapa.object_store import ObjectStore
from mandapa.run.logger import BackendLogger
from mandapa.trainers.composer_files import Reader
from mandapa.trainers.composer_run import Training

__all__ = ["ObjectStoreLogger", "WandBLogger"]


class _Destination(LoggerDestination):  # type: ignore[misc]
    """What Composer calls; the first of ours among the loggers of a `Trainer` hands everything to the run."""

    def __init__(self, backend: BackendLogger, folder: str | os.PathLike[str]) -> None:
        self._backend = backend
        self._folder = os.path.abspath(os.fspath(folder))
        self._training: Training | None = None
        self._leads = False

    def init(self, state: Any, logger: Any) -> None:
        ours = [one for one in logger.destinations if isinstance(one, _Destination)]
        self._leads = ours[0] is self
        if self._leads:
            backends, folders = [one._backend for one in ours], {one._folder for one in ours}  # noqa: SLF001 - of one kind
            if len(folders) > 1:
                raise InvalidInputError(f"loggers of one Trainer share a run: one dir=, not {sorted(folders)}")
            training = Training(state, logger.destinations, backends, self._folder)
            for one in ours:
                one._training = training  # noqa: SLF001

    def _lead(self, what: str, do: Callable[[Training], None]) -> None:
        """Logging that fails is told, and ends no training."""
        if self._leads and self._training:
            try:
                do(self._training)
            except (MandapaError, OSError) as error:
                warnings.warn(f"{what} is not logged: {error}", RuntimeWarning, stacklevel=3)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if self._leads and self._training:
            self._training.log_hparams(hyperparameters)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step is not None:
            self._lead("a metric", lambda training: training.log_metrics(metrics, step))

    def upload_file(self, state: Any, remote_file_name: str, file_path: Path, *, overwrite: bool) -> None:
        """Own the file before this returns; what is there already is in an older version, whatever ``overwrite``."""
        self._lead(remote_file_name, lambda training: training.upload(remote_file_name.lstrip("/"), str(file_path)))

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
        Reader(self._training, readable[0] if readable else None).get(name, destination)

    def can_upload_files(self) -> bool:
        return True

    def fit_start(self, state: Any, logger: Any) -> None:
        self._lead("the beginning", Training.begin)

    def batch_checkpoint(self, state: Any, logger: Any) -> None:
        self._lead("the checkpoint", Training.commit_checkpoint)

    epoch_checkpoint = iteration_checkpoint = batch_checkpoint

    def fit_end(self, state: Any, logger: Any) -> None:
        self._lead("the end", Training.end)

    def close(self, state: Any, logger: Any) -> None:
        self._lead("the rest", Training.commit)

    def post_close(self) -> None:
        self._lead("the rest", Training.close)
        self._training = None


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
