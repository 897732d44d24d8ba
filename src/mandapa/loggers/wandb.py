"""The backend logger for Weights & Biases: metrics, hyperparameters, and a W&B artifact version a commit.

It works in the training process, with W&B's own package: a W&B run belongs to the program.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from mandapa.errors import AccessDeniedError, InvalidInputError, StorageError
from mandapa.loggers.wandb_backend import WandbBackend
from mandapa.loggers.wandb_session import Session, mode_of
from mandapa.run.backend import WANDB
from mandapa.run.directory import RunDirectory
from mandapa.run.logger import BackendLogger, BackendSpec, RunContext, artifact_name

__all__ = ["WandBLogger"]


class WandBLogger(BackendLogger):
    """Sends metrics and hyperparameters to a W&B run, and makes a W&B artifact version of each commit.

    A version has all assets of the run's folder as they were then: files, and URLs as references, of which nothing is
    fetched. It is of type ``model``, its aliases are ``latest`` and ``best``, its metadata that of the checkpoint.

    It joins the W&B run that the program has, or makes one whose id is the run's name, so that a run that is started
    again goes on in it. W&B's own environment variables and ``init_kwargs`` go before everything that is said here:
    ``WANDB_MODE=offline`` works offline, ``WANDB_MODE=disabled`` does nothing. W&B's folders are in the run's
    directory, unless ``WANDB_DIR``, ``WANDB_CACHE_DIR`` or ``WANDB_DATA_DIR`` say otherwise.

    What W&B has not confirmed stays in the run's directory; the next start of the run, or ``mandapa sync``, logs it
    again. Confirmed means: by the server that it has all files; offline, that it is in W&B's file, from which
    ``wandb sync`` sends it. Metrics are in W&B's hands alone.

    Only rank 0 talks to W&B; artifacts have the assets of all ranks.

    Args:
        project: Of W&B; None: what W&B takes by itself (``WANDB_PROJECT``).
        log_artifacts: False: only metrics and hyperparameters.
        artifact: The artifact's name; may hold ``{run_name}``.
        init_kwargs: Further arguments of ``wandb.init``.

    Raises:
        InvalidInputError: The package wandb is not installed, or the name can be none of an artifact.

    Example:
        >>> logger = WandBLogger("vision", init_kwargs={"group": "resnets"})  # doctest: +SKIP
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        log_artifacts: bool = True,
        artifact: str = "{run_name}",
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise InvalidInputError("WandBLogger needs the package wandb: pip install 'mandapa[wandb]'")
        artifact_name(artifact, "run")
        self._kwargs = {**({} if project is None else {"project": project}), **(init_kwargs or {})}
        self._artifact = artifact
        self._log_artifacts = log_artifacts
        self._session: Session | None = None
        self._failed = False

    def spec(self, run_name: str) -> BackendSpec | None:
        """Where versions of that run go; None when W&B gets none."""
        if not self._log_artifacts or mode_of(self._kwargs) == "disabled":
            return None
        where = {
            "project": str(self._kwargs.get("project") or os.environ.get("WANDB_PROJECT", "")),
            "entity": str(self._kwargs.get("entity") or os.environ.get("WANDB_ENTITY", "")),
        }
        return BackendSpec(WANDB, where, artifact_name(self._artifact, run_name))

    def open(self, run: RunContext) -> None:
        """Join the W&B run of the program, or make one.

        Raises:
            InvalidInputError: W&B has no API key, or refuses it, or its arguments.
        """
        if run.rank == 0:
            self._session = Session(run.name, run.dir, self._kwargs)
            try:
                self._session.open(program=True)
            except AccessDeniedError as error:
                raise InvalidInputError(str(error)) from error
            except StorageError as error:
                warnings.warn(
                    f"{error} (training goes on without its metrics; what is to become artifacts waits)",
                    category=RuntimeWarning,
                    stacklevel=2,
                )

    def backend(self, spec: BackendSpec, directory: RunDirectory, tell: Callable[[str], None]) -> WandbBackend | None:
        """What commits to W&B; None on other ranks than 0."""
        return None if self._session is None else WandbBackend(spec, directory, tell, self._session)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Goes to the W&B run, which keeps what it gets for a step until a later one begins; steps only go up."""
        if self._session is not None and self._session.run is not None:
            self._session.run.log(dict(metrics), step=step)

    def log_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Becomes the configuration of the W&B run."""
        if self._session is not None and self._session.run is not None:
            self._session.run.config.update(dict(hparams), allow_val_change=True)

    def log_failure(self, text: str) -> None:
        """The W&B run ends as failed."""
        self._failed = True

    def close(self) -> None:
        """End the W&B run, if it is ours."""
        if self._session is not None:
            self._session.finish(1 if self._failed else 0)
            self._session = None
