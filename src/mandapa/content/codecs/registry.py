"""The codecs of this mandapa by id, and decoding by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import NamedTuple

from mandapa.content.codecs.bf16 import decode_bf16
from mandapa.content.codecs.frames import decode_zstd
from mandapa.content.codecs.pco import decode_delta, decode_pco
from mandapa.content.codecs.planes import decode_planes
from mandapa.errors import CorruptionError, FormatVersionError
from mandapa.format.strict import CHUNK_MAX
from mandapa.object_store.base import Buffer

__all__ = ["BF16", "CODECS", "DELTA", "FEATURES", "PCO", "PLANES", "RAW", "ZSTD", "Codec", "decode", "required"]

RAW = 0
ZSTD = 1
PLANES = 2
PCO = 3
DELTA = 4
BF16 = 5


class Codec(NamedTuple):
    """One way to store a chunk."""

    feature: str
    """The name by which a version requires it."""
    needs_base: bool
    """Whether decoding takes the bytes of another chunk."""
    decode: Callable[..., Buffer]
    """From stored bytes, raw length, and the base's raw bytes where it needs one, to raw bytes; raises
    `CorruptionError` and nothing else."""


def decode(codec: int, stored: Buffer, raw_length: int, base: Buffer | None = None) -> Buffer:
    """The raw bytes of a chunk, ``raw_length`` of them; never more memory than that is used, whatever is stored.

    Whether they are the right ones is for the caller to check against the chunk's BLAKE3. Safe to call from several
    threads, which then run side by side. With codec `RAW` the result is ``stored`` itself, not a copy.

    Args:
        codec: Its id.
        stored: What stands in the container.
        raw_length: Bytes of the chunk.
        base: The raw bytes of the chunk's base, where it has one.

    Raises:
        CorruptionError: The stored bytes are no such chunk; a base where the codec needs none, or none where it does.
        FormatVersionError: No codec of this mandapa has that id.

    Example:
        >>> decode(RAW, b"weights", 7)
        b'weights'
    """
    known = CODECS.get(codec)
    if known is None:
        raise FormatVersionError(f"a chunk is stored with codec {codec}, which this mandapa does not have: upgrade it")
    if not 0 <= raw_length <= CHUNK_MAX:
        raise CorruptionError(f"a chunk of {raw_length} bytes: the format allows 0 to {CHUNK_MAX}")
    if known.needs_base != (base is not None):
        raise CorruptionError(f"a chunk of codec {known.feature} {'has' if base is not None else 'lacks'} a base")
    return known.decode(stored, raw_length) if base is None else known.decode(stored, raw_length, base)


def required(codecs: Iterable[int]) -> set[str]:
    """The features that a version with chunks of these codecs lists in ``requires``."""
    return {CODECS[codec].feature for codec in codecs if codec > ZSTD}


def _decode_raw(stored: Buffer, raw_length: int) -> Buffer:
    if memoryview(stored).nbytes != raw_length:
        raise CorruptionError(f"a raw chunk has {memoryview(stored).nbytes} bytes, not {raw_length}")
    return stored


CODECS = MappingProxyType(
    {
        RAW: Codec("raw", False, _decode_raw),
        ZSTD: Codec("zstd", False, decode_zstd),
        PLANES: Codec("planes", False, decode_planes),
        PCO: Codec("pco", False, decode_pco),
        DELTA: Codec("delta", True, decode_delta),
        BF16: Codec("bf16", True, decode_bf16),
    }
)
"""The codecs of this mandapa by id."""

FEATURES = MappingProxyType({codec: known.feature for codec, known in CODECS.items()})
"""The names of their features by id."""
