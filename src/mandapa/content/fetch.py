"""Verified bytes of chunks: few requests, several at once, bases of deltas in the same wave."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import NamedTuple, TypeVar

from mandapa.content.cache import ChunkCache
from mandapa.content.codecs import decode
from mandapa.content.index import Piece, piece_of
from mandapa.content.parallel import in_order
from mandapa.content.tree import Located, child_address
from mandapa.digest import digest
from mandapa.errors import CorruptionError
from mandapa.format.keys import container_key
from mandapa.format.manifest import LargeFileRow, Node, NodeAddress, Part, UrlRow
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["Request", "Room", "StoredWave", "Wave", "chain_size", "fly", "pieces_of", "read_pieces", "windows"]

_WINDOW_BYTES = 8 << 20
_WINDOW_PIECES = 4096
_CHAIN_BYTES = 24 << 20  # with bases: two chunks of 4 MiB that stand on two others each
_REQUEST_BYTES = 16 << 20
_UNDER_WAY = 128 << 20
_GAP = 64 << 10  # unwanted bytes that are cheaper to read than another request
_CACHED = b""  # stands for a container: what the cache has, so that it is read by a thread of its own as well

_T = TypeVar("_T")
_W = TypeVar("_W", bound="Wave")


class Request(NamedTuple):
    """One range of one container, and what it holds of what is wanted."""

    container: bytes
    offset: int
    length: int
    wanted: list[tuple[int, Piece]]
    """The position of a piece of the wave, and that piece or one of its bases."""


class Room:
    """Says how many pieces go into one window.

    About 8 MiB, stored or decoded, whichever is more; 24 MiB with bases; 4,096 pieces. Deltas stay with their base
    where they come right after it.
    """

    def __init__(self) -> None:
        self._size = self._chain = self._count = 0
        self._base: Piece | None = None  # of the last piece, or that itself

    def takes(self, piece: Piece) -> bool:
        """Whether the piece fits; if not, a new window begins with it."""
        size = _size(piece)
        beside = piece.base is not None and piece.base == self._base
        chain = chain_size(piece)
        self._base = piece.base or piece
        self._size += size
        self._chain += size if beside else chain
        self._count += 1
        full = self._chain > _CHAIN_BYTES or self._count > _WINDOW_PIECES or (self._size > _WINDOW_BYTES and not beside)
        if full and self._count > 1:
            self._size, self._chain, self._count = size, chain, 1
            return False
        return True


def windows(items: Iterable[_T], piece_of: Callable[[_T], Piece]) -> Iterator[list[_T]]:
    """The items in groups as large as a `Room`; never an empty group."""
    room = Room()
    window: list[_T] = []
    for item in items:
        if not room.takes(piece_of(item)):
            yield window
            window = []
        window.append(item)
    if window:
        yield window


class Wave:
    """Pieces that are fetched together: the requests that this takes, and what each of them completes.

    Neighbours in one container are joined across gaps of up to 64 KiB, up to 16 MiB. Bases are fetched beside the
    deltas that stand on them, once where they are wanted themselves, and decoded once. Each request is to be made once,
    in any order and by any thread: a piece comes out of the last one that it needs.

    Args:
        store: Where the containers are.
        pieces: What is wanted.
        path_of: The asset that a piece belongs to, by its position; for messages.
        cache: What it has is not fetched, what is fetched is put there.

    Attributes:
        pieces: What was asked for.
        requests: What is to be given to `fetch`.
        size: Bytes of memory that it may take, about.
    """

    def __init__(
        self,
        store: ObjectStore,
        pieces: Sequence[Piece],
        path_of: Callable[[int], str],
        cache: ChunkCache | None = None,
    ) -> None:
        self._store = store
        self.pieces = pieces
        self._path_of = path_of
        self._cache = cache
        self._lock = threading.Lock()
        self._missing: dict[int, int] = {}  # ranges that a delta waits for
        self._stored: dict[Piece, memoryview] = {}
        self._shared: set[Piece] = set()  # bases, which may be wanted themselves
        self._base_lock = threading.RLock()
        self._bases: dict[Piece, Buffer] = {}
        self.size = 0
        self.requests = self._plan()

    def _plan(self) -> list[Request]:
        cached: list[tuple[int, Piece]] = []
        places: list[tuple[int, Piece]] = []
        for i, piece in enumerate(self.pieces):
            self.size += _size(piece)
            if self._is_cached(piece):
                cached.append((i, piece))
                continue
            places.append((i, piece))
            base = piece.base
            if base is not None:
                self._missing[i] = 1
                while base is not None and not self._is_cached(base):
                    self.size += _size(base)
                    self._missing[i] += 1
                    self._shared.add(base)
                    places.append((i, base))
                    base = base.base
        requests = [Request(_CACHED, 0, 0, cached)] if cached else []
        places.sort(key=lambda place: place[1][:2])
        container, start, end = b"", 0, 0
        wanted: list[tuple[int, Piece]] = []
        for place in places:
            where, offset, stored = place[1][:3]
            if where == container and offset <= end + _GAP and max(end, offset + stored) - start <= _REQUEST_BYTES:
                end = max(end, offset + stored)
                wanted.append(place)
                continue
            if wanted:
                requests.append(Request(container, start, end - start, wanted))
            container, start, end, wanted = where, offset, offset + stored, [place]
        if wanted:
            requests.append(Request(container, start, end - start, wanted))
        return requests

    def fetch(self, request: Request) -> list[tuple[int, Buffer]]:
        """The pieces that this request completes: positions, and raw bytes, verified. One store request, or none.

        Raises:
            NotFoundError: The container is not there (any more).
            CorruptionError: Bytes do not decode, or are not those that were stored; names key and path.
            FormatVersionError: A chunk is stored with an unknown codec.
        """
        if request.container == _CACHED:
            return [(i, self._from_cache(i, piece)) for i, piece in request.wanted]
        [data] = self._store.get_ranges(container_key(request.container), [(request.offset, request.length)])
        view = memoryview(data)
        ready: list[tuple[int, memoryview | None]] = []
        for i, one in request.wanted:
            at = one.offset - request.offset
            stored = view[at : at + one.stored]
            if self._missing:  # some are deltas: what they stand on is kept
                self._stored[one] = stored
            if i in self._missing:
                with self._lock:
                    self._missing[i] -= 1
                    if self._missing[i]:
                        continue
            ready.append((i, stored if one is self.pieces[i] else None))
        return [(i, self._finished(i, stored)) for i, stored in ready]

    def all(self, threads: int) -> list[Buffer]:
        """The raw bytes of all pieces, in order, by up to ``threads`` requests at once. Raises as `fetch`."""
        return self.in_order(in_order(self.fetch, self.requests, threads=threads))

    def in_order(self, answers: Iterable[list[tuple[int, Buffer]]]) -> list[Buffer]:
        """The raw bytes of all pieces, in order, from what `fetch` gave for all requests."""
        values: list[Buffer] = [b""] * len(self.pieces)
        for found in answers:
            for i, value in found:
                values[i] = value
        return values

    def _is_cached(self, piece: Piece) -> bool:
        return self._cache is not None and self._cache.has(piece.hash, piece.raw)

    def _from_cache(self, i: int, piece: Piece) -> Buffer:
        assert self._cache is not None
        kept = self._cache.get(piece.hash)
        if kept is not None and len(kept) == piece.raw:
            return kept
        # Thrown out meanwhile, or damaged.
        [value] = Wave(self._store, [piece], lambda _: self._path_of(i)).all(threads=0)
        self._cache.put(piece.hash, value)
        return value

    def _finished(self, i: int, stored: memoryview | None) -> Buffer:
        piece = self.pieces[i]
        value = self._base(i, piece) if piece in self._shared else self._raw(i, piece, stored)
        if digest(value) != piece.hash:
            raise self._corrupt(i, piece, "their BLAKE3 is not the one that was stored")
        if self._cache is not None:
            self._cache.put(piece.hash, value)
        return value

    def _raw(self, i: int, piece: Piece, stored: memoryview | None = None) -> Buffer:
        """The decoded bytes, not yet verified."""
        if stored is None:
            stored = self._stored[piece]
        base = None if piece.base is None else self._base(i, piece.base)
        try:
            return decode(piece.codec, stored, piece.raw, base)
        except CorruptionError as error:
            raise self._corrupt(i, piece, str(error)) from None

    def _base(self, i: int, base: Piece) -> Buffer:
        # Whether it is the right one shows in the hash of what stands on it.
        with self._base_lock:
            value = self._bases.get(base)
            if value is None:
                value = self._bases[base] = self._raw(i, base) if base in self._stored else self._from_cache(i, base)
            return value

    def _corrupt(self, i: int, piece: Piece, why: str) -> CorruptionError:
        """What to say of a piece that cannot be had: where the bytes are that are to blame."""
        for base in reversed(piece.chain()[1:]):
            if base in self._bases and digest(self._bases[base]) != base.hash:
                piece, why = base, "their BLAKE3 is not the one that was stored, and other chunks are deltas to them"
                break
        key = container_key(piece.container)
        return CorruptionError(f"{self._path_of(i)}: {key}, bytes {piece.offset}+{piece.stored}: {why}", key=key)


class StoredWave(Wave):
    """The same, but what comes out is the bytes as they are stored; what they decode to was verified all the same."""

    def __init__(self, store: ObjectStore, pieces: Sequence[Piece], path_of: Callable[[int], str]) -> None:
        super().__init__(store, pieces, path_of)  # a cache has only decoded bytes

    def _finished(self, i: int, stored: memoryview | None) -> Buffer:
        super()._finished(i, stored)
        return self._stored[self.pieces[i]] if stored is None else stored


def fly(
    waves: Iterable[_W], work: Callable[[_W, Request], _T], pool: ThreadPoolExecutor | None, *, most: int
) -> Iterator[tuple[_W, list[_T]]]:
    """``work`` for every request of every wave, in the pool's threads; gives the waves in order, with the answers.

    Up to ``most`` waves and 128 MiB are under way besides the one that is taken; a wave alone may be larger. The first
    error is raised at its place, and what has not begun by then is not begun.
    """
    waiting: deque[tuple[_W, list[Future[_T]]]] = deque()
    size = 0
    try:
        for wave in waves:
            while waiting and (len(waiting) > most or size + wave.size > _UNDER_WAY):
                first, jobs = waiting[0]
                yield first, [job.result() for job in jobs]
                waiting.popleft()
                size -= first.size
            if pool is None:
                yield wave, [work(wave, request) for request in wave.requests]
            else:
                waiting.append((wave, [pool.submit(work, wave, request) for request in wave.requests]))
                size += wave.size
        while waiting:
            first, jobs = waiting[0]
            yield first, [job.result() for job in jobs]
            waiting.popleft()
    finally:
        for _, jobs in waiting:
            for job in jobs:
                job.cancel()


def pieces_of(located: Located, load: Callable[[NodeAddress], Node]) -> Iterator[Piece]:
    """The chunks of a file's row, in order, each with its container and hash.

    Args:
        located: The row of a file.
        load: Reads a node, as `NodeReader.load`; called once for each part of a large file.

    Raises:
        CorruptionError: A part is not what the row says.
    """
    row, table = located
    if isinstance(row, UrlRow):
        return
    if isinstance(row, LargeFileRow):
        for address in row.parts:
            part = load(child_address(address, table))
            if not isinstance(part, Part) or sum([chunk.raw for chunk in part.rows]) != address.raw:
                raise CorruptionError(f"a part of {row.path!r} is not the one that its row names")
            for chunk in part.rows:
                yield piece_of(chunk, chunk.hash, part.containers)
    elif len(row.chunks) == 1:
        yield piece_of(row.chunks[0], row.digest, table)
    else:
        for chunk in row.chunks:
            yield piece_of(chunk, chunk.hash, table)


def read_pieces(
    store: ObjectStore,
    pieces: Iterable[Piece],
    *,
    path: str,
    threads: int = 4,
    wave: type[Wave] | type[StoredWave] = Wave,
) -> Iterator[tuple[Piece, Buffer]]:
    """Each piece with its raw bytes, verified, in the order asked for; with `StoredWave` with its stored bytes.

    Neighbours are fetched by one request of up to 16 MiB; up to ``threads`` windows of about 8 MiB are under way, and
    as many wait to be taken. ``threads=0`` fetches in the caller's thread.

    Raises:
        NotFoundError: A container is not there (any more).
        CorruptionError: Bytes are not those that were stored; names key and ``path``.
    """
    waves = (wave(store, window, lambda _: path) for window in windows(pieces, lambda piece: piece))
    begun = list(islice(waves, 2))
    pool = None
    if threads and sum([len(one.requests) for one in begun]) > 1:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="mandapa-get")
    try:
        for one, found in fly(chain(begun, waves), lambda one, request: one.fetch(request), pool, most=threads):
            yield from zip(one.pieces, one.in_order(found), strict=True)
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def chain_size(piece: Piece) -> int:
    """Bytes of memory that it takes to have a chunk, bases included."""
    return _size(piece) if piece.base is None else sum([_size(one) for one in piece.chain()])


def _size(piece: Piece) -> int:
    return max(piece.raw, piece.stored)
