"""Histories by hand: ``python -m model SEEDS [RULE,... switched off] [FIRST SEED] [--reads-on]``."""

from __future__ import annotations

import sys
import time
from collections import Counter

from model.world import run

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    count = int(words[0])
    off = words[1].split(",") if len(words) > 1 else []
    first = int(words[2]) if len(words) > 2 else 0
    counts: Counter[str] = Counter()
    violations: Counter[str] = Counter()
    bad: list[int] = []
    start = time.process_time()
    for seed in range(first, first + count):
        outcome = run(seed, off, reads_on="--reads-on" in sys.argv)
        counts.update(outcome.counts, stuck=outcome.stuck)
        violations.update(outcome.violations)
        if outcome.violations:
            bad.append(seed)
    spent = time.process_time() - start
    print(f"{count} seeds in {spent:.1f} s of CPU time, without {off}: {dict(counts)}")
    print(f"violations: {dict(violations)}; {len(bad)} seeds, first {bad[:5]}")
