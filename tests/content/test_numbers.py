"""Codecs of numbers: every bit comes back, whatever the type; hostile bytes are corruption, within bounds."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mandapa.content.codecs import (
    BF16,
    CODECS,
    DELTA,
    PCO,
    PLANES,
    RAW,
    ZSTD,
    decode,
    encode,
    is_bf16_copy,
    required,
)
from mandapa.content.codecs.bf16 import round_to_bf16
from mandapa.content.codecs.numbers import WIDTHS, likely_width
from mandapa.content.codecs.pco import encode_delta, encode_pco
from mandapa.content.codecs.planes import encode_planes
from mandapa.errors import CorruptionError
from mandapa.format.strict import CHUNK_MAX

EFFORTS = ("raw", "fast", "planes", "dense")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "complex64": torch.complex64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
PATTERNS = (
    0x0000000000000000,
    0x8000000080008080,  # -0 in every width
    0x7FF0000000000001,  # a NaN with a payload
    0xFFC1234567890ABC,
    0x7FC000017F817FC1,
    0x0000000100010001,  # denormals
    0x7F8000007C007F80,  # infinities
    0xFFFFFFFFFFFFFFFF,
)


def tensor_bytes(dtype: str, values: np.ndarray) -> bytes:
    """Values as a tensor of that type, in its bytes."""
    tensor = torch.from_numpy(values).to(DTYPES[dtype]).contiguous()
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@st.composite
def arrays(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """The bytes of an array of any type, and those of an earlier state of it."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    size = draw(st.sampled_from([0, 1, 2, 3, 7, 64, 300, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.normal(size=size) * draw(st.sampled_from([1e-40, 1e-8, 0.02, 1.0, 300.0]))
    if draw(st.booleans()):
        values = np.round(values * 8) / 8
    with np.errstate(all="ignore"):
        before = tensor_bytes(dtype, values)
        after = bytearray(tensor_bytes(dtype, values * (1 + draw(st.sampled_from([0, 1e-4, 0.1])) * rng.normal())))
    for place in draw(st.lists(st.integers(0, max(0, len(after) - 8)), max_size=4)):
        after[place : place + 8] = struct.pack("<Q", draw(st.sampled_from(PATTERNS)))[: len(after) - place]
    extra = draw(st.binary(max_size=3))  # headers and odd lengths
    return bytes(after) + extra, before + extra[::-1]


@settings(max_examples=5000, deadline=None)
@given(arrays(), st.sampled_from(WIDTHS))
def test_arrays_come_back_from_every_codec(pair: tuple[bytes, bytes], width: int) -> None:
    """To the bit, with any width, with any base of the same length, and by every effort."""
    data, before = pair
    assert bytes(decode(PLANES, encode_planes(data, width), len(data))) == data
    assert bytes(decode(PCO, encode_pco(data, width), len(data))) == data
    assert bytes(decode(DELTA, encode_delta(data, before, width), len(data), before)) == data
    for effort in EFFORTS:
        codec, stored, base = encode(data, effort, [None, before[1:], before])
        assert base in (None, 2)
        assert bytes(decode(codec, stored, len(data), None if base is None else before)) == data
        assert len(stored) <= len(data)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1) | st.sampled_from([p & 0xFFFFFFFF for p in PATTERNS]), max_size=50))
def test_bf16_is_rounded_as_torch_rounds(bits: list[int]) -> None:
    """All bit patterns of fp32: ties to even, overflow to infinity, denormals, both zeros; NaN as torch makes it."""
    numbers = np.array(bits, np.uint32)
    expected = torch.from_numpy(numbers.view(np.float32).copy()).bfloat16()
    rounded = torch.from_numpy(np.frombuffer(round_to_bf16(numbers), np.int16).copy()).view(torch.bfloat16)
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(rounded), nan)
    assert torch.equal(rounded[~nan].view(torch.int16), expected[~nan].view(torch.int16))
    assert (rounded[nan].view(torch.int16) == 0x7FC0).all()


def trained(count: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count, scale=scale).astype(np.float32)


def test_a_bf16_copy_costs_nothing() -> None:
    """What equals its rounded master has no bytes of its own; one bit less, and it has."""
    master = trained(1 << 16)
    copy = bytes(round_to_bf16(master))
    assert is_bf16_copy(copy, master)
    assert bytes(decode(BF16, b"", len(copy), master.tobytes())) == copy
    assert not is_bf16_copy(bytes([copy[0] ^ 1]) + copy[1:], master)
    assert not is_bf16_copy(copy, master[1:])


def test_what_each_effort_makes_of_floats() -> None:
    """Planes for floats, pcodec where time allows, and a delta where the parent is near."""
    before = trained(1 << 18)
    after = before + trained(1 << 18, seed=1, scale=1e-6)
    data = after.tobytes()
    assert encode(data, "fast").codec == RAW
    assert encode(data, "planes").codec == PLANES
    alone = encode(data, "dense")
    assert alone.codec == PCO
    assert len(alone.stored) < len(encode(data, "planes").stored) < 0.87 * len(data)
    delta = encode(data, "dense", [before.tobytes()])
    assert (delta.codec, delta.base) == (DELTA, 0)
    assert len(delta.stored) < 0.8 * len(alone.stored)
    assert encode(data, "dense", [trained(1 << 18, seed=3).tobytes()]).codec == PCO
    assert encode(data, "planes", [before.tobytes()]).codec == PLANES


def test_the_base_with_the_fewest_bases_is_taken_when_it_is_near() -> None:
    """So that the next version can stand on this one; else the nearest."""
    first = trained(1 << 16)
    second = first + trained(1 << 16, seed=1, scale=1e-6)
    third = second + trained(1 << 16, seed=2, scale=1e-6)
    far = second + trained(1 << 16, seed=4, scale=1e-2)
    offered = [first.tobytes(), second.tobytes()]
    assert encode(third.tobytes(), "dense", offered).base == 0
    offered[0] = far.tobytes()
    assert encode(third.tobytes(), "dense", offered).base == 1


def test_widths_are_found_from_the_bytes_alone() -> None:
    """The bytes of a number that are alike say how wide it is."""
    numbers = trained(1 << 14)
    assert likely_width(numbers.tobytes())[0] == 4
    assert likely_width(numbers.astype(np.float64).tobytes())[0] == 8
    assert likely_width(round_to_bf16(numbers).tobytes())[0] == 2
    assert likely_width(np.random.default_rng(0).bytes(1 << 16)) == (1, pytest.approx(1, abs=0.01))
    assert likely_width(b"1234567") == (1, 1.0)


def test_features_of_codecs() -> None:
    """Raw and zstd need none; the others are named."""
    assert required([RAW, ZSTD]) == set()
    assert required(CODECS) == {"planes", "pco", "delta", "bf16"}


def test_a_base_is_there_when_and_only_when_it_is_needed() -> None:
    """A codec with a base that it does not need, or without the one it needs, is corruption."""
    data = trained(100).tobytes()
    for codec, stored in ((RAW, data), (PLANES, encode_planes(data, 4)), (PCO, encode_pco(data, 4))):
        with pytest.raises(CorruptionError, match="has a base"):
            decode(codec, stored, len(data), data)
    for codec in (DELTA, BF16):
        with pytest.raises(CorruptionError, match="lacks a base"):
            decode(codec, b"", len(data))
    with pytest.raises(CorruptionError, match="base of"):
        decode(DELTA, encode_delta(data, data, 4), len(data), data[4:])
    with pytest.raises(CorruptionError, match="base of"):
        decode(BF16, b"", len(data), data)
    with pytest.raises(CorruptionError, match="base of"):
        decode(BF16, b"x", len(data) // 2, data)


def stored_chunks() -> list[tuple[int, bytes, int, bytes | None]]:
    """Codec, stored bytes, raw length and base of small chunks of all kinds."""
    found: list[tuple[int, bytes, int, bytes | None]] = []
    for count in (1, 300, 3000):
        data = trained(count).tobytes() + b"xyz"
        base = trained(count, seed=1).tobytes() + b"abc"
        for width in WIDTHS:
            found.append((PLANES, encode_planes(data, width), len(data), None))
            found.append((PCO, encode_pco(data, width), len(data), None))
            found.append((DELTA, encode_delta(data, base, width), len(data), base))
    return found


def test_damaged_chunks() -> None:
    """10,000 mutations: the right length or CorruptionError, nothing else, and none takes long."""
    rng = random.Random(5)
    chunks = stored_chunks()
    slowest = 0.0
    for _ in range(10_000):
        codec, stored, raw, base = rng.choice(chunks)
        hurt = bytearray(stored)
        kind = rng.random()
        if kind < 0.6:
            for _ in range(rng.randint(1, 4)):
                hurt[rng.randrange(min(len(hurt), 80))] = rng.randrange(256)
        elif kind < 0.8:
            del hurt[rng.randrange(len(hurt)) :]
        elif kind < 0.9:
            hurt += rng.randbytes(rng.randint(1, 30))
        else:
            raw = max(0, raw + rng.choice((-8, -4, -1, 1, 4, 1000, CHUNK_MAX)))
        started = time.perf_counter()
        with suppress(CorruptionError):
            assert memoryview(decode(codec, bytes(hurt), raw, base)).nbytes == raw
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 1


BOMBS = """
import resource, struct, sys
from mandapa.content.codecs import DELTA, PCO, PLANES, decode
from mandapa.content.codecs.pco import encode_pco
from mandapa.content.codecs.planes import encode_planes
from mandapa.errors import CorruptionError
from mandapa.format.strict import CHUNK_MAX

small = encode_pco(bytes(8000), 8)
frame = encode_planes(bytes(1 << 20), 1)[5:]
decode(PCO, small, 8000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for codec, stored, raw, base in (
    (PCO, small, CHUNK_MAX, None),
    (PCO, small, CHUNK_MAX + 1, None),
    (DELTA, small, CHUNK_MAX, bytes(CHUNK_MAX)),
    (PLANES, bytes([8]) + struct.pack("<I", len(frame)) + frame, CHUNK_MAX, None),
    (PLANES, bytes([1]) + struct.pack("<I", 2**32 - 1) + frame, CHUNK_MAX, None),
):
    try:
        decode(codec, stored, raw, base)
        sys.exit(f"{codec} was decoded")
    except CorruptionError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_bombs_take_little_memory() -> None:
    """A small chunk that declares the most is refused within a few chunks' memory."""
    run = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 128


def test_the_largest_chunk_in_bounded_memory() -> None:
    """16 MiB go through every effort."""
    data = trained(CHUNK_MAX // 4).tobytes()
    before = (trained(CHUNK_MAX // 4) * np.float32(1.0001)).tobytes()
    for effort in EFFORTS:
        codec, stored, base = encode(data, effort, [before])
        assert bytes(decode(codec, stored, CHUNK_MAX, None if base is None else before)) == data
