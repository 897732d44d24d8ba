"""How a run tells of what went wrong with logging: once each, and without ending the training."""

from __future__ import annotations

import sys
import warnings

from mandapa.errors import StorageError

__all__ = ["Troubles"]


class Troubles:
    """Warns, or with ``strict`` raises."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self._told: set[str] = set()

    def report(self, message: str) -> None:
        """Logging has failed at something.

        Raises:
            StorageError: With ``strict``.
        """
        if self.strict:
            raise StorageError(message)
        self.warn(message)

    def warn(self, message: str) -> None:
        """Something that one should know; the same is said once."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=_to_caller())


def _to_caller() -> int:
    """How many frames are mandapa's own: a warning names the line of the training script."""
    level, frame = 2, sys._getframe(2)  # noqa: SLF001 - as `warnings` itself does
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("mandapa.", "contextlib")):
        level, frame = level + 1, frame.f_back
    return level
