"""The protocol as a model, in more histories than real code could go through: no promise is broken, no rule idle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from model.world import RULES, run

SOAK = bool(os.environ.get("MANDAPA_SOAK"))
SEEDS = 200_000 if SOAK else 20_000
BLOCKS = 8

WITHIN = {
    "nohead": 100,
    "nohead_own": 1000,
    "reg_late": 200,
    "restart_noscan": 200,
    "list_after_fences": 4000,
    "mark_beyond_fence": 10_000,
    "catalog_unfenced": 4000,
    "remove_others": 200_000,
}
"""Histories in which a rule that is switched off must be missed; 4,000 where none is given."""


def histories(seeds: range) -> Counter[str]:
    """What happened in all of them; raises at the first broken promise."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        outcome = run(seed)
        assert not outcome.violations, f"seed {seed}: {outcome.violations}"
        assert not outcome.stuck, f"seed {seed} has no end"
        counts.update(outcome.counts)
    return counts


@pytest.mark.timeout(7200 if SOAK else 300)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_promise_is_broken(block: int) -> None:
    """Acknowledged is there, once; logs have no gap; live versions are whole; readers are told why something is gone.

    Whatever is lost, late, refused, killed or stalled, with several gcs of no grace at once. And what is to be stood
    happens often: each count is of a hundred histories, at least.
    """
    seeds = range(block, SEEDS, BLOCKS)
    counts = histories(seeds)
    least = {
        "acknowledged": 800,
        "gc": 200,
        "killed": 20,
        "undeleted": 40,
        "repacked": 50,
        "read": 400,
        "read, moved": 0.1,
    }
    assert {what: counts[what] for what in least if counts[what] < least[what] * len(seeds) / 100} == {}


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=[pytest.mark.slow] * (WITHIN.get(rule, 0) > 10_000)) for rule in RULES]
)
def test_each_rule_is_needed(rule: str) -> None:
    """With one rule switched off a promise is broken, in as few histories as are said above."""
    assert any(run(seed, [rule]).violations for seed in range(WITHIN.get(rule, 4000)))


def test_gc_may_mark_what_came_after_its_fence_too() -> None:
    """More than what was live at the fence may stay: a gc that reads on to the tail breaks nothing either."""
    for seed in range(SEEDS // 20):
        assert run(seed, reads_on=True).violations == []


def test_a_seed_is_one_history() -> None:
    """The same seed gives the same history, in every process, so that a failure can be seen again."""

    def told(seeds: range) -> str:
        return repr([(outcome.violations, sorted(outcome.counts.items())) for outcome in map(run, seeds)])

    code = "from model.world import run; print([(o.violations, sorted(o.counts.items())) for o in map(run, range(50))])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == told(range(50)) == told(range(50))
