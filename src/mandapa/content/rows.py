"""From chunks to an asset's row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from mandapa.content.index import Index
from mandapa.content.packing import Packer
from mandapa.content.tree import Located, NodeReader, child_address
from mandapa.digest import digest
from mandapa.errors import NotFoundError
from mandapa.format.manifest import (
    INLINE_CHUNKS,
    PART_CHUNKS,
    Chunk,
    FileRow,
    LargeFileRow,
    Part,
    PartAddress,
    encode_node,
)

__all__ = ["RowMaker", "bare"]

_PART_KEPT = 256  # a part of the base with fewer chunks is written again, so that parts do not become many


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
