"""The one seam to the outside world: a flat map from keys to immutable bytes, with create-if-absent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeAlias, runtime_checkable

__all__ = ["Buffer", "ObjectInfo", "ObjectStore"]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes that a store takes, and hands back, without promising a copy."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store tells about one object without its bytes."""

    key: str
    size: int
    """Bytes."""
    last_modified: datetime
    """By the store's own clock, aware, UTC."""


@runtime_checkable
class ObjectStore(Protocol):
    """A flat map key -> bytes with *create-if-absent*; knows nothing of artifacts.

    Keys are relative to the store's root: lower-case ASCII segments joined by ``/``, none of which starts with a dot;
    anything else raises `InvalidInputError`. Every method is safe to call from several threads. A client that must not
    be used in a forked child raises `ClosedError` there.

    Every method may raise `StorageError` (``.retryable`` says whether trying again may help) and
    `AccessDeniedError` (the message names the permission that lacks). An answer of 403 to a key that may be missing is
    an `AccessDeniedError`, never "absent".
    """

    @property
    def url(self) -> str:
        """Where the root is, without credentials: stable, fit for messages and as the key of caches."""
        ...

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        """The whole object. One request. Raises `NotFoundError`.

        One of more than ``limit`` bytes raises `CorruptionError`, before memory is taken for it: a reader knows how
        large what it reads may be, and not who wrote it.
        """
        ...

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """The bytes of each ``(offset, length)`` of one object, in the order asked for.

        Never returns short: a range that ends beyond the object raises `CorruptionError`. A range of length 0 is empty
        wherever it starts, and asks nothing. One request a range; neighbours may be joined. Raises `NotFoundError`.
        """
        ...

    def head(self, key: str) -> ObjectInfo:
        """Size and time of an object. One request. Raises `NotFoundError`."""
        ...

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with ``prefix`` (plain string match) and sorts after ``start_after``.

        In ascending byte order of the keys; one request per 1,000 objects. Sees every put that was acknowledged
        before the call.
        """
        ...

    def put(self, key: str, data: Buffer) -> None:
        """Store ``data`` under ``key``, replacing what was there; atomic: readers see the old or the new object.

        Acknowledged means durable. One request (never multipart).
        """
        ...

    def create(self, key: str, data: Buffer) -> None:
        """Store ``data`` under ``key`` only if no object is there; of any number of racers exactly one wins.

        One request. Raises `AlreadyExistsError` when the store said that the key is taken - which a lost reply can make
        untrue for the winner, so callers read the key back - and `StorageError` (retryable) when the outcome is
        unknown: the write may land, now or later.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; a key that is not there is no error. One request per key, or per 1,000 where stores can."""
        ...
