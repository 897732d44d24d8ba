"""A store that writes down which requests it makes; in a module of its own, since the uploader imports it by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mandapa.object_store import S3ObjectStore
from mandapa.object_store.base import Buffer, ObjectInfo, ObjectStore


class CountingS3:
    """An S3 store; each request is a word in the file ``log``."""

    def __init__(self, bucket: str, prefix: str = "", *, log: str, **options: Any) -> None:
        self._store: ObjectStore = S3ObjectStore(bucket, prefix, **options)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)

    def _count(self, kind: str) -> ObjectStore:
        os.write(self._log, f"{kind}\n".encode())
        return self._store

    @property
    def url(self) -> str:
        return self._store.url

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        return self._count("GET").get(key, limit=limit)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        return self._count("GET").get_ranges(key, ranges)

    def head(self, key: str) -> ObjectInfo:
        return self._count("HEAD").head(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        return self._count("LIST").list(prefix, start_after=start_after)

    def put(self, key: str, data: Buffer) -> None:
        self._count("PUT").put(key, data)

    def create(self, key: str, data: Buffer) -> None:
        self._count("PUT").create(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        self._count("DELETE").delete(keys)
