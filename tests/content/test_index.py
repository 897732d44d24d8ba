"""The index: hints come back as they were fed, files are known only when that is certain, and nothing ever fails."""

from __future__ import annotations

import os
import random
import sqlite3
import threading

import pytest

from mandapa.content.index import Index, Piece
from mandapa.content.walk import Found
from mandapa.digest import digest
from mandapa.format.manifest import Chunk, FileRow, LargeFileRow, Leaf, Part, PartAddress, UrlRow

SECOND = 1_000_000_000
CONTAINER = b"p" + bytes(range(16))
OTHER = b"m" + bytes(range(1, 17))


def name(i):
    return digest(str(i).encode())


def leaf(first, count):
    rows = [
        FileRow(f"f{i:08}", 100 + i, 0, name(i), (Chunk(i % 2, 16 + i, 100, 100 + i, 1),)) for i in range(first, count)
    ]
    return Leaf([CONTAINER, OTHER], rows)


def database(folder):
    [path] = [path for path in folder.iterdir() if path.suffix == ".sqlite"]
    return path


@pytest.fixture(params=["file", "memory"])
def index(request, tmp_path):
    made = Index(tmp_path / "cache" if request.param == "file" else None, repository="r", url="memory://x")
    yield made
    made.close()


def fake(mtime, ctime, size=3, inode=7):
    return os.stat_result(
        [0o100644, inode, 9, 1, 0, 0, size, 0, mtime // SECOND, ctime // SECOND],
        {"st_mtime_ns": mtime, "st_ctime_ns": ctime},
    )


def test_chunks_are_found(index):
    """Every chunk of a leaf is found with its container, range and codec; others are not."""
    index.feed(leaf(0, 1200))
    found = index.lookup([name(i) for i in range(1300)])
    assert len(found) == 1200
    assert found[name(3)] == Piece(OTHER, 19, 100, 103, 1, name(3))


def test_it_lasts(tmp_path):
    """What one index was fed, the next one on the same folder knows; another repository's does not."""
    first = Index(tmp_path, repository="r", url="a")
    first.feed(leaf(0, 10))
    first.close()
    assert len(Index(tmp_path, repository="r", url="a").lookup([name(1), name(2)])) == 2
    assert Index(tmp_path, repository="r", url="b").lookup([name(1)]) == {}
    assert Index(tmp_path, repository="s", url="a").lookup([name(1)]) == {}


def test_assets_of_several_chunks(index):
    """The whole list is found by the asset's digest, each chunk by its own hash."""
    chunks = (Chunk(0, 16, 5, 5, 0, name(1)), Chunk(1, 16, 6, 6, 0, name(2)))
    index.feed(Leaf([CONTAINER, OTHER], [FileRow("a", 11, 0, name(0), chunks), UrlRow("u", "s3://x/y", None, "")]))
    expected = (Piece(CONTAINER, 16, 5, 5, 0, name(1)), Piece(OTHER, 16, 6, 6, 0, name(2)))
    assert index.lookup_asset(name(0)) == expected
    assert index.lookup_asset(name(1)) is None
    assert set(index.lookup([name(1), name(2)]).values()) == set(expected)


def test_parts_and_large_files(index):
    """Parts teach their chunks; the row of a large file has none of its own."""
    part = Part([CONTAINER], [Chunk(0, 16 + i, 1, 1, 0, name(i)) for i in range(9)])
    index.feed(part)
    index.feed(Leaf([OTHER], [LargeFileRow("a", 9, 0, name(99), (PartAddress(0, 16, 9, name(98), 9),))]))
    assert len(index.lookup([name(i) for i in range(20)])) == 9
    pieces = [Piece(CONTAINER, 16 + i, 1, 1, 0, name(i)) for i in range(9)]
    index.remember_asset(name(99), part.rows, part.containers)
    assert index.lookup_asset(name(99)) == tuple(pieces)


def test_deltas_are_not_taught(index):
    """A chunk that needs another one is no help to anybody else."""
    base = Chunk(0, 16, 5, 5, 0, name(5))
    index.feed(Leaf([CONTAINER], [FileRow("a", 5, 0, name(1), (Chunk(0, 30, 2, 5, 7, b"", base),))]))
    assert index.lookup([name(1)]) == {}


def test_feeding_twice_writes_once(tmp_path):
    """A leaf that was fed is not written again."""
    index = Index(tmp_path)
    index.feed(leaf(0, 500))
    index.flush()
    before = database(tmp_path).read_bytes()
    index.feed(leaf(0, 500))
    index.flush()
    assert database(tmp_path).read_bytes() == before
    index.close()


# Files


def remembered(index, mtime, ctime, hashed_at):
    stat = fake(mtime, ctime)
    index.remember_file("/a/b", stat, name(1), hashed_at)
    return index.known_file("/a/b", stat) == name(1)


NOW = 1_800_000_000 * SECOND + 123_456_789


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        (SECOND, True),
        (101_000_000, True),
        (99_000_000, False),
        (0, False),
        (-SECOND, False),
        (-(10**6) * SECOND, False),
    ],
)
def test_racy_files_with_fine_times(index, age, expected):
    """Where times are fine, a file changed in the last 100 ms, or in the future, is not remembered."""
    assert remembered(index, NOW - age, NOW - age, NOW) is expected


@pytest.mark.parametrize(("age", "expected"), [(3, True), (2, False), (1, False), (0, False), (-5, False)])
def test_racy_files_with_coarse_times(index, age, expected):
    """Where times are whole milliseconds or seconds, the last 2 s count as just now."""
    whole = NOW // SECOND * SECOND
    assert remembered(index, whole - age * SECOND, whole - age * SECOND, whole) is expected


def test_both_times_count(index):
    """An old mtime does not help a fresh ctime, nor the other way round."""
    old = NOW - 9 * SECOND
    assert not remembered(index, old, NOW, NOW)
    assert not remembered(index, NOW, old, NOW)
    assert remembered(index, old, old, NOW)


def test_any_difference_makes_it_unknown(index):
    """Size, mtime, ctime, inode and path must all be the same."""
    old = NOW - 9 * SECOND
    index.remember_file("/a/b", fake(old, old), name(1), NOW)
    assert index.known_file("/a/b", fake(old, old)) == name(1)
    assert index.known_file("/a/c", fake(old, old)) is None
    for other in (fake(old + 1, old), fake(old, old + 1), fake(old, old, size=4), fake(old, old, inode=8)):
        assert index.known_file("/a/b", other) is None


def test_many_files_at_once(index):
    """The batch answers in order, with gaps."""
    old = NOW - 9 * SECOND
    found = [Found(str(i), f"/x/{i}", fake(old, old, size=i)) for i in range(1500)]
    for i, one in enumerate(found):
        if i % 3:
            index.remember_file(one.source, one.stat, name(i), NOW)
    assert index.known_files(found) == [name(i) if i % 3 else None for i in range(1500)]


def test_names_that_are_not_utf8(index):
    """A path is bytes to the system, and here."""
    old = NOW - 9 * SECOND
    index.remember_file("/a/\udcff", fake(old, old), name(1), NOW)
    assert index.known_file("/a/\udcff", fake(old, old)) == name(1)


# Nothing fails


def test_garbage_is_made_anew(tmp_path):
    """A file that is no database is replaced, and works again at once."""
    index = Index(tmp_path)
    index.feed(leaf(0, 10))
    index.close()
    path = database(tmp_path)
    path.write_bytes(os.urandom(9000))
    index = Index(tmp_path)
    assert index.lookup([name(1)]) == {}
    index.feed(leaf(0, 10))
    assert len(index.lookup([name(1)])) == 1
    index.close()


def test_every_page_may_be_damaged(tmp_path):
    """Whatever bytes a disk loses, an answer is right or missing."""
    index = Index(tmp_path / "a")
    index.feed(leaf(0, 200))
    old = NOW - 9 * SECOND
    index.remember_file("/a/b", fake(old, old), name(1), NOW)
    index.close()
    good = database(tmp_path / "a").read_bytes()
    for at in range(0, len(good), 509):
        folder = tmp_path / f"b{at}"
        folder.mkdir()
        bad = bytearray(good)
        bad[at : at + 40] = random.Random(at).randbytes(len(bad[at : at + 40]))
        (folder / database(tmp_path / "a").name).write_bytes(bad)
        index = Index(folder)
        for hash_, piece in index.lookup([name(i) for i in range(200)]).items():
            i = next(i for i in range(200) if name(i) == hash_)
            assert piece == Piece([CONTAINER, OTHER][i % 2], 16 + i, 100, 100 + i, 1, name(i))
        assert index.known_file("/a/b", fake(old, old)) in (name(1), None)
        index.close()


def test_locked_database(tmp_path):
    """While another holds the lock, writes are dropped and reads still work or are empty."""
    index = Index(tmp_path)
    index.feed(leaf(0, 10))
    index.close()
    other = sqlite3.connect(database(tmp_path), isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    index = Index(tmp_path)
    index.feed(leaf(10, 20))
    assert index.lookup([name(1)]) == {}
    other.execute("ROLLBACK")
    other.close()
    index.close()


def test_folder_that_cannot_be(tmp_path):
    """A cache folder that cannot be made is done without."""
    (tmp_path / "file").write_bytes(b"")
    index = Index(tmp_path / "file" / "cache")
    index.feed(leaf(0, 10))
    assert index.lookup([name(1)]) == {}
    assert index.known_file("/a", fake(1, 1)) is None
    index.close()


def test_another_schema(tmp_path):
    """A database of another version is made anew."""
    index = Index(tmp_path)
    index.feed(leaf(0, 10))
    index.close()
    other = sqlite3.connect(database(tmp_path))
    other.execute("PRAGMA user_version=77")
    other.close()
    assert Index(tmp_path).lookup([name(1)]) == {}


def test_size_is_bounded(tmp_path, monkeypatch):
    """Above the cap, a random half is forgotten."""
    index = Index(tmp_path)
    index.feed(leaf(0, 1000))
    index.close()
    monkeypatch.setattr("mandapa.content.index._SIZE_MAX", 1)
    index = Index(tmp_path)
    assert 300 < len(index.lookup([name(i) for i in range(1000)])) < 700
    index.close()


def test_threads(tmp_path):
    """Any number of threads may use one index."""
    index = Index(tmp_path)
    problems = []

    def work(k):
        try:
            for i in range(20):
                index.feed(leaf(k * 1000 + i * 10, k * 1000 + i * 10 + 10))
                assert len(index.lookup([name(k * 1000 + i * 10 + j) for j in range(10)])) == 10
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index.close()
    assert not problems


def test_fork(tmp_path):
    """A forked child has its own connection; parent and child both go on."""
    index = Index(tmp_path)
    index.feed(leaf(0, 10))
    assert len(index.lookup([name(1)])) == 1
    child = os.fork()
    if not child:
        code = 1
        try:
            ok = len(index.lookup([name(2)])) == 1
            index.feed(leaf(10, 20))
            index.close()
            code = 0 if ok else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(index.lookup([name(3), name(12)])) == 2
    index.close()
