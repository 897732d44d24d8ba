"""From a row to verified bytes: which ranges of which containers, few requests, several at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from mandapa.content.codecs import decode
from mandapa.content.index import Index, Piece, piece_of
from mandapa.content.packing import Packer
from mandapa.content.tree import Located, NodeReader, child_address
from mandapa.digest import digest
from mandapa.errors import CorruptionError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.manifest import (
    INLINE_CHUNKS,
    PART_CHUNKS,
    Chunk,
    FileRow,
    LargeFileRow,
    Node,
    NodeAddress,
    Part,
    PartAddress,
    UrlRow,
    encode_node,
)
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["Request", "RowMaker", "bare", "fetch", "pieces_of", "plan", "read_pieces", "windows"]

_WINDOW_BYTES = 8 << 20
_WINDOW_PIECES = 4096
_PART_KEPT = 256  # a part of the base with fewer chunks is written again, so that parts do not become many
_GAP = 64 << 10  # unwanted bytes that are cheaper to read than another request


class Request(NamedTuple):
    """One range of one container, and what it holds of what is wanted."""

    container: bytes
    offset: int
    length: int
    wanted: list[int]
    """Positions in the list of pieces that was planned for."""


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


def windows(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces in groups of about 8 MiB, stored or decoded, whichever is more; never an empty group."""
    window: list[Piece] = []
    size = 0
    for piece in pieces:
        more = max(piece.raw, piece.stored)
        if window and (size + more > _WINDOW_BYTES or len(window) >= _WINDOW_PIECES):
            yield window
            window, size = [], 0
        window.append(piece)
        size += more
    if window:
        yield window


def plan(pieces: Sequence[Piece]) -> list[Request]:
    """The requests that fetch ``pieces``: neighbours of one container joined across gaps of up to 64 KiB."""
    requests: list[Request] = []
    order = sorted(range(len(pieces)), key=lambda i: pieces[i][:2])
    container, start, end, wanted = b"", 0, 0, []
    for i in order:
        where, offset, stored = pieces[i][:3]
        if where == container and offset <= end + _GAP and max(end, offset + stored) - start <= 2 * _WINDOW_BYTES:
            end = max(end, offset + stored)
            wanted.append(i)
            continue
        if wanted:
            requests.append(Request(container, start, end - start, wanted))
        container, start, end, wanted = where, offset, offset + stored, [i]
    if wanted:
        requests.append(Request(container, start, end - start, wanted))
    return requests


def fetch(store: ObjectStore, request: Request, pieces: Sequence[Piece], path_of: Callable[[int], str]) -> list[Buffer]:
    """The raw bytes of each wanted piece of one request, verified. One store request.

    Args:
        store: Where the container is.
        request: One of those that `plan` made for ``pieces``.
        pieces: What was planned for.
        path_of: The asset that a piece belongs to, by its position; for messages.

    Raises:
        NotFoundError: The container is not there (any more).
        CorruptionError: Bytes do not decode, or are not those that were stored; names key and path.
    """
    key = container_key(request.container)
    [data] = store.get_ranges(key, [(request.offset, request.length)])
    view = memoryview(data)
    start = request.offset
    found = []
    for i in request.wanted:
        _, offset, stored, raw, codec, hash_, base = pieces[i]
        at = offset - start
        try:
            if base is not None:
                raise CorruptionError("a delta to another chunk, which codec does not have")
            value = decode(codec, view[at : at + stored], raw)
        except CorruptionError as error:
            raise CorruptionError(f"{path_of(i)}: {key}, bytes {offset}+{stored}: {error}", key=key) from None
        if digest(value) != hash_:
            raise CorruptionError(
                f"{path_of(i)}: {key}, bytes {offset}+{stored}: their BLAKE3 is not the one that was stored", key=key
            )
        found.append(value)
    return found


def read_pieces(
    store: ObjectStore, pieces: Iterable[Piece], *, path: str, threads: int = 4
) -> Iterator[tuple[Piece, Buffer]]:
    """Each piece with its raw bytes, verified, in the order asked for.

    Neighbours are fetched by one request of up to 16 MiB; up to ``threads`` windows of about 8 MiB are under way, and
    as many wait to be taken. ``threads=0`` fetches in the caller's thread.

    Raises:
        NotFoundError: A container is not there (any more).
        CorruptionError: Bytes are not those that were stored; names key and ``path``.
    """
    if threads == 0:
        for window in windows(pieces):
            yield from _window(store, window, path)
        return
    rest = windows(pieces)
    first = next(rest, None)
    second = next(rest, None)
    if first is None:
        return
    if second is None and len(plan(first)) == 1:
        yield from _window(store, first, path)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="mandapa-get") as pool:
        waiting: deque[tuple[list[Piece], list[tuple[Request, Future[list[Buffer]]]]]] = deque()

        def ask(window: list[Piece]) -> None:
            waiting.append((window, [(r, pool.submit(fetch, store, r, window, lambda _: path)) for r in plan(window)]))

        try:
            ask(first)
            while second is not None or waiting:
                while second is not None and len(waiting) <= threads:
                    ask(second)
                    second = next(rest, None)
                window, answers = waiting.popleft()
                yield from _assemble(window, [(request, answer.result()) for request, answer in answers])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _window(store: ObjectStore, window: list[Piece], path: str) -> Iterator[tuple[Piece, Buffer]]:
    return _assemble(window, [(request, fetch(store, request, window, lambda _: path)) for request in plan(window)])


def _assemble(window: list[Piece], answers: Iterable[tuple[Request, list[Buffer]]]) -> Iterator[tuple[Piece, Buffer]]:
    values: list[Buffer] = [b""] * len(window)
    for request, found in answers:
        for i, value in zip(request.wanted, found, strict=True):
            values[i] = value
    return zip(window, values, strict=True)


class RowMaker:
    """Rows of files from chunks that are in the packer's containers, or were numbered by it.

    Long lists of chunks go into parts, and those into the meta container.
    """

    def __init__(self, packer: Packer, index: Index, nodes: NodeReader) -> None:
        self._packer = packer
        self._index = index
        self._nodes = nodes

    def make(
        self, at: str, size: int, mode: int, digest_: bytes, chunks: list[tuple[bytes, Chunk]], base: Located | None
    ) -> Located:
        """The row of an asset of these chunks; parts that the base has too are used again."""
        if len(chunks) == 1:
            return Located(FileRow(at, size, mode, digest_, (bare(chunks[0][1]),)), self._packer.table)
        named = [_named(chunk, hash_) for hash_, chunk in chunks]
        if len(named) <= INLINE_CHUNKS:
            return Located(FileRow(at, size, mode, digest_, tuple(named)), self._packer.table)
        table = self._packer.table
        self._index.remember_asset(digest_, named, table)
        return Located(LargeFileRow(at, size, mode, digest_, tuple(self._parts(named, base))), table)

    def _parts(self, chunks: list[Chunk], base: Located | None) -> Iterator[PartAddress]:
        old = self._base_parts(base)
        at = 0
        while at < len(chunks):
            end = min(at + PART_CHUNKS, len(chunks))
            for i in range(at, end):
                found = old.get(chunks[i].hash)
                if found is not None and found[1] == [chunk.hash for chunk in chunks[i : i + len(found[1])]]:
                    if i > at:
                        yield self._new_part(chunks[at:i])
                    yield found[0]
                    at = i + len(found[1])
                    break
            else:
                yield self._new_part(chunks[at:end])
                at = end

    def _base_parts(self, base: Located | None) -> dict[bytes, tuple[PartAddress, list[bytes]]]:
        """The parts of a base row, and their hashes, by the first of these; short ones are left to be joined."""
        old: dict[bytes, tuple[PartAddress, list[bytes]]] = {}
        if base is None or not isinstance(base.row, LargeFileRow):
            return old
        for address in base.row.parts:
            try:
                node = self._nodes.load(child_address(address, base.table))
            except NotFoundError:  # swept with its version, meanwhile: it cannot be named again
                continue
            if isinstance(node, Part) and len(node.rows) >= _PART_KEPT:
                number = self._packer.number(base.table[address.container])
                hashes = [chunk.hash for chunk in node.rows]
                old[hashes[0]] = (msgspec.structs.replace(address, container=number), hashes)
        return old

    def _new_part(self, chunks: Sequence[Chunk]) -> PartAddress:
        node = Part.of(chunks, self._packer.table)
        raw, stored = encode_node(node)
        hash_ = digest(raw)
        address = self._packer.add_node(hash_, stored, len(raw))
        self._nodes.remember(hash_, node)
        self._index.feed(node)
        container = self._packer.number(address.container)
        return PartAddress(container, address.offset, address.stored, hash_, sum([c.raw for c in chunks]))


def bare(chunk: Chunk) -> Chunk:
    """Without its hash, as the only chunk of an asset is written."""
    if not chunk.hash:
        return chunk
    return Chunk(chunk.container, chunk.offset, chunk.stored, chunk.raw, chunk.codec, b"", chunk.base)


def _named(chunk: Chunk, hash_: bytes) -> Chunk:
    if chunk.hash:
        return chunk
    return Chunk(chunk.container, chunk.offset, chunk.stored, chunk.raw, chunk.codec, hash_, chunk.base)
