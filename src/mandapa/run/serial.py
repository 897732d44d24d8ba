"""The file of a state, made from an outline and the bytes of its tensors, without the library that gave them.

Files of ``torch.save`` are byte for byte what torch 2.13 writes: a zip archive whose records are stored as they are,
each with its CRC behind it, padded so that tensors begin at multiples of 64 bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal

import msgspec

from mandapa.errors import CorruptionError

__all__ = ["ALIGNED", "INDEX_MAX", "Outline", "offsets", "read_outline", "size_of_file", "write_file"]

ALIGNED = 64
"""Bytes: where a record begins in memory."""
INDEX_MAX = 64 << 20
"""Bytes of an outline as JSON; longer ones are damage."""

_ROOT = "archive/"  # as torch calls it where it is given no file's name
_ID = ".data/serialization_id"
_BIG = 0xFFFFFFFF
_MASK = (1 << 64) - 1
_UTF8, _SIZES_FOLLOW = 0x0800, 0x0008

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 56)]
_Name = Annotated[str, msgspec.Meta(max_length=1024)]


class Outline(msgspec.Struct, frozen=True, kw_only=True):
    """What a file consists of, but for the bytes."""

    kind: Literal["zip", "plain"]
    """An archive as torch writes it, or the records one after the other."""
    records: list[tuple[_Name, _Count]]
    """Name and bytes of each, in the order of the file."""
    names: Annotated[str, msgspec.Meta(pattern="^([0-9]{20})?$")] = ""
    """What torch makes of the names of the records, the first half of the archive's id; empty: it has none."""
    alignment: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] = 64
    """Bytes: where a record begins in the archive."""


def read_outline(data: bytes) -> Outline:
    """The outline in JSON; raises `CorruptionError`."""
    try:
        return msgspec.json.decode(data, type=Outline)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptionError(f"the outline of a checkpoint in memory is damaged: {error}") from None


def offsets(outline: Outline, start: int) -> Iterator[int]:
    """Where each record begins in memory, the first at ``start`` or up to 63 bytes later; then where the last ends."""
    for _, size in outline.records:
        start += -start % ALIGNED
        yield start
        start += size
    yield start


def size_of_file(outline: Outline) -> int:
    """Bytes of the file that `write_file` makes."""
    if outline.kind == "plain":
        return sum(size for _, size in outline.records)
    archive = _Archive(outline.alignment)
    at = 0
    for name, size in outline.records:
        at += archive.add_size(name, size, at)
    if outline.names:
        at += archive.add_size(_ID, 40, at)
    return at + len(archive.end(at))


def write_file(
    outline: Outline,
    read: Callable[[int, int], Iterable[memoryview]],
    start: int,
    write: Callable[[bytes | memoryview], object],
) -> None:
    """Write the file from its first byte to its last.

    Args:
        outline: Of the file.
        read: Gives so many bytes of the memory from an offset, in parts, each until the next is asked for.
        start: Where the records begin in memory, as for `offsets`.
        write: Takes the next bytes of the file.
    """
    archive = _Archive(outline.alignment) if outline.kind == "zip" else None
    position = 0

    def put(data: bytes | memoryview) -> None:
        nonlocal position
        write(data)
        position += len(data)

    def put_record(name: str, size: int, parts: Iterable[bytes | memoryview]) -> None:
        if archive is not None:
            put(archive.head(name, size, position))
        crc = 0
        for part in parts:
            if archive is not None:
                crc = zlib.crc32(part, crc)
            put(part)
        if archive is not None:
            put(archive.tail(crc))

    for (name, size), at in zip(outline.records, offsets(outline, start), strict=False):
        put_record(name, size, read(at, size))
    if archive is not None:
        if outline.names:
            identity = f"{outline.names}{archive.checksums:020d}".encode()
            put_record(_ID, len(identity), [identity])
        put(archive.end(position))


class _Archive:
    """The parts of a zip archive around its records, as torch has them.

    Source: APPNOTE.TXT 6.3.10, and what files of torch show.
    """

    def __init__(self, alignment: int) -> None:
        self.checksums = 0
        """Of all records that are not empty, the second half of the archive's id."""
        self._alignment = alignment
        self._directory: list[bytes] = []
        self._open: tuple[bytes, int, int, bytes] = (b"", 0, 0, b"")

    def head(self, name: str, size: int, at: int) -> bytes:
        """What stands before the bytes of a record; ``at``: where in the archive."""
        encoded = f"{_ROOT}{name}".encode()
        large = [size, 0] if size >= _BIG else []  # torch does not say the second one here
        large += [at] if at >= _BIG else []
        extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        padding = -(at + 30 + len(encoded) + len(extra) + 4) % self._alignment
        extra_size = len(extra) + 4 + padding
        self._open = encoded, size, at, extra
        fixed = struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, _flags(size), 0, 0, 0, 0, 0, 0, len(encoded), extra_size)
        return b"".join((fixed, encoded, extra, b"FB", struct.pack("<H", padding), b"Z" * padding))

    def tail(self, crc: int) -> bytes:
        """What stands behind them."""
        encoded, size, at, extra = self._open
        if size >= _BIG:
            extra = extra[:12] + struct.pack("<Q", size) + extra[20:]
        self._directory.append(
            struct.pack("<IHHHHHHIII", 0x02014B50, 0, 0, _flags(size), 0, 0, 0, crc, min(size, _BIG), min(size, _BIG))
            + struct.pack("<HHHHHII", len(encoded), len(extra), 0, 0, 0, 0, min(at, _BIG))
            + encoded
            + extra
        )
        if not size:
            return b""
        mixed = crc + 0x9E3779B9 + (self.checksums << 6 & _MASK) + (self.checksums >> 2)
        self.checksums ^= mixed & _MASK
        return struct.pack("<IIQQ" if extra else "<IIII", 0x08074B50, crc, size, size)

    def add_size(self, name: str, size: int, at: int) -> int:
        """Bytes of a record and of what stands around it."""
        return len(self.head(name, size, at)) + size + len(self.tail(0))

    def end(self, at: int) -> bytes:
        """The directory of the archive, which begins there, and what stands behind it."""
        directory = b"".join(self._directory)
        count, size = len(self._directory), len(directory)
        return b"".join(
            (
                directory,
                struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0x031E, 45, 0, 0, count, count, size, at),
                struct.pack("<IIQI", 0x07064B50, 0, at + size, 1),
                struct.pack("<IHHHHII", 0x06054B50, 0, 0, *[min(count, 0xFFFF)] * 2, min(size, _BIG), min(at, _BIG)),
                b"\0\0",
            )
        )


def _flags(size: int) -> int:
    return _UTF8 | _SIZES_FOLLOW if size else _UTF8
