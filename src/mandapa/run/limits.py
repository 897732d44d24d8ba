"""How much a run may take of the machine, and how long of the end of the program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mandapa.errors import InvalidInputError

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Caps of a run, and what happens at them.

    Example:
        >>> Limits(staging_bytes=50 << 30, when_full="wait").when_full
        'wait'
    """

    staging_bytes: int | None = None
    """Bytes that may wait in the run's directory; None: what its disk has, but 256 MiB."""
    when_full: Literal["wait", "skip"] = "skip"
    """A call for which there is no room warns and takes nothing (``skip``), or blocks until there is (``wait``)."""
    commit_every: float = 600.0
    """Seconds after which whatever waits is committed, though nothing asked for it."""
    exit_seconds: float = 600.0
    """Seconds that `Run.close` waits for what is not committed; after that the uploader goes on alone."""
    at_exit: Literal["wait", "skip"] = "wait"
    """Whether `Run.close` waits at all."""
    linger: float = 1800.0
    """Seconds that the uploader goes on trying after the last trainer is gone."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            InvalidInputError: A number below 0, or an unknown policy.
        """
        if self.when_full not in ("wait", "skip") or self.at_exit not in ("wait", "skip"):
            raise InvalidInputError("when_full= and at_exit= are 'wait' or 'skip'")
        numbers = (self.staging_bytes or 0, self.commit_every, self.exit_seconds, self.linger)
        if any(
            isinstance(number, bool) or not isinstance(number, int | float) or not number >= 0 for number in numbers
        ):
            raise InvalidInputError("limits are numbers, 0 or more")
