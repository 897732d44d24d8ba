"""Chunks on their way into the store: found where they are already, or packed into new containers."""

from __future__ import annotations

import mmap
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from typing import NamedTuple, TypeVar

from mandapa.content.cache import ChunkCache
from mandapa.content.codecs import BF16, ZSTD, Encoded, is_bf16_copy
from mandapa.content.copies import Copy
from mandapa.content.cutters import Source
from mandapa.content.encoding import Encoder, New
from mandapa.content.index import Index, Piece, piece_of
from mandapa.content.link import Link, Mode
from mandapa.digest import Hasher, digest
from mandapa.errors import InvalidInputError
from mandapa.format.keys import container_key
from mandapa.format.manifest import BASES_MAX, Chunk, FileRow, Leaf, NodeAddress, Part
from mandapa.format.pack import HEADER, KIND_CHUNK, KIND_NODE, TRAILER_SIZE, PackEntry, pack_footer
from mandapa.format.strict import CONTAINER_MAX
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["Packer", "Placer"]

_T = TypeVar("_T")

_SMALL = 64 << 10  # chunks of fewer raw bytes may go beside the manifest nodes
_META_CHUNKS = 4 << 20  # bytes of chunks beside the nodes of a container; later ones go into packs
_TARGET = 16 << 20  # a container of this many bytes is closed
_CAPACITY = 20 << 20  # and none is filled above this
_ENTRY = 48
_BUFFER = 4 << 20  # bytes of chunks that are hashed and encoded by one call


class _Open:
    """A container that is being filled."""

    __slots__ = ("buffer", "chunk_bytes", "container", "entries", "number", "used", "view")

    def __init__(self, container: bytes, number: int, buffer: mmap.mmap) -> None:
        self.container = container
        self.number = number
        self.buffer = buffer
        self.view = memoryview(buffer)
        self.view[: len(HEADER)] = HEADER
        self.used = len(HEADER)
        self.chunk_bytes = 0
        self.entries: list[PackEntry] = []

    def fits(self, size: int) -> bool:
        return self.used + size + _ENTRY * (len(self.entries) + 1) + TRAILER_SIZE <= _CAPACITY

    def full(self) -> bool:
        return self.used + _ENTRY * len(self.entries) + TRAILER_SIZE >= _TARGET

    def append(self, data: Buffer, raw: int, codec: int, kind: int, hash_: bytes) -> int:
        offset = self.used
        end = offset + len(data)
        self.view[offset:end] = data
        self.used = end
        self.entries.append(PackEntry(offset, end - offset, raw, codec, kind, hash_))
        return offset

    def seal(self) -> int:
        """Write table and trailer; returns the container's size."""
        footer = pack_footer(self.entries, self.used)
        end = self.used + len(footer)
        assert end <= CONTAINER_MAX
        self.view[self.used : end] = footer
        self.entries = []
        return end


class Packer:
    """Puts chunks and nodes into new containers; each container is one ``put``, made while the next one is filled.

    For one thread. The containers are a function of what was added and in what order, not of ``threads``. Holds at most
    ``threads`` + 2 packs and one meta container of 20 MiB each; their memory is used again, as fresh pages cost more
    than the copy into them. A store must not keep the buffer that it was given after ``put`` has returned.

    Args:
        store: Where containers go.
        link: Learns how fast it takes them.
        threads: Puts under way at once; 0 makes each put in the caller's thread.
        new_id: Makes 16 random bytes.

    Attributes:
        table: Every container that was begun here, or numbered by `number`; grows only.
        fresh: Those that were begun here.
        added: Bytes handed to the store so far.
    """

    def __init__(self, store: ObjectStore, *, link: Link, threads: int, new_id: Callable[[], bytes]) -> None:
        self._store = store
        self._link = link
        self._threads = threads
        self._new_id = new_id
        self.table: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self._free: list[mmap.mmap] = []
        self._meta: _Open | None = None
        self._pack: _Open | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._puts: set[Future[None]] = set()
        self._error: BaseException | None = None
        self._began = False
        self._lock = threading.Lock()
        self.fresh: set[bytes] = set()
        self.added = 0
        self.before_first_put: Callable[[], None] | None = None
        self.progress: Callable[[int], None] | None = None

    def number(self, container: bytes) -> int:
        """Where a container stands in the table; it is put there when it is new."""
        found = self._numbers.get(container)
        if found is None:
            found = self._numbers[container] = len(self.table)
            self.table.append(container)
        return found

    def add_chunk(self, data: Buffer, raw: int, codec: int, hash_: bytes) -> tuple[int, int]:
        """Put a chunk's stored bytes somewhere; returns the container's number in the table, and the offset in it."""
        size = len(data)
        meta = self._meta
        if raw < _SMALL:
            if meta is None:
                meta = self._meta = self._begin(b"m")
            if meta.chunk_bytes + size <= _META_CHUNKS and meta.fits(size):
                meta.chunk_bytes += size
                return meta.number, meta.append(data, raw, codec, KIND_CHUNK, hash_)
        pack = self._pack
        if pack is not None and not pack.fits(size):
            self._send(pack)
            pack = None
        if pack is None:
            pack = self._pack = self._begin(b"p")
        offset = pack.append(data, raw, codec, KIND_CHUNK, hash_)
        if pack.full():
            self._pack = None
            self._send(pack)
        return pack.number, offset

    def add_node(self, hash_: bytes, stored: bytes, raw: int) -> NodeAddress:
        """Put a manifest node into the meta container."""
        meta = self._meta
        if meta is not None and not meta.fits(len(stored)):
            self._send(meta)
            meta = None
        if meta is None:
            meta = self._meta = self._begin(b"m")
        offset = meta.append(stored, raw, ZSTD, KIND_NODE, hash_)
        return NodeAddress(meta.container, offset, len(stored), hash_)

    def flush(self) -> None:
        """Close what is open and wait until every put is acknowledged; raises the first error of any put."""
        for opened in (self._pack, self._meta):
            if opened is not None:
                self._send(opened, last=opened is self._meta)
        self._pack = self._meta = None
        while self._puts:
            self._reap()
        self._check()

    def close(self) -> None:
        """Stop: what is open is dropped, puts under way are waited for; no error is raised."""
        self._pack = self._meta = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._puts.clear()
        self._free.clear()

    def _begin(self, kind: bytes) -> _Open:
        self._check()
        container = kind + self._new_id()
        self.fresh.add(container)
        return _Open(container, self.number(container), self._free.pop() if self._free else _new_buffer())

    def _send(self, opened: _Open, *, last: bool = False) -> None:
        """Hand a container to the store; ``last`` says that the caller waits for it anyway."""
        self._check()
        if not self._began:
            self._began = True
            if self.before_first_put is not None:
                self.before_first_put()
        size = opened.seal()
        self.added += size
        if self._threads == 0 or (last and not self._puts):
            self._put(opened, size)
            return
        while len(self._puts) > self._threads:
            self._reap()
        self._check()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="mandapa-put")
        self._puts.add(self._pool.submit(self._put, opened, size))

    def _put(self, opened: _Open, size: int) -> None:
        started = self._link.clock()
        try:
            self._store.put(container_key(opened.container), opened.view[:size])
        except BaseException as error:
            with self._lock:
                if self._error is None:
                    self._error = error
            if self._threads == 0:
                raise
            return
        self._link.put(size, self._link.clock() - started)
        opened.view.release()
        self._free.append(opened.buffer)
        if self.progress is not None:
            self.progress(size)

    def _reap(self) -> None:
        done, self._puts = wait(self._puts, return_when=FIRST_COMPLETED)
        for put in done:
            put.result()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


def _new_buffer() -> mmap.mmap:
    """Memory that costs nothing until it is written to, unlike a bytearray."""
    buffer = mmap.mmap(-1, _CAPACITY, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


class Batch(NamedTuple):
    """Neighbouring chunks of about 4 MiB together, in one buffer."""

    buffer: bytearray
    ends: list[int]
    old: Sequence[Piece | None]
    """For each chunk the one that it may be a delta to, or that one's base."""
    copies: Sequence[Copy | None]
    """For each chunk what it may be the bf16 copy of."""
    read: Callable[[memoryview], None] | None
    """Fills the buffer, in any thread; None where it is filled."""


class _Taken(NamedTuple):
    """A chunk after the part of the work that needs no order."""

    hash: bytes
    raw: int
    encoded: Encoded | None
    """None where the chunk is known."""
    base: Piece | None
    """What it was encoded as a delta to."""
    known: Piece | None
    copy: tuple[Copy, bytes] | None
    """Where the chunk is a bf16 copy: of what, and the hash of that chunk."""


class Placer:
    """Gives every chunk a place: where it is already, as far as that is known, else in a new container.

    Looks into what it has placed itself, what was seeded, what the caller knows, the index; in this order.

    Args:
        store: Where bases of deltas are read.
        packer: Where new chunks go.
        index: What this machine remembers of the repository.
        mode: How they are stored.
        link: Says how much work they may be in mode ``auto``.
        cache: Where bases of deltas may be at hand, and where new chunks are put to be such bases; for far stores.
        threads: Threads that hash and encode.

    Attributes:
        codecs: Codecs of all chunks that were placed, and of their bases.
        hits: Containers of chunks that were found, neither begun here nor inherited from the base version: whoever
            commits makes sure that they are there, and will be.
    """

    def __init__(
        self,
        store: ObjectStore,
        packer: Packer,
        index: Index,
        *,
        mode: Mode,
        link: Link,
        cache: ChunkCache | None,
        threads: int,
    ) -> None:
        self._packer = packer
        self._index = index
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._workers = min(threads, cores)
        self._encoder = Encoder(store, mode=mode, link=link, cache=cache, cores=self._workers, puts=threads)
        self._pool: ThreadPoolExecutor | None = None
        self._buffers: list[bytearray] = []
        self.placed: dict[bytes, Chunk] = {}
        self._unmapped: list[Leaf | Part] = []
        self._seeds: dict[bytes, tuple[Chunk, Sequence[bytes]]] = {}
        self._inherited: set[bytes] = set()
        self.bad: set[bytes] = set()
        self.codecs: set[int] = set()
        self.hits: set[bytes] = set()

    @property
    def leaves_floats(self) -> bool:
        """Whether floats are stored as they are, because the link is faster than any codec."""
        return self._encoder.leaves_floats

    def seed(self, node: Leaf | Part) -> None:
        """Chunks of this node are found from now on, and their containers are inherited."""
        self._unmapped.append(node)

    def inherit(self, containers: Iterable[bytes]) -> None:
        """These containers are reached from the base version."""
        self._inherited.update(containers)

    def forget(self, bad: Collection[bytes]) -> None:
        """No chunk is found in these containers any more."""
        new = set(bad) - self.bad
        if new:
            table = self._packer.table
            self.bad |= new
            self.placed = {hash_: chunk for hash_, chunk in self.placed.items() if table[chunk.container] not in new}
            self.hits -= new
            self._packer.fresh -= new

    def find(self, hashes: Sequence[bytes]) -> dict[bytes, Piece]:
        """Where chunks are that were seeded or that the index knows."""
        self._map_seeds()
        return self._find(hashes)

    def adopt(self, piece: Piece) -> Chunk:
        """Refer to a chunk that is somewhere already."""
        container = piece.container
        if container not in self._inherited and container not in self._packer.fresh:
            self.hits.add(container)
        self.codecs.add(piece.codec)
        base = None if piece.base is None else self._base(piece.base)
        chunk = Chunk(self._packer.number(container), *piece[1:5], b"", base)
        self.placed[piece.hash] = chunk
        return chunk

    def _base(self, piece: Piece) -> Chunk:
        """A chunk that another one is a delta to, as that one's row names it."""
        chunk = self.adopt(piece)
        return Chunk(chunk.container, chunk.offset, chunk.stored, chunk.raw, chunk.codec, piece.hash, chunk.base)

    def encode(self, data: Buffer, hash_: bytes) -> Chunk:
        """Encode and store a chunk that was not found; its ``hash`` field is empty."""
        [(encoded, base)] = self._encoder.encode([New(hash_, memoryview(data))])
        return self._add(hash_, len(data), encoded, base)

    def _add(self, hash_: bytes, raw: int, encoded: Encoded, base: Piece | None) -> Chunk:
        below = None if base is None else self._base(base)
        codec, stored = encoded.codec, encoded.stored
        number, offset = self._packer.add_chunk(stored, raw, codec, hash_)
        self.codecs.add(codec)
        chunk = self.placed[hash_] = Chunk(number, offset, len(stored), raw, codec, b"", below)
        return chunk

    def from_views(self, views: Iterable[memoryview]) -> Iterator[Batch]:
        """Batches of chunks, each view copied before the next is asked for."""
        batch, used = self._begin(0), 0
        for view in views:
            size = len(view)
            if used + size > len(batch.buffer):
                if used:
                    yield batch
                batch, used = self._begin(size), 0
            batch.buffer[used : used + size] = view
            used += size
            batch.ends.append(used)
        if used:
            yield batch

    def from_cuts(
        self,
        source: Source,
        path: str,
        cuts: Sequence[int],
        start: int,
        old: Sequence[Piece | None],
        copies: Mapping[int, Copy],
    ) -> Iterator[Batch]:
        """Batches of the chunks of ``source`` from ``start`` on, which is a cut or 0; read by whoever hashes them.

        Args:
            source: What is stored.
            path: Its name, for messages.
            cuts: The ends of its chunks.
            start: Where the first chunk starts.
            old: For each chunk, from the first cut on, the one that it may be a delta to.
            copies: Chunks that may be bf16 copies, by where they start.
        """
        first = bisect_right(cuts, start)
        while first < len(cuts):
            last = max(bisect_right(cuts, start + _BUFFER), first + 1)
            ends = [cut - start for cut in cuts[first:last]]
            buffer = self._begin(ends[-1]).buffer
            starts = [start, *cuts[first : last - 1]]
            read = partial(_read_all, source, path, start, ends[-1])
            yield Batch(buffer, ends, old[first:last], [copies.get(at) for at in starts], read)
            start = cuts[last - 1]
            first = last

    def place_all(
        self, batches: Iterable[Batch], known: dict[bytes, Piece], asset: Hasher
    ) -> list[tuple[bytes, Chunk]]:
        """Place chunks, in order; reading, hashing and encoding run in other threads.

        Args:
            batches: The chunks.
            known: Chunks of the base row.
            asset: Is fed with all bytes: what is hashed is what is stored.
        """
        self._map_seeds()
        placed: list[tuple[bytes, Chunk | None]] = []
        copies: dict[int, tuple[_Taken, Copy, bytes]] = {}
        waiting: deque[tuple[Batch, Future[list[_Taken]]]] = deque()

        def settle() -> None:
            batch, future = waiting.popleft()
            taken = future.result()
            asset.update(memoryview(batch.buffer)[: batch.ends[-1]])
            for one in taken:
                if one.copy is not None and one.hash not in self.placed:
                    copies[len(placed)] = one, *one.copy  # its master may come later
                    placed.append((one.hash, None))
                else:
                    placed.append((one.hash, self._settle(one)))
            if len(batch.buffer) == _BUFFER:
                self._buffers.append(batch.buffer)

        try:
            for batch in batches:
                waiting.append((batch, self.submit(self._work, batch, known)))
                if len(waiting) > self._workers:
                    settle()
            while waiting:
                settle()
        finally:
            wait([future for _, future in waiting])
        for at, (one, copy, master) in copies.items():
            placed[at] = one.hash, self._settle_copy(one, copy, master)
        return [(hash_, chunk) for hash_, chunk in placed if chunk is not None]

    def submit(self, work: Callable[..., _T], *args: object) -> Future[_T]:
        """Run in another thread, or at once where there is none."""
        if self._workers == 0:
            future: Future[_T] = Future()
            future.set_result(work(*args))
            return future
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="mandapa-encode")
        return self._pool.submit(work, *args)

    def close(self) -> None:
        """Release threads and memory."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self.placed.clear()
        self._seeds.clear()
        self._unmapped.clear()
        self._buffers.clear()

    def _begin(self, size: int) -> Batch:
        if size > _BUFFER:
            return Batch(bytearray(size), [], (), (), None)
        return Batch(self._buffers.pop() if self._buffers else bytearray(_BUFFER), [], (), (), None)

    def _work(self, batch: Batch, known: dict[bytes, Piece]) -> list[_Taken]:
        """Hash chunks, and encode those that nobody knows. In any thread: changes nothing but the batch."""
        view = memoryview(batch.buffer)
        if batch.read is not None:
            batch.read(view)
        placed, bad = self.placed, self.bad
        chunks = [view[start:end] for start, end in zip([0, *batch.ends], batch.ends, strict=False)]
        hashes = [digest(chunk) for chunk in chunks]
        found = {hash_: known[hash_] for hash_ in hashes if hash_ in known and known[hash_].container not in bad}
        unknown = [hash_ for hash_ in hashes if hash_ not in placed and hash_ not in found]
        if unknown:
            found.update(self._find(unknown))
        new: dict[bytes, New] = {}
        copies: dict[bytes, tuple[Copy, bytes]] = {}
        for hash_, chunk, old, copy in zip_longest(hashes, chunks, batch.old, batch.copies):
            if hash_ in found or hash_ in placed or hash_ in new or hash_ in copies:
                continue
            if copy is not None and is_bf16_copy(chunk, master := copy.read_master()):
                copies[hash_] = copy, digest(master)
            else:
                new[hash_] = New(hash_, chunk, old)
        encoded = dict(zip(new, self._encoder.encode(list(new.values())), strict=True))
        result = []
        for hash_, chunk in zip(hashes, chunks, strict=True):
            how, base = encoded.pop(hash_, (None, None))
            result.append(_Taken(hash_, len(chunk), how, base, found.get(hash_), copies.get(hash_)))
        return result

    def _settle(self, one: _Taken) -> Chunk:
        chunk = self.placed.get(one.hash)
        if chunk is not None:
            return chunk
        if one.known is not None:
            return self.adopt(one.known)
        assert one.encoded is not None
        return self._add(one.hash, one.raw, one.encoded, one.base)

    def _settle_copy(self, one: _Taken, copy: Copy, master: bytes) -> Chunk:
        """The place of a bf16 copy, whose master has a place by now."""
        chunk = self.placed.get(one.hash)
        if chunk is not None:
            return chunk
        of = self.placed.get(master)
        if of is None or len(of.numbers()) > BASES_MAX:
            data = copy.read()
            if digest(data) != one.hash:
                raise InvalidInputError("a file changed while it was added: add files that nobody writes any more")
            return self.encode(data, one.hash)
        number, offset = self._packer.add_chunk(b"", one.raw, BF16, one.hash)
        self.codecs.add(BF16)
        base = Chunk(of.container, of.offset, of.stored, of.raw, of.codec, master, of.base)
        chunk = self.placed[one.hash] = Chunk(number, offset, 0, one.raw, BF16, b"", base)
        return chunk

    def _find(self, hashes: Sequence[bytes]) -> dict[bytes, Piece]:
        found: dict[bytes, Piece] = {}
        rest: Sequence[bytes] = hashes
        if self._seeds:
            rest = []
            for hash_ in hashes:
                seed = self._seeds.get(hash_)
                if seed is not None and seed[1][seed[0].container] not in self.bad:
                    found[hash_] = piece_of(seed[0], hash_, seed[1])
                else:
                    rest.append(hash_)
        if rest:
            known = self._index.lookup(rest)
            found.update({hash_: piece for hash_, piece in known.items() if piece.container not in self.bad})
        return found

    def _map_seeds(self) -> None:
        for node in self._unmapped:
            table = node.containers
            self._inherited.update(table)
            for row in node.rows:
                if isinstance(row, Chunk):
                    self._seeds[row.hash] = (row, table)
                elif isinstance(row, FileRow):
                    if len(row.chunks) == 1:
                        self._seeds[row.digest] = (row.chunks[0], table)
                    else:
                        self._seeds.update([(chunk.hash, (chunk, table)) for chunk in row.chunks])
        self._unmapped.clear()


def _read_all(source: Source, path: str, offset: int, size: int, view: memoryview) -> None:
    if source.readinto(offset, view[:size]) != size:
        raise InvalidInputError(f"{path} changed while it was added: add files that nobody writes any more")
