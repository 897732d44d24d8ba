"""Whether what many processes did to one log could have happened one after the other. Linearizability, for logs.

A log makes that easy to tell: its records are the order. An append has *place* n + 1 when its record is the n-th, a
read has place n when it saw n records. A history is linearizable if each operation can be put at a point between its
call and its return so that all agree with the places; that is: whoever returned before another was called has a lower
place, or, if the later one only read, the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation on one log that was acknowledged, by a clock that all who took part share."""

    log: str
    call: float
    answer: float
    place: int
    """Records in the log after an append, or seen by a read."""
    append: bool
    who: str = ""


def contradiction(operations: Iterable[Operation]) -> str:
    """Two operations that cannot have happened one after the other, in words; empty if there are none."""
    by_log: dict[str, list[Operation]] = {}
    for operation in operations:
        by_log.setdefault(operation.log, []).append(operation)
    for log in sorted(by_log):
        answered = sorted(by_log[log], key=lambda one: one.answer)
        before: Operation | None = None
        """Of those that have returned by now, the one with the highest place; an append, if several have it."""
        at = 0
        for later in sorted(by_log[log], key=lambda one: one.call):
            while answered[at].answer < later.call:
                one = answered[at]
                at += 1
                if before is None or (one.place, one.append) > (before.place, before.append):
                    before = one
            if before is not None and (later.place, not later.append) < (before.place, True):
                return f"{log}: {later} came after {before} had returned"
    return ""
