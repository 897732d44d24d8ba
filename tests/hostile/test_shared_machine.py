"""A machine that others use too: what they plant in a cache is not believed, and what is ours they cannot read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import mandapa
from mandapa import Run
from mandapa.content.cache import ChunkCache
from mandapa.content.index import Index
from mandapa.digest import digest
from mandapa.loggers import FileLogger
from mandapa.repository.shelf import Kept, Shelf

OTHER = 12_345  # the id of some other user
AGES = 10**12  # nanoseconds


def planted(folder: Path) -> tuple[Index, Shelf]:
    """An index and a shelf in ``folder``."""
    return Index(folder, repository="r", url="u"), Shelf(folder, "nodes", repository="r", url="u")


def make_foreign(folder: Path) -> None:
    """It belongs to somebody else, who lets us write there."""
    os.chown(folder, OTHER, OTHER)
    os.chmod(folder, 0o777)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
WAYS = [
    pytest.param(make_foreign, id="another user's", marks=needs_root),
    pytest.param(lambda folder: os.chmod(folder, 0o777), id="open to all"),
    pytest.param(lambda folder: os.chmod(folder, 0o1777), id="open to all, sticky"),
]


@pytest.mark.parametrize("open_up", WAYS)
def test_what_others_can_plant_is_not_believed(tmp_path: Path, open_up) -> None:
    """Neither which files were hashed, nor what was kept of logs and manifests; and nothing of ours is put there."""
    folder = tmp_path / "cache"
    file = tmp_path / "file"
    file.write_bytes(b"really this")
    found = file.stat()
    index, shelf = planted(folder)
    index.remember_file(str(file), found, digest(b"planted"), found.st_ctime_ns + AGES)
    index.close()
    shelf.write(Kept(b"", {}), {b"key": b"planted"})
    index, shelf = planted(folder)
    assert index.known_file(str(file), found) == digest(b"planted")
    assert shelf.read().rows == {b"key": b"planted"}
    index.close()

    open_up(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    index, shelf = planted(folder)
    assert index.known_file(str(file), found) is None
    assert shelf.read().rows == {}
    index.remember_file(str(file), found, digest(b"really this"), found.st_ctime_ns + AGES)
    index.close()
    shelf.write(shelf.read(), {b"key": b"ours"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("open_up", WAYS)
def test_no_chunk_goes_into_a_folder_of_others(tmp_path: Path, open_up) -> None:
    """And what they put there under a chunk's name is a miss."""
    folder = tmp_path / "chunks"
    folder.mkdir()
    open_up(folder)
    chunk = os.urandom(100_000)
    cache = ChunkCache(folder, 1 << 30)
    cache.put(digest(chunk), chunk)
    assert list(folder.rglob("*")) == []
    name = digest(chunk).hex()
    (folder / name[:2]).mkdir()
    (folder / name[:2] / name[2:]).write_bytes(bytes(100_000))
    assert cache.get(digest(chunk)) is None


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_what_we_keep_others_cannot_read(tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask: folders of caches and of runs are 0700, all that is in them is below such a one."""
    old = os.umask(umask)
    try:
        cache, runs = tmp_path / "cache", tmp_path / "runs"
        monkeypatch.setenv("MANDAPA_CACHE", str(cache))
        repo = mandapa.open(str(tmp_path / "repo"), create=True)
        with repo.artifact("net").transaction() as txn:
            txn.add_bytes("a", os.urandom(100_000))
        repo["net"].download(tmp_path / "out")
        repo.index.close()
        ChunkCache(cache / "chunks", 1 << 30).put(digest(bytes(100_000)), bytes(100_000))
        with Run("private", dir=str(runs), loggers=[FileLogger()]) as run:
            run.log_metrics({"x": 1.0}, step=1)
    finally:
        os.umask(old)
    for private in (cache, cache / "chunks", runs / "private", runs / "private" / ".run"):
        assert stat.S_IMODE(private.stat().st_mode) == 0o700, private
