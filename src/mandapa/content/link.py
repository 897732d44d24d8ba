"""How fast a store takes bytes, and so how much work a chunk may be before it goes there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeAlias

from mandapa.content.codecs import Effort

__all__ = ["Link", "Mode"]

Mode: TypeAlias = Literal["raw", "auto", "dense"]
"""How new chunks are stored: as they are; as small as the link to the store leaves time for; as small as possible."""

_COUNTS = 1 << 20  # bytes: what a smaller put takes says nothing of the link
_WEIGHT = 0.3  # of the newest measurement
_NEAR = 4.0  # times faster than it seemed: a disk that others use as well, and that is as fast as memory later
_SPARE = 0.35  # of what coding could do: the client and everybody else need the cores, too
_SPEEDS: dict[Effort, float] = {"planes": 9e8, "dense": 1.5e8}


class Link:
    """What was measured of the way to one store, and what ``auto`` makes of it.

    A chunk may be coded as long as all cores together code faster than the link takes raw bytes: then coding, which
    runs beside the puts, costs no time. Until something was measured a store on this machine counts as faster than
    any coding, and another one as fast enough for byte planes. Shared by threads.

    Args:
        near: Whether the store is on this machine.
        clock: Seconds, going up.
    """

    def __init__(self, *, near: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.near = near
        self.clock = clock
        self._rate: float | None = None  # bytes a second of one put
        self._speeds = dict(_SPEEDS)  # bytes a second of one core

    def put(self, size: int, seconds: float) -> None:
        """A put of ``size`` bytes was acknowledged after ``seconds``."""
        if size >= _COUNTS:
            rate = size / max(seconds, 1e-9)
            self._rate = rate if self._rate is None else _WEIGHT * rate + (1 - _WEIGHT) * self._rate

    def coded(self, effort: Effort, size: int, seconds: float) -> None:
        """A chunk of ``size`` bytes took one thread ``seconds``."""
        if effort in self._speeds and size >= _COUNTS:
            self._speeds[effort] += _WEIGHT * (size / max(seconds, 1e-9) - self._speeds[effort])

    def effort(self, mode: Mode, *, cores: int, puts: int) -> Effort:
        """How much work a chunk may be.

        Args:
            mode: What the user asked for.
            cores: Threads that code.
            puts: Puts under way at once: as many times faster than one of them the link is taken to be, which is too
                fast where they share it, until they do.
        """
        if mode != "auto":
            return mode
        if self._rate is None:
            return "fast" if self.near else "planes"
        rate = self._rate * max(1, puts) * (_NEAR if self.near else 1.0)
        for effort in ("dense", "planes"):
            if self._speeds[effort] * max(1, cores) * _SPARE >= rate:
                return effort
        return "fast"
