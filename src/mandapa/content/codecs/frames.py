"""Chunks, and planes of chunks, as zstd frames. Source: RFC 8878; docs/format.md §5.3."""

from __future__ import annotations

import sys
import threading

from mandapa.errors import CorruptionError
from mandapa.format.strict import CHUNK_MAX
from mandapa.object_store.base import Buffer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["BYTES", "compress", "decode_zstd"]

_P = zstd.CompressionParameter
BYTES: dict[int, int] = {
    int(_P.strategy): int(zstd.Strategy.fast),
    int(_P.window_log): 17,
    int(_P.hash_log): 6,
    int(_P.chain_log): 6,
    int(_P.search_log): 1,
    int(_P.min_match): 7,
    int(_P.target_length): 0,
}
"""Options under which zstd codes single bytes by how frequent they are and hardly looks for repeats: twice as fast as
level 1 on the exponents of floats, and a little smaller."""

_MAGIC = b"\x28\xb5\x2f\xfd"
_OPTIONS = {int(zstd.DecompressionParameter.window_log_max): (CHUNK_MAX - 1).bit_length()}
"""No frame needs a window above the largest chunk."""


class _Compressors(threading.local):
    """The compressors of one thread: making one costs more than compressing a small chunk."""

    def __init__(self) -> None:
        self.by_level: dict[int | None, zstd.ZstdCompressor] = {}


_compressors = _Compressors()


def compress(view: Buffer, level: int | None) -> bytes:
    """One frame with its content size, without a checksum (the chunk has a BLAKE3); None: with the options `BYTES`."""
    compressor = _compressors.by_level.get(level)
    if compressor is None:
        compressor = zstd.ZstdCompressor(options=BYTES) if level is None else zstd.ZstdCompressor(level)
        _compressors.by_level[level] = compressor
    stored: bytes = compressor.compress(view, zstd.ZstdCompressor.FLUSH_FRAME)
    return stored


def decode_zstd(stored: Buffer, raw_length: int) -> bytes:
    """The bytes of one frame that declares ``raw_length`` of them; raises `CorruptionError` and nothing else."""
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
