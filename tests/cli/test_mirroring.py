"""``mandapa mirror``: what it prints, how it ends, and what it leaves alone."""

from __future__ import annotations

import pytest

import mandapa
from mandapa.cli import main


@pytest.fixture
def runs(cli):
    """A repository with two artifacts, and commands."""
    repo = mandapa.open("runs", create=True)
    for name in ("net", "base"):
        for number in range(2):
            with repo.artifact(name).transaction(message=f"step {number}") as txn:
                txn.add_bytes("w", bytes([number]) * 50_000)
                txn.alias("best")
    return cli


def test_a_copy_is_made_and_followed(runs):
    """The first call makes the repository, later ones bring what is new; the same addresses name the same content."""
    out = runs("mirror", "runs", "there").out
    assert "base  2 versions" in out
    assert out.splitlines()[-1].startswith("2 artifacts brought up to date")
    assert runs("mirror", "runs", "there").out == "0 artifacts brought up to date, 0 B sent, 2 had nothing new\n"
    runs("alias", "--repo", "runs", "net", "best", "v0")
    [value] = runs.json("mirror", "runs", "there")
    assert (value["ok"], value["added"]) == (True, 0)
    assert [(one["artifact"], one["versions"], one["records"]) for one in value["artifacts"]] == [
        ("base", 0, 0),
        ("net", 0, 1),
    ]
    for address in ("net:best", "base:v1"):
        [mine], [theirs] = (runs.json("show", "--repo", repo, address) for repo in ("runs", "there"))
        assert (mine["digest"], mine["number"], mine["names"]) == (theirs["digest"], theirs["number"], theirs["names"])
    assert "no problems" in runs("fsck", "--repo", "there", "--deep").out


def test_only_some(runs):
    """Patterns choose; one that names nothing is an error, and nothing is done."""
    runs("mirror", "runs", "there", "--only", "n*", "--only", "net")
    assert [artifact.name for artifact in mandapa.open("there").artifacts()] == ["net"]
    assert "no artifact 'nett'; did you mean 'net'" in runs.error("mirror", "runs", "there", "--only", "nett", code=3)


def test_a_conflict_is_told_and_the_rest_is_done(runs):
    """Ends with 4, names artifact, version and who; the other one is up to date."""
    runs("mirror", "runs", "there")
    for repo in ("there", "runs"):
        with mandapa.open(repo).artifact("net").transaction(message="mine") as txn:
            txn.add_bytes("mine", repo.encode())
    runs("alias", "--repo", "runs", "base", "best", "v0")
    result = runs("mirror", "runs", "there", code=4)
    assert "not mirrored: net:" in result.out
    assert "v2 was made here by" in result.out
    assert result.out.splitlines()[-1].startswith("1 artifact brought up to date")
    assert mandapa.open("there").artifact("base").aliases() == {"best": 0}
    [value] = runs.json("mirror", "runs", "there", code=4)
    assert not value["ok"]
    assert "v2 was made here" in value["artifacts"][1]["error"]


def test_a_removed_artifact_is_told(runs):
    """It is kept there."""
    runs("mirror", "runs", "there")
    mandapa.open("runs").artifact("net").remove()
    assert "net: removed in the source, kept here" in runs("mirror", "runs", "there").out


def test_places_that_are_none(runs, tmp_path):
    """A source that is not there, itself, a destination that holds other things; no repository is made by mistake."""
    assert "mandapa init" in runs.error("mirror", "nowhere", "there", code=3)
    assert not (runs.folder / "there").exists()
    assert "a repository of its own" in runs.error("mirror", "runs", "runs", code=2)
    (runs.folder / "mine").mkdir()
    (runs.folder / "mine/file").write_text("mine")
    assert "holds other things" in runs.error("mirror", "runs", "mine", code=2)


def test_help_says_it():
    """In one line of the list, under the task."""
    assert main.commands["mirror"].get_short_help_str(100) == "Copy a repository, and later what is new."
