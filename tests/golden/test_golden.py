"""Format 1 is read for ever: the checked-in repository, by us, by a stranger, and written anew."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from mandapa.errors import FormatVersionError
from mandapa.object_store import LocalObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository

HOME = Path(__file__).parent
GOLDEN = HOME / "format-1"
EXPECTED = json.loads((HOME / "format-1.json").read_text())


@pytest.fixture
def golden(tmp_path):
    """A copy, so that nothing can be written to the original."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    return Repository(LocalObjectStore(tmp_path / "golden"), threads=0)


def load(name):
    """A script beside this file, as a module."""
    spec = importlib.util.spec_from_file_location(name, HOME / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_fact_and_byte_is_read(golden):
    """Names, versions, history, metadata and the content of every asset are what was written."""
    assert json.loads(json.dumps(load("make_golden").facts(golden))) == EXPECTED


def test_fsck_finds_nothing(golden):
    """Every invariant holds, down to each byte."""
    report = fsck(golden, deep=True)
    assert report.findings == []
    assert report.checked["versions"] == sum(len(a["versions"]) for a in EXPECTED.values() if "versions" in a)


def test_an_op_of_a_newer_mandapa_keeps_writers_out(golden):
    """The optional op at the end of the log is skipped by readers and stops writers."""
    with pytest.raises(FormatVersionError, match="upgrade"), golden.artifact("model").transaction() as txn:
        txn.add_bytes("x", b"x")


def test_writing_it_anew_gives_the_same_facts(tmp_path):
    """Digests, records and folding do not drift; compressed bytes may."""
    made = load("make_golden").make(tmp_path / "format-1", tmp_path)
    assert json.loads(json.dumps(made)) == EXPECTED


def test_a_stranger_reads_every_byte():
    """A reader written from docs/format.md alone finds the same assets."""
    stranger = load("stranger")
    source = (HOME / "stranger.py").read_text()
    assert "import mandapa" not in source
    assert "from mandapa" not in source
    for name, artifact in EXPECTED.items():
        if "versions" not in artifact:
            continue
        found = stranger.versions(GOLDEN, name)
        assert sorted(found) == sorted(map(int, artifact["versions"]))
        for number, version in artifact["versions"].items():
            rows = stranger.assets(GOLDEN, found[int(number)])
            contents = {row[1]: stranger.content(GOLDEN, row, table) for row, table in rows if row[0] != 1}
            if isinstance(version["assets"], str):
                continue
            assert [row[1] for row, _ in rows] == sorted(version["assets"])
            for path, data in contents.items():
                assert hashlib.sha256(data).hexdigest() == version["assets"][path][3], path
