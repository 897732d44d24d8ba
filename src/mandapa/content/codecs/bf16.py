"""A bf16 copy of fp32 numbers: nothing is stored, rounding gives it again. Source: docs/format.md §5.3.

Training in mixed precision keeps both; the copy is one in seven bytes of such a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mandapa.content.codecs.numbers import as_numbers
from mandapa.errors import CorruptionError
from mandapa.object_store.base import Buffer

if TYPE_CHECKING:
    import numpy as np

__all__ = ["decode_bf16", "round_to_bf16"]

_BLOCK = 64 << 10  # numbers, so that what is in between stays in the cache
_NAN = 0x7FC0


def round_to_bf16(data: Buffer) -> memoryview:
    """The upper halves of fp32 numbers, rounded to nearest, ties to even; every NaN is 0x7FC0, as torch makes it."""
    import numpy as np

    numbers, over = as_numbers(data, 4)
    if len(over):
        raise CorruptionError(f"{memoryview(data).nbytes} bytes are no fp32 numbers")
    rounded: np.ndarray[Any, Any] = np.empty(len(numbers), "<u2")
    for start in range(0, len(numbers), _BLOCK):
        block = numbers[start : start + _BLOCK]
        up = block >> np.uint32(16)
        up &= np.uint32(1)
        up += np.uint32(0x7FFF)
        up += block
        up >>= np.uint32(16)
        part = rounded[start : start + _BLOCK]
        part[:] = up
        part[(block & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)] = _NAN
    return rounded.view(np.uint8).data


def decode_bf16(stored: Buffer, raw_length: int, base: Buffer) -> memoryview:
    """The raw bytes, half as many as those of ``base``; raises `CorruptionError` and nothing else."""
    if memoryview(stored).nbytes or memoryview(base).nbytes != 2 * raw_length:
        raise CorruptionError(f"a bf16 copy of {raw_length} bytes of a base of {memoryview(base).nbytes}")
    return round_to_bf16(base)
