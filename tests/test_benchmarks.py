"""Benchmarks do not rot: they run, and print their tables."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_training_benchmark_prints_its_tables(tmp_path: Path) -> None:
    """With next to nothing to do it says nothing of speed; every part of it works."""
    pytest.importorskip("torch")
    folder = Path(__file__).parents[1] / "benchmarks" / "training"
    sizes = "--mb 1 --saves 2 --seconds 0.02 --rounds 1 --calls 10 --idle 0.1"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(folder), "--quick", *sizes.split(), "--disk", str(tmp_path)],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    titles = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("### ")]
    assert titles == ["Training", "Milliseconds", "A", "The"]
    assert done.stdout.count(": met") + done.stdout.count(": not met") > 8
    assert "nan" not in done.stdout
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    for package, row in {
        "composer": "torch.save, Composer's RemoteUploaderDownloader",
        "wandb": "torch.save, W&B offline",
    }.items():
        left_out = f"Left out, since {package} is not installed: {row}." in done.stdout
        assert left_out == (importlib.util.find_spec(package) is None)
        assert (row in rows) != left_out
    assert not list(tmp_path.glob("mandapa-bench-*"))
