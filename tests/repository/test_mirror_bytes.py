"""Bytes on their way to a mirror: sent once, as they are stored, with what they stand on; found again after a kill."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save

from mandapa.content.codecs import BF16, DELTA
from mandapa.content.fetch import pieces_of
from mandapa.format.manifest import BASES_MAX, FileRow, LargeFileRow
from mandapa.object_store import LocalObjectStore
from mandapa.repository.repository import Repository
from mandapa.testing.faults import CountingObjectStore, Crash
from mandapa.testing.server import Server, serve

sys.path.insert(0, os.path.dirname(__file__))
from mirroring import (
    check,
    checkpoints,
    commit,
    reopened,
    repository,
    stored,
    sweep,
    whole,
)


def pieces(repo: Repository, address: str, path: str):
    return list(pieces_of(repo[address].tree.get(path), repo.reader.load))


class Dying(LocalObjectStore):
    """The process dies when a pack is put after so many others."""

    def __init__(self, path, packs: int) -> None:
        super().__init__(path)
        self._left = packs
        self._lock = threading.Lock()

    def put(self, key, data):
        with self._lock:
            self._left -= key.startswith("packs/")
            if self._left < 0:
                raise Crash
        super().put(key, data)


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


def test_encodings_travel_as_they_are():
    """Deltas, their bases, bf16 copies: the same codecs, chains and sizes there, and about as many bytes in all."""
    source, destination = repository(codec="dense"), repository(codec="raw")
    for data in checkpoints(4):
        commit(source, w=data)
    assert source.mirror(destination).ok
    check(source, destination)
    for number in range(4):
        there, here = (pieces(repo, f"m:v{number}", "w") for repo in (source, destination))
        assert [[(p.codec, p.raw, p.stored, p.hash) for p in piece.chain()] for piece in here] == [
            [(p.codec, p.raw, p.stored, p.hash) for p in piece.chain()] for piece in there
        ]
        assert destination[f"m:v{number}"].requires == source[f"m:v{number}"].requires
    codecs = Counter(piece.codec for number in range(4) for piece in pieces(destination, f"m:v{number}", "w"))
    assert codecs[DELTA]
    assert codecs[BF16]
    assert stored(destination) < 1.02 * stored(source) + 4096


def test_a_base_that_no_version_holds_travels_too():
    """A delta whose base was of a deleted version: the base is copied, and gc leaves it on both sides."""
    source, destination = repository(codec="dense"), repository()
    for data in checkpoints(3):
        commit(source, w=data)
    source.artifact("m").delete(0, 1)
    sweep(source)
    assert any(piece.base for piece in pieces(source, "m:v2", "w"))
    assert source.mirror(destination).ok
    sweep(destination)
    check(source, destination)


def test_a_base_that_is_a_long_chain_there():
    """Chunks that the destination has as deltas are no bases of further ones beyond what the format allows."""
    source, destination = repository(codec="raw"), repository(codec="dense")
    data = checkpoints(6)
    for one in data[:3]:
        commit(source, w=one)
    source.mirror(destination)
    destination.artifact("m").repack()  # there v2 stands on two others now; in the source it is raw
    assert max(len(piece.chain()) for piece in pieces(destination, "m:v2", "w")) > 1
    later = reopened(source, codec="dense")
    for one in data[3:]:
        commit(later, w=one)
    assert later.mirror(destination).ok
    check(source, destination)
    for number in range(6):
        assert max(len(piece.chain()) for piece in pieces(destination, f"m:v{number}", "w")) <= BASES_MAX + 1


def test_what_is_there_is_not_sent_again():
    """Unchanged files, moved files, and chunks of a changed file: neither read from the source nor put again."""
    source, destination = repository(codec="raw"), repository()
    rng = np.random.default_rng(1)
    commit(source, big=rng.bytes(12 << 20), other=rng.bytes(1 << 20))
    source.mirror(destination)
    with source.artifact("m").transaction() as txn:
        txn.copy("m", "other", at="moved")
        txn.remove("other")
        txn.add_bytes("big", source["m"].open("big").read() + b"tail")
    there, here = CountingObjectStore(source.place), CountingObjectStore(destination.place)
    done = Repository(there).mirror(Repository(here))
    assert done.ok
    check(source, destination)
    cost = source["m"].added  # the last chunk, which grew, and the manifest
    assert done.added < cost + 10_000
    assert there.bytes_read < cost + 10_000


def test_the_same_bytes_in_another_artifact_are_sent_once():
    """The local index knows them, whichever artifact has them; without one, the version before."""
    source, destination = repository(codec="raw"), repository()
    data = np.random.default_rng(1).bytes(4 << 20)
    commit(source, "a", x=data)
    commit(source, "b", y=data)
    assert source.mirror(destination).added < 4.1 * (1 << 20)
    check(source, destination)


def test_chunks_that_are_there_otherwise_are_used():
    """The destination stores them in its own way: nothing is sent, and its own encoding is named."""
    source, destination = repository(codec="raw"), repository(codec="dense")
    data = np.random.default_rng(0).normal(size=200_000).astype(np.float32).tobytes()
    commit(destination, "mine", w=data)
    commit(source, "m", w=data)
    done = source.mirror(destination)
    assert done.added < 10_000
    assert destination["m"].requires
    assert content_of(destination, "m") == data
    whole(destination)


def content_of(repo: Repository, address: str) -> bytes:
    return reopened(repo)[address].open("w").read()


def test_large_files_and_many(tmp_path):
    """Lists of chunks in parts, shared parts, leaves and branches; a later version sends what changed."""
    source, destination = repository(codec="raw"), repository()
    rng = np.random.default_rng(2)
    weights = {f"t{number}": torch.from_numpy(rng.integers(0, 9, 66_000, np.uint8)) for number in range(1100)}
    (tmp_path / "d").mkdir()
    for number in range(1500):
        (tmp_path / "d" / str(number)).write_text(str(number))
    with source.artifact("m").transaction() as txn:
        txn.add(tmp_path)
    commit(source, "large", w=save(weights))
    weights["t1099"] += 1
    commit(source, "large", w=save(weights))
    assert isinstance(source["large"].tree.get("w").row, LargeFileRow)
    assert source.mirror(destination).ok
    first, second = (destination[f"large:v{number}"].tree.get("w").row for number in range(2))
    assert isinstance(first, LargeFileRow)
    assert isinstance(second, LargeFileRow)
    assert {part.hash for part in first.parts} & {part.hash for part in second.parts}
    with source.artifact("m").transaction() as txn:
        txn.add_bytes("d/700", b"changed")
    assert reopened(source).mirror(reopened(destination)).added < 200_000
    check(source, destination)


def test_empty_files_and_executables(tmp_path):
    """Nothing, one byte, and the x bit."""
    source, destination = repository(), repository()
    (tmp_path / "run").write_bytes(b"#!")
    (tmp_path / "run").chmod(0o755)
    (tmp_path / "none").touch()
    with source.artifact("m").transaction() as txn:
        txn.add(tmp_path)
        txn.add_bytes(".mandapa/run.json", b"{}", reserved=True)
    source.mirror(destination)
    check(source, destination)
    assert destination["m"].assets["run"].executable
    assert isinstance(destination["m"].tree.get("none").row, FileRow)


@pytest.mark.parametrize("way", ["to", "from", "between"])
def test_clouds(server: Server, tmp_path, way):
    """A folder to S3, S3 to a folder, S3 to GCS."""
    prefix = f"mirror-{way}-{os.path.basename(tmp_path)}"
    stores = {
        "to": (LocalObjectStore(tmp_path / "a"), server.s3(prefix=prefix)),
        "from": (server.s3(prefix=prefix), LocalObjectStore(tmp_path / "a")),
        "between": (server.s3(prefix=prefix), server.gcs(prefix=f"{prefix}-2")),
    }[way]
    source, destination = (repository(store, cache_dir=tmp_path / "cache", cache_size=1 << 30) for store in stores)
    for data in checkpoints(3):
        commit(source, alias="best", w=data, log=data[:100_000])
    dense = reopened(source, codec="dense")
    commit(dense, w=checkpoints(4)[3])
    assert source.mirror(destination).ok
    check(source, destination)
    commit(dense, w=checkpoints(5)[4])
    again = reopened(source, cache_dir=tmp_path / "cache", cache_size=1 << 30)
    assert again.mirror(reopened(destination, cache_dir=tmp_path / "cache")).ok
    check(source, destination)


def test_bases_at_hand_are_not_fetched_again(server: Server, tmp_path):
    """What was mirrored from a far store is kept on the machine: the next delta costs about its own bytes."""
    source = repository(server.s3(prefix=f"bases-{tmp_path.name}"), codec="dense")
    destination = repository(LocalObjectStore(tmp_path / "a"))
    data = checkpoints(2, size=1_000_000)
    commit(source, w=data[0])
    options = {"cache_dir": tmp_path / "cache", "cache_size": 1 << 30}
    reopened(source, **options).mirror(reopened(destination))
    commit(source, w=data[1])
    cost = source["m"].added
    assert cost < len(data[1]) / 3
    counting = CountingObjectStore(source.place)
    reopened(source, counting, **options).mirror(reopened(destination))
    assert counting.bytes_read < cost + 300_000
    check(source, destination)


def test_what_had_arrived_is_found_again(tmp_path):
    """Killed in the middle of a large version: of 100 MB, only what was under way is sent again."""
    source, destination = repository(codec="raw"), repository(LocalObjectStore(tmp_path / "d"))
    total = 100 << 20
    commit(source, big=np.random.default_rng(0).bytes(total))
    options = {"cache_dir": tmp_path / "cache", "threads": 2}
    with pytest.raises(Crash):
        source.mirror(Repository(Dying(tmp_path / "d", 4), **options))
    arrived = sum(info.size for info in destination.place.list("packs/"))
    assert arrived >= 4 * (15 << 20)
    counting = CountingObjectStore(LocalObjectStore(tmp_path / "d"))
    there = CountingObjectStore(source.place)
    done = Repository(there).mirror(Repository(counting, **options))
    assert done.ok
    assert counting.bytes_written < total - arrived + (1 << 20)
    assert there.bytes_read < total - arrived + (1 << 20)
    check(source, destination)
    assert sweep(destination) < 1 << 20


def test_what_had_arrived_and_was_swept(tmp_path):
    """A clean-up without any grace takes what nothing names: it is sent again, and nothing is lost."""
    source, destination = repository(codec="raw"), repository(LocalObjectStore(tmp_path / "d"))
    commit(source, big=np.random.default_rng(0).bytes(60 << 20))
    with pytest.raises(Crash):
        source.mirror(Repository(Dying(tmp_path / "d", 2), cache_dir=tmp_path / "cache"))
    arrived = sum(info.size for info in destination.place.list("packs/"))
    assert arrived
    assert sweep(destination) >= arrived
    assert source.mirror(Repository(LocalObjectStore(tmp_path / "d"), cache_dir=tmp_path / "cache")).ok
    check(source, destination)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_copy_of_the_bytes_works(server: Server, tmp_path, place):
    """With a warm cache of the old place: opened, checked, read, written and swept at the new one."""
    cache = tmp_path / "cache"
    if place == "folder":
        old = LocalObjectStore(tmp_path / "old")
    else:
        old = server.s3(prefix=f"old-{tmp_path.name}")
    repo = repository(old, cache_dir=cache, cache_size=1 << 30)
    for data in checkpoints(3):
        commit(repo, alias="best", w=data, log=data[:100_000])
    repo.mirror(repository())
    for version in Repository(old, cache_dir=cache, cache_size=1 << 30).artifact("m").versions():
        version.open("w").read()
    if place == "folder":
        shutil.copytree(tmp_path / "old", tmp_path / "new")
        shutil.rmtree(tmp_path / "old")
        new = LocalObjectStore(tmp_path / "new")
    else:
        new = server.s3(prefix=f"new-{tmp_path.name}")
        for info in old.list(""):
            new.put(info.key, old.get(info.key))
        old.delete([info.key for info in old.list("")])
    moved = Repository(new, cache_dir=cache, cache_size=1 << 30)
    whole(moved)
    assert moved["m:best"].open("w").read() == checkpoints(3)[2]
    commit(moved, w=checkpoints(4)[3], log=b"new")
    commit(moved, "another", w=checkpoints(1)[0])
    sweep(moved)
    assert moved.mirror(repository()).ok
    whole(moved)
    assert [version.number for version in moved.artifact("m").versions()] == [0, 1, 2, 3]


def test_nothing_new_costs_a_few_requests(tmp_path):
    """However many artifacts and versions there are; and one new version about what a commit costs."""
    source, destination = repository(), repository()
    for name in range(30):
        for number in range(4):
            commit(source, f"a{name}", x=bytes([name, number]))
    source.mirror(destination)
    options = {"cache_dir": tmp_path}
    reopened(source, **options).mirror(reopened(destination, **options))
    there, here = CountingObjectStore(source.place), CountingObjectStore(destination.place)

    def requests() -> tuple[int, int]:
        there.reset()
        here.reset()
        assert Repository(there, **options).mirror(Repository(here, **options)).ok
        return there.requests.total(), here.requests.total()

    assert max(requests()) <= 6
    commit(source, "a7", x=b"new")
    read, written = requests()
    assert read <= 6 + 4
    assert written <= 6 + 6
    assert max(requests()) <= 6
    check(source, destination)
