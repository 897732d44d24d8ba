"""SIGKILL, at any moment: what was acknowledged is there, what is there is whole, and everybody goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = bool(os.environ.get("MANDAPA_SOAK"))
KILLS = 50
ROUNDS = 10 if SOAK else 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_no_sigkill_does_harm(seed: int, tmp_path: Path) -> None:
    """Writers, a reader, a clean-up and a mirror are killed and started again, one at a time or all at once.

    Every acknowledged commit is in the log once; ``fsck`` reads every byte of both repositories and has nothing to say;
    readers got what was put; all of it can have happened in one order; the mirror follows.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "prooflib.killing", tmp_path, str(seed), str(KILLS)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    counts = json.loads(done.stdout)
    assert counts["SIGKILLs"] >= KILLS
    assert {what for what in ("made", "deleted", "read", "mirrored") if not counts.get(what)} == set()
