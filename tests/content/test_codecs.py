"""Codecs: what goes in comes out, floats are left alone, and nothing hostile gets further than CorruptionError."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mandapa.content.codecs import BF16, CODECS, DELTA, FEATURES, PCO, PLANES, RAW, ZSTD, choice, decode, encode
from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError
from mandapa.format.strict import CHUNK_MAX

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

EFFORTS = ("raw", "fast", "planes", "dense")
LOG = "".join(f"step {i} loss {1 / (i + 1):.6f} lr 0.0003\n" for i in range(50_000)).encode()


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def floats(count: int) -> bytes:
    rng = random.Random(7)
    return array("f", (rng.gauss(0, 0.02) for _ in range(count))).tobytes()


def bfloats(count: int) -> bytes:
    data = floats(count)
    return b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))


@given(
    data=st.binary(max_size=3000)
    | st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=40), st.integers(1, 3000)),
    effort=st.sampled_from(EFFORTS),
)
def test_what_goes_in_comes_out(data: bytes, effort: str) -> None:
    """Any bytes come back from any effort, and no effort makes them longer."""
    codec, stored, _ = encode(data, effort)
    assert decode(codec, stored, len(data)) == data
    assert len(stored) <= len(data)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer(effort: str, kind: type) -> None:
    """Bytes, bytearrays and views are taken and can be decoded from."""
    codec, stored, _ = encode(kind(LOG[:100_000]), effort)
    assert decode(codec, memoryview(stored), 100_000) == LOG[:100_000]
    assert decode(codec, bytearray(stored), 100_000) == LOG[:100_000]


@pytest.mark.parametrize("effort", ["fast", "planes", "dense"])
def test_a_chunk_may_start_anywhere(effort: str) -> None:
    """Chunks are views of mapped files: their first byte is where no number of more than one byte may stand."""
    numbers = array("f", (i * 0.37 + (i % 7) * 1e-3 for i in range(40_000))).tobytes()
    before = array("f", (i * 0.37 for i in range(40_000))).tobytes()
    for start in (1, 2, 3):
        view, base = memoryview(bytes(start) + numbers)[start:], memoryview(bytes(start) + before)[start:]
        found = encode(view, effort, [base])
        assert decode(found.codec, found.stored, len(view), base if found.codec == DELTA else None) == numbers


def test_views_of_other_formats() -> None:
    """A view of floats is the bytes of the floats."""
    data = memoryview(array("f", [1.5] * 5000))
    for effort in EFFORTS:
        codec, stored, _ = encode(data, effort)
        assert bytes(memoryview(decode(codec, stored, 20_000)).cast("B")) == data.tobytes()


@pytest.mark.parametrize(
    ("data", "codec"),
    [
        pytest.param(b"", RAW, id="empty"),
        pytest.param(LOG[:100], RAW, id="too short"),
        pytest.param(LOG[:300], ZSTD, id="short log"),
        pytest.param(LOG[:9000], ZSTD, id="log below the sample"),
        pytest.param(LOG, ZSTD, id="log"),
        pytest.param(json.dumps([{"id": i, "text": f"row {i}"} for i in range(20_000)]).encode(), ZSTD, id="json"),
        pytest.param(bytes(1 << 20), ZSTD, id="zeros"),
        pytest.param(struct.pack("<50000q", *range(50_000)), ZSTD, id="counters"),
        pytest.param(noise(1 << 20), RAW, id="noise"),
        pytest.param(noise(300), RAW, id="short noise"),
        pytest.param(floats(1 << 18), RAW, id="fp32"),
        pytest.param(bfloats(1 << 18), RAW, id="bf16"),
        pytest.param(noise(1 << 16) + bytes(1 << 16) + noise(7 << 17), RAW, id="a few zeros in noise"),
    ],
)
def test_fast_compresses_repeats_and_leaves_floats(data: bytes, codec: int) -> None:
    """`fast` spends time only on what shrinks by a fifth."""
    chosen, stored, _ = encode(data, "fast")
    assert chosen == codec
    assert decode(chosen, stored, len(data)) == data
    if codec == ZSTD:
        assert len(stored) <= 0.8 * len(data)
    else:
        assert stored is data


def test_dense_is_never_larger_than_fast() -> None:
    """Dense takes the smallest of all, floats included."""
    for data in (LOG[: 1 << 20], floats(1 << 16), bfloats(1 << 16), noise(1 << 16), LOG[:120], b""):
        assert len(encode(data, "dense")[1]) <= len(encode(data, "fast")[1])
    assert encode(floats(1 << 16), "dense")[0] == PCO
    assert encode(floats(1 << 16), "planes")[0] == PLANES


def test_a_frame_is_the_same_each_time() -> None:
    """A compressor that was used before gives the frame of a new one: one frame, with its size, no checksum."""
    stored = bytes(encode(LOG, "fast")[1])
    encode(noise(5000), "fast")
    encode(LOG[:9000], "fast")
    assert encode(LOG, "fast")[1] == stored == zstd.compress(LOG, 1)
    assert zstd.get_frame_info(stored).decompressed_size == len(LOG)
    assert not stored[4] & 0b0000_0111  # neither checksum nor dictionary


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_largest_chunk(effort: str) -> None:
    """16 MiB go through every effort; one byte more is refused."""
    data = (LOG * 20)[:CHUNK_MAX]
    codec, stored, _ = encode(data, effort)
    assert decode(codec, stored, CHUNK_MAX) == data
    with pytest.raises(InvalidInputError, match="above the limit"):
        encode(bytes(CHUNK_MAX + 1), effort)


@pytest.mark.parametrize("wrong", [zstd.compress(LOG[:8999] + b"?", 1), zstd.compress(LOG[:8999], 1), b"", b"junk"])
@pytest.mark.parametrize("effort", ["fast", "dense"])
def test_a_compressor_that_errs_is_found_out(effort: str, wrong: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not decode to the same bytes is not stored: the chunk stays raw."""
    monkeypatch.setattr(choice, "compress", lambda view, level: wrong)
    monkeypatch.setattr(choice, "encode_planes", lambda view, width: wrong)
    monkeypatch.setattr(choice, "encode_pco", lambda view, width: wrong)
    assert encode(LOG[:9000], effort) == (RAW, LOG[:9000], None)


def test_refused_arguments() -> None:
    """Efforts and codecs that are not there are refused by name; a codec as something newer."""
    with pytest.raises(InvalidInputError, match="'auto'"):
        encode(b"", "auto")
    with pytest.raises(FormatVersionError, match="codec 7"):
        decode(7, b"", 0)


def test_the_registry() -> None:
    """Ids and feature names are part of the format."""
    assert dict(FEATURES) == {RAW: "raw", ZSTD: "zstd", PLANES: "planes", PCO: "pco", DELTA: "delta", BF16: "bf16"}
    assert list(FEATURES) == [0, 1, 2, 3, 4, 5]
    assert [codec for codec, known in CODECS.items() if known.needs_base] == [DELTA, BF16]


def test_decode_of_literal_bytes() -> None:
    """A frame that is written down here is read for ever."""
    frame = bytes.fromhex("28b52ffd2007390000") + b"weights"
    assert decode(ZSTD, frame, 7) == b"weights"
    assert decode(ZSTD, bytes.fromhex("28b52ffda00000010003000800"), 65_536) == bytes(65_536)


def _with_size(size: int) -> bytes:
    """A frame header that declares any size, and a block that has another."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + bytes.fromhex("390000") + b"weights"


GOOD = zstd.compress(b"weights" * 100, 1)
HOSTILE = {
    "empty": (b"", 700),
    "nothing for nothing": (b"", 0),
    "magic only": (GOOD[:4], 700),
    "half a header": (GOOD[:5], 700),
    "truncated by one": (GOOD[:-1], 700),
    "truncated half": (GOOD[: len(GOOD) // 2], 700),
    "trailing byte": (GOOD + b"\0", 700),
    "two frames": (GOOD + GOOD, 700),
    "two frames, both lengths": (GOOD + GOOD, 1400),
    "skippable frame before": (b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + GOOD, 700),
    "skippable frame after": (GOOD + b"\x50\x2a\x4d\x18\x04\0\0\0abcd", 700),
    "one less": (GOOD, 699),
    "one more": (GOOD, 701),
    "zero": (GOOD, 0),
    "negative": (GOOD, -1),
    "above the limit": (zstd.compress(bytes(CHUNK_MAX + 1), 1), CHUNK_MAX + 1),
    "bomb": (zstd.compress(bytes(1 << 30), 1), 1 << 30),
    "bomb with a small raw length": (zstd.compress(bytes(1 << 26), 1), 1 << 16),
    "declares 2**63": (_with_size(1 << 63), 1 << 63),
    "declares the most, has 7": (_with_size(CHUNK_MAX), CHUNK_MAX),
    "declares less than it has": (_with_size(3), 3),
    "no content size": (
        zstd.ZstdCompressor(options={zstd.CompressionParameter.content_size_flag: 0}).compress(
            b"weights" * 100, zstd.ZstdCompressor.FLUSH_FRAME
        ),
        700,
    ),
    "window of 128 MiB": (b"\x28\xb5\x2f\xfd\x80" + bytes([17 << 3]) + struct.pack("<I", 65_536) + GOOD[6:], 65_536),
    "dictionary": (b"\x28\xb5\x2f\xfd\x21\x05\x07" + bytes.fromhex("390000") + b"weights", 7),
    "reserved bit": (b"\x28\xb5\x2f\xfd\x28\x07" + bytes.fromhex("390000") + b"weights", 7),
    "old magic": (b"\x27\xb5\x2f\xfd" + GOOD[4:], 700),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", 700),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_are_corruption(name: str) -> None:
    """Nothing but CorruptionError comes out of a frame that is not exactly what it must be."""
    stored, raw_length = HOSTILE[name]
    with pytest.raises(CorruptionError):
        decode(ZSTD, stored, raw_length)


@pytest.mark.parametrize("raw_length", [-1, 0, 6, 8, CHUNK_MAX + 1])
def test_raw_of_another_length_is_corruption(raw_length: int) -> None:
    """A raw chunk has exactly its length."""
    with pytest.raises(CorruptionError):
        decode(RAW, b"weights", raw_length)


@settings(max_examples=300)
@given(
    at=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
    source=st.sampled_from([LOG[:5000], bytes(3000), noise(500) * 3]),
)
def test_damaged_frames(at: list[tuple[int, int]], cut: int, source: bytes) -> None:
    """A damaged frame gives CorruptionError or bytes of the right length, nothing else."""
    stored = bytearray(zstd.compress(source, 1))
    for offset, value in at:
        stored[offset % len(stored)] = value
    del stored[len(stored) - cut % len(stored) :]
    try:
        raw = decode(ZSTD, stored, len(source))
    except CorruptionError:
        return
    assert len(raw) == len(source)


def test_threads_do_not_mix() -> None:
    """Four threads that encode and decode at once get their own bytes back."""

    def work(seed: int) -> bool:
        rng = random.Random(seed)
        for _ in range(40):
            part = rng.randbytes(50) * rng.randrange(1, 4000)
            for effort in ("fast", "dense") if len(part) < 20_000 else ("fast",):
                codec, stored, _ = encode(part, effort)
                if hashlib.sha256(decode(codec, stored, len(part))).digest() != hashlib.sha256(part).digest():
                    return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(8)))
