"""Trying again: an object store around an object store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from mandapa.errors import InvalidInputError, StorageError
from mandapa.object_store.base import Buffer, ObjectInfo, ObjectStore

if TYPE_CHECKING:
    from random import Random

__all__ = ["RetryingObjectStore"]

_T = TypeVar("_T")


class RetryingObjectStore:
    """The same store, patient: a call that fails with a retryable `StorageError` is made again after a random pause.

    The n-th pause is uniform in [0, min(``cap``, ``base`` * 2^n)] seconds, so that many clients do not come back
    together. Repeated are reads, lists (they go on after the last key handed out), ``put`` (same bytes, same key) and
    ``delete``. ``create`` is passed on once: after an unknown outcome only its caller can tell, by reading the key,
    whose bytes stand there.

    Args:
        store: The store to ask.
        attempts: Calls at most, the first included; for a list: without progress.
        base: Seconds.
        cap: Seconds.
        sleep: Called with seconds.
        random: Source of the jitter; by default the system's, which a fork does not duplicate.

    Example:
        >>> from mandapa.object_store import MemoryObjectStore
        >>> store = RetryingObjectStore(MemoryObjectStore(), attempts=3)
        >>> store.put("a", b"1")
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        attempts: int = 5,
        base: float = 0.1,
        cap: float = 5.0,
        sleep: Callable[[float], None] = time.sleep,
        random: Random | None = None,
    ) -> None:
        from random import SystemRandom

        if attempts < 1:
            raise InvalidInputError("attempts must be 1 or more")
        self._store = store
        self._attempts = attempts
        self._base = base
        self._cap = cap
        self._sleep = sleep
        self._random = random or SystemRandom()

    @property
    def url(self) -> str:
        """The wrapped store's."""
        return self._store.url

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        """The whole object, after retries."""
        return self._again(lambda: self._store.get(key, limit=limit))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """The bytes of each range, after retries."""
        return self._again(lambda: self._store.get_ranges(key, ranges))

    def head(self, key: str) -> ObjectInfo:
        """Size and time, after retries."""
        return self._again(lambda: self._store.head(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Every object once and in order; a list that breaks off goes on after the last key it gave."""
        failures = 0
        while True:
            try:
                for info in self._store.list(prefix, start_after=start_after):
                    yield info
                    start_after = info.key
                    failures = 0
                return
            except StorageError as error:
                failures += 1
                self._pause_or_raise(error, failures)

    def put(self, key: str, data: Buffer) -> None:
        """Store, after retries: the bytes are the same, so a lost reply does no harm."""
        self._again(lambda: self._store.put(key, data))

    def create(self, key: str, data: Buffer) -> None:
        """Create once; never retried."""
        self._store.create(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove, after retries."""
        keys = tuple(keys)
        self._again(lambda: self._store.delete(keys))

    def __repr__(self) -> str:
        return f"RetryingObjectStore({self._store!r}, attempts={self._attempts})"

    def _again(self, call: Callable[[], _T]) -> _T:
        failures = 0
        while True:
            try:
                return call()
            except StorageError as error:
                failures += 1
                self._pause_or_raise(error, failures)

    def _pause_or_raise(self, error: StorageError, failures: int) -> None:
        if not error.retryable or failures >= self._attempts:
            raise error
        self._sleep(self._random.uniform(0.0, min(self._cap, self._base * 2.0**failures)))
