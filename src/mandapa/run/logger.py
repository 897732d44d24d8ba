"""What a run tells its loggers. Those that make assets and those that take them away are both loggers."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mandapa.errors import InvalidInputError

if TYPE_CHECKING:
    from mandapa.run.backend import Backend
    from mandapa.run.directory import RunDirectory

__all__ = ["BackendLogger", "BackendSpec", "Logger", "RunContext", "Take", "artifact_name"]

Take = Literal["copy", "move", "link", "grow"]
"""How the bytes of a file are taken over: see `mandapa.Run.log_asset`."""


class RunContext(Protocol):
    """What a logger may use of the run that it belongs to."""

    @property
    def name(self) -> str:
        """The run's name."""

    @property
    def dir(self) -> str:
        """The run's directory, absolute: where a logger puts its files unless it was told another place."""

    @property
    def rank(self) -> int:
        """Of this process among all of the run, from 0."""

    @property
    def world_size(self) -> int:
        """How many processes the run has."""

    @property
    def attempt(self) -> int:
        """How often the run was started, this time included, from 1."""

    def log_asset(self, path: str, at: str | None = None, *, take: Take = "copy") -> object:
        """Hand a file over; ``take="grow"``: as it is now, of a file to which bytes are only ever appended."""


class Logger:
    """Listens to a run. Every hook does nothing by default, is called by the training process, and returns at once.

    The order is `open`, then any of the others, then `close`. A hook that raises an `Exception` is told of once, as a
    warning, and not called again; training goes on (with ``strict=True`` it raises).

    Example:
        >>> import tempfile
        >>> from mandapa import Run
        >>> class Printer(Logger):
        ...     def log_metrics(self, metrics, step):
        ...         print(step, dict(metrics))
        >>> with Run("resnet-7", loggers=[Printer()], dir=tempfile.mkdtemp()) as run:
        ...     run.log_metrics({"loss": 0.5}, step=1)
        1 {'loss': 0.5}
    """

    def open(self, run: RunContext) -> None:
        """The run has begun."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers at a step; NaN and infinities are numbers."""

    def log_hparams(self, hparams: Mapping[str, Any]) -> None:
        """All hyperparameters, as plain JSON values, secrets redacted."""

    def log_failure(self, text: str) -> None:
        """The attempt ends with an exception; ``text`` is its traceback. `close` is next."""

    def flush(self) -> None:
        """Hand over what was written so far: a checkpoint, a commit or the end of the run is next."""

    def close(self) -> None:
        """The run is over: hand over the rest and let go of files and streams. Called once."""


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """Where a backend logger makes versions, as plain values: the uploader process builds the store from it.

    Example:
        >>> BackendSpec("s3://team-bucket/runs", artifact="resnet-7").options
        {}
    """

    store: str
    """A URL, or ``module:class`` of an object store; ``wandb``: W&B, to which the training process itself commits."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords for the store; may hold secrets, so it reaches the uploader by a pipe only."""
    artifact: str = ""
    """The artifact's name."""


class BackendLogger(Logger):
    """Takes assets and makes versions of them elsewhere; the work is done by the uploader process.

    Its `close` comes last, when all is committed or has been given up.

    Example:
        >>> class TeamStore(BackendLogger):
        ...     def spec(self, run_name):
        ...         return BackendSpec("s3://team-bucket/runs", artifact=run_name)
        >>> TeamStore().spec("resnet-7").artifact
        'resnet-7'
    """

    def spec(self, run_name: str) -> BackendSpec | None:
        """Where versions of that run go; None: nowhere.

        Raises:
            InvalidInputError: That can never work; the message says why.
        """
        raise NotImplementedError

    def wants(self, path: str) -> bool:
        """Whether the asset at that path in the version is logged here."""
        return True

    def backend(self, spec: BackendSpec, directory: RunDirectory, tell: Callable[[str], None]) -> Backend | None:
        """What commits there from within this process; None, as for all object stores: the uploader does.

        Asked for after `open`; ``tell`` takes a line about what happens.
        """
        return None


def artifact_name(pattern: str, run_name: str) -> str:
    """An artifact's name, in which ``{run_name}`` may stand.

    Raises:
        InvalidInputError: Anything else in braces.
    """
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
        if fields <= {"run_name"}:
            return pattern.format(run_name=run_name)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError):
        pass
    raise InvalidInputError(f"artifact={pattern!r}: it may hold {{run_name}}, and nothing else in braces")
