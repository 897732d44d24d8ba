"""The real code under a deterministic scheduler and a bad store: whatever the order of events, no promise is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from prooflib import switches
from prooflib.truth import check
from prooflib.world import World

from mandapa.repository import packs
from mandapa.repository.log import Log
from mandapa.repository.transaction import Transaction

SOAK = bool(os.environ.get("MANDAPA_SOAK"))
SEEDS = 5_000 if SOAK else 500
BLOCKS = 8
LEAST = {
    "kill": 120,
    "gc": 100,
    "conflict": 20,
    "repack": 8,
    "rewrite": 8,
    "undelete": 20,
    "expire": 3,
    "read": 80,
    "gone": 0.5,
    "remove": 3,
    "mirrored": 25,
}
"""What happens in a hundred seeds, at least."""


def run(seed: int) -> World:
    """One seed; if a promise is broken, the output tells the whole story."""
    world = World(seed)
    world.populate()
    try:
        world.run()
        check(world)
    except BaseException as error:
        print(f"seed {seed}", *world.scheduler.trace, sep="\n")
        raise AssertionError(f"seed {seed}: {error!r}") from error
    return world


@pytest.mark.timeout(7200 if SOAK else 300)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_promise_is_broken(block: int) -> None:
    """Writers, readers, gcs, movers, expirers, removers and mirrors, killed and misled by the store, do no harm.

    Acknowledged commits stand once, refused ones nowhere, logs have no gap, live versions hold byte for byte what was
    meant, aliases name live versions, readers saw a prefix of the one history and no byte that was not meant; all that
    was acknowledged or seen can have happened in one order; what follows another repository says what that one said;
    what was deleted less than the grace ago can be brought back. Things that are to be stood happen often.
    """
    counts: Counter[str] = Counter()
    for seed in range(block, SEEDS, BLOCKS):
        counts.update(run(seed).counts)
    share = SEEDS / BLOCKS / 100
    assert {what: counts[what] for what in LEAST if counts[what] < LEAST[what] * share} == {}


def story(seeds: range) -> str:
    """A hash of everything that happens."""
    return sha256("\n".join(event for seed in seeds for event in run(seed).scheduler.trace).encode()).hexdigest()


def test_a_seed_is_one_story() -> None:
    """The same seed gives the same calls in the same order, in every process, so that a failure can be seen again."""
    here = Path(__file__)
    code = "import runpy, sys; sys.path.insert(0, sys.argv[1]); print(runpy.run_path(sys.argv[2])['story'](range(5)))"
    expected = story(range(5))
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, here.parents[1], here],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            text=True,
        )
        assert done.stdout.strip() == expected


NOTICED: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], int]] = {
    "nohead": (lambda patch: patch.setattr(packs, "missing", lambda *_, **__: set()), 100),
    "nofence": (lambda patch: patch.setattr(Transaction, "_notice", lambda *_: None), 100),
    "fixed_base_nocheck": (lambda patch: patch.setattr(Transaction, "_stay", lambda *_: None), 100),
    "restart_noscan": (lambda patch: patch.setattr(Log, "find", lambda *_: None), 100),
    "mark_once": (switches.mark_once, 100),
    "mark_before_the_fence": (switches.mark_before_the_fence, 100),
    "no_fences": (switches.no_fences, 100),
    "resume": (switches.resume, 150),
    "grace_of_objects_alone": (switches.grace_of_objects_alone, 150),
    "tell_by_chance": (switches.tell_by_chance, 100),
}
"""Rules that are switched off, and the seeds in which that is noticed. Others are rarer: docs/design/018."""


@pytest.mark.parametrize("rule", NOTICED)
def test_the_simulation_notices(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rule of the protocol switched off some seed fails: the world is as hostile as the rules expect."""
    switch_off, seeds = NOTICED[rule]
    switch_off(monkeypatch)
    for seed in range(seeds):
        world = World(seed)
        world.populate()
        try:
            world.run()
            check(world)
        except Exception:
            return
    pytest.fail(f"{rule} was not noticed in {seeds} seeds")
