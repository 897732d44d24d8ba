"""Containers emptied: what manifests need of them is copied into new ones, and the nodes that name it are made anew."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import msgspec

from mandapa.content.fetch import StoredWave, read_pieces, windows
from mandapa.content.index import Piece, piece_of
from mandapa.content.link import Link
from mandapa.content.packing import Packer
from mandapa.content.parallel import in_order
from mandapa.content.tree import NodeReader, Tree, child_address
from mandapa.digest import digest
from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.format.manifest import (
    Branch,
    ChildRow,
    Chunk,
    FileRow,
    LargeFileRow,
    Leaf,
    Node,
    NodeAddress,
    Part,
    PartAddress,
    Row,
    encode_node,
)
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["Mover"]

_WAITING_BYTES = 256 << 20  # stored bytes of chunks that were found and are not copied yet
_WAITING = 65_536  # and their number: about 30 MB of memory

_Range: TypeAlias = tuple[bytes, int, int, int, int, bytes]
"""Container, offset, stored and raw length, codec, hash: a chunk where it is, whatever its base's place is."""


_NodeRow = TypeVar("_NodeRow", ChildRow, PartAddress)


def _range(piece: Piece) -> _Range:
    return piece[:6]


class Mover:
    """Copies chunks out of containers, byte for byte and each once, and makes the nodes that name them anew.

    Nothing that is decoded, hashed and found wrong is copied. A node below which nothing moves stays where it is, one
    that several trees share is made once; content, and so the logical digest of every tree, stays. Memory: what a
    `Packer` takes, about 300 bytes for each chunk that has moved, and 200 for each node looked at.

    For one thread. Whoever uses what `moved` gives has to `flush` before.

    Args:
        store: Where containers are.
        nodes: Reads manifest nodes.
        containers: Which are to be emptied.
        touches: Whether a node, itself or by what is below it, needs one of them; where it says no nothing is read.
        link: Learns how fast the store takes bytes.
        threads: Requests at once; 0 makes all in the caller's thread.
        new_id: Makes 16 random bytes.
    """

    def __init__(
        self,
        store: ObjectStore,
        nodes: NodeReader,
        containers: Collection[bytes],
        *,
        touches: Callable[[NodeAddress], bool] = lambda _: True,
        link: Link,
        threads: int,
        new_id: Callable[[], bytes],
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._doomed = frozenset(containers)
        self._touches = touches
        self._threads = threads
        self._packer = Packer(store, link=link, threads=threads, new_id=new_id)
        self._looked: set[bytes] = set()
        self._waiting: dict[_Range, tuple[Piece, str]] = {}
        self._placed: dict[_Range, tuple[bytes, int]] = {}
        self._bad: dict[_Range, str] = {}
        self._made: dict[NodeAddress, NodeAddress] = {}
        self.waiting = 0
        """Stored bytes that `look` has found and that are not copied yet."""

    @property
    def fresh(self) -> set[bytes]:
        """Containers that were put, are being put, or have begun to be filled here."""
        return self._packer.fresh

    @property
    def added(self) -> int:
        """Bytes handed to the store so far."""
        return self._packer.added

    @property
    def progress(self) -> Callable[[int], None] | None:
        """Called with the bytes of each container that was put, from the thread that put it."""
        return self._packer.progress

    @progress.setter
    def progress(self, call: Callable[[int], None] | None) -> None:
        self._packer.progress = call

    def look(self, root: NodeAddress) -> None:
        """Find the chunks of a tree that have to move; copies what was found before when that is too much to keep.

        One request for each node that needs one of the containers, and that neither this nor the reader has met.

        Raises:
            NotFoundError: A node is not there (any more).
            CorruptionError: A node is not what its address says.
            StorageError: The store failed.
        """
        level = [(root, "")]
        while level:
            below: list[tuple[NodeAddress, str]] = []
            nodes = in_order(self._nodes.load, [address for address, _ in level], threads=self._threads)
            for (top, path), node in zip(level, nodes, strict=True):
                found = [(address, at) for address, at in self._look(node, path) if address.hash not in self._looked]
                below += [(address, at) for address, at in found if self._touches(address)]
                self._looked.add(top.hash)
                if self.waiting > _WAITING_BYTES or len(self._waiting) > _WAITING:
                    self.copy()
            level = below

    def copy(self) -> None:
        """Copy what `look` has found, in the order in which it is stored: few requests, and neighbours stay neighbours.

        What cannot be read, or is not what was stored, is left; `moved` says so of each tree that needs it.

        Raises:
            StorageError: The store failed.
        """
        pieces = sorted([piece for piece, _ in self._waiting.values()], key=lambda piece: piece[:2])
        done = 0
        try:
            for piece, stored in self._read(pieces):
                self._put(piece, stored)
                done += 1
        except (NotFoundError, CorruptionError, FormatVersionError):
            # One of them is bad: the others are read again beside it.
            for window in windows(pieces[done:], lambda piece: piece):
                self._copy_sound(window)
        self._waiting.clear()
        self.waiting = 0

    def moved(self, address: NodeAddress) -> NodeAddress:
        """A tree like the one at ``address`` that needs nothing of the emptied containers; that one, if it never did.

        To be called after `look` and `copy`.

        Raises:
            NotFoundError, CorruptionError: Bytes of it are gone or wrong; the message names them.
            FormatVersionError: It needs a newer mandapa.
            StorageError: The store failed.
        """
        found = self._made.get(address)
        if found is None:
            found = self._made[address] = self._move(address) if self._touches(address) else address
        return found

    def flush(self) -> None:
        """Close the open containers and wait until every put is acknowledged; raises the first error of any."""
        self._packer.flush()

    def forget(self) -> None:
        """Use nothing again that was put so far: all that still has to move is copied anew."""
        self._packer.flush()
        self._packer.fresh.clear()
        self._looked.clear()
        self._waiting.clear()
        self.waiting = 0
        self._placed.clear()
        self._made.clear()

    def close(self) -> None:
        """Drop what is not flushed, wait for puts under way, release threads and memory."""
        self._packer.close()

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Finding

    def _look(self, node: Node, path: str) -> Iterator[tuple[NodeAddress, str]]:
        """Take note of the chunks of a node; gives the nodes below it."""
        table = node.containers
        if isinstance(node, Branch):
            yield from [(child_address(row, table), row.path) for row in node.rows]
            return
        doomed = {number for number, container in enumerate(table) if container in self._doomed}
        if isinstance(node, Part):
            self._want(node.rows, b"", table, doomed, path)
            return
        for row in node.rows:
            if isinstance(row, LargeFileRow):
                yield from [(child_address(part, table), row.path) for part in row.parts]
            elif isinstance(row, FileRow) and doomed:
                self._want(row.chunks, row.digest, table, doomed, row.path)

    def _want(
        self, chunks: Iterable[Chunk], digest_: bytes, table: Sequence[bytes], doomed: set[int], path: str
    ) -> None:
        for chunk in chunks:
            if doomed.isdisjoint(chunk.numbers()):
                continue
            for piece in piece_of(chunk, chunk.hash or digest_, table).chain():
                at = _range(piece)
                if piece.container not in self._doomed or at in self._placed or at in self._bad:
                    continue
                if at not in self._waiting:
                    self._waiting[at] = piece, path
                    self.waiting += piece.stored

    # Copying

    def _read(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Buffer]]:
        return read_pieces(self._store, pieces, path="", threads=self._threads, wave=StoredWave)

    def _copy_sound(self, pieces: Sequence[Piece]) -> None:
        """Copy those of one window that are what was stored, and keep in mind what is wrong with the others."""
        try:
            for piece, stored in list(self._read(pieces)):
                self._put(piece, stored)
        except (NotFoundError, CorruptionError, FormatVersionError):
            for piece in pieces:
                _, path = self._waiting[_range(piece)]
                try:
                    [(_, stored)] = read_pieces(self._store, [piece], path=path, threads=0, wave=StoredWave)
                except (NotFoundError, CorruptionError, FormatVersionError) as error:
                    self._bad[_range(piece)] = str(error)
                else:
                    self._put(piece, stored)

    def _put(self, piece: Piece, stored: Buffer) -> None:
        number, offset = self._packer.add_chunk(stored, piece.raw, piece.codec, piece.hash)
        self._placed[_range(piece)] = self._packer.table[number], offset

    # Nodes

    def _move(self, address: NodeAddress) -> NodeAddress:
        node = self._nodes.load(address)
        stays = address.container not in self._doomed and self._doomed.isdisjoint(node.containers)
        below = self._below(address, node)
        moved = [self.moved(old) for old in below]
        if stays and moved == below:
            return address
        raw, stored = encode_node(new := self._anew(node, iter(moved)))
        hash_ = digest(raw)
        found = self._packer.add_node(hash_, stored, len(raw))
        self._nodes.remember(hash_, new)
        return found

    def _below(self, address: NodeAddress, node: Node) -> list[NodeAddress]:
        """The nodes that a node names, in order, each of which fits there."""
        table = node.containers
        found = []
        if isinstance(node, Branch):
            for at, child in enumerate(node.rows):
                found.append(child_address(child, table))
                if found[-1] not in self._made and self._touches(found[-1]):
                    Tree(self._nodes, address).child(node, at)
        elif isinstance(node, Leaf):
            for row in node.rows:
                if isinstance(row, LargeFileRow):
                    found += [self._part_address(part, table, row.path) for part in row.parts]
        return found

    def _part_address(self, row: PartAddress, table: Sequence[bytes], path: str) -> NodeAddress:
        address = child_address(row, table)
        if address in self._made or not self._touches(address):
            return address
        part = self._nodes.load(address)
        if not isinstance(part, Part) or sum([chunk.raw for chunk in part.rows]) != row.raw:
            raise CorruptionError(f"a part of {path!r} is not the one that its row names")
        return address

    def _anew(self, node: Node, below: Iterator[NodeAddress]) -> Node:
        """The node with all that it names where that is now."""
        table = _Table()
        if isinstance(node, Branch):
            children = [table.readdressed(child, next(below)) for child in node.rows]
            return Branch(table.containers, node.level, children)
        old = node.containers
        if isinstance(node, Part):
            chunks = [self._chunk(chunk, b"", old, table) for chunk in node.rows]
            return Part(table.containers, chunks)
        rows: list[Row] = []
        for row in node.rows:
            if isinstance(row, FileRow):
                named = tuple([self._chunk(chunk, row.digest, old, table) for chunk in row.chunks])
                rows.append(msgspec.structs.replace(row, chunks=named))
            elif isinstance(row, LargeFileRow):
                parts = tuple([table.readdressed(part, next(below)) for part in row.parts])
                rows.append(msgspec.structs.replace(row, parts=parts))
            else:
                rows.append(row)
        return Leaf(table.containers, rows)

    def _chunk(self, chunk: Chunk, digest_: bytes, old: Sequence[bytes], table: _Table) -> Chunk:
        container, offset = old[chunk.container], chunk.offset
        if container in self._doomed:
            at = (container, offset, chunk.stored, chunk.raw, chunk.codec, chunk.hash or digest_)
            if at in self._bad:
                raise CorruptionError(self._bad[at])
            container, offset = self._placed[at]
        base = None if chunk.base is None else self._chunk(chunk.base, b"", old, table)
        return Chunk(table.number(container), offset, chunk.stored, chunk.raw, chunk.codec, chunk.hash, base)


class _Table:
    """The containers that a new node names."""

    def __init__(self) -> None:
        self.containers: list[bytes] = []
        self._numbers: dict[bytes, int] = {}

    def number(self, container: bytes) -> int:
        found = self._numbers.get(container)
        if found is None:
            found = self._numbers[container] = len(self.containers)
            self.containers.append(container)
        return found

    def readdressed(self, row: _NodeRow, address: NodeAddress) -> _NodeRow:
        """The row with its node where it is now."""
        container = self.number(address.container)
        return msgspec.structs.replace(
            row, container=container, offset=address.offset, stored=address.stored, hash=address.hash
        )
