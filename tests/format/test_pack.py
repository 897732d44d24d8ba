"""Containers: literal bytes, round trips, and tables that are refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mandapa.digest import digest
from mandapa.errors import CorruptionError, FormatVersionError
from mandapa.format.pack import HEADER, KIND_CHUNK, KIND_NODE, PackEntry, pack_footer, read_pack_table
from mandapa.format.strict import CHUNK_MAX, CONTAINER_MAX

HELLO = bytes.fromhex("ea8f163db38682925e4491c5e58d4bb3506ef8c14eb78a86e908c5624a67200f")  # BLAKE3 of b"hello"


def build(rows, start=None, header=HEADER, end=b"adapnam\0", count=None):
    """A container from table rows, its hash right whatever the rows say; entries are filled with zeros."""
    start = 16 + sum(row[1] for row in rows) if start is None else start
    table = b"".join(struct.pack("<IIIHH32s", *row) for row in rows)
    tail = struct.pack("<II8s", len(rows) if count is None else count, start, end)
    return header + bytes(start - 16) + table + tail + digest(HEADER + table + tail)


def read(data):
    return list(read_pack_table(data, key="packs/x"))


def test_a_container_written_down_as_bytes_is_read():
    """Header, five bytes, one row, trailer: every byte by hand."""
    assert digest(b"hello") == HELLO
    head = b"mandapa\x00\x01\x00\x00\x00\x00\x00\x00\x00"
    table = b"\x10\0\0\0\x05\0\0\0\x05\0\0\0\0\0\0\0" + HELLO
    tail = b"\x01\0\0\0\x15\0\0\0adapnam\x00"
    data = head + b"hello" + table + tail + digest(head + table + tail)
    assert len(data) == 117
    assert read(data) == [PackEntry(16, 5, 5, 0, KIND_CHUNK, HELLO)]
    assert read(bytearray(data)) == read(memoryview(data)) == read(data)
    assert pack_footer([PackEntry(16, 5, 5, 0, 0, HELLO)], 21) == data[21:]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=50), st.integers(0, 65535), st.sampled_from([KIND_CHUNK, KIND_NODE]))))
def test_tables_come_back_as_they_were(pieces):
    """Any number of entries, empty ones too; any one flipped bit of header, table or trailer is found."""
    data, entries = HEADER, []
    for piece, codec, kind in pieces:
        entries.append(PackEntry(len(data), len(piece), len(piece) * 2, codec, kind, digest(piece)))
        data += piece
    start = len(data)
    data += pack_footer(entries, start)
    assert read(data) == entries
    for at in {0, 15, start, len(data) - 60, len(data) - 1}:
        broken = bytearray(data)
        broken[at] ^= 4
        if not 16 <= at < start:
            with pytest.raises((CorruptionError, FormatVersionError)):
                read(broken)


ROW = (16, 5, 5, 0, 0, HELLO)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", CorruptionError),
        (HEADER, CorruptionError),
        (build([])[:-1], CorruptionError),
        (b"x" * 200, CorruptionError),
        (build([ROW]) + b"\0", CorruptionError),
        (build([ROW])[1:], CorruptionError),
        (build([ROW], end=b"adapnam\1"), CorruptionError),
        (build([ROW], count=0), CorruptionError),
        (build([ROW], count=2), CorruptionError),
        (build([ROW], count=2**32 - 1), CorruptionError),
        (build([ROW], start=20), CorruptionError),
        (build([ROW], start=22), CorruptionError),
        (build([(17, 5, 5, 0, 0, HELLO)]), CorruptionError),
        (build([(0, 21, 5, 0, 0, HELLO)]), CorruptionError),
        (build([(16, 2**32 - 1, 5, 0, 0, HELLO)], start=21), CorruptionError),
        (build([ROW, ROW]), CorruptionError),
        (build([ROW, (22, 5, 5, 0, 0, HELLO)]), CorruptionError),
        (build([(16, 5, CHUNK_MAX + 1, 1, 0, HELLO)]), CorruptionError),
        (build([ROW], header=b"mandapa\0\2\0" + bytes(6)), FormatVersionError),
        (build([ROW], header=b"mandapa\0\1\1" + bytes(6)), FormatVersionError),
        (build([ROW], header=b"mandapa\0\1\0" + bytes(5) + b"\1"), FormatVersionError),
        (build([ROW], header=b"mandapb\0\1\0" + bytes(6)), CorruptionError),
        (build([(16, 5, 5, 0, 2, HELLO)]), FormatVersionError),
        (build([(16, 5, 5, 0, 65535, HELLO)]), FormatVersionError),
    ],
)
def test_tables_that_lie_are_refused(data, error):
    """Overlaps, gaps, counts, ends, limits and unknown kinds, each with a hash that fits."""
    with pytest.raises(error):
        read(data)


def test_nothing_of_a_bad_table_is_given_out():
    """The fault is in the last row; the first is not handed out either."""
    with pytest.raises(CorruptionError):
        read_pack_table(build([ROW, (22, 5, 5, 0, 0, HELLO)]), key="packs/x")


def test_the_largest_container():
    """32 MiB pass, one byte more does not."""
    size = CONTAINER_MAX - 16 - 3 * 48 - 48
    rows = [(16, 0, 0, 1, 0, HELLO), (16, 1, 1, 1, 0, HELLO), (17, size - 1, CHUNK_MAX, 1, 0, HELLO)]
    data = build(rows)
    assert len(data) == CONTAINER_MAX
    assert len(read(data)) == 3
    with pytest.raises(CorruptionError, match="cannot be a container"):
        read(data + b"\0")
