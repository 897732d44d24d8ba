"""The judge of histories is judged: what can have happened passes, what cannot does not."""

from __future__ import annotations

from random import Random

import pytest
from prooflib.histories import Operation, contradiction


def append(call: int, answer: int, place: int, log: str = "log") -> Operation:
    return Operation(log, call, answer, place, append=True)


def read(call: int, answer: int, place: int, log: str = "log") -> Operation:
    return Operation(log, call, answer, place, append=False)


POSSIBLE = {
    "nothing": [],
    "one after the other": [append(0, 1, 1), read(2, 3, 1), read(4, 5, 1), append(6, 7, 2), read(8, 9, 2)],
    "together, in any order": [append(0, 9, 2), append(1, 8, 1), read(0, 9, 0), read(0, 9, 1), read(0, 9, 2)],
    "read before it is acknowledged": [append(0, 9, 1), read(2, 3, 1), read(4, 5, 1)],
    "the answer is the next call": [append(0, 5, 2), append(5, 6, 1)],
    "different logs": [append(0, 1, 5, "a"), append(2, 3, 1, "b")],
}
IMPOSSIBLE = {
    "an acknowledged append is not read": [append(0, 1, 1), read(2, 3, 0)],
    "a read goes back": [append(0, 9, 1), read(1, 2, 1), read(3, 4, 0)],
    "a later append has a lower place": [append(0, 1, 2), append(2, 3, 1)],
    "two appends have one place": [append(0, 1, 1), append(2, 3, 1)],
    "an append has the place of what was read": [read(0, 1, 1), append(2, 3, 1)],
    "what comes later was read": [read(0, 1, 1), append(2, 3, 1), read(4, 5, 1)],
    "it happened long ago": [append(0, 1, 3), read(0, 30, 0), read(2, 3, 3), append(10, 11, 2)],
}


@pytest.mark.parametrize("history", POSSIBLE.values(), ids=POSSIBLE)
def test_what_can_have_happened_passes(history: list[Operation]) -> None:
    """Whatever the order in which it is told."""
    for seed in range(5):
        assert contradiction(Random(seed).sample(history, len(history))) == ""


@pytest.mark.parametrize("history", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_have_happened_is_noticed(history: list[Operation]) -> None:
    """Whatever the order in which it is told."""
    for seed in range(5):
        assert contradiction(Random(seed).sample(history, len(history))) != ""


def test_a_history_of_points_passes_and_any_swap_of_what_did_not_overlap_does_not() -> None:
    """Random histories made from an order of points: right as they are, wrong with two places exchanged."""
    for seed in range(50):
        random = Random(seed)
        place, history = 0, []
        for at in range(40):
            is_append = random.random() < 0.5
            place += is_append
            early, late = random.random() * 5, random.random() * 5
            history.append(Operation("log", at - early, at + late, place, is_append))
        assert contradiction(history) == ""
        appends = [one for one in history if one.append]
        first, last = appends[0], appends[-1]
        swapped = [one for one in history if one not in (first, last)]
        swapped += [append(first.call, first.answer, last.place), append(last.call, last.answer, first.place)]
        assert contradiction(swapped) != ""
