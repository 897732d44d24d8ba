"""For stores that do not keep create-if-absent: the promise that one process writes at a time, made explicit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mandapa.errors import AlreadyExistsError, NotFoundError
from mandapa.object_store.base import Buffer, ObjectInfo, ObjectStore

__all__ = ["SingleWriterObjectStore"]


class SingleWriterObjectStore:
    """The same store, whose ``create`` looks first and then puts: right only while one process writes at a time."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @property
    def url(self) -> str:
        """The wrapped store's."""
        return self._store.url

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        """The whole object."""
        return self._store.get(key, limit=limit)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """The bytes of each range."""
        return self._store.get_ranges(key, ranges)

    def head(self, key: str) -> ObjectInfo:
        """Size and time."""
        return self._store.head(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """All objects under a prefix."""
        return self._store.list(prefix, start_after=start_after)

    def put(self, key: str, data: Buffer) -> None:
        """Store ``data``, replacing what was there."""
        self._store.put(key, data)

    def create(self, key: str, data: Buffer) -> None:
        """Look, then put. Two requests. Raises `AlreadyExistsError`."""
        try:
            self._store.head(key)
        except NotFoundError:
            self._store.put(key, data)
        else:
            raise AlreadyExistsError(f"{self.url}: {key} is there already")

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects."""
        self._store.delete(keys)
