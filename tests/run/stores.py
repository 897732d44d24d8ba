"""Object stores that the tests' runs name by class: the uploader imports this module by itself."""

from __future__ import annotations

import os
from collections.abc import Iterable

from mandapa.errors import AccessDeniedError
from mandapa.object_store import LocalObjectStore, S3ObjectStore
from mandapa.object_store.base import Buffer


class NeverDeletes(S3ObjectStore):
    """A bucket that one may read and write, as for a training job that shall not be able to destroy anything."""

    def delete(self, keys: Iterable[str]) -> None:
        raise AccessDeniedError(f"delete {list(keys)}: no")


class Outer:
    class Inner(LocalObjectStore):
        """A class inside of another one, which can be imported all the same."""


class Moody(LocalObjectStore):
    """A folder that refuses all that is asked as long as a file is there."""

    def __init__(self, path: str, denied: str) -> None:
        super().__init__(path)
        self._denied = denied

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        self._check()
        return super().get(key, limit=limit)

    def create(self, key: str, data: Buffer) -> None:
        self._check()
        super().create(key, data)

    def _check(self) -> None:
        if os.path.exists(self._denied):
            raise AccessDeniedError("no, not now")
