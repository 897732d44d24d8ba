"""Objects in this process's memory: for tests, and for trying things out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import NoReturn, TypeAlias

from mandapa.errors import AlreadyExistsError, CorruptionError, NotFoundError
from mandapa.object_store.base import Buffer, ObjectInfo
from mandapa.object_store.keys import check_key, check_prefix, check_ranges, check_size

__all__ = ["MemoryObjectStore"]

_Objects: TypeAlias = dict[str, tuple[bytes, datetime]]

_named: dict[str, _Objects] = {}


class MemoryObjectStore:
    """An object store that lives and dies with this process.

    Stores of one ``name`` share their objects; without a name a store is alone. Safe to use from threads. It cannot be
    pickled: another process would see an empty store.

    Example:
        >>> store = MemoryObjectStore()
        >>> store.create("log/0", b"first")
        >>> bytes(store.get("log/0"))
        b'first'
    """

    # No lock, so that a fork can never inherit a held one: each method touches the dict by one atomic call.

    def __init__(self, name: str | None = None) -> None:
        self._name = name or f"anonymous-{os.urandom(8).hex()}"
        self._objects: _Objects = _named.setdefault(name, {}) if name else {}

    @property
    def url(self) -> str:
        """``memory://<name>``."""
        return f"memory://{self._name}"

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        """The whole object. Raises `NotFoundError`, and `CorruptionError` above ``limit``."""
        data = self._find(key)[0]
        check_size(key, len(data), limit)
        return data

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """The bytes of each range. Raises `NotFoundError`, `CorruptionError` beyond the end."""
        check_ranges(ranges)
        check_key(key)
        if not any(length for _, length in ranges):
            return [b"" for _ in ranges]
        data = self._find(key)[0]
        for offset, length in ranges:
            if length and offset + length > len(data):
                raise CorruptionError(f"{self.url}/{key} ends at {len(data)}, before {offset + length}", key=key)
        return [data[offset : offset + length] for offset, length in ranges]

    def head(self, key: str) -> ObjectInfo:
        """Size and time. Raises `NotFoundError`."""
        data, at = self._find(key)
        return ObjectInfo(key, len(data), at)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects under ``prefix`` in byte order, as they were when the iteration began."""
        check_prefix(prefix)
        objects = self._objects.copy()
        for key in sorted(key for key in objects if key.startswith(prefix) and key > start_after):
            data, at = objects[key]
            yield ObjectInfo(key, len(data), at)

    def put(self, key: str, data: Buffer) -> None:
        """Store a copy of ``data``."""
        self._objects[check_key(key)] = (bytes(data), datetime.now(UTC))

    def create(self, key: str, data: Buffer) -> None:
        """Store a copy of ``data`` unless the key is taken. Raises `AlreadyExistsError`."""
        new = (bytes(data), datetime.now(UTC))
        if self._objects.setdefault(check_key(key), new) is not new:
            raise AlreadyExistsError(f"{self.url}/{key} is there already")

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; a missing one is no error."""
        for key in [check_key(key) for key in keys]:
            self._objects.pop(key, None)

    def __repr__(self) -> str:
        return f"MemoryObjectStore({self._name!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a MemoryObjectStore lives in one process and cannot be pickled: use a local directory")

    def _find(self, key: str) -> tuple[bytes, datetime]:
        try:
            return self._objects[check_key(key)]
        except KeyError:
            raise NotFoundError(f"{self.url}/{key} is not there") from None
