"""Assets of another repository on their way into this one: chunks found here, or copied as they are stored there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, cast

from mandapa.content.cache import ChunkCache
from mandapa.content.codecs import required
from mandapa.content.fetch import Wave, fly, pieces_of, windows
from mandapa.content.index import Index, Piece
from mandapa.content.link import Link
from mandapa.content.packing import Packer, Placer
from mandapa.content.rows import RowMaker
from mandapa.content.tree import Located, NodeReader
from mandapa.digest import digest
from mandapa.errors import CorruptionError
from mandapa.format.keys import container_key
from mandapa.format.manifest import BASES_MAX, Chunk, FileRow, Leaf, NodeAddress, UrlRow
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["Origin", "Transfer"]

_ROWS = 2048  # of which the chunks are looked up together
_CHUNKS = 16_384
_CHAIN = BASES_MAX + 1  # chunks that one stands on, itself included


class Origin(NamedTuple):
    """Where assets come from."""

    store: ObjectStore
    nodes: NodeReader
    cache: ChunkCache | None
    """Bases of deltas that need not be fetched."""
    threads: int
    """Requests at once; 0 makes them in the caller's thread."""


class Transfer:
    """Copies assets from one repository into containers of one transaction of another.

    A chunk that is here already, in whatever encoding, is referred to; another one is copied byte for byte as it is
    stored there, with the chunks that it is a delta to, after it was decoded and compared with its hash. Rows may be
    used once `flush` has returned.

    What was put is remembered by the index under ``journal``: a transfer of the same journal, in this process or a
    later one, finds it, whether or not anything names it by then. A hint like all that the index says.

    For one thread.

    Args:
        origin: The other repository.
        store: Where containers go.
        index: What this machine remembers of the repository that they go into.
        nodes: Reads nodes of that repository.
        link: Learns how fast its store takes bytes.
        threads: Puts under way at once; 0 makes each in the caller's thread.
        new_id: Makes 16 random bytes, for the names of containers.
        journal: Names what is copied, the same each time.
        progress: Called with the bytes of each container that was put, from the thread that put it.
    """

    def __init__(
        self,
        origin: Origin,
        store: ObjectStore,
        *,
        index: Index,
        nodes: NodeReader,
        link: Link,
        threads: int,
        new_id: Callable[[], bytes],
        journal: bytes,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._origin = origin
        # Of a store a packer only asks to put.
        noting = cast("ObjectStore", _Noting(store, self._note))
        self._packer = Packer(noting, link=link, threads=threads, new_id=new_id)
        self._packer.progress = progress
        self._placer = Placer(store, self._packer, index, mode="raw", link=link, cache=None, threads=0)
        self._nodes = nodes
        self._rows = RowMaker(self._packer, index, nodes)
        self._journal = _Journal(index, journal)
        self._known = {piece.hash: piece for piece in self._journal.read()}
        self._lock = threading.Lock()
        self._pending: list[Chunk] = []
        """Chunks that the journal does not know: something that they need is on its way."""
        self._there: set[str] = set()
        """Keys of containers that were acknowledged."""

    @property
    def hits(self) -> set[bytes]:
        """Containers named because a chunk was found in them, which are not reached from the base version."""
        return self._placer.hits

    @property
    def fresh(self) -> set[bytes]:
        """Containers that this transfer has put, is putting, or has begun to fill."""
        return self._packer.fresh

    @property
    def requires(self) -> set[str]:
        """Features of the format that rows made here need."""
        return required(self._placer.codecs)

    @property
    def added(self) -> int:
        """Bytes handed to the store so far."""
        return self._packer.added

    def seed(self, leaf: Leaf) -> None:
        """Chunks of a leaf that is reached from the base version: found from now on, and not counted as hits."""
        self._placer.seed(leaf)

    def add(
        self, rows: Iterable[Located], base_of: Callable[[str], Located | None], *, inherited: bool
    ) -> Iterator[Located]:
        """The rows of assets of the other repository as they stand here, in order, in groups.

        Args:
            rows: Of the other repository.
            base_of: The row of a path here that is likely to have chunks of it, or None.
            inherited: Whether these rows are reached from the base version.

        Raises:
            NotFoundError: A container of the other repository, or a node that ``base_of`` reads, is not there.
            CorruptionError: Bytes of the other repository are not those that were stored.
            StorageError: A store failed.
        """
        group: list[tuple[Located, list[Piece]]] = []
        count = 0
        for located in rows:
            pieces = list(pieces_of(located, self._origin.nodes.load))
            group.append((located, pieces))
            count += len(pieces)
            if len(group) >= _ROWS or count >= _CHUNKS:
                yield from self._add_group(group, base_of, inherited)
                group, count = [], 0
        yield from self._add_group(group, base_of, inherited)

    def put_node(self, hash_: bytes, stored: bytes, raw_size: int) -> NodeAddress:
        """Put a manifest node into the current meta container."""
        return self._packer.add_node(hash_, stored, raw_size)

    def flush(self) -> None:
        """Close the open containers and wait until every put is acknowledged; raises the first error of any."""
        self._packer.flush()

    def forget(self, bad: Collection[bytes]) -> None:
        """Find nothing in these containers any more: a gc has listed them, or they are gone."""
        self._placer.forget(bad)

    def close(self) -> None:
        """Drop what is not flushed, wait for puts under way, release threads and memory. Any number of times."""
        self._placer.close()
        self._packer.close()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Rows

    def _add_group(
        self, group: list[tuple[Located, list[Piece]]], base_of: Callable[[str], Located | None], inherited: bool
    ) -> Iterator[Located]:
        bases = [None if isinstance(located.row, UrlRow) else base_of(located.row.path) for located, _ in group]
        self._find(group, bases, inherited)
        coming = _Coming(self)
        for located, pieces in group:
            for piece in pieces:
                coming.need(piece, _CHAIN, located.row.path)
        self._copy(coming.pieces)
        placed, table = self._placer.placed, self._packer.table
        for (located, pieces), base in zip(group, bases, strict=True):
            row = located.row
            if isinstance(row, UrlRow):
                yield Located(row, ())
            elif not pieces:
                yield Located(FileRow(row.path, row.size, row.mode, row.digest, ()), table)
            else:
                chunks = [(piece.hash, placed[piece.hash]) for piece in pieces]
                reuse = base if inherited and not self._placer.bad else None
                yield self._rows.make(row.path, row.size, row.mode, row.digest, chunks, reuse)

    def _find(self, group: list[tuple[Located, list[Piece]]], bases: Sequence[Located | None], inherited: bool) -> None:
        """Learn which chunks of these rows are here."""
        for base in bases:
            here = [] if base is None else list(pieces_of(base, self._nodes.load))
            self._known.update([(piece.hash, piece) for piece in here])
            if inherited:
                self._placer.inherit([one.container for piece in here for one in piece.chain()])
        wanted = {one.hash for _, pieces in group for piece in pieces for one in piece.chain()}
        self._known.update(self._placer.find([hash_ for hash_ in wanted if not self._has(hash_)]))

    def _has(self, hash_: bytes) -> bool:
        return hash_ in self._placer.placed or self.find(hash_, _CHAIN) is not None

    def depth(self, hash_: bytes) -> int | None:
        """Of how many chunks the one that stands for this hash consists; None when none does yet."""
        chunk = self._placer.placed.get(hash_)
        if chunk is None:
            return None
        numbers = chunk.numbers()
        # What it stands on may have been condemned after it.
        sound = not self._placer.bad or self._placer.bad.isdisjoint([self._packer.table[n] for n in numbers])
        return len(numbers) if sound else None

    def find(self, hash_: bytes, most: int) -> Piece | None:
        """Where a chunk is here, which stands with all its bases on ``most`` at most."""
        piece = self._known.get(hash_)
        if piece is None or len(piece.chain()) > most:
            return None
        return piece if self._placer.bad.isdisjoint([one.container for one in piece.chain()]) else None

    def adopt(self, piece: Piece) -> None:
        """Let a chunk that is here stand for its hash."""
        placed = self._placer.placed
        before = {one.hash: placed[one.hash] for one in piece.chain()[1:] if self.depth(one.hash)}
        self._placer.adopt(piece)
        # What stands on fewer chunks goes on standing for the hashes of its bases.
        placed.update(
            [(hash_, old) for hash_, old in before.items() if len(old.numbers()) < len(placed[hash_].numbers())]
        )

    # Bytes

    def _copy(self, pieces: list[tuple[Piece, str]]) -> None:
        """Fetch, verify and store chunks, each after those that it stands on."""
        origin = self._origin
        waves = (_Stored(origin, window) for window in windows(pieces, lambda item: item[0]))
        pool = None
        if origin.threads and len(pieces) > 1:
            pool = ThreadPoolExecutor(origin.threads, thread_name_prefix="mandapa-get")
        try:
            for wave, answers in fly(waves, lambda wave, request: wave.fetch(request), pool, most=origin.threads):
                for piece, stored in zip(wave.pieces, wave.in_order(answers), strict=True):
                    self._store(piece, stored)
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _store(self, piece: Piece, stored: Buffer) -> None:
        base = None
        if piece.base is not None:
            below = self._placer.placed[piece.base.hash]
            base = Chunk(*_place(below), piece.base.hash, below.base)
        number, offset = self._packer.add_chunk(stored, piece.raw, piece.codec, piece.hash)
        self._placer.codecs.add(piece.codec)
        chunk = Chunk(number, offset, len(stored), piece.raw, piece.codec, b"", base)
        with self._lock:
            self._pending.append(Chunk(*_place(chunk), piece.hash, base))
        old = self.depth(piece.hash)
        if old is None or len(chunk.numbers()) < old:
            self._placer.placed[piece.hash] = chunk

    def _note(self, key: str) -> None:
        """An object was acknowledged: remember the chunks that have all that they need by now. In any thread."""
        table, fresh = self._packer.table, self._packer.fresh
        with self._lock:
            self._there.add(key)
            done: list[Chunk] = []
            rest: list[Chunk] = []
            for chunk in self._pending:
                names = fresh.intersection([table[number] for number in chunk.numbers()])
                (done if self._there.issuperset(map(container_key, names)) else rest).append(chunk)
            self._pending = rest
            if done:
                self._journal.add(done, table)


class _Coming:
    """Which chunks have to be copied, each after what it stands on."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._depth: dict[bytes, int] = {}
        self.pieces: list[tuple[Piece, str]] = []

    def need(self, piece: Piece, most: int, path: str) -> int:
        """See to a chunk that may stand, with its bases, on ``most`` at most; gives on how many it will."""
        there = self._transfer.depth(piece.hash)
        if there is not None and there <= most:
            return there
        here = self._transfer.find(piece.hash, most)
        if here is not None:
            self._transfer.adopt(here)
            return len(here.chain())
        coming = self._depth.get(piece.hash)
        if coming is not None and coming <= most:
            return coming
        if most < 1:
            raise CorruptionError(f"{path}: a chunk with more bases than the format allows")
        depth = 1 if piece.base is None else 1 + self.need(piece.base, most - 1, path)
        self._depth[piece.hash] = depth
        self.pieces.append((piece, path))
        return depth


class _Stored(Wave):
    """Chunks as the origin has stored them, decoded and verified; only what they stand on may come from its cache."""

    def __init__(self, origin: Origin, items: list[tuple[Piece, str]]) -> None:
        pieces = [piece for piece, _ in items]
        self._wanted = frozenset(pieces)
        super().__init__(origin.store, pieces, lambda at: items[at][1], origin.cache)

    def _is_cached(self, piece: Piece) -> bool:
        return piece not in self._wanted and super()._is_cached(piece)

    def _finished(self, i: int, stored: memoryview | None) -> Buffer:
        super()._finished(i, stored)
        return self._stored[self.pieces[i]] if stored is None else stored


class _Journal:
    """Chunks that were put for something that is not committed yet, on this machine."""

    def __init__(self, index: Index, name: bytes) -> None:
        self._index = index
        self._name = name
        self._count = 0

    def read(self) -> Iterator[Piece]:
        """All of them; what is added comes after them."""
        while (pieces := self._index.lookup_asset(self._key())) is not None:
            self._count += 1
            yield from pieces

    def add(self, chunks: Sequence[Chunk], table: Sequence[bytes]) -> None:
        """These too; they carry their hashes."""
        self._index.remember_asset(self._key(), chunks, table)
        self._index.flush()
        self._count += 1

    def _key(self) -> bytes:
        return digest(b"mandapa journal 1\n" + self._name + self._count.to_bytes(8, "little"))


class _Noting:
    """A store to put objects into, which tells of each that was acknowledged."""

    def __init__(self, store: ObjectStore, note: Callable[[str], None]) -> None:
        self._store = store
        self._note = note

    def put(self, key: str, data: Buffer) -> None:
        self._store.put(key, data)
        self._note(key)


def _place(chunk: Chunk) -> tuple[int, int, int, int, int]:
    return chunk.container, chunk.offset, chunk.stored, chunk.raw, chunk.codec
