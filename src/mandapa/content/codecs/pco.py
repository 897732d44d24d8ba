"""Numbers, and differences of numbers to a base, coded by pcodec. Source: docs/format.md §5.3; pcodec's own format.

A difference is taken between the bits of the two numbers, modulo 2**width, as if they were integers. For floats of one
sign this is the distance in steps of the least bit, whatever the exponents, so what training has moved a little gives
small numbers. Nothing is rounded and every pair of bit patterns has a difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mandapa.content.codecs.numbers import Width, as_numbers, opened, unsigned
from mandapa.errors import CorruptionError
from mandapa.object_store.base import Buffer

if TYPE_CHECKING:
    import numpy as np

__all__ = ["decode_delta", "decode_pco", "encode_delta", "encode_pco"]

_LEVEL = 8
"""Of pcodec's 0 to 12: 4 loses most of the gain, 12 adds a hundredth at half the speed."""


def encode_pco(data: Buffer, width: Width) -> bytes:
    """The stored bytes of the chunk's numbers."""
    numbers, over = as_numbers(data, width)
    return b"".join([bytes((width,)), over, _coded(numbers)])


def decode_pco(stored: Buffer, raw_length: int) -> memoryview:
    """The raw bytes; raises `CorruptionError` and nothing else."""
    return _decoded(stored, raw_length)[0].data


def encode_delta(data: Buffer, base: Buffer, width: Width) -> bytes:
    """The stored bytes of the differences to ``base``, which has as many bytes."""
    numbers, over = as_numbers(data, width)
    # Signed, so that small differences of both signs are neighbours.
    return b"".join([bytes((width,)), over, _coded((numbers - as_numbers(base, width)[0]).view(f"<i{width}"))])


def decode_delta(stored: Buffer, raw_length: int, base: Buffer) -> memoryview:
    """The raw bytes; raises `CorruptionError` and nothing else."""
    import numpy as np

    if memoryview(base).nbytes != raw_length:
        raise CorruptionError(f"a delta of {raw_length} bytes to a base of {memoryview(base).nbytes}")
    raw, numbers = _decoded(stored, raw_length, signed=True)
    numbers = numbers.view(unsigned(numbers.itemsize))
    np.add(numbers, as_numbers(base, numbers.itemsize)[0], out=numbers)
    return raw.data


def _coded(numbers: np.ndarray[Any, Any]) -> bytes:
    from pcodec import ChunkConfig, DeltaSpec, standalone

    if not len(numbers):
        return b""
    config = ChunkConfig(compression_level=_LEVEL, delta_spec=DeltaSpec.no_op(), enable_8_bit=True)
    # A chunk may start at any byte of a mapped file; pcodec takes only what is aligned.
    numbers = numbers if numbers.flags.aligned else numbers.copy()
    coded: bytes = standalone.simple_compress(numbers, config)
    return coded


def _decoded(
    stored: Buffer, raw_length: int, *, signed: bool = False
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All raw bytes, and those of them that are numbers."""
    import numpy as np
    from pcodec import standalone

    width, count, over, rest = opened(stored, raw_length)
    raw: np.ndarray[Any, Any] = np.empty(raw_length, np.uint8)
    raw[count * width :] = np.frombuffer(over, np.uint8)
    numbers: np.ndarray[Any, Any] = raw[: count * width].view(f"<i{width}" if signed else f"<u{width}")
    if count:
        try:
            progress = standalone.simple_decompress_into(bytes(rest), numbers)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CorruptionError(f"a chunk of numbers cannot be decoded: {error}") from None
        if progress.n_processed != count or not progress.finished:
            raise CorruptionError(f"a chunk of numbers does not have {count} of them")
    elif len(rest):
        raise CorruptionError("a chunk of no numbers has bytes after its end")
    return raw, numbers
