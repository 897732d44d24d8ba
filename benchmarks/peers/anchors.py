"""Other ways to make floats small, each on one core: zstd, ZipNN, and the XOR with the version before."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pcodec

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PART = 4 << 20
"""Bytes that are compressed together: what mandapa takes at once, too."""

WIDTHS = {"F32": (np.uint32, "float32"), "BF16": (np.uint16, "bfloat16")}
"""What safetensors calls a type -> the integer of its width, and ZipNN's name of it."""


class Way(NamedTuple):
    """From floats, and those of the version before, to bytes and back."""

    encode: Callable[[np.ndarray, np.ndarray], Any]
    decode: Callable[[Any, np.ndarray], np.ndarray]


def floats(path: Path) -> tuple[np.ndarray, str]:
    """All tensors of a safetensors file in a row, as integers of their width, and what ZipNN calls their type."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        (kind,) = {entry["dtype"] for entry in header.values()}
        integer, name = WIDTHS[kind]
        return np.frombuffer(file.read(), integer), name


def changed(paths: list[Path]) -> dict[str, float]:
    """Bytes of the tensors of which a later version has other bits, the median; and how many tensors there are."""
    versions = []
    for path in paths:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            data = memoryview(file.read())
        versions.append({name: data[slice(*entry["data_offsets"])] for name, entry in header.items()})
    sizes = [
        sum(len(data) for name, data in now.items() if data != before[name])
        for before, now in itertools.pairwise(versions)
    ]
    return {"changed": statistics.median(sizes), "tensors": len(versions[0])}


def xor(now: np.ndarray, before: np.ndarray) -> list[bytes]:
    """Byte planes of the bits that differ, each by zstd at level 1: ZipLLM's way."""
    planes = (now ^ before).view(np.uint8).reshape(-1, now.itemsize).T
    return [zstd.compress(np.ascontiguousarray(plane), 1) for plane in planes]


def unxor(planes: list[bytes], before: np.ndarray) -> np.ndarray:
    """What `xor` was given."""
    bits = np.empty((len(before), before.itemsize), np.uint8)
    for number, plane in enumerate(planes):
        bits[:, number] = np.frombuffer(zstd.decompress(plane), np.uint8)
    return bits.view(before.dtype)[:, 0] ^ before


def ordered(bits: np.ndarray) -> np.ndarray:
    """Integers in the order of the floats whose bits are given."""
    top = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return np.where(bits & top, ~bits, bits ^ top)


def unordered(integers: np.ndarray) -> np.ndarray:
    """What `ordered` was given."""
    top = integers.dtype.type(1 << (8 * integers.itemsize - 1))
    return np.where(integers & top, integers ^ top, ~integers)


def integers(now: np.ndarray, before: np.ndarray) -> bytes:
    """The differences of floats as integers, by pcodec: the floor of what a delta can do."""
    return pcodec.standalone.simple_compress(ordered(now) - ordered(before), pcodec.ChunkConfig())


def unintegers(stored: bytes, before: np.ndarray) -> np.ndarray:
    """What `integers` was given."""
    return unordered(pcodec.standalone.simple_decompress(stored) + ordered(before))


def zipnn(kind: str) -> Way | None:
    """As its makers call it, with one thread."""
    try:
        from zipnn import ZipNN
    except ImportError:
        return None
    tool = ZipNN(bytearray_dtype=kind, input_format="byte", threads=1)
    return Way(
        lambda now, before: bytes(tool.compress(bytearray(now.tobytes()))),
        lambda stored, before: np.frombuffer(tool.decompress(stored), before.dtype),
    )


def ways(kind: str) -> dict[str, Way]:
    """All that can be had."""
    found = {
        "zstd-3": Way(
            lambda now, before: zstd.compress(now, 3),
            lambda stored, before: np.frombuffer(zstd.decompress(stored), before.dtype),
        ),
        "ZipNN": zipnn(kind),
        "XOR, planes, zstd": Way(xor, unxor),
        "integers, pcodec": Way(integers, unintegers),
    }
    return {name: way for name, way in found.items() if way is not None}


def measure(paths: list[Path]) -> dict[str, dict[str, float]]:
    """Of each way: what it leaves of a later version, and raw bytes a second in and out; medians over the versions."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    before, kind = floats(paths[0])
    for path in paths[1:]:
        now, _ = floats(path)
        for name, way in ways(kind).items():
            found.setdefault(name, []).append(one(way, now, before))
        before = now
    return {
        name: dict(zip(("of_raw", "encode", "decode"), map(statistics.median, zip(*runs, strict=True)), strict=True))
        for name, runs in found.items()
    }


def one(way: Way, now: np.ndarray, before: np.ndarray) -> tuple[float, float, float]:
    """Fraction left, and rates in and out, of one version."""
    size, stored_bytes, spent_in, spent_out = PART // now.itemsize, 0, 0.0, 0.0
    for at in range(0, len(now), size):
        part, old = now[at : at + size], before[at : at + size]
        start = time.perf_counter()
        stored = way.encode(part, old)
        middle = time.perf_counter()
        again = way.decode(stored, old)
        spent_out += time.perf_counter() - middle
        spent_in += middle - start
        stored_bytes += len(stored) if isinstance(stored, bytes) else sum(map(len, stored))
        if not np.array_equal(again, part):
            raise RuntimeError("it does not give back what it was given")
    return stored_bytes / now.nbytes, now.nbytes / spent_in, now.nbytes / spent_out
