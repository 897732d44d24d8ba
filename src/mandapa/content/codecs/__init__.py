"""How a chunk's bytes are stored: a codec for each small integer in the format, chosen by trying.

A codec's id stands in packs and manifests, its feature's name in a version's ``requires``, so that a mandapa which
lacks it says so before it reads a byte. `encode` chooses and `decode` reads; each codec is a file of its own, pure
functions from bytes to bytes. numpy and pcodec are imported when the first chunk needs them.

Source: docs/format.md §5.3; the choice of codecs and their figures: docs/design/012-codecs.md.
"""

from mandapa.content.codecs.choice import Effort, Encoded, encode, is_bf16_copy
from mandapa.content.codecs.registry import (
    BF16,
    CODECS,
    DELTA,
    FEATURES,
    PCO,
    PLANES,
    RAW,
    ZSTD,
    Codec,
    decode,
    required,
)

__all__ = [
    "BF16",
    "CODECS",
    "DELTA",
    "FEATURES",
    "PCO",
    "PLANES",
    "RAW",
    "ZSTD",
    "Codec",
    "Effort",
    "Encoded",
    "decode",
    "encode",
    "is_bf16_copy",
    "required",
]
