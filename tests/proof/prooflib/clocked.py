"""A store in memory that has a clock of its own."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from mandapa.errors import AlreadyExistsError
from mandapa.object_store.base import Buffer
from mandapa.object_store.keys import check_key
from mandapa.object_store.memory import MemoryObjectStore


class ClockedObjectStore(MemoryObjectStore):
    """The same, but times are what ``now`` says."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__()
        self._now = now

    def put(self, key: str, data: Buffer) -> None:
        self._objects[check_key(key)] = (bytes(data), self._now())

    def create(self, key: str, data: Buffer) -> None:
        if check_key(key) in self._objects:
            raise AlreadyExistsError(f"{self.url}/{key} is there already")
        self.put(key, data)
