"""Benchmarks do not rot: they run, and print their tables."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_peers_benchmark_prints_its_tables(tmp_path: Path) -> None:
    """With series of next to nothing it says nothing of speed; every tool that is there restores what it was given."""
    pytest.importorskip("torch")
    page, tables = tmp_path / "README.md", ("adam", "frozen", "folder", "codecs", "decode", "link")
    tools = ("cp and fsync", "obstore put", "mandapa", "mandapa, raw", "mandapa, dense")
    page.write_text("".join(f"<!-- {name} -->\nnothing yet\n<!-- /{name} -->\n" for name in ("targets", *tables)))
    folder = Path(__file__).parents[1] / "benchmarks" / "peers"
    asked = [("--table", name) for name in tables] + [("--tool", name) for name in tools]
    asked += [(option, str(tmp_path)) for option in ("--data", "--disk", "--out")]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(folder), "--quick", *itertools.chain(*asked)],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n### ") == len(tables)
    assert "failed" not in done.stdout
    written = page.read_text()
    assert "nothing yet" not in written
    for name in tables:
        result = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert result["rows"]
        for row in result["rows"]:
            numbers = [value for value in row.values() if isinstance(value, float)]
            assert all(value >= 0 for value in numbers)
    adam = {row["tool"]: row for row in json.loads((tmp_path / "results" / "adam.json").read_text())["rows"]}
    assert tuple(adam) == tools
    assert adam["cp and fsync"]["of_raw"] == 1
    assert all(row["restore"] for row in adam.values())
    for plot in ("bytes", "commits", "restores", "codecs"):
        ET.parse(tmp_path / "plots" / f"{plot}.svg")
    assert not list(tmp_path.glob("mandapa-peers-*"))


def test_the_benchmark_of_clean_ups_prints_its_table(tmp_path: Path) -> None:
    """One create for each artifact, one for the catalog and one for the list; nothing when nothing can go."""
    script = Path(__file__).parents[1] / "benchmarks" / "gc.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--artifacts", "3", "--folder", str(tmp_path / "repo")],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == ["first", "again", "nothing to free"]
    creates = rows[0].index("create")
    assert [row[creates] for row in rows[2:]] == ["5", "5", "0"]


@pytest.mark.slow
def test_the_benchmark_of_usage_runs(tmp_path: Path) -> None:
    """Both shapes and both commands, with next to no versions."""
    script = Path(__file__).parents[1] / "benchmarks" / "usage.py"
    sizes = ["--versions", "20", "--rounds", "1", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *sizes], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["shape"], one["command"]) for one in found] == list(
        itertools.product(("one", "many"), ("du", "expire"))
    )
    assert all(one["warm_s"] > 0 for one in found)
