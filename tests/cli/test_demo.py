"""``mandapa demo``: it trains, is killed, resumes, checks, restores; and README shows what it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mandapa
from mandapa.cli.demo import command as demo_command

README = Path(__file__).parents[2] / "README.md"


def demo(folder, *arguments):
    found = subprocess.run(
        [sys.executable, "-m", "mandapa.cli", "demo", "--epochs", "4", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "MANDAPA_REPO": ""},
    )
    assert (found.returncode, found.stderr) == (0, "")
    return found.stdout


def shape(line):
    """A line without its numbers, and without what depends on who was best."""
    line = re.sub(r"[0-9]+(\.[0-9]+)*", "#", line)
    line = re.sub(r"tfevents\.#\.\S+", "tfevents.#", line)
    line = re.sub(r"^v#\s+(latest, best|latest|best)?\s*", "v# ", line)
    line = re.sub(r"(# k?B) -> # (B|kB)", r"\1", line).replace("# kB", "# B").replace("# min ago", "# s ago")
    return re.sub(r"\s+", " ", line).strip()


def processes():
    """Command lines of every process that works in a folder of these tests, where the system tells."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def test_demo_and_its_transcript(tmp_path):
    """Killed, all of it committed, resumed, whole, evaluated, gone; and each line in README is a real one."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    out = demo(tmp_path)
    assert not [line for line in processes() if str(tmp_path) in line]
    repo = mandapa.open(tmp_path / ".mandapa")
    *epochs, end = versions = repo.artifact("digits").versions()
    assert [version.metadata["epoch"] for version in epochs] == [1, 2, 3, 4]
    assert [version.message for version in versions] == ["step 45", "step 90", "step 135", "step 180", "finished"]
    assert {version.run for version in versions} == {"demo-1"}
    assert {path.partition("/")[0] for path in end.assets} == {
        ".mandapa",
        "checkpoint",
        "tensorboard",
        "train.log",
        "train.attempt-2.log",
        "hparams.yaml",
    }
    lines = end.open("train.log").read().decode() + end.open("train.attempt-2.log").read().decode()
    # That of epoch 3 was printed after the log had been handed over with its checkpoint, and went with the machine.
    assert re.findall(r"^\[stdout\] epoch ([0-9])", lines, re.MULTILINE) == ["1", "2", "4"]
    facts = json.loads(end.open(".mandapa/run.json").read())
    assert (facts["attempt"], facts["status"], facts["resumed_from"]["version"]) == (2, "finished", "digits:v2")
    best = max(epochs, key=lambda version: version.metadata["accuracy"])
    assert repo["digits:best"].metadata["accuracy"] == best.metadata["accuracy"] > 0.9
    assert "killed with SIGKILL" in out
    assert "resumed from digits:v2" in out

    transcript = re.search(r"```console\n(A small network.*?)```", README.read_text(), re.DOTALL)
    assert transcript is not None
    printed = {shape(line) for line in out.splitlines()}
    strange = [line for line in transcript[1].splitlines() if line.strip() != "..." and shape(line) not in printed]
    assert not strange


@pytest.mark.slow
def test_demo_goes_on_in_a_repository_that_has_runs(tmp_path):
    """New versions after the old ones, nothing of the old run in them, and a best that nobody beat stays the best."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    repo = mandapa.open(tmp_path / ".mandapa", create=True)
    first = mandapa.Artifact(repo, "digits", run="demo-1")
    with first.transaction(message="epoch 1", metadata={"epoch": 1, "accuracy": 0.2}) as txn:
        txn.add_bytes("checkpoint/old.pt", b"of another run")
        txn.alias("best")
    facts = json.loads(demo(tmp_path, "--json"))
    assert facts["run"] == "demo-2"
    assert facts["killed_in_epoch"] == 3
    assert facts["resumed_from"] == "digits:v3"
    assert facts["versions"] == ["digits:v1", "digits:v2", "digits:v3", "digits:v4", "digits:v5"]
    assert facts["accuracy"] == facts["logged_accuracy"] == repo["digits:best"].metadata["accuracy"] > 0.9
    assert "checkpoint/old.pt" not in repo["digits:v1"].assets
    # run.json, the checkpoint, hparams.yaml, and of each attempt its events and its log
    assert repo["digits"].asset_count == 7

    again = json.loads(demo(tmp_path, "--json"))
    assert (again["run"], again["resumed_from"]) == ("demo-3", "digits:v8")
    assert again["accuracy"] == again["logged_accuracy"]
    best = [version for version in repo.artifact("digits").versions() if "accuracy" in version.metadata]
    assert repo["digits:best"].metadata["accuracy"] == max(version.metadata["accuracy"] for version in best)


def test_demo_leaves_an_artifact_of_somebody_else_alone(cli):
    """One that happens to have its name."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    (cli.folder / "a.txt").write_text("mine")
    cli("init")
    cli("add", "digits", "a.txt")
    assert "not the demo's" in cli.error("demo", code=2)
    assert len(cli.json("log", "digits")) == 1


def test_demo_says_what_is_missing(cli, monkeypatch):
    """Without the extra it makes nothing."""
    monkeypatch.setattr(demo_command, "_NEEDED", {"no_such_module": "no-such-package"})
    error = cli.error("demo", code=7)
    assert "no-such-package" in error
    assert "mandapa[demo]" in error
    assert os.listdir() == []
