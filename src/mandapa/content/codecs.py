"""How a chunk's bytes are stored: a codec for each small integer in the format, chosen by trying.

A codec's id stands in packs and manifests, its feature's name in a version's ``requires``, so that a mandapa which
lacks it says so before it reads a byte. Source: docs/format.md.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError
from mandapa.format.strict import CHUNK_MAX

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["CODECS", "FEATURES", "RAW", "ZSTD", "Codec", "Mode", "decode", "encode"]

Buffer: TypeAlias = bytes | bytearray | memoryview
Mode: TypeAlias = Literal["raw", "auto", "dense"]

RAW = 0
ZSTD = 1

_AUTO_MIN = 256
"""Shorter chunks are not worth a frame: most of them are headers of a few dozen bytes."""

_UNPROBED_MAX = 4 << 10
"""Up to this a probe costs as much as compressing, and finds too few repeats in prose."""

_SAMPLE_MIN = 16 << 10
_SAMPLE_MAX = 64 << 10
_AUTO_KEPT = 0.8
"""In ``auto`` a chunk is compressed when at most this is left of its sample, and then of all of it."""

_PROBE_LEVEL = -1
"""Finds repeats but codes no single bytes: text and records shrink, floats pass at the speed of a copy."""

_AUTO_LEVEL = 1
_DENSE_LEVELS = (1, 9)
_MAGIC = b"\x28\xb5\x2f\xfd"
_OPTIONS = {int(zstd.DecompressionParameter.window_log_max): (CHUNK_MAX - 1).bit_length()}
"""No frame needs a window above the largest chunk."""


class Codec(NamedTuple):
    """One way to store a chunk."""

    feature: str
    """The name by which a version requires it."""
    needs_base: bool
    """Whether decoding takes the bytes of another chunk."""
    decode: Callable[[Buffer, int], Buffer]
    """From stored bytes and raw length to raw bytes; raises `CorruptionError` and nothing else."""


def encode(data: Buffer, mode: Mode) -> tuple[int, Buffer]:
    r"""The id of the codec that was chosen and the bytes to store, which were decoded and found equal to ``data``.

    ``raw`` stores as is. ``auto`` compresses fast, and only what a sample says shrinks by a fifth or more: text, logs
    and tables, but no floats. ``dense`` takes its time and the smallest result. Safe to call from several threads,
    which then run side by side. With codec `RAW` the result is ``data`` itself, not a copy.

    Args:
        data: The chunk, at most 16 MiB.
        mode: How much work may be done.

    Raises:
        InvalidInputError: No such mode, or a chunk above 16 MiB.

    Example:
        >>> codec, stored = encode(b"step 100 loss 0.5\n" * 1000, "auto")
        >>> FEATURES[codec], len(stored) < 100
        ('zstd', True)
    """
    view = memoryview(data).cast("B")
    if len(view) > CHUNK_MAX:
        raise InvalidInputError(f"a chunk of {len(view)} bytes is above the limit of {CHUNK_MAX}")
    if mode == "raw":
        return RAW, data
    if mode == "auto":
        levels: tuple[int, ...] = (_AUTO_LEVEL,) if _shrinks(view) else ()
        limit = int(len(view) * _AUTO_KEPT)
    elif mode == "dense":
        levels, limit = _DENSE_LEVELS, len(view)
    else:
        raise InvalidInputError(f"{mode!r} is no mode of encoding: use 'raw', 'auto' or 'dense'")
    best: bytes | None = None
    for level in levels:
        stored = _compress(view, level)
        if len(stored) < limit:
            best, limit = stored, len(stored)
    if best is not None and _same(best, view):
        return ZSTD, best
    return RAW, data


def decode(codec: int, stored: Buffer, raw_length: int) -> Buffer:
    """The raw bytes of a chunk, ``raw_length`` of them; never more memory than that is used, whatever is stored.

    Whether they are the right ones is for the caller to check against the chunk's BLAKE3. Safe to call from several
    threads, which then run side by side. With codec `RAW` the result is ``stored`` itself, not a copy.

    Raises:
        CorruptionError: The stored bytes are no such chunk.
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
    return known.decode(stored, raw_length)


def _decode_raw(stored: Buffer, raw_length: int) -> Buffer:
    if memoryview(stored).nbytes != raw_length:
        raise CorruptionError(f"a raw chunk has {memoryview(stored).nbytes} bytes, not {raw_length}")
    return stored


def _decode_zstd(stored: Buffer, raw_length: int) -> bytes:
    # A skippable frame has another magic number; libzstd would pass over it in silence.
    view = memoryview(stored).cast("B")
    if view[:4] != _MAGIC:
        raise CorruptionError("a zstd chunk does not start with a zstd frame")
    try:
        frame = zstd.get_frame_info(view[:18])
        if frame.decompressed_size != raw_length or frame.dictionary_id:
            raise CorruptionError(f"a zstd chunk says it has {frame.decompressed_size} bytes, not {raw_length}")
        decompressor = zstd.ZstdDecompressor(options=_OPTIONS)
        # One byte more than there may be, so that the frame can reach its end.
        raw: bytes = decompressor.decompress(view, max_length=raw_length + 1)
    except zstd.ZstdError as error:
        raise CorruptionError(f"a zstd chunk cannot be decoded: {error}") from None
    if len(raw) != raw_length or not decompressor.eof or decompressor.unused_data:
        raise CorruptionError(f"a zstd chunk is not one frame of {raw_length} bytes")
    return raw


def _shrinks(view: memoryview) -> bool:
    """Whether two samples, together 1/64 of the chunk but at least 16 and at most 64 KiB, shrink by a fifth."""
    size = len(view)
    if size <= _UNPROBED_MAX:
        return size >= _AUTO_MIN
    sample = min(max(size // 64, _SAMPLE_MIN), _SAMPLE_MAX)
    if size <= sample:
        return len(_compress(view, _PROBE_LEVEL)) <= size * _AUTO_KEPT
    half, middle = sample // 2, size // 2
    left = len(_compress(view[:half], _PROBE_LEVEL)) + len(_compress(view[middle : middle + half], _PROBE_LEVEL))
    return left <= sample * _AUTO_KEPT


class _Compressors(threading.local):
    """The compressors of one thread by level: making one costs more than compressing a small chunk."""

    def __init__(self) -> None:
        self.by_level: dict[int, zstd.ZstdCompressor] = {}


_compressors = _Compressors()


def _compress(view: memoryview, level: int) -> bytes:
    """One frame with its content size, and without a checksum: the chunk has a BLAKE3."""
    compressor = _compressors.by_level.get(level)
    if compressor is None:
        compressor = _compressors.by_level[level] = zstd.ZstdCompressor(level)
    stored: bytes = compressor.compress(view, zstd.ZstdCompressor.FLUSH_FRAME)
    return stored


def _same(stored: bytes, view: memoryview) -> bool:
    try:
        # Of all ways to compare with a view this one is a memcmp; the lengths are equal already.
        return _decode_zstd(stored, len(view)).startswith(view)
    except CorruptionError:
        return False


CODECS = MappingProxyType({RAW: Codec("raw", False, _decode_raw), ZSTD: Codec("zstd", False, _decode_zstd)})
"""The codecs of this mandapa by id."""

FEATURES = MappingProxyType({codec: known.feature for codec, known in CODECS.items()})
"""The names of their features by id."""
