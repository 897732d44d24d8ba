"""The faults do what they say, so that tests which rely on them mean something."""

from collections.abc import Callable
from random import Random

import pytest

from mandapa.errors import AlreadyExistsError, InvalidInputError, StorageError
from mandapa.object_store import MemoryObjectStore, ObjectStore
from mandapa.testing.faults import CountingObjectStore, Crash, CrashingObjectStore, FaultyObjectStore


def outcomes(seed: int) -> list[str]:
    memory = MemoryObjectStore()
    store = FaultyObjectStore(memory, Random(seed), lost=0.5, conflicts=0.3, doubled=0.3)
    seen = []
    for number in range(200):
        key = f"k/{number:03}"
        try:
            store.create(key, b"1")
            told = "won"
        except AlreadyExistsError:
            told = "taken"
        except StorageError as error:
            told = "unknown" if error.retryable else "failed"
        now = bool(list(memory.list(key)))
        seen.append(f"{told}, {'there' if now else 'absent'}")
    before = len(list(memory.list("")))
    store.flush()
    seen.append(f"{len(list(memory.list(''))) > before}")
    return seen


def test_all_fates_of_a_create_occur() -> None:
    """Won; refused though nothing is there; won but told it lost; unknown and done; unknown and not (yet) done."""
    seen = outcomes(1)
    assert set(seen[:-1]) == {"won, there", "taken, absent", "taken, there", "unknown, there", "unknown, absent"}


def test_same_seed_same_faults() -> None:
    assert outcomes(1) == outcomes(1)
    assert outcomes(1) != outcomes(2)


def test_late_requests_land() -> None:
    """During later calls, and the rest at flush: a put that was given up comes back from the dead."""
    memory = MemoryObjectStore()
    store = FaultyObjectStore(memory, Random(0), lost=1.0)
    for number in range(30):
        with pytest.raises(StorageError):
            store.put(f"k/{number:02}", b"late")
    landed = len(list(memory.list("")))
    store.flush()
    assert 0 < landed < len(list(memory.list(""))) < 30
    assert not store._late


def test_late_bytes_are_those_of_the_call() -> None:
    """The buffer's owner may have changed it since."""
    memory = MemoryObjectStore()
    store = FaultyObjectStore(memory, Random(0), lost=1.0)
    for number in range(30):
        data = bytearray(b"before")
        with pytest.raises(StorageError):
            store.put(f"k/{number}", data)
        data[:] = b"after!"
    store.flush()
    assert {bytes(memory.get(info.key)) for info in memory.list("")} == {b"before"}


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.get("a"),
        lambda store: store.get_ranges("a", [(0, 1)]),
        lambda store: store.head("a"),
        lambda store: list(store.list("")),
    ],
)
def test_reads_fail(call: Callable[[ObjectStore], object]) -> None:
    """With a retryable error; a list may have given some objects before."""
    memory = MemoryObjectStore()
    memory.put("a", b"1")
    with pytest.raises(StorageError) as caught:
        call(FaultyObjectStore(memory, Random(0), lost=1.0))
    assert caught.value.retryable


def test_counting() -> None:
    """Requests as a bill would have them, and bytes both ways."""
    store = CountingObjectStore(MemoryObjectStore())
    for number in range(1001):
        store.put(f"a/{number:04}", b"123")
    with pytest.raises(AlreadyExistsError):
        store.create("a/0000", b"12345")
    assert (store.bytes_written, store.bytes_read) == (3008, 0)
    assert len(list(store.list("a/"))) == 1001
    store.get("a/0000")
    store.get_ranges("a/0000", [(0, 1), (1, 2), (2, 0)])
    store.head("a/0000")
    store.delete(f"a/{number:04}" for number in range(1001))
    assert store.requests == {"put": 1001, "create": 1, "list": 2, "get": 1, "get_ranges": 2, "head": 1, "delete": 2}
    assert store.bytes_read == 6
    store.reset()
    assert store.requests.total() == store.bytes_written == store.bytes_read == 0


@pytest.mark.parametrize(("mode", "there"), [("before", False), ("after", True)])
def test_crash(mode: str, there: bool) -> None:
    """At the k-th call, before or after it is done; whoever crashed stays dead."""
    memory = MemoryObjectStore()
    store = CrashingObjectStore(memory, at=2, mode=mode)  # type: ignore[arg-type]
    store.put("a", b"1")
    with pytest.raises(Crash):
        store.put("b", b"1")
    assert bool(list(memory.list("b"))) is there
    with pytest.raises(Crash):
        store.get("a")
    assert store.calls == 3
    assert not issubclass(Crash, Exception)


def test_crashes_are_counted_from_one() -> None:
    with pytest.raises(InvalidInputError):
        CrashingObjectStore(MemoryObjectStore(), at=0)
