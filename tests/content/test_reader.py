"""An asset as a file: any read gives the right bytes, and fetches little besides."""

from __future__ import annotations

import io
import os
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mandapa.content.fetch import pieces_of, read_pieces
from mandapa.content.index import Index
from mandapa.content.reader import AssetFile
from mandapa.content.tree import Located, NodeReader
from mandapa.content.upload import Upload
from mandapa.errors import ClosedError, CorruptionError, InvalidInputError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.manifest import LargeFileRow, UrlRow
from mandapa.object_store import MemoryObjectStore
from mandapa.testing.faults import CountingObjectStore

MIB = 1 << 20
DATA = random.Random(5).randbytes(24 * MIB + 7)


def stored(data, store=None, **options):
    store = CountingObjectStore(store or MemoryObjectStore())
    with Upload(store, index=Index(), **options) as upload:
        located = upload.add_bytes("model", data)
        upload.flush()
    store.reset()
    return store, located


def opened(store, located, **options):
    return AssetFile(located, store=store, load=NodeReader(store).load, **options)


@pytest.fixture(scope="module")
def asset():
    return stored(DATA)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("step", [100_000, MIB + 1, 30 * MIB])
def test_read_from_start_to_end(asset, threads, step):
    """Sequential reads of any size give the bytes in order."""
    with opened(*asset, threads=threads) as file:
        parts = []
        while part := file.read(step):
            parts.append(part)
        assert b"".join(parts) == DATA
        assert file.read(1) == b""


def test_buffered_reader(asset):
    """It works below `io.BufferedReader`, with the whole protocol of a file."""
    with io.BufferedReader(opened(*asset)) as file:
        assert file.readable()
        assert file.seekable()
        assert not file.writable()
        assert file.seek(-5, os.SEEK_END) == len(DATA) - 5
        assert file.read() == DATA[-5:]
        assert file.seek(10) == 10
        assert file.seek(5, os.SEEK_CUR) == 15
        assert file.tell() == 15
        assert file.read(3) == DATA[15:18]
        assert file.raw.name == "model"


def test_readall_and_readinto(asset):
    """`readall` gives what is left; `readinto` fills any buffer."""
    with opened(*asset) as file:
        file.seek(MIB)
        assert file.readall() == DATA[MIB:]
        file.seek(3)
        buffer = bytearray(9)
        assert file.readinto(memoryview(buffer)) == 9
        assert buffer == DATA[3:12]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DATA) + 100), st.integers(0, 2 * MIB), st.booleans()), max_size=6))
def test_any_reads(calls):
    """Reads and preads anywhere, in any order, also beyond the end."""
    with opened(*SHARED) as file:
        for offset, length, positioned in calls:
            if positioned:
                assert file.pread(length, offset) == DATA[offset : offset + length]
            else:
                file.seek(offset)
                assert file.read(length) == DATA[offset : offset + length]
                assert file.tell() == max(offset, min(offset + length, max(len(DATA), offset)))


SHARED = stored(DATA)


def test_bad_positions(asset):
    """Negative positions and lengths are refused."""
    with opened(*asset) as file:
        for call in (
            lambda: file.seek(-1),
            lambda: file.seek(0, 9),
            lambda: file.pread(-1, 0),
            lambda: file.pread(1, -1),
        ):
            with pytest.raises(InvalidInputError):
                call()


def test_empty_asset():
    """An empty asset reads as empty, without a request."""
    store, located = stored(b"")
    with opened(store, located) as file:
        assert file.read() == b""
        assert file.read(5) == b""
    assert not store.requests


def test_url_is_refused():
    """A URL is not here."""
    with pytest.raises(InvalidInputError, match="s3://x/y"):
        opened(MemoryObjectStore(), Located(UrlRow("u", "s3://x/y", None, ""), ()))


# What it costs


def test_only_what_is_read_is_fetched():
    """Opening costs nothing; a small read costs the chunks that it touches, once."""
    store, located = stored(DATA, codec="raw")
    pieces = list(pieces_of(located, NodeReader(store).load))
    store.reset()
    with opened(store, located) as file:
        assert not store.requests
        file.pread(10, 12 * MIB)
        before = store.bytes_read
        assert before <= 2 * MIB + 64 * 1024  # a chunk, and the part that names it
        file.pread(10, 12 * MIB)
        assert store.bytes_read == before
    assert len(pieces) > 20


def test_a_large_read_is_few_requests():
    """Neighbours are fetched together."""
    store, located = stored(DATA, codec="raw")
    with opened(store, located) as file:
        assert file.pread(len(DATA), 0) == DATA
    assert store.requests["get_ranges"] <= 8
    assert store.bytes_read < len(DATA) * 1.01


def test_a_header_and_one_tensor():
    """Reading a header, then a range far away, fetches little else; as readers of tensors do."""
    store, located = stored(DATA, codec="raw")
    with io.BufferedReader(opened(store, located), 128 << 10) as file:
        file.read(8)
        file.read(2000)
        file.seek(10 * MIB)
        file.read(MIB)
    assert store.bytes_read < MIB + 5 * MIB


def test_reading_on_is_not_more_than_once():
    """A reader that goes through the whole file fetches each byte once, ahead of time."""
    store, located = stored(DATA, codec="raw")
    with io.BufferedReader(opened(store, located, threads=2), 128 << 10) as file:
        while file.read(100_000):
            pass
    assert store.bytes_read < len(DATA) * 1.02
    assert store.requests["get_ranges"] < 20


def test_parts_are_loaded_when_needed(monkeypatch):
    """Of a large file's list of chunks, only the part that is read is loaded."""
    monkeypatch.setattr("mandapa.content.rows.INLINE_CHUNKS", 3)
    monkeypatch.setattr("mandapa.content.rows.PART_CHUNKS", 4)
    store, located = stored(DATA)
    assert isinstance(located.row, LargeFileRow)
    assert len(located.row.parts) > 10
    loads = []
    nodes = NodeReader(store)
    file = AssetFile(located, store=store, load=lambda address: loads.append(address) or nodes.load(address))
    with file:
        assert file.pread(10, len(DATA) - 10) == DATA[-10:]
        assert len(loads) == 1
        assert file.pread(len(DATA), 0) == DATA


# What goes wrong


def test_corrupt_bytes():
    """A flipped byte is found on read and named with key and path; other chunks still read."""
    store, located = stored(DATA, codec="raw")
    pieces = list(pieces_of(located, NodeReader(store).load))
    key = container_key(pieces[0].container)
    bad = bytearray(store.get(key))
    bad[pieces[0].offset + 5] ^= 1
    store.put(key, bytes(bad))
    with opened(store, located) as file:
        with pytest.raises(CorruptionError, match="model") as error:
            file.read(10)
        assert error.value.key == key
        assert file.pread(10, len(DATA) - 10) == DATA[-10:]


def test_missing_container():
    """Without a hook `NotFoundError`; with one that gives a new row the reader goes on in the middle."""
    store, located = stored(DATA)
    with opened(store, located, threads=0) as file:
        assert file.read(100) == DATA[:100]
        _, moved = stored(DATA, store)
        for info in list(store.list("")):
            if info.key not in keys(moved, store):
                store.delete([info.key])
        with pytest.raises(NotFoundError):
            file.pread(10, len(DATA) - 10)
    asked = []
    with opened(store, located, moved=lambda: asked.append(1) or moved) as file:
        file.seek(len(DATA) // 2)
        assert file.read() == DATA[len(DATA) // 2 :]
        file.seek(0)
        assert file.read(10) == DATA[:10]
    assert asked == [1]


def keys(located, store):
    named = {container_key(container) for container in located.table}
    return named | {container_key(piece.container) for piece in pieces_of(located, NodeReader(store).load)}


def test_moved_nowhere():
    """A row that is missing wherever it is said to be is corruption; another file's row is one too."""
    store, located = stored(DATA[:MIB])
    store.delete([info.key for info in list(store.list(""))])
    with opened(store, located, moved=lambda: located) as file, pytest.raises(CorruptionError, match="fsck"):
        file.read(1)
    _, other = stored(b"other", store)
    with opened(store, located, moved=lambda: other) as file, pytest.raises(CorruptionError, match="another"):
        file.read(1)


def test_closed(asset):
    """A closed file says so."""
    file = opened(*asset)
    file.read(10)
    file.close()
    file.close()
    for call in (lambda: file.read(1), lambda: file.pread(1, 0), lambda: file.seek(0), file.tell, file.readall):
        with pytest.raises(ClosedError):
            call()


def test_fork(asset):
    """A forked child gets a clear error, and may close its copy."""
    with opened(*asset) as file:
        file.read(3 * MIB)
        file.read(3 * MIB)
        child = os.fork()
        if not child:
            code = 1
            try:
                file.read(1)
            except ClosedError:
                file.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert file.read(1) == DATA[6 * MIB : 6 * MIB + 1]


def test_threads_may_pread(asset):
    """Several threads may use `pread` of one file."""
    problems = []
    with opened(*asset) as file:

        def work(seed):
            rng = random.Random(seed)
            for _ in range(30):
                at, length = rng.randrange(len(DATA)), rng.randrange(300_000)
                if file.pread(length, at) != DATA[at : at + length]:
                    problems.append(at)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems


# Lists of chunks


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_read_pieces(asset, threads):
    """Every piece with its bytes, in the order asked for, repeats and all."""
    store, located = asset
    pieces = list(pieces_of(located, NodeReader(store).load))
    order = [*reversed(pieces), *pieces[:3], *pieces[:3]]
    expected, at = {}, 0
    for piece in pieces:
        expected[piece.hash] = DATA[at : at + piece.raw]
        at += piece.raw
    found = list(read_pieces(store, order, threads=threads, path="model"))
    assert [piece for piece, _ in found] == order
    assert all(bytes(data) == expected[piece.hash] for piece, data in found)
    assert list(read_pieces(store, [], threads=threads, path="model")) == []


def test_read_pieces_stops_early(asset):
    """A reader that takes one and leaves does not fetch the rest, nor hang."""
    store, located = asset
    pieces = list(pieces_of(located, NodeReader(store).load)) * 10
    store.reset()
    iterator = read_pieces(store, pieces, threads=1, path="model")
    next(iterator)
    iterator.close()
    assert store.bytes_read < 60 * MIB
