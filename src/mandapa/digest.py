"""BLAKE3, the one hash of the format, and nothing else."""

from __future__ import annotations

from blake3 import blake3

__all__ = ["DIGEST_SIZE", "Hasher", "digest", "hexdigest"]

DIGEST_SIZE = 32
"""Bytes in a digest."""

Hasher = blake3
"""A running BLAKE3: ``update(buffer)``, ``digest()``, ``hexdigest()``. Releases the GIL on large buffers."""


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """The 32-byte BLAKE3 of ``data``."""
    return blake3(data).digest()


def hexdigest(data: bytes | bytearray | memoryview) -> str:
    """The BLAKE3 of ``data`` as 64 lower-case hex digits."""
    return blake3(data).hexdigest()
