"""Object stores around an object store that lose requests, crash, and count."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from random import Random
from typing import Literal, TypeVar

from mandapa.errors import AlreadyExistsError, InvalidInputError, StorageError
from mandapa.object_store.base import Buffer, ObjectInfo, ObjectStore

__all__ = ["CountingObjectStore", "Crash", "CrashingObjectStore", "FaultyObjectStore"]

_T = TypeVar("_T")

_LANDS = 0.2  # chance at each call that one late request lands, as in the protocol's model
_PAGE = 1000


class FaultyObjectStore:
    """A store behind a bad network; what happens is a function of ``random`` and of the order of calls.

    A write that is *lost* raises a retryable `StorageError` and, with equal chances, was never done, was done, or is
    done during some later call (see `flush`). Deletes of several keys are one request.

    Args:
        store: Where writes end up.
        random: Seeded by the caller.
        lost: Chance that a call is lost; reads just fail.
        conflicts: Chance that a create is refused by `AlreadyExistsError` without a look.
        doubled: Chance that a write arrives twice; a create that won is then reported as `AlreadyExistsError`.
    """

    def __init__(
        self, store: ObjectStore, random: Random, *, lost: float = 0.0, conflicts: float = 0.0, doubled: float = 0.0
    ) -> None:
        self._store = store
        self._random = random
        self._lost = lost
        self._conflicts = conflicts
        self._doubled = doubled
        self._late: list[Callable[[], None]] = []
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        """The wrapped store's."""
        return self._store.url

    def flush(self) -> None:
        """All late requests land now, in a random order."""
        with self._lock:
            while self._late:
                self._land()

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        """As the store, or a retryable `StorageError`."""
        return self._read(lambda: self._store.get(key, limit=limit))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """As the store, or a retryable `StorageError`."""
        return self._read(lambda: self._store.get_ranges(key, ranges))

    def head(self, key: str) -> ObjectInfo:
        """As the store, or a retryable `StorageError`."""
        return self._read(lambda: self._store.head(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """As the store, or broken off by a retryable `StorageError` after up to three objects."""
        with self._lock:
            self._tick()
            left = self._random.randrange(4) if self._random.random() < self._lost else None
        for number, info in enumerate(self._store.list(prefix, start_after=start_after)):
            if number == left:
                break
            yield info
        if left is not None:
            raise _lost()

    def put(self, key: str, data: Buffer) -> None:
        """As the store, lost or doubled."""
        kept = bytes(data)
        self._write(lambda: self._store.put(key, kept))

    def create(self, key: str, data: Buffer) -> None:
        """As the store, refused for nothing, lost or doubled."""
        kept = bytes(data)
        self._write(lambda: self._store.create(key, kept), conflicts=self._conflicts)

    def delete(self, keys: Iterable[str]) -> None:
        """As the store, lost or doubled, as one request."""
        kept = tuple(keys)
        self._write(lambda: self._store.delete(kept))

    def _read(self, call: Callable[[], _T]) -> _T:
        with self._lock:
            self._tick()
            if self._random.random() < self._lost:
                raise _lost()
            return call()

    def _write(self, call: Callable[[], None], conflicts: float = 0.0) -> None:
        with self._lock:
            self._tick()
            if self._random.random() < self._lost:
                fate = self._random.randrange(3)
                if fate == 1:
                    with suppress(AlreadyExistsError):
                        call()
                elif fate == 2:
                    self._late.append(call)
                raise _lost()
            if self._random.random() < conflicts:
                raise AlreadyExistsError("refused without a look")
            call()
            if self._random.random() < self._doubled:
                call()

    def _tick(self) -> None:
        if self._late and self._random.random() < _LANDS:
            self._land()

    def _land(self) -> None:
        call = self._late.pop(self._random.randrange(len(self._late)))
        with suppress(AlreadyExistsError):
            call()


class CountingObjectStore:
    """The same store, counting what would be paid for.

    Attributes:
        requests: By method name; a range counts as one request, a list as one per 1,000 objects, a delete as one per
            1,000 keys.
        bytes_read: By ``get`` and ``get_ranges``.
        bytes_written: By ``put`` and ``create``, refused ones included.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        self.requests: Counter[str] = Counter()
        self.bytes_read = 0
        self.bytes_written = 0

    @property
    def url(self) -> str:
        """The wrapped store's."""
        return self._store.url

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        """As the store."""
        self._count("get")
        data = self._store.get(key, limit=limit)
        self._count("get", 0, read=memoryview(data).nbytes)
        return data

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """As the store."""
        lengths = [length for _, length in ranges if length]
        self._count("get_ranges", len(lengths), read=sum(lengths))
        return self._store.get_ranges(key, ranges)

    def head(self, key: str) -> ObjectInfo:
        """As the store."""
        self._count("head")
        return self._store.head(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """As the store."""
        self._count("list")
        for number, info in enumerate(self._store.list(prefix, start_after=start_after)):
            if number and number % _PAGE == 0:
                self._count("list")
            yield info

    def put(self, key: str, data: Buffer) -> None:
        """As the store."""
        self._count("put", written=memoryview(data).nbytes)
        self._store.put(key, data)

    def create(self, key: str, data: Buffer) -> None:
        """As the store."""
        self._count("create", written=memoryview(data).nbytes)
        self._store.create(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        """As the store."""
        kept = tuple(keys)
        self._count("delete", -(-len(kept) // _PAGE))
        self._store.delete(kept)

    def _count(self, verb: str, requests: int = 1, *, read: int = 0, written: int = 0) -> None:
        with self._lock:
            if requests:
                self.requests[verb] += requests
            self.bytes_read += read
            self.bytes_written += written


class Crash(BaseException):
    """The process died here: no error, so that no ``except Exception`` survives it."""


class CrashingObjectStore:
    """The same store, up to its ``at``-th call (from 1); that one and all later ones raise `Crash`.

    Run once with ``at=None`` and read `calls` to learn how many places there are to crash at.

    Args:
        store: Where calls go.
        at: Which call; None: never.
        mode: Whether that call is still done.
    """

    def __init__(
        self, store: ObjectStore, *, at: int | None = None, mode: Literal["before", "after"] = "before"
    ) -> None:
        if at is not None and at < 1:
            raise InvalidInputError("calls are counted from 1")
        self._store = store
        self._at = at
        self._mode = mode
        self._lock = threading.Lock()
        self.calls = 0

    @property
    def url(self) -> str:
        """The wrapped store's."""
        return self._store.url

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        """As the store, while alive."""
        return self._call(lambda: self._store.get(key, limit=limit))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """As the store, while alive."""
        return self._call(lambda: self._store.get_ranges(key, ranges))

    def head(self, key: str) -> ObjectInfo:
        """As the store, while alive."""
        return self._call(lambda: self._store.head(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """As the store, while alive; one call."""
        yield from self._call(lambda: self._store.list(prefix, start_after=start_after))

    def put(self, key: str, data: Buffer) -> None:
        """As the store, while alive."""
        self._call(lambda: self._store.put(key, data))

    def create(self, key: str, data: Buffer) -> None:
        """As the store, while alive."""
        self._call(lambda: self._store.create(key, data))

    def delete(self, keys: Iterable[str]) -> None:
        """As the store, while alive."""
        self._call(lambda: self._store.delete(keys))

    def _call(self, call: Callable[[], _T]) -> _T:
        with self._lock:
            self.calls += 1
            number = self.calls
        if self._at is None or number < self._at:
            return call()
        if number == self._at and self._mode == "after":
            call()
        raise Crash(f"call {number}")


def _lost() -> StorageError:
    return StorageError("the request or its reply was lost", retryable=True)
