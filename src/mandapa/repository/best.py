"""Which of several versions a number in their metadata says is best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from mandapa.errors import InvalidInputError
from mandapa.repository.state import VersionState

__all__ = ["Contest", "Mode", "measures"]

Mode: TypeAlias = Literal["min", "max"]


class Contest(NamedTuple):
    """Versions compared by one metric: the least, or the greatest, number is best."""

    metric: str
    mode: Mode

    @classmethod
    def of(cls, metric: str, mode: Mode) -> Contest:
        """A contest that makes sense, else `InvalidInputError`."""
        if not isinstance(metric, str):
            raise InvalidInputError(f"a metric is named by a string, not {type(metric).__name__}")
        if mode not in get_args(Mode):
            raise InvalidInputError(f"mode {mode!r}: a metric is best at its 'min' or at its 'max'")
        return cls(metric, mode)

    def wins(self, metadata: Mapping[str, Any], against: VersionState | None) -> bool:
        """Whether a version of this metadata is better than another one, which may have no number or be deleted."""
        return self.beats(metadata, {} if against is None or against.deleted is not None else against.op.metadata)

    def beats(self, metadata: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
        """Whether the number in this metadata is better than that in others, where there may be none."""
        mine, theirs = _number(metadata.get(self.metric)), _number(others.get(self.metric))
        if mine is None:
            return False
        return theirs is None or (mine < theirs if self.mode == "min" else mine > theirs)

    def ranked(self, versions: Iterable[VersionState]) -> list[VersionState]:
        """Those that have a number, the best first; of equal ones the first that was given."""
        numbers = [(_number(version.op.metadata.get(self.metric)), version) for version in versions]
        found = [(number, version) for number, version in numbers if number is not None]
        return [version for _, version in sorted(found, key=lambda pair: pair[0], reverse=self.mode == "max")]

    def best(self, versions: Iterable[VersionState]) -> VersionState | None:
        """The first of the best; None when none has a number."""
        best = None
        for version in versions:
            if self.wins(version.op.metadata, best):
                best = version
        return best


def measures(metadata: Mapping[str, Any]) -> Iterator[str]:
    """The metrics that have a finite number."""
    return (name for name, value in metadata.items() if _number(value) is not None)


def _number(value: object) -> int | float | None:
    """``value`` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None
