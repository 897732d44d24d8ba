r"""The container: many chunks, or manifest nodes, in one object. Source: docs/format.md §5.

::

    header   16 bytes   "mandapa\0", version 1, cipher 0, six zero bytes
    chunks              stored bytes, back to back
    table    48 a chunk offset u32, stored u32, raw u32, codec u16, kind u16, BLAKE3 of the raw bytes
    trailer  48 bytes   count u32, table offset u32, "adapnam\0", BLAKE3 of header, table and trailer so far
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from mandapa.digest import Hasher
from mandapa.errors import CorruptionError, FormatVersionError
from mandapa.format.strict import CHUNK_MAX, CONTAINER_MAX

__all__ = ["HEADER", "KIND_CHUNK", "KIND_NODE", "TRAILER_SIZE", "PackEntry", "pack_footer", "read_pack_table"]

HEADER = b"mandapa\0\x01\x00" + bytes(6)
TRAILER_SIZE = 48
KIND_CHUNK = 0
KIND_NODE = 1
_ENTRY = struct.Struct("<IIIHH32s")
_TRAILER = struct.Struct("<II8s")
_END = b"adapnam\0"


class PackEntry(NamedTuple):
    """One row of a container's table."""

    offset: int
    stored: int
    """Bytes in the container."""
    raw: int
    """Bytes after decoding."""
    codec: int
    kind: int
    hash: bytes
    """BLAKE3 of the raw bytes."""


def pack_footer(entries: list[PackEntry], table_offset: int) -> bytes:
    """Table and trailer that make a container of a header and ``table_offset - 16`` bytes of chunks."""
    table = b"".join([_ENTRY.pack(*entry) for entry in entries])
    tail = _TRAILER.pack(len(entries), table_offset, _END)
    return table + tail + Hasher(HEADER).update(table).update(tail).digest()


def read_pack_table(data: bytes | bytearray | memoryview, *, key: str) -> Iterator[PackEntry]:
    """The table of a whole container, all of it checked: no entry overlaps another or leaves the container.

    The chunks' own bytes are checked by whoever decodes them, against each entry's hash.

    Raises:
        CorruptionError: The container is cut, altered, or its table lies.
        FormatVersionError: Another version of the container, encrypted, or with a kind of entry that is not known.
    """
    size = len(data)
    view = memoryview(data)
    if size < len(HEADER) + TRAILER_SIZE or size > CONTAINER_MAX:
        raise CorruptionError(f"{key}: {size} bytes cannot be a container", key=key)
    if view[:8] != HEADER[:8]:
        raise CorruptionError(f"{key}: not a container", key=key)
    if view[:16] != HEADER:
        raise FormatVersionError(f"{key}: a container of version {view[8]}, cipher {view[9]}: upgrade mandapa")
    tail = view[size - TRAILER_SIZE : size - 32]
    count, start, end = _TRAILER.unpack(tail)
    if end != _END or start < len(HEADER) or start + count * _ENTRY.size != size - TRAILER_SIZE:
        raise CorruptionError(f"{key}: its table is not where the trailer says", key=key)
    table = view[start : size - TRAILER_SIZE]
    if Hasher(HEADER).update(table).update(tail).digest() != view[size - 32 :]:
        raise CorruptionError(f"{key}: the BLAKE3 of its table does not fit", key=key)
    position = len(HEADER)
    entries = [PackEntry(*row) for row in _ENTRY.iter_unpack(table)]
    for entry in entries:
        if entry.offset != position or entry.raw > CHUNK_MAX:
            raise CorruptionError(f"{key}: its table overlaps, leaves a gap, or names a chunk above the limit", key=key)
        if entry.kind not in (KIND_CHUNK, KIND_NODE):
            raise FormatVersionError(f"{key}: a container with an entry of kind {entry.kind}: upgrade mandapa")
        position += entry.stored
    if position != start:
        raise CorruptionError(f"{key}: its chunks do not end where its table starts", key=key)
    return iter(entries)
