"""The loggers of a run, told of everything; and the checks of what a run is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from mandapa.errors import InvalidInputError
from mandapa.format.strict import INT_MAX, check_name
from mandapa.run.backend import key_of, value_of
from mandapa.run.checkpoints import CheckpointSaver
from mandapa.run.logger import BackendLogger, Logger, RunContext
from mandapa.run.troubles import Troubles

__all__ = ["Listeners", "check_metrics", "check_step"]


class Listeners:
    """The loggers of a run; one that fails is told of, and left alone from then on.

    Args:
        loggers: As they were given to the run.
        troubles: Takes what went wrong.

    Raises:
        InvalidInputError: Something among them is no logger, or there are two savers of checkpoints.
    """

    def __init__(self, loggers: Any, troubles: Troubles) -> None:
        one = isinstance(loggers, Logger | type) or not isinstance(loggers, Iterable)
        found = [loggers] if one else list(loggers)
        for logger in found:
            if not isinstance(logger, Logger):
                name = logger.__name__ if isinstance(logger, type) else type(logger).__name__
                hint = f": write {name}(...)" if isinstance(logger, type) else ""
                raise InvalidInputError(f"{name} is no logger of mandapa.loggers, nor a CheckpointSaver{hint}")
        savers = [logger for logger in found if isinstance(logger, CheckpointSaver)]
        if len(savers) > 1:
            raise InvalidInputError("a run has one CheckpointSaver")
        self.saver = savers[0] if savers else CheckpointSaver()
        # What makes assets is told first, so that the backends get what it has handed over.
        self._loggers = sorted(found, key=lambda logger: isinstance(logger, BackendLogger))
        self._troubles = troubles
        self._broken: set[int] = set()
        self._opened: list[Logger] = []

    def backends(self, run_name: str) -> dict[str, tuple[BackendLogger, dict[str, Any]]]:
        """Key -> backend logger, and where it logs to.

        Raises:
            InvalidInputError: Two log to one place, or one to a place that cannot be.
        """
        found: dict[str, tuple[BackendLogger, dict[str, Any]]] = {}
        for logger in self._loggers:
            if isinstance(logger, BackendLogger):
                spec = logger.spec(run_name)
                if spec is None:
                    continue
                check_name(spec.artifact)
                key = key_of(spec)
                if key in found:
                    raise InvalidInputError(f"two backend loggers log to the artifact {spec.artifact!r} at one place")
                found[key] = (logger, value_of(spec))
        return found

    def open(self, run: RunContext) -> None:
        """The run has begun. Raises `InvalidInputError` of a logger that can never work."""
        for logger in self._loggers:
            self._call(logger, lambda logger: logger.open(run), raises=InvalidInputError)
            self._opened.append(logger)

    def tell(self, hook: Callable[[Logger], None], *, backends: bool = True, makers: bool = True) -> None:
        """Call each of them, or only those that make assets, or only the backends."""
        for logger in self._loggers:
            if backends if isinstance(logger, BackendLogger) else makers:
                self._call(logger, hook)

    def abandon(self) -> None:
        """Close those that were opened, whatever they say: there is an error already."""
        for logger in self._opened:
            with suppress(Exception):
                logger.close()

    def _call(
        self, logger: Logger, hook: Callable[[Logger], None], *, raises: type[Exception] | tuple[()] = ()
    ) -> None:
        if id(logger) in self._broken:
            return
        try:
            hook(logger)
        except raises:
            raise
        except Exception as error:
            if self._troubles.strict:
                raise
            self._broken.add(id(logger))
            self._troubles.warn(f"{type(logger).__name__} failed and is left alone from here on: {error!r}")


def check_metrics(metrics: Any) -> dict[str, float]:
    """Names and numbers, NaN and infinities among them; anything else is an `InvalidInputError` that names it."""
    if not isinstance(metrics, Mapping):
        raise InvalidInputError(f"metrics are a mapping of names to numbers, not {type(metrics).__name__}")
    return {name: _number(name, value) for name, value in metrics.items()}


def _number(name: Any, value: Any) -> float:
    if not isinstance(name, str):
        raise InvalidInputError(f"metrics: the name {name!r} is not a string")
    try:
        if not isinstance(value, str | bytes):
            # A tensor that requires a gradient warns when it is made a float, but not when it is asked for its item.
            return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise InvalidInputError(f"metrics[{name!r}] is not a number but a {type(value).__name__}")


def check_step(step: Any, what: str = "step") -> None:
    """Refuse, as `InvalidInputError`, a step or epoch that is no integer, or below 0."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= INT_MAX:
        raise InvalidInputError(f"{what}={step!r}: an integer, 0 or more")
