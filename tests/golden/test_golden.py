"""Format 1 is read for ever: the checked-in repository, by us, by a stranger, and written anew."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from mandapa.content.codecs import CODECS, required
from mandapa.content.fetch import pieces_of
from mandapa.errors import FormatVersionError
from mandapa.object_store import LocalObjectStore
from mandapa.repository import repository
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository

HOME = Path(__file__).parent
FROZEN = {
    "format-1": "4defa4f3f685db4c91f14bdbcd5f2c5ca106afaca51f5f2518ecebeed0c445bf",
    "format-1-codecs": "edd7feaa02ebb6f2b6c145bd3f35c039afa361f9b8731a3a55a064231f52b112",
    "format-1-mirror": "abfce28881bac8c54d67f500421618777db3e0b7402215fe81c27037a00c2314",
}
"""What the checked-in bytes have been since format 1 was frozen. A change here is a broken promise."""
NAMES = tuple(FROZEN)
EXPECTED = {name: json.loads((HOME / f"{name}.json").read_text()) for name in NAMES}


@pytest.fixture
def expected(name):
    """What is in it."""
    return EXPECTED[name]


@pytest.fixture
def golden(name, tmp_path):
    """A copy, so that nothing can be written to the original."""
    shutil.copytree(HOME / name, tmp_path / "golden")
    return Repository(LocalObjectStore(tmp_path / "golden"), threads=0)


def load(name):
    """A script beside this file, as a module."""
    spec = importlib.util.spec_from_file_location(name, HOME / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_not_a_byte_has_changed(name):
    """Format 1 is frozen: a golden repository is never made again."""
    hasher = hashlib.sha256()
    for path in sorted(path for path in (HOME / name).rglob("*") if path.is_file()):
        data = path.read_bytes()
        hasher.update(f"{path.relative_to(HOME / name).as_posix()} {len(data)}\n".encode() + data)
    assert hasher.hexdigest() == FROZEN[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_fact_and_byte_is_read(golden, expected):
    """Names, versions, history, metadata and the content of every asset are what was written."""
    assert json.loads(json.dumps(load("make_golden").facts(golden))) == expected


@pytest.mark.parametrize("name", NAMES)
def test_fsck_finds_nothing(golden, expected):
    """Every invariant holds, down to each byte."""
    report = fsck(golden, deep=True)
    assert report.findings == []
    assert report.checked["versions"] == sum(len(a["versions"]) for a in expected.values() if "versions" in a)


@pytest.mark.parametrize("name", ["format-1-codecs"])
def test_every_codec_is_there(golden):
    """Each with the features that its version needs, and deltas of deltas."""
    codecs, most = set(), 0
    for version in golden.artifact("net").versions():
        used = set()
        for located in version.rows():
            for piece in pieces_of(located, golden.reader.load):
                used.update([one.codec for one in piece.chain()])
                most = max(most, len(piece.chain()))
        assert required(used) <= set(version.requires)
        codecs |= used
    assert (codecs, most) == (set(CODECS), 3)


@pytest.mark.parametrize("name", ["format-1-codecs"])
def test_a_reader_without_the_codecs_refuses_by_name(golden, monkeypatch):
    """It reads what it can, and says of the rest what it lacks."""
    monkeypatch.setattr(repository, "FEATURES", {0: "raw", 1: "zstd"})
    assert golden["net:v0"].open("odd.bin").read()
    for version, feature in (("v1", "planes"), ("v2", "pco"), ("v3", "delta"), ("v6", "bf16")):
        with pytest.raises(FormatVersionError, match=feature):
            golden[f"net:{version}"].open("odd.bin")


@pytest.mark.parametrize("name", ["format-1"])
def test_an_op_of_a_newer_mandapa_keeps_writers_out(golden):
    """The optional op at the end of the log is skipped by readers and stops writers."""
    with pytest.raises(FormatVersionError, match="upgrade"), golden.artifact("model").transaction() as txn:
        txn.add_bytes("x", b"x")


@pytest.mark.parametrize(
    ("name", "make"),
    [("format-1", "make"), ("format-1-codecs", "make_codecs"), ("format-1-mirror", "make_mirror")],
)
def test_writing_it_anew_gives_the_same_facts(expected, make, tmp_path):
    """Digests, records and folding do not drift; compressed bytes may."""
    arguments = (tmp_path / "new", tmp_path)[: 2 if make == "make" else 1]
    made = getattr(load("make_golden"), make)(*arguments)
    assert json.loads(json.dumps(made)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_reads_every_byte(name, expected):
    """A reader written from docs/format.md alone finds the same assets."""
    stranger = load("stranger")
    source = (HOME / "stranger.py").read_text()
    assert "import mandapa" not in source
    assert "from mandapa" not in source
    root = HOME / name
    for artifact_name, artifact in expected.items():
        if "versions" not in artifact:
            continue
        found = stranger.versions(root, artifact_name)
        assert sorted(found) == sorted(map(int, artifact["versions"]))
        for number, version in artifact["versions"].items():
            rows = stranger.assets(root, found[int(number)])
            contents = {row[1]: stranger.content(root, row, table) for row, table in rows if row[0] != 1}
            if isinstance(version["assets"], str):
                continue
            assert [row[1] for row, _ in rows] == sorted(version["assets"])
            for path, data in contents.items():
                assert hashlib.sha256(data).hexdigest() == version["assets"][path][3], path
