"""Which codec a chunk is stored with: found by trying on a sample, within what the caller will spend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from mandapa.content.codecs.bf16 import round_to_bf16
from mandapa.content.codecs.frames import compress
from mandapa.content.codecs.numbers import likely_width
from mandapa.content.codecs.pco import encode_delta, encode_pco
from mandapa.content.codecs.planes import encode_planes
from mandapa.content.codecs.registry import DELTA, PCO, PLANES, RAW, ZSTD, decode
from mandapa.errors import CorruptionError, InvalidInputError
from mandapa.format.strict import CHUNK_MAX
from mandapa.object_store.base import Buffer

__all__ = ["Effort", "Encoded", "encode", "is_bf16_copy"]

Effort: TypeAlias = Literal["raw", "fast", "planes", "dense"]
"""How much work a chunk may be: none; zstd for what clearly shrinks (2 GB/s a core over floats, which it leaves); byte
planes for floats, too (1.3 GB/s); everything (0.2 GB/s)."""

_FAST_MIN = 256
"""Shorter chunks are not worth a frame: most of them are headers of a few dozen bytes."""

_UNPROBED_MAX = 4 << 10
"""Up to this a probe costs as much as compressing, and finds too few repeats in prose."""

_PROBE_MIN = 16 << 10
_PROBE_MAX = 64 << 10
_FAST_KEPT = 0.8
"""With effort ``fast`` a chunk is compressed when at most this is left of its probe, and then of all of it."""

_PROBE_LEVEL = -1
"""Finds repeats but codes no single bytes: text and records shrink, floats pass at the speed of a copy."""

_FAST_LEVEL = 1
_DENSE_LEVELS = (1, 9)

_LANES_SAMPLE = 64 << 10
_SAMPLE = 256 << 10
_SAMPLE_PARTS = 4
_PLANES_KEPT = 0.95
"""Planes, and numbers, are worth their decoding when at most this is left."""

_DELTA_KEPT = 0.98
"""A delta makes readers fetch its base, too: it has to be smaller than the chunk alone by more than chance."""

_NEAR = 1.2
"""A base with fewer bases below it is taken when the delta is at most this much larger than the smallest: the next
version can then use this chunk as its own base. Best of 1.0 to 1.3 over series of fine-tunings in bf16."""

_STRONG = 0.65
_NEAR_WEAK = 1.05
"""The same where the smallest delta leaves more than `_STRONG` of what the chunk alone takes, as with fp32: the best of
the same for weights with Adam's moments, and for EMAs, which soon stand alone again anyway."""

_NUMBERS_MIN = 1 << 10
"""Below this, numbers are not looked for."""


class Encoded(NamedTuple):
    """A chunk as it is stored."""

    codec: int
    stored: Buffer
    base: int | None = None
    """Which of the bases offered it is a delta to."""


def encode(data: Buffer, effort: Effort, bases: Sequence[Buffer | None] = ()) -> Encoded:
    r"""The chunk by the codec that was chosen; decoded again, and found equal, before this returns.

    Safe to call from several threads, which then run side by side. With codec `RAW` the result is ``data`` itself.

    Args:
        data: The chunk, at most 16 MiB.
        effort: How much work may be done.
        bases: For ``dense``: the raw bytes of chunks of the same length that this one may be a delta to, those first
            that have the fewest bases themselves. None, and one of another length, is passed over.

    Raises:
        InvalidInputError: No such effort, or a chunk above 16 MiB.

    Example:
        >>> from mandapa.content.codecs import FEATURES
        >>> codec, stored, base = encode(b"step 100 loss 0.5\n" * 1000, "fast")
        >>> FEATURES[codec], len(stored) < 100
        ('zstd', True)
    """
    view = memoryview(data).cast("B")
    if len(view) > CHUNK_MAX:
        raise InvalidInputError(f"a chunk of {len(view)} bytes is above the limit of {CHUNK_MAX}")
    if effort not in ("raw", "fast", "planes", "dense"):
        raise InvalidInputError(f"{effort!r} is no effort of encoding: use 'raw', 'fast', 'planes' or 'dense'")
    found: Encoded | None = None
    base: Buffer | None = None
    most = len(view) - 1
    if effort == "dense":
        found, base = _dense(view, bases)
    elif effort != "raw" and _shrinks(view):
        found = Encoded(ZSTD, compress(view, _FAST_LEVEL))
        most = int(len(view) * _FAST_KEPT)
    elif effort == "planes" and len(view) >= _NUMBERS_MIN:
        width, left = likely_width(_middle(view, _LANES_SAMPLE))
        if left <= _PLANES_KEPT:
            found = Encoded(PLANES, encode_planes(view, width))
    if found is not None and len(found.stored) <= most and _same(found, view, base):
        return found
    return Encoded(RAW, data)


def is_bf16_copy(data: Buffer, master: Buffer) -> bool:
    """Whether the chunk is what rounding makes of fp32 numbers: then `BF16` stores it in no bytes.

    Example:
        >>> is_bf16_copy(bytes.fromhex("803f"), bytes.fromhex("0100803f"))
        True
    """
    view = memoryview(data).cast("B")
    return memoryview(master).nbytes == 2 * len(view) and _equal(round_to_bf16(master), view)


def _dense(view: memoryview, bases: Sequence[Buffer | None]) -> tuple[Encoded | None, Buffer | None]:
    """The smallest way to store the chunk, as its sample says, and the base's bytes; None where nothing shrinks."""
    if len(view) < _NUMBERS_MIN:
        return _frame(view), None
    sample = _sample(view)
    width, _ = likely_width(sample)
    alone = min(
        [_frame(sample), Encoded(PLANES, encode_planes(sample, width)), Encoded(PCO, encode_pco(sample, width))],
        key=_size,
    )
    deltas: list[tuple[int, int, Buffer]] = []
    for i, base in enumerate(bases):
        if base is not None and memoryview(base).nbytes == len(view):
            size = len(encode_delta(sample, _sample(memoryview(base).cast("B")), width))
            if size <= _size(alone) * _DELTA_KEPT:
                deltas.append((size, i, base))
    if deltas:
        least = min(deltas, key=lambda one: one[0])[0]
        near = _NEAR if least <= _size(alone) * _STRONG else _NEAR_WEAK
        _, i, base = next(one for one in deltas if one[0] <= least * near)
        return Encoded(DELTA, encode_delta(view, base, width), i), base
    if sample is view:
        return alone, None
    if alone.codec == ZSTD:
        return _frame(view), None
    return Encoded(alone.codec, (encode_planes if alone.codec == PLANES else encode_pco)(view, width)), None


def _frame(view: memoryview) -> Encoded:
    # What repeats at a distance shows only in the whole, so a sample cannot tell which level is better.
    return min([Encoded(ZSTD, compress(view, level)) for level in _DENSE_LEVELS], key=_size)


def _size(one: Encoded) -> int:
    return len(one.stored)


def _middle(view: memoryview, size: int) -> memoryview:
    start = max(0, len(view) - size) // 16 * 8  # numbers keep their places
    return view[start : start + size]


def _sample(view: memoryview) -> memoryview:
    """Up to 256 KiB of the chunk, from four places, numbers in their places."""
    if len(view) <= _SAMPLE:
        return view
    part = _SAMPLE // _SAMPLE_PARTS
    step = (len(view) - part) // (_SAMPLE_PARTS - 1) // 8 * 8
    return memoryview(b"".join([view[i * step : i * step + part] for i in range(_SAMPLE_PARTS)]))


def _shrinks(view: memoryview) -> bool:
    """Whether two samples, together 1/64 of the chunk but at least 16 and at most 64 KiB, shrink by a fifth."""
    size = len(view)
    if size <= _UNPROBED_MAX:
        return size >= _FAST_MIN
    sample = min(max(size // 64, _PROBE_MIN), _PROBE_MAX)
    if size <= sample:
        return len(compress(view, _PROBE_LEVEL)) <= size * _FAST_KEPT
    half, middle = sample // 2, size // 2
    left = len(compress(view[:half], _PROBE_LEVEL)) + len(compress(view[middle : middle + half], _PROBE_LEVEL))
    return left <= sample * _FAST_KEPT


def _same(found: Encoded, view: memoryview, base: Buffer | None) -> bool:
    try:
        raw = decode(found.codec, found.stored, len(view), base)
    except CorruptionError:
        return False
    return _equal(raw, view)


def _equal(raw: Buffer, view: memoryview) -> bool:
    # Of all ways to compare bytes with a view this one is a memcmp; views are compared byte by byte.
    if isinstance(raw, bytes):
        return len(raw) == len(view) and raw.startswith(view)
    import numpy as np

    return np.array_equal(np.frombuffer(raw, np.uint8), np.frombuffer(view, np.uint8))
