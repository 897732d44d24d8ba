"""The real code under a deterministic scheduler and a bad store: whatever the order of events, no promise is broken."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from prooflib.world import World, check

SEEDS = 40_000 if os.environ.get("MANDAPA_SOAK") else 800
BLOCKS = 8


def run(seed: int) -> World:
    world = World(seed)
    world.populate()
    world.run()
    check(world)
    return world


@pytest.mark.timeout(7200 if os.environ.get("MANDAPA_SOAK") else 300)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_promise_is_broken(block: int) -> None:
    """Writers, gcs, repackers and readers, killed and misled by the store, leave a repository in which all is right.

    Acknowledged commits stand once, refused ones nowhere, logs have no gap, live versions hold byte for byte what was
    meant, aliases name live versions, readers saw a prefix of the one history and no byte that was not meant. Things
    that are to be stood happen often.
    """
    counts: Counter[str] = Counter()
    for seed in range(block, SEEDS, BLOCKS):
        try:
            counts.update(run(seed).counts)
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
    share = SEEDS / BLOCKS / 100
    least = {"kill": 120, "gc": 100, "conflict": 20, "repack": 40, "undelete": 20, "read": 80, "gone": 1, "remove": 3}
    assert {what: counts[what] for what in least if counts[what] < least[what] * share} == {}


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_is_one_story(seed: int) -> None:
    """The same seed gives the same calls in the same order, so that a failure can be looked at again."""
    first, second = run(seed), run(seed)
    assert first.scheduler.trace == second.scheduler.trace
    assert first.memory._objects.keys() == second.memory._objects.keys()
