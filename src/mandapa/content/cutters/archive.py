"""The members of zip archives as torch and NumPy write them. Source: PKWARE APPNOTE 6.3, §4.3.

Only what those two write is understood: stored, not compressed or encrypted, one disk, no comment after the end. The
central directory is what counts, because local headers may leave sizes to a data descriptor (torch does); of a local
header only the lengths of its name and padding are used. All other archives are opaque files.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Any, NamedTuple

from mandapa.content.cutters.layout import HEADER_MAX, MEMBERS_MAX, SMALLEST, Member
from mandapa.content.cutters.source import Source, read_some

__all__ = ["LOCAL_SIZE", "Archive", "Entry", "Refused", "archive_members", "archives_of", "local_data_start"]

_LOCAL = Struct("<4s2xHH16xHH")
LOCAL_SIZE = _LOCAL.size
"""Bytes of a local header, without name and padding."""

_ENTRY = Struct("<4s4xHH4xIIIHHHH6xI")
_END = Struct("<4sHHHHIIH")
_END64 = Struct("<4sQ4xIIQQQQ")
_LOCATOR = Struct("<4sIQI")
_U16 = 0xFFFF
_U32 = 0xFFFFFFFF
_DESCRIPTOR = 1 << 3
_REFUSED_FLAGS = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 13  # encrypted, a patch, strongly encrypted, masked
_TAIL = _END64.size + _LOCATOR.size + _END.size  # and nothing before, which may be a large tensor in a store
_NOT_OURS = "it is an archive that neither torch nor NumPy writes"


class Refused(ValueError):  # noqa: N818 - not an error: whoever reads archives catches it
    """The archive is not one of ours; the message says what it is instead."""


class Entry(NamedTuple):
    """One member, as the central directory has it."""

    name: bytes
    record: int
    """Where its local header starts in the file."""
    size: int
    crc: int
    flags: int
    wide: bool
    """Whether size or place did not fit in 32 bits."""


def archive_members(source: Source) -> list[Member] | None:
    """The members of all archives in the file, in the order of their bytes; None when they do not fill it."""
    try:
        archives = [archive.members() for archive in archives_of(source)]
    except Refused:
        return None
    return [member for members in reversed(archives) for member in members]


def archives_of(source: Source) -> Iterator[Archive]:
    """The archives that the file consists of, the last one first; raises `Refused` when they do not fill it.

    torch.distributed.checkpoint writes one archive for each tensor, back to back, so the file is walked from its end:
    the directory there tells where its archive starts, which is where the one before ends.
    """
    end = source.size
    members_left, header_left = MEMBERS_MAX, HEADER_MAX
    while end > 0:
        archive = Archive(source, end)
        members_left -= archive.count + 1
        header_left -= archive.directory_size
        _require(members_left >= 0 and header_left >= 0, "it has too many members")
        yield archive
        end = archive.start


class Archive:
    """One archive that ends at ``end``: checks all that its last records say, then its members.

    Attributes:
        start: Where it begins in the file.
        directory: Where its central directory begins, and its last member is over.
    """

    def __init__(self, source: Source, end: int) -> None:
        self._source = source
        self._end = end
        self._tail = read_some(source, max(0, end - _TAIL), min(end, _TAIL))
        self._tail_start = end - len(self._tail)
        directory_end = end - _END.size
        magic, disk, first_disk, here, count, size, offset, comment = self._unpack(_END, directory_end)
        _require(magic == b"PK\x05\x06" and disk == first_disk == 0 and here == count and comment == 0)
        locator = directory_end - _LOCATOR.size
        if locator >= 0 and self._unpack(_LOCATOR, locator)[0] == b"PK\x06\x07":
            directory_end = locator - _END64.size
            magic, length, disk, first_disk, here, count64, size64, offset64 = self._unpack(_END64, directory_end)
            _require(magic == b"PK\x06\x06" and length == _END64.size - 12 and disk == first_disk == 0)
            _require(here == count64 and count in (count64, _U16) and size in (size64, _U32))
            _require(offset in (offset64, _U32))
            count, size, offset = count64, size64, offset64
            _, disk, record, disks = self._unpack(_LOCATOR, locator)
            _require(disk == 0 and disks <= 1 and record == offset + size)
        self.count: int = count
        self.directory_size: int = size
        self.directory: int = directory_end - size
        self.start: int = self.directory - offset
        _require(self.start >= 0 and 0 < count * _ENTRY.size <= size <= HEADER_MAX)

    def entries(self) -> Iterator[Entry]:
        """The members in the order of the directory, which nothing has compared with the local headers yet."""
        directory = self._read(self.directory, self.directory_size)
        at = 0
        for _ in range(self.count):
            _require(at + _ENTRY.size <= len(directory))
            magic, flags, method, crc, stored, size, name, extra, comment, disk, offset = _ENTRY.unpack_from(
                directory, at
            )
            _require(method == 0, "its members are compressed")
            _require(magic == b"PK\x01\x02" and not flags & _REFUSED_FLAGS and disk == 0)
            name_at = at + _ENTRY.size
            extra_at = name_at + name
            at = extra_at + extra + comment
            wide = _U32 in (stored, size, offset)
            if wide:
                size, stored, offset = _zip64(directory[extra_at : extra_at + extra], [size, stored, offset])
            _require(stored == size)
            yield Entry(bytes(directory[name_at:extra_at]), self.start + offset, size, crc, flags, wide)
        _require(at == len(directory))

    def members(self) -> list[Member]:
        """The members, checked to be in order and not to overlap, and the directory as the last one."""
        local = bytearray(_LOCAL.size)
        local_view = memoryview(local)
        found = []
        floor = self.start
        for name, record, size, crc, flags, _ in self.entries():
            _require(floor <= record < self.directory)
            if size >= SMALLEST:
                _require(self._source.readinto(record, local_view) == LOCAL_SIZE)
                start = local_data_start(local, record, flags)
                floor = start + size
            else:
                # Never alone, so where exactly its bytes start is not worth a read.
                start = floor = record + _LOCAL.size + len(name) + size
            _require(floor <= self.directory)
            found.append(Member(record, start, floor, crc))
        found.append(Member(self.directory, self._end, self._end, 0))
        return found

    def data_starts(self, entries: list[Entry]) -> list[int]:
        """Where the bytes of each member start, from the directory alone: they end where the next record starts.

        True of what torch and NumPy write, which leave no gaps; `local_data_start` tells whether it is of a member.
        """
        starts = []
        end = self.directory
        for entry in reversed(entries):
            # What torch appends to a member: its checksum and sizes, of 32 or 64 bits.
            descriptor = (24 if entry.wide else 16) if entry.flags & _DESCRIPTOR else 0
            start = end - descriptor - entry.size
            _require(self.start <= entry.record <= start - _LOCAL.size - len(entry.name), "its members overlap")
            starts.append(start)
            end = entry.record
        return starts[::-1]

    def _unpack(self, record: Struct, offset: int) -> tuple[Any, ...]:
        _require(offset >= self._tail_start and offset - self._tail_start + record.size <= len(self._tail))
        return record.unpack_from(self._tail, offset - self._tail_start)

    def _read(self, offset: int, length: int) -> bytearray:
        if offset >= self._tail_start:
            return self._tail[offset - self._tail_start : offset - self._tail_start + length]
        data = read_some(self._source, offset, length)
        _require(len(data) == length)
        return data


def local_data_start(header: bytes | bytearray | memoryview, record: int, flags: int | None = None) -> int:
    """Where the bytes of a member start, whose local header starts at ``record`` with these 30 bytes or more."""
    magic, local_flags, method, name, extra = _LOCAL.unpack_from(header)
    _require(magic == b"PK\x03\x04" and flags in (None, local_flags) and method == 0)
    return record + _LOCAL.size + int(name) + int(extra)


def _zip64(extra: bytearray, values: list[int]) -> list[int]:
    """``values`` (size, stored size, offset) with those that did not fit in 32 bits taken from the extra field."""
    at = 0
    while at + 4 <= len(extra):
        tag = int.from_bytes(extra[at : at + 2], "little")
        length = int.from_bytes(extra[at + 2 : at + 4], "little")
        field = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if tag != 1:
            continue
        large = [index for index, value in enumerate(values) if value == _U32]
        _require(len(field) == length and length >= 8 * len(large))
        for place, index in enumerate(large):
            values[index] = int.from_bytes(field[8 * place : 8 * place + 8], "little")
        return values
    raise Refused(_NOT_OURS)


def _require(condition: bool, otherwise: str = _NOT_OURS) -> None:
    if not condition:
        raise Refused(otherwise)
