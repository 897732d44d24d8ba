"""Chunks out of the store: deltas with their bases, in one wave, verified, and blamed where they are wrong."""

from __future__ import annotations

import random
import threading
from array import array

import pytest

from mandapa.content import fetch as fetch_module
from mandapa.content.cache import ChunkCache
from mandapa.content.codecs import BF16, DELTA, RAW, ZSTD, encode
from mandapa.content.download import download
from mandapa.content.fetch import Wave, read_pieces, windows
from mandapa.content.index import Piece
from mandapa.content.reader import AssetFile
from mandapa.content.tree import Located
from mandapa.digest import digest
from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.manifest import Chunk, FileRow
from mandapa.object_store import MemoryObjectStore
from mandapa.testing.faults import CountingObjectStore

MIB = 1 << 20


def floats(count, seed=0):
    """fp32 numbers as weights have them."""
    rng = random.Random(seed)
    return array("f", [rng.gauss(0, 0.02) for _ in range(count)])


def trained(numbers, seed):
    """The same, a few steps later."""
    rng = random.Random(seed)
    return array("f", [x * (1 + rng.gauss(0, 1e-5)) for x in numbers])


class Store:
    """Containers filled by hand; `rows` as a manifest would have them."""

    def __init__(self):
        self.objects = CountingObjectStore(MemoryObjectStore())
        self.bytes = {}

    def add(self, container, raw, codec=RAW, stored=None, base=None, hash_=None):
        """Put a chunk's stored bytes at the end of a container; ``stored`` is ``raw`` unless given."""
        stored = raw if stored is None else stored
        name = b"p" + bytes([container]) * 16
        data = self.bytes.setdefault(name, bytearray(16))
        offset = len(data)
        data += stored
        self.objects.put(container_key(name), bytes(data))
        self.objects.reset()
        return Piece(name, offset, len(stored), len(raw), codec, hash_ or digest(raw), base)

    def delta(self, container, raw, base, of):
        """A chunk as the writer makes it of a base: one that is smaller for it."""
        made = encode(raw, "dense", [of])
        assert made.codec == DELTA
        return self.add(container, raw, DELTA, bytes(made.stored), base)

    def hurt(self, piece, at=0):
        """Flip a bit of a stored chunk."""
        data = self.bytes[piece.container]
        data[piece.offset + at] ^= 1
        self.objects.put(container_key(piece.container), bytes(data))

    def located(self, path, raws, pieces):
        """The row of a file of these chunks."""
        table = []

        def chunk(piece, named=True):
            if piece.container not in table:
                table.append(piece.container)
            base = None if piece.base is None else chunk(piece.base)
            return Chunk(table.index(piece.container), *piece[1:5], piece.hash if named else b"", base)

        chunks = tuple([chunk(piece, len(pieces) > 1) for piece in pieces])
        content = b"".join(raws)
        return Located(FileRow(path, len(content), 0, digest(content), chunks), table)


def none(_):
    pytest.fail("there are no parts")


FIRST = floats(50_000)
SECOND = trained(FIRST, 1)
THIRD = trained(SECOND, 2)
A, B, C = FIRST.tobytes(), SECOND.tobytes(), THIRD.tobytes()


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def chain(store):
    """A chunk, a delta to it, and a delta to that, in three containers."""
    first = store.add(1, A)
    second = store.delta(2, B, first, A)
    third = store.delta(3, C, second, B)
    return first, second, third


@pytest.mark.parametrize("threads", [0, 4])
def test_a_chain_comes_in_one_wave(store, chain, threads):
    """A delta to a delta: three requests, none of which waits for another."""
    wave = Wave(store.objects, [chain[2]], str)
    assert len(wave.requests) == 3
    assert wave.all(threads) == [C]
    assert store.objects.requests == {"get_ranges": 3}


def test_requests_in_any_order(store, chain):
    """Whichever request comes last completes the chunk; the others complete nothing."""
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        wave = Wave(store.objects, [chain[2]], str)
        found = [wave.fetch(wave.requests[at]) for at in order]
        assert [len(values) for values in found] == [0, 0, 1]
        assert found[2] == [(0, C)]


def test_bases_are_fetched_and_decoded_once(store, monkeypatch):
    """Two deltas to one base, which is wanted itself: one range, and one decoding."""
    packed = encode(A, "dense")
    base = store.add(1, A, packed.codec, bytes(packed.stored))
    assert packed.codec not in (RAW, DELTA)
    pieces = [store.delta(2, B, base, A), base, store.delta(2, C, base, A)]
    real, decoded = fetch_module.decode, []
    monkeypatch.setattr(fetch_module, "decode", lambda codec, *rest: decoded.append(codec) or real(codec, *rest))
    assert Wave(store.objects, pieces, str).all(0) == [B, A, C]
    assert store.objects.requests == {"get_ranges": 2}
    assert sorted(decoded) == sorted([packed.codec, DELTA, DELTA])


def test_bases_count_in_windows():
    """Without bases 8 MiB make a window, with them 24; a base that several stand on counts once."""

    def piece(offset=16, base=None):
        return Piece(b"p" * 17, offset, 4 * MIB, 4 * MIB, RAW, b"h" * 32, base)

    def lengths(pieces):
        return [len(window) for window in windows(pieces, lambda item: item)]

    assert lengths([piece()] * 5) == [2, 2, 1]
    assert lengths([piece(0, piece(i, piece(i))) for i in range(5)]) == [2, 2, 1]
    assert lengths([piece(0, piece(7, piece(7)))] * 5) == [4, 1]
    huge = piece()._replace(raw=16 * MIB, stored=16 * MIB)
    deep = huge._replace(base=huge._replace(base=huge))
    assert lengths([piece(), deep, piece()]) == [1, 1, 1]
    wave = Wave(MemoryObjectStore(), [deep], str)
    assert wave.size == 48 * MIB


def test_a_copy_of_which_nothing_is_stored(store):
    """A bf16 copy of fp32 numbers has no bytes of its own, and is had from its base alone."""
    from mandapa.content.codecs.bf16 import round_to_bf16

    base = store.add(1, A)
    copy = bytes(round_to_bf16(A))
    piece = store.add(2, copy, BF16, b"", base)
    assert Wave(store.objects, [piece], str).all(0) == [copy]
    located = store.located("f", [copy, A], [piece, base])
    assert AssetFile(located, store=store.objects, load=none).readall() == copy + A


@pytest.mark.parametrize("threads", [0, 2])
def test_files_of_deltas(store, tmp_path, threads):
    """Downloads, files and fsck's reads take deltas; a base that is in the same file is fetched once."""
    count = 6
    olds = [floats(20_000, seed) for seed in range(count)]
    raws = [old.tobytes() for old in olds]
    bases = [store.add(1, raw) for raw in raws]
    news = [trained(old, 9).tobytes() for old in olds]
    pieces = [store.delta(2, new, base, raw) for new, base, raw in zip(news, bases, raws, strict=True)]
    located = store.located("f", [*news, *raws], [*pieces, *bases])
    content = b"".join([*news, *raws])
    assert [bytes(value) for _, value in read_pieces(store.objects, [*pieces, *bases], path="f", threads=threads)] == [
        *news,
        *raws,
    ]
    with AssetFile(located, store=store.objects, load=none, threads=threads) as file:
        assert file.pread(1000, len(news[0]) - 500) == content[len(news[0]) - 500 :][:1000]
        assert file.readall() == content
    store.objects.reset()
    result = download([located], tmp_path, store=store.objects, load=none, threads=threads)
    assert (tmp_path / "f").read_bytes() == content
    assert result.bytes == len(content)
    assert store.objects.requests == {"get_ranges": 2}


def test_deltas_are_put_beside_their_bases(store, tmp_path):
    """Where a file holds bases in another window, each container's bytes are still fetched once."""
    raws = [floats(300_000, seed).tobytes() for seed in range(16)]  # 19 MB: windows of 8 MiB
    bases = [store.add(1, raw) for raw in raws]
    from mandapa.content.codecs.bf16 import round_to_bf16

    copies = [bytes(round_to_bf16(raw)) for raw in raws]
    pieces = [store.add(2, copy, BF16, b"", base) for copy, base in zip(copies, bases, strict=True)]
    located = store.located("f", [*copies, *raws], [*pieces, *bases])
    store.objects.reset()
    download([located], tmp_path, store=store.objects, load=none)
    assert (tmp_path / "f").read_bytes() == b"".join([*copies, *raws])
    assert store.objects.bytes_read < 1.1 * sum(map(len, raws))


def test_threads_share_a_wave(store):
    """Many deltas to one base, fetched by many threads, come out right whatever comes first."""
    base = store.add(1, A)
    news = [trained(FIRST, seed).tobytes() for seed in range(8)]
    pieces = [store.delta(10 + i, new, base, A) for i, new in enumerate(news)]
    for seed in range(10):
        wave = Wave(store.objects, pieces, str)
        random.Random(seed).shuffle(wave.requests)
        assert wave.all(9) == news


# What is wrong


def message(store, piece):
    with pytest.raises(CorruptionError) as error:
        Wave(store.objects, [piece], lambda _: "a/path").all(0)
    assert str(error.value).startswith("a/path: ")
    return error.value


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_chunk_to_blame_is_named(store, chain, which):
    """A flipped bit anywhere in a chain: the container that has it is named, and nothing comes out."""
    store.hurt(chain[which], at=chain[which].stored // 2)
    error = message(store, chain[2])
    assert error.key == container_key(chain[which].container)
    assert f"bytes {chain[which].offset}+{chain[which].stored}" in str(error)


def test_every_byte_of_a_delta(store):
    """No flipped bit in a delta or its base lets wrong bytes pass."""
    numbers = floats(2000)
    raw = trained(numbers, 1).tobytes()
    base = store.add(1, numbers.tobytes())
    piece = store.delta(2, raw, base, numbers.tobytes())
    for hurt in (piece, base):
        for at in range(0, hurt.stored, 97):
            store.hurt(hurt, at)
            message(store, piece)
            store.hurt(hurt, at)
    assert Wave(store.objects, [piece], str).all(0) == [raw]


def test_base_where_none_is_due(store, chain):
    """A base for a codec without, none for a codec with: corrupt."""
    first, second, _ = chain
    message(store, second._replace(base=None))
    message(store, first._replace(base=second))
    packed = encode(b"text " * 9000, "fast")
    assert packed.codec == ZSTD
    message(store, store.add(4, b"text " * 9000, ZSTD, packed.stored, first))


def test_a_base_that_lies(store, chain):
    """Another chunk than the writer's, another length, a range beyond the end, the chunk itself: corrupt."""
    first, second, _ = chain
    other = store.add(5, floats(50_000, 5).tobytes())
    message(store, second._replace(base=other))
    message(store, second._replace(base=other._replace(hash=first.hash)))
    message(store, second._replace(base=first._replace(raw=4, stored=4)))
    message(store, second._replace(base=first._replace(raw=16 * MIB)))
    message(store, second._replace(base=second._replace(base=None)))
    message(store, second._replace(base=second._replace(base=second._replace(base=None))))
    with pytest.raises(CorruptionError):
        Wave(store.objects, [second._replace(base=first._replace(offset=MIB))], str).all(0)


def test_a_base_that_is_gone(store, chain):
    """A base's container that is not there is missing, as the chunk's own is; an unknown codec is said so."""
    store.objects.delete([container_key(chain[0].container)])
    for piece in chain:
        with pytest.raises(NotFoundError):
            Wave(store.objects, [piece], str).all(0)
    with pytest.raises(FormatVersionError):
        Wave(store.objects, [store.add(6, b"x" * 99, 999)], str).all(0)


# With a cache


def test_what_the_cache_has_is_not_fetched(store, chain, tmp_path):
    """Chunks, and bases, come from the cache; what was fetched is in it."""
    cache = ChunkCache(tmp_path, 1 << 30)
    cache.put(chain[1].hash, B)
    wave = Wave(store.objects, [chain[2]], str, cache)
    assert wave.all(2) == [C]
    assert store.objects.requests == {"get_ranges": 1}
    assert cache.get(chain[2].hash) == C
    assert Wave(store.objects, [chain[2], chain[1]], str, cache).all(2) == [C, B]
    assert store.objects.requests == {"get_ranges": 1}


def test_a_damaged_cache_is_fetched_past(store, chain, tmp_path):
    """Bytes of the cache that are wrong are not used: for a chunk, and for a base."""
    cache = ChunkCache(tmp_path, 1 << 30)
    for number in (1, 2):
        cache.put(chain[number].hash, (B, C)[number - 1])
        [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
        path.write_bytes(bytes(path.stat().st_size))
        wave = Wave(store.objects, [chain[2]], str, cache)
        assert wave.all(2) == [C]
        for path in tmp_path.rglob("*"):
            if path.is_file():
                path.unlink()


def test_thrown_out_while_it_was_planned_with(store, chain, tmp_path):
    """A chunk that leaves the cache between planning and reading is fetched."""
    cache = ChunkCache(tmp_path, 1 << 30)
    cache.put(chain[0].hash, A)
    cache.put(chain[1].hash, B)
    wave = Wave(store.objects, [chain[0], chain[2]], str, cache)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.unlink()
    assert wave.all(2) == [A, C]


def test_no_thread_is_left(store, chain):
    """A wave's threads end with it."""
    before = threading.active_count()
    Wave(store.objects, [chain[2]], str).all(4)
    assert threading.active_count() == before
