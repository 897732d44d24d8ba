"""What a key may look like, checked by every store before it does anything."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mandapa.errors import CorruptionError, InvalidInputError

__all__ = ["check_key", "check_prefix", "check_ranges", "check_size", "is_segment"]

MAX_KEY_BYTES = 512
"""Leaves room for a root's own prefix within the 1,024 bytes that S3, GCS and Azure allow."""

MAX_SEGMENT_BYTES = 255
"""What the file systems under a local directory can hold."""

# No segment starts with a dot: that rules out `.`, `..`, and whatever a local directory keeps for itself. Nor does one
# end with it: Azure drops such dots.
_SEGMENT = re.compile(r"[a-z0-9_-](?:[a-z0-9._-]{0,253}[a-z0-9_-])?")
_KEY = re.compile(rf"{_SEGMENT.pattern}(?:/{_SEGMENT.pattern})*")


def is_segment(name: str) -> bool:
    """Whether ``name`` can stand between two slashes of a key."""
    return _SEGMENT.fullmatch(name) is not None


def check_key(key: str) -> str:
    """The key itself, when it is one that every store can hold.

    Raises:
        InvalidInputError: ``key`` is not segments of ``a-z 0-9 _ - .`` joined by ``/``, without a dot at the ends of a
            segment, of at most 255 bytes each and 512 together.
    """
    if len(key) > MAX_KEY_BYTES or _KEY.fullmatch(key) is None:
        raise InvalidInputError(
            f"{key!r} is not a key: segments of a-z 0-9 _ - . (not first, not last), joined by '/', "
            f"{MAX_SEGMENT_BYTES} bytes each and {MAX_KEY_BYTES} together at most"
        )
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself, when some key can start with it; ``""`` and ``"log/"`` and ``"log/00"`` can.

    Raises:
        InvalidInputError: no key can start with ``prefix``.
    """
    if prefix and not _KEY.fullmatch(prefix) and not _KEY.fullmatch(prefix + "x"):
        raise InvalidInputError(f"{prefix!r} is not the beginning of any key")
    return prefix


def check_ranges(ranges: Sequence[tuple[int, int]]) -> None:
    """Nothing, when every ``(offset, length)`` is at least zero.

    Raises:
        InvalidInputError: one is negative.
    """
    for offset, length in ranges:
        if offset < 0 or length < 0:
            raise InvalidInputError(f"range ({offset}, {length}): offset and length must not be negative")


def check_size(key: str, size: int, limit: int | None) -> None:
    """Nothing, when an object of ``size`` bytes may be read whole.

    Raises:
        CorruptionError: it is larger than ``limit``.
    """
    if limit is not None and size > limit:
        raise CorruptionError(f"{key}: {size} bytes, more than the {limit} that the format allows", key=key)
