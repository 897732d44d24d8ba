"""What a far repository has told this machine is not asked for again; a store on this machine needs no cache."""

from __future__ import annotations

import random

import pytest

import mandapa
from mandapa.environment import cache_size
from mandapa.errors import InvalidInputError
from mandapa.object_store import LocalObjectStore, MemoryObjectStore
from mandapa.repository.repository import Repository
from mandapa.testing.faults import CountingObjectStore
from mandapa.testing.server import serve

MIB = 1 << 20
DATA = random.Random(1).randbytes(20 * MIB)


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


@pytest.fixture
def far(server, tmp_path):
    """Opens a repository in S3 that holds one version, with another store each time."""
    prefix = tmp_path.name.replace("_", "-")

    def open_it(**options):
        return Repository(CountingObjectStore(server.s3("bucket", prefix)), **options)

    with Repository.create(server.s3("bucket", prefix), codec="raw").artifact("a").transaction() as txn:
        txn.add_bytes("big", DATA)
        txn.add_bytes("small", b"small")
    return open_it


def test_a_second_restore_reads_no_chunks(far, tmp_path):
    """Another process, another folder, another way to read: chunks come from the cache."""
    options = {"cache_dir": tmp_path / "cache", "cache_size": 1 << 30}
    far(**options)["a"].download(tmp_path / "1")
    repo = far(**options)
    repo["a"].download(tmp_path / "2")
    with repo["a"].open("big") as file:
        file.seek(7 * MIB)
        assert file.read() == DATA[7 * MIB :]
    assert (tmp_path / "2/big").read_bytes() == DATA
    assert repo.place.bytes_read < MIB


def test_a_damaged_cache_costs_a_fetch(far, tmp_path):
    """Whatever becomes of the cache's files, the bytes are right."""
    options = {"cache_dir": tmp_path / "cache", "cache_size": 1 << 30}
    far(**options)["a"].download(tmp_path / "1")
    paths = [path for path in (tmp_path / "cache/chunks").rglob("*") if path.is_file()]
    for i, path in enumerate(paths):
        data = bytearray(path.read_bytes())
        data[i % len(data)] ^= 1
        path.write_bytes(data)
    repo = far(**options)
    repo["a"].download(tmp_path / "2")
    assert (tmp_path / "2/big").read_bytes() == DATA
    assert repo.place.bytes_read > len(DATA)
    repo = far(**options)
    repo["a"].download(tmp_path / "3")
    assert repo.place.bytes_read < MIB


def test_off(far, tmp_path):
    """0 bytes, or no folder: nothing is kept."""
    for options in ({"cache_dir": tmp_path / "cache"}, {"cache_size": 1 << 30}):
        repo = far(**options)
        assert repo.cache is None
        repo["a"].download(tmp_path / "1")
    assert not (tmp_path / "cache/chunks").exists()


@pytest.mark.parametrize("make", [lambda path: LocalObjectStore(path / "repo"), lambda _: MemoryObjectStore()])
def test_stores_on_this_machine_have_none(tmp_path, make):
    """A folder, and memory, are as near as a cache."""
    assert Repository.create(make(tmp_path), cache_dir=tmp_path / "cache", cache_size=1 << 30).cache is None


# The environment


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", 10 << 30),
        ("0", 0),
        ("1000", 1000),
        ("500M", 500 << 20),
        ("20 GiB", 20 << 30),
        ("1tb", 1 << 40),
        ("7k", 7168),
    ],
)
def test_sizes(monkeypatch, text, size):
    """Bytes, or with a unit of powers of 1,024."""
    monkeypatch.setenv("MANDAPA_CACHE_SIZE", text)
    assert cache_size() == size


@pytest.mark.parametrize("text", ["much", "-1", "1.5G", "5 X", "1" * 16, "\u0661G"])
def test_no_size(monkeypatch, tmp_path, text):
    """What is no size is refused where the repository is opened, and the message names the variable."""
    monkeypatch.setenv("MANDAPA_CACHE_SIZE", text)
    with pytest.raises(InvalidInputError, match="MANDAPA_CACHE_SIZE"):
        mandapa.open(tmp_path / "repo", create=True)
