"""Headers that lie: the file is opaque then, in bounded time, and its bytes come back exactly."""

from __future__ import annotations

import io
import itertools
import json
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from mandapa.content.cutters import BytesSource, Cutter, structured_cuts

KIB = 1 << 10
MIB = 1 << 20
PAYLOAD = random.Random(1).randbytes(600 * KIB)


def tensor(begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [1], "data_offsets": [begin, end]}


def with_header(header: Any, payload: bytes = PAYLOAD, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + payload


GOOD_TENSORS = {
    "__metadata__": {"step": "1"},
    "a": tensor(0, 200_000),
    "b": tensor(200_000, 200_010),
    "c": tensor(200_010, 614_400),
}


def zip_of(*sizes: int, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for i, size in enumerate(sizes):
            archive.writestr(zipfile.ZipInfo(f"archive/data/{i}"), PAYLOAD[:size], compression)
    return file.getvalue()


GOOD_ZIP = zip_of(200 * KIB, 100, 300 * KIB)
DIRECTORY = GOOD_ZIP.index(b"PK\x01\x02")
END = len(GOOD_ZIP) - 22


def patched(data: bytes, offset: int, layout: str, *values: Any) -> bytes:
    copy = bytearray(data)
    struct.pack_into("<" + layout, copy, offset, *values)
    return bytes(copy)


def zip64_of(count: int, size: int, offset: int, *, place: int | None = None, length: int = 44) -> bytes:
    """The good archive with zip64 end records that say so."""
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", length, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, END if place is None else place, 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return GOOD_ZIP[:END] + record + locator + end


def overlapping() -> bytes:
    """Two directory entries for one local header: the trick of a zip bomb."""
    entry = GOOD_ZIP[DIRECTORY : GOOD_ZIP.index(b"PK\x01\x02", DIRECTORY + 4)]
    directory = entry * 1000
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1000, 1000, len(directory), DIRECTORY, 0)
    return GOOD_ZIP[:DIRECTORY] + directory + end


def swapped() -> bytes:
    second = GOOD_ZIP.index(b"PK\x01\x02", DIRECTORY + 4)
    third = GOOD_ZIP.index(b"PK\x01\x02", second + 4)
    parts = GOOD_ZIP[DIRECTORY:second], GOOD_ZIP[second:third]
    return GOOD_ZIP[:DIRECTORY] + parts[1] + parts[0] + GOOD_ZIP[third:]


EMPTY_ZIP = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0, 0, 0, 0, 0)

OPAQUE: dict[str, Callable[[], bytes]] = {
    # safetensors
    "header of 2**63": lambda: with_header(b"{}", size=1 << 63),
    "header of 2**64-1": lambda: with_header(b"{}", size=(1 << 64) - 1),
    "header longer than the file": lambda: with_header(b"{}", size=len(PAYLOAD) + 3),
    "header shorter than its text": lambda: with_header(GOOD_TENSORS, size=20),
    "header longer than its text": lambda: with_header(GOOD_TENSORS, size=400),
    "header that is no object": lambda: with_header(b"{" * 500),
    "header nested deeply": lambda: with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "arrays nested deeply": lambda: with_header(b'{"a":{"x":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}}"),
    "braces": lambda: with_header(b"{" * 2_000_000),
    "a million tensors": lambda: with_header(b"{" + b",".join(b'"%d":{}' % i for i in range(1_000_000)) + b"}"),
    "tensor behind the end": lambda: with_header({"a": tensor(0, len(PAYLOAD) + 1)}),
    "tensor far behind the end": lambda: with_header({"a": tensor(0, 1 << 62)}),
    "offsets above 64 bits": lambda: with_header({"a": tensor(0, 1 << 80)}),
    "negative offsets": lambda: with_header({"a": tensor(-5, 10)}),
    "reversed offsets": lambda: with_header({"a": tensor(10, 5)}),
    "overlap": lambda: with_header({"a": tensor(0, 300_000), "b": tensor(299_999, 600_000)}),
    "the same bytes twice": lambda: with_header({"a": tensor(0, 300_000), "b": tensor(0, 300_000)}),
    "offsets that are text": lambda: with_header({"a": tensor("0", "5")}),
    "offsets that are fractions": lambda: with_header({"a": tensor(0.5, 5)}),
    "three offsets": lambda: with_header({"a": {"data_offsets": [0, 1, 2]}}),
    "tensor that is a number": lambda: with_header({"a": 5}),
    "tensor that is null": lambda: with_header({"a": None}),
    "not UTF-8": lambda: with_header(b'{"\xff":{"data_offsets":[0,5]}}'),
    "half a surrogate": lambda: with_header(b'{"\\ud800":{"data_offsets":[0,5]}}'),
    "not JSON": lambda: with_header(b"{'a':1}".ljust(100)),
    "nothing but a header": lambda: with_header({"a": tensor(0, 1 << 20)}, b"").ljust(300 * KIB),
    # archives
    "compressed": lambda: zip_of(600 * KIB, compression=zipfile.ZIP_DEFLATED),
    "encrypted": lambda: patched(GOOD_ZIP, DIRECTORY + 8, "H", 1),
    "masked": lambda: patched(GOOD_ZIP, DIRECTORY + 8, "H", 1 << 13),
    "method differs in the local header": lambda: patched(GOOD_ZIP, 8, "H", 8),
    "flags differ in the local header": lambda: patched(GOOD_ZIP, 6, "H", 8),
    "no local header": lambda: patched(GOOD_ZIP, GOOD_ZIP.rindex(b"PK\x03\x04"), "I", 0x04034B51),
    "local name too long": lambda: patched(GOOD_ZIP, 26, "HH", 0xFFFF, 0xFFFF),
    "sizes differ": lambda: patched(GOOD_ZIP, DIRECTORY + 20, "II", 5, 204_800),
    "size of 4 GiB": lambda: patched(GOOD_ZIP, DIRECTORY + 20, "II", 0xFFFFFFFE, 0xFFFFFFFE),
    "size in a zip64 field that is not there": lambda: patched(GOOD_ZIP, DIRECTORY + 20, "II", *[0xFFFFFFFF] * 2),
    "offset behind the directory": lambda: patched(GOOD_ZIP, DIRECTORY + 42, "I", len(GOOD_ZIP)),
    "another disk": lambda: patched(GOOD_ZIP, DIRECTORY + 34, "H", 3),
    "directory entry cut": lambda: patched(GOOD_ZIP, DIRECTORY + 28, "HHH", 0xFFFF, 0xFFFF, 0xFFFF),
    "more entries than there are": lambda: patched(GOOD_ZIP, END + 8, "HH", 4, 4),
    "fewer entries than there are": lambda: patched(GOOD_ZIP, END + 8, "HH", 2, 2),
    "no entries": lambda: patched(GOOD_ZIP, END + 8, "HH", 0, 0),
    "entries differ by disk": lambda: patched(GOOD_ZIP, END + 8, "HH", 2, 3),
    "directory too small": lambda: patched(GOOD_ZIP, END + 12, "I", 10),
    "directory of 4 GiB": lambda: patched(GOOD_ZIP, END + 12, "I", 0xFFFFFFF0),
    "directory before the start": lambda: patched(GOOD_ZIP, END + 16, "I", 0xFFFFFFF0),
    "directory moved": lambda: patched(GOOD_ZIP, END + 16, "I", DIRECTORY - 1),
    "a comment that is not there": lambda: patched(GOOD_ZIP, END + 20, "H", 9),
    "bytes behind the end": lambda: GOOD_ZIP + b"x",
    "bytes before the start": lambda: b"PK\x03\x04" + GOOD_ZIP,
    "cut": lambda: GOOD_ZIP[:-1],
    "cut in the middle": lambda: GOOD_ZIP[: 300 * KIB],
    "one member many times": overlapping,
    "out of order": swapped,
    "zip64 with 2**64-1 entries": lambda: zip64_of((1 << 64) - 1, END - DIRECTORY, DIRECTORY),
    "zip64 with a directory of 2**64-1": lambda: zip64_of(3, (1 << 64) - 1, DIRECTORY),
    "zip64 with an offset of 2**64-1": lambda: zip64_of(3, END - DIRECTORY, (1 << 64) - 1),
    "zip64 record elsewhere": lambda: zip64_of(3, END - DIRECTORY, DIRECTORY, place=5),
    "zip64 record of another length": lambda: zip64_of(3, END - DIRECTORY, DIRECTORY, length=1 << 60),
    "zip64 locator without a record": lambda: (
        GOOD_ZIP[:END] + struct.pack("<4sIQI", b"PK\x06\x07", 0, END, 1) + GOOD_ZIP[END:]
    ),
    "half a million empty archives": lambda: b"PK\x03\x04" + EMPTY_ZIP * 500_000,
    "a quarter of a million archives": lambda: zip_of(1) * 250_000,
    "empty archive behind a good one": lambda: GOOD_ZIP + EMPTY_ZIP,
    "only magic": lambda: b"PK\x03\x04" * 80_000,
    "an end inside the end": lambda: b"PK\x03\x04" + bytes(300 * KIB) + EMPTY_ZIP[:11] + EMPTY_ZIP,
}


@pytest.mark.parametrize("name", OPAQUE)
def test_a_lying_header_makes_an_opaque_file(name: str) -> None:
    """No cuts, within seconds, and the bytes exactly."""
    data = OPAQUE[name]()
    assert len(data) >= 256 * KIB
    began = time.process_time()
    assert structured_cuts(BytesSource(data)) is None
    assert time.process_time() - began < 5
    assert b"".join(map(bytes, Cutter().cut(BytesSource(data), name))) == data


HARMLESS: dict[str, Callable[[], bytes]] = {
    "good tensors": lambda: with_header(GOOD_TENSORS),
    "good archive": lambda: GOOD_ZIP,
    "zip64": lambda: zip64_of(3, END - DIRECTORY, DIRECTORY),
    "three archives": lambda: GOOD_ZIP + zip64_of(3, END - DIRECTORY, DIRECTORY) + GOOD_ZIP,
    "one name twice": lambda: with_header(b'{"a":{"data_offsets":[0,9]},"a":{"data_offsets":[9,614400]}}'),
    "a hole": lambda: with_header({"a": tensor(0, 100), "b": tensor(300_000, 614_400)}),
    "bytes behind the last tensor": lambda: with_header({"a": tensor(0, 100_000)}),
    "no tensors": lambda: with_header({}),
    "metadata of braces": lambda: with_header({"__metadata__": {"json": "{[" * 20_000}, **GOOD_TENSORS}),
    "names that are paths": lambda: GOOD_ZIP.replace(b"archive/data/", b"../../../etc/"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_odd_files_are_cut_and_come_back(name: str) -> None:
    """What is odd but consistent is cut, and the bytes come back exactly."""
    data = HARMLESS[name]()
    check(structured_cuts(BytesSource(data)), len(data))
    assert structured_cuts(BytesSource(data)) is not None
    assert b"".join(map(bytes, Cutter().cut(BytesSource(data), name))) == data


def check(cuts: list[int] | None, size: int) -> None:
    if cuts is not None:
        assert cuts[-1] == size
        assert all(a < b <= a + 4 * MIB for a, b in itertools.pairwise([0, *cuts]))


class Sparse:
    """A file of any size that is zeros but for a few places."""

    def __init__(self, size: int, *places: tuple[int, bytes]) -> None:
        self.size = size
        self._places = places
        self.read = 0

    def readinto(self, offset: int, buffer: memoryview, /) -> int:
        length = min(len(buffer), max(0, self.size - offset))
        self.read += length
        buffer[:length] = bytes(length)
        for place, data in self._places:
            begin, end = max(place, offset), min(place + len(data), offset + length)
            if begin < end:
                buffer[begin - offset : end - offset] = data[begin - place : end - place]
        return length


TIB = 1 << 40


@pytest.mark.parametrize(
    ("source", "cut"),
    [
        pytest.param(Sparse(TIB, (0, struct.pack("<Q", TIB - 8) + b"{")), False, id="a header of 1 TiB"),
        pytest.param(Sparse(TIB, (0, struct.pack("<Q", 33 * MIB) + b"{")), False, id="a header of 33 MiB"),
        pytest.param(Sparse(TIB, (0, with_header({}, b""))), False, id="1 TiB and no tensor"),
        pytest.param(
            Sparse(TIB, (0, with_header({"a": tensor(0, 9), "b": tensor(TIB // 2, TIB // 2 + 9)}, b""))),
            False,
            id="a hole of 512 GiB",
        ),
        pytest.param(
            Sparse(TIB, (0, with_header({"a": tensor(TIB // 2, TIB // 2 + 1 * MIB)}, b""))), False, id="a hole first"
        ),
        pytest.param(Sparse(TIB, (0, b"PK\x03\x04")), False, id="1 TiB and no end"),
        pytest.param(
            Sparse(
                TIB,
                (0, b"PK\x03\x04"),
                (TIB - 22, struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0, 0, 0xF0000000, 0, 0)),
            ),
            False,
            id="a directory of 4 GB",
        ),
        pytest.param(
            Sparse(
                TIB,
                (0, b"PK\x03\x04"),
                (TIB - 22, struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 60_000, 60_000, 31 * MIB, 0, 0)),
            ),
            False,
            id="a directory of zeros",
        ),
        pytest.param(Sparse(TIB, (0, with_header({"a": tensor(0, 1 << 39)}, b"x"))), False, id="half is nothing"),
        pytest.param(
            Sparse(1 << 34, (0, with_header({"a": tensor(0, (1 << 34) - 78)}, b""))), True, id="one tensor of 16 GiB"
        ),
    ],
)
def test_huge_files_cost_their_headers(source: Sparse, cut: bool) -> None:
    """Never more than 33 MiB is read and held to decide about a file of any size."""
    tracemalloc.start()
    try:
        cuts = structured_cuts(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (cuts is not None) == cut
    check(cuts, source.size)
    assert source.read <= 33 * MIB
    assert peak <= 80 * MIB


BASES = {
    "safetensors": with_header(GOOD_TENSORS),
    "archive": GOOD_ZIP,
    "zip64": zip64_of(3, END - DIRECTORY, DIRECTORY),
    "archives": zip_of(100 * KIB, 600) + zip_of(150 * KIB) + zip_of(700, 70 * KIB),
}


@pytest.mark.parametrize("name", BASES)
def test_mutations(name: str) -> None:
    """600 damaged copies of each: no error, all of the file, in bounded time."""
    rng = random.Random(name)
    base = BASES[name]
    # Bytes that mean something: headers, not tensors.
    where = [i for start in (0, len(base) - 600) for i in range(start, start + 600)]
    for match in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"):
        at = -1
        while (at := base.find(match, at + 1)) >= 0:
            where += range(at, min(at + 50, len(base)))
    cutter = Cutter()
    survived = 0
    for round_ in range(600):
        data = bytearray(base)
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(where)
            match rng.randrange(5):
                case 0:
                    data[at % len(data)] ^= 1 << rng.randrange(8)
                case 1:
                    data[at % len(data)] = rng.choice(b'\x00\xff{}[]"0919-e,:PK')
                case 2:
                    width = rng.choice([2, 4, 8])
                    value = rng.choice(
                        [0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), len(base), rng.getrandbits(8 * width)]
                    )
                    at = min(at % len(data), len(data) - width)
                    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
                case 3:
                    del data[at % len(data) : at % len(data) + rng.randint(1, 40)]
                case 4:
                    data[at % len(data) : at % len(data)] = rng.randbytes(rng.randint(1, 40))
        began = time.process_time()
        cuts = structured_cuts(BytesSource(data))
        assert time.process_time() - began < 5
        check(cuts, len(data))
        survived += cuts is not None
        if round_ % 4 == 0:
            assert b"".join(map(bytes, cutter.cut(BytesSource(data), name))) == data
    assert 0 < survived < 600


def test_a_read_that_fails_is_not_hidden() -> None:
    """What the disk refuses is the caller's to see; it is not a sign of a wrong header."""

    class Broken(BytesSource):
        def readinto(self, offset: int, buffer: memoryview, /) -> int:
            if offset + len(buffer) > 300_000:
                raise OSError(5, "Input/output error")
            return super().readinto(offset, buffer)

    for data in (GOOD_ZIP, with_header(GOOD_TENSORS), PAYLOAD * 3):
        with pytest.raises(OSError, match="Input/output"):
            list(Cutter().cut(Broken(data), "file"))


@pytest.mark.parametrize("at", [9, 100, 5000])
def test_a_file_that_shrinks_while_its_header_is_read(at: int) -> None:
    """A header that is no longer there is a wrong header."""

    class Shrunk(BytesSource):
        size = 600 * KIB

    for data in (GOOD_ZIP, with_header(GOOD_TENSORS)):
        assert structured_cuts(Shrunk(data[:at])) is None
