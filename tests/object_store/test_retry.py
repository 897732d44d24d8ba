"""Trying again: what is repeated, how often, and what is not."""

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from random import Random

import pytest

from mandapa.errors import AccessDeniedError, InvalidInputError, NotFoundError, StorageError
from mandapa.object_store import MemoryObjectStore, ObjectInfo, RetryingObjectStore
from mandapa.testing.faults import CountingObjectStore, FaultyObjectStore


class Flaky(MemoryObjectStore):
    """Each call fails ``failures`` times before it works."""

    def __init__(self, failures: int, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.left = failures
        self.error = error

    def _find(self, key: str) -> tuple[bytes, datetime]:
        self.fail()
        return super()._find(key)

    def fail(self) -> None:
        if self.left:
            self.left -= 1
            raise self.error()

    def put(self, key: str, data: bytes) -> None:
        self.fail()
        super().put(key, data)

    def create(self, key: str, data: bytes) -> None:
        self.fail()
        super().create(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        kept = list(keys)
        self.fail()
        super().delete(kept)


def passing() -> StorageError:
    return StorageError("later", retryable=True)


CALLS = {
    "get": lambda store: store.get("a"),
    "get_ranges": lambda store: store.get_ranges("a", [(0, 1)]),
    "head": lambda store: store.head("a"),
    "put": lambda store: store.put("a", b"1"),
    "delete": lambda store: store.delete(key for key in ["a"]),
}


@pytest.mark.parametrize("verb", CALLS)
def test_repeated_until_it_works(verb: str) -> None:
    """Four failures are survived by five attempts, with pauses that grow and are random."""
    flaky = Flaky(0, passing)
    flaky.put("a", b"1")
    flaky.left = 4
    pauses: list[float] = []
    store = RetryingObjectStore(flaky, attempts=5, base=1.0, cap=5.0, sleep=pauses.append, random=Random(1))
    CALLS[verb](store)
    assert len(pauses) == 4
    assert all(0.0 <= pause <= limit for pause, limit in zip(pauses, (2.0, 4.0, 5.0, 5.0), strict=True))
    assert len(set(pauses)) == 4


@pytest.mark.parametrize("verb", CALLS)
def test_gives_up(verb: str) -> None:
    """The last error comes out as it was."""
    pauses: list[float] = []
    store = RetryingObjectStore(Flaky(99, passing), attempts=3, sleep=pauses.append)
    with pytest.raises(StorageError, match="later"):
        CALLS[verb](store)
    assert len(pauses) == 2


@pytest.mark.parametrize(
    "error", [lambda: StorageError("never"), lambda: AccessDeniedError("no"), lambda: NotFoundError("gone")]
)
def test_what_is_final_is_not_repeated(error: Callable[[], Exception]) -> None:
    """Not retryable, refused, missing: at once."""
    flaky = Flaky(1, error)
    with pytest.raises(type(error())):
        RetryingObjectStore(flaky, sleep=pytest.fail).get("a")
    assert flaky.left == 0


def test_create_is_never_repeated() -> None:
    """Its caller has to look at the key first."""
    flaky = Flaky(1, passing)
    with pytest.raises(StorageError):
        RetryingObjectStore(flaky, sleep=pytest.fail).create("a", b"1")
    assert flaky.left == 0
    assert list(flaky.list("")) == []


class Breaking(MemoryObjectStore):
    """Lists break off after ``run`` objects."""

    run = 3

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        for number, info in enumerate(super().list(prefix, start_after=start_after)):
            if number == self.run:
                raise passing()
            yield info


def test_list_goes_on_where_it_broke_off() -> None:
    """Each object once, in order, however often it breaks, as long as there is progress."""
    breaking = Breaking()
    keys = [f"log/{number:03}" for number in range(100)]
    for key in keys:
        breaking.put(key, b"1")
    pauses: list[float] = []
    store = RetryingObjectStore(breaking, attempts=2, sleep=pauses.append)
    assert [info.key for info in store.list("log/", start_after="log/009")] == keys[10:]
    assert len(pauses) == 29
    breaking.run = 0
    with pytest.raises(StorageError):
        list(store.list("log/"))


def test_over_a_bad_network() -> None:
    """With a third of all calls lost, what was put is read."""
    memory = MemoryObjectStore()
    counting = CountingObjectStore(FaultyObjectStore(memory, Random(3), lost=0.33))
    store = RetryingObjectStore(counting, attempts=50, sleep=lambda _: None)
    for number in range(100):
        store.put(f"a/{number:03}", b"%d" % number)
    assert [bytes(store.get(info.key)) for info in store.list("a/")] == [b"%d" % number for number in range(100)]
    assert counting.requests["put"] > 120


def test_attempts_must_be_positive() -> None:
    with pytest.raises(InvalidInputError):
        RetryingObjectStore(MemoryObjectStore(), attempts=0)
