"""A store with a clock of its own, that notes every call and does something else at a point that a test names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TypeVar

import pytest

from mandapa.errors import AlreadyExistsError, NotFoundError
from mandapa.object_store.base import Buffer, ObjectInfo
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository

_T = TypeVar("_T")

DAY = 86_400.0


class ClockedStore(MemoryObjectStore):
    """In memory; its clock stands at 2001 until a test moves it, and the writers' clock is in 2027."""

    def __init__(self) -> None:
        super().__init__()
        self.now = datetime(2001, 9, 9, tzinfo=UTC)
        self.calls: list[str] = []
        self.before: list[tuple[str, Callable[[], object]]] = []
        """Start of a call, such as ``create log/``, and what happens once just before the next such call."""

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        return self._call("get", key, lambda: MemoryObjectStore.get(self, key, limit=limit))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        return self._call("get_ranges", key, lambda: MemoryObjectStore.get_ranges(self, key, ranges))

    def head(self, key: str) -> ObjectInfo:
        return self._call("head", key, lambda: MemoryObjectStore.head(self, key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        return iter(
            self._call("list", prefix, lambda: [*MemoryObjectStore.list(self, prefix, start_after=start_after)])
        )

    def put(self, key: str, data: Buffer) -> None:
        def call() -> None:
            self._objects[key] = (bytes(data), self.now)

        self._call("put", key, call)

    def create(self, key: str, data: Buffer) -> None:
        def call() -> None:
            if key in self._objects:
                raise AlreadyExistsError(f"{key} is there already")
            self._objects[key] = (bytes(data), self.now)

        self._call("create", key, call)

    def delete(self, keys: Iterable[str]) -> None:
        kept = [*keys]
        self._call("delete", " ".join(kept), lambda: MemoryObjectStore.delete(self, kept))

    def _call(self, verb: str, key: str, call: Callable[[], _T]) -> _T:
        event = f"{verb} {key}"
        for at, (start, action) in enumerate(self.before):
            if event.startswith(start):
                del self.before[at]
                action()
                break
        self.calls.append(event)
        return call()

    def keys(self, *prefixes: str) -> set[str]:
        return {key for key in self._objects if key.startswith(prefixes or "")}

    def copy(self) -> ClockedStore:
        """Another store with the same objects, and the time of this one."""
        other = ClockedStore()
        other._objects.update(self._objects)
        other.now = self.now
        return other


class Place:
    """A repository on such a store, and what tests do there."""

    def __init__(self, store: ClockedStore | None = None, seed: int = 0) -> None:
        self.store = store or ClockedStore()
        self.repo = Repository.create(self.store, threads=0, codec="raw", author=self.author(seed))

    @staticmethod
    def author(seed: int) -> Author:
        return Author("ana", clock=lambda: datetime(2027, 1, 1, tzinfo=UTC), sleep=lambda _: None, random=Random(seed))

    def other(self, seed: int = 99) -> Repository:
        """Another process, which knows nothing yet."""
        return Repository(self.store, threads=0, codec="raw", author=self.author(seed))

    def copy(self) -> Place:
        """The same, of its own."""
        return Place(self.store.copy(), seed=1)

    def wait(self, days: float) -> None:
        """Let the store's clock go on."""
        self.store.now += timedelta(days=days)

    def add(self, name: str, repo: Repository | None = None, **files: bytes) -> int:
        """A version that holds exactly this; gives its number."""
        with (repo or self.repo).artifact(name).transaction(base=None) as txn:
            for path, data in files.items():
                txn.add_bytes(path, data)
        assert txn.version is not None
        return txn.version.number

    def content(self, *, whole: bool = True) -> dict[str, dict[str, bytes]]:
        """What every live version holds, as someone reads it who comes now; and the repository is whole."""
        repo = self.other()
        assert not whole or fsck(repo, deep=True).findings == []
        found = {}
        for artifact in repo.artifacts():
            try:
                versions = artifact.versions()
            except NotFoundError:
                continue
            for version in versions:
                found[version.address] = {path: version.open(path).read() for path in version.assets}
        return found

    def containers(self) -> set[str]:
        return self.store.keys("packs/", "meta/")


def noise(seed: int, size: int = 70_000) -> bytes:
    """Bytes that get a pack of their own."""
    return Random(seed).randbytes(size)


@pytest.fixture
def place() -> Place:
    return Place()
