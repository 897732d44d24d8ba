"""Byte planes: the first bytes of all numbers, then the second bytes, and so on, each plane as a frame or as it is.

The exponents of trained floats take about 3 of 8 bits, the rest hardly shrinks: so one plane in four of fp32, one in
two of bf16, is coded, and the others are copied. Source: docs/format.md §5.3.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any

from mandapa.content.codecs.frames import compress, decode_zstd
from mandapa.content.codecs.numbers import Width, as_numbers, opened, unsigned
from mandapa.errors import CorruptionError
from mandapa.object_store.base import Buffer

if TYPE_CHECKING:
    import numpy as np

__all__ = ["decode_planes", "encode_planes"]

_LENGTH = Struct("<I")
_BLOCK = 64 << 10  # numbers, so that what is in between stays in the cache
_PROBE = 8 << 10
_KEPT = 0.95
"""A plane is coded when at most this is left of a piece of it."""


def encode_planes(data: Buffer, width: Width) -> bytes:
    """The stored bytes; longer than ``data`` by a few where nothing shrinks."""
    import numpy as np

    numbers, over = as_numbers(data, width)
    parts: list[Buffer] = [bytes((width,)), over]
    for place in range(width):
        part: np.ndarray[Any, Any] = np.empty(len(numbers), np.uint8)
        for start in range(0, len(numbers), _BLOCK):
            part[start : start + _BLOCK] = numbers[start : start + _BLOCK] >> numbers.dtype.type(8 * place)
        plane = part.data
        middle = len(plane) // 2
        probe = plane[middle : middle + _PROBE]
        stored: Buffer = plane
        if len(compress(probe, None)) <= len(probe) * _KEPT:
            coded = compress(plane, None)
            if len(coded) < len(plane):
                stored = coded
        parts += [_LENGTH.pack(len(stored)), stored]
    return b"".join(parts)


def decode_planes(stored: Buffer, raw_length: int) -> memoryview:
    """The raw bytes; raises `CorruptionError` and nothing else."""
    import numpy as np

    width, count, over, rest = opened(stored, raw_length)
    raw: np.ndarray[Any, Any] = np.empty(raw_length, np.uint8)
    numbers = raw[: count * width].view(unsigned(width))
    planes: list[Buffer] = []
    for _ in range(width):
        if len(rest) < 4:
            raise CorruptionError("a chunk of byte planes ends too early")
        [length] = _LENGTH.unpack(rest[:4])
        if length > min(count, len(rest) - 4):
            raise CorruptionError("a byte plane is longer than its chunk")
        part, rest = rest[4 : 4 + length], rest[4 + length :]
        planes.append(part if length == count else decode_zstd(part, count))
    if len(rest):
        raise CorruptionError("a chunk of byte planes has bytes after its end")
    numbers[:] = np.frombuffer(planes[-1], np.uint8, count)
    for plane in planes[-2::-1]:
        np.left_shift(numbers, 8, out=numbers)
        np.bitwise_or(numbers, np.frombuffer(plane, np.uint8, count), out=numbers)
    raw[count * width :] = np.frombuffer(over, np.uint8)
    return raw.data
