"""A clean-up beside writers and other clean-ups, and one that dies or loses a request at any point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import pytest

from mandapa.errors import AlreadyExistsError, NotFoundError, StorageError
from mandapa.repository import gc as gc_module
from mandapa.repository.gc import Collection
from mandapa.repository.log import Author
from mandapa.repository.marking import Marks
from mandapa.repository.repository import Repository
from mandapa.testing.faults import Crash, CrashingObjectStore, FaultyObjectStore

if TYPE_CHECKING:
    from conftest import Place

STEPS = ["looked", "chosen", "listed", "catalog fenced", "fenced", "marked", "swept", "done"]


def noise(seed: int, size: int = 70_000) -> bytes:
    return Random(seed).randbytes(size)


@pytest.fixture
def key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects are deleted one by one, so that something can happen between any two."""
    monkeypatch.setattr(gc_module, "BATCH", 1)


def until(steps: Iterator[str], name: str) -> None:
    """Go on to the end of a step."""
    while next(steps) != name:
        pass


def collection(place: Place, seed: int) -> Iterator[str]:
    """A clean-up by a process of its own, with no grace."""
    return Collection(place.other(seed), grace=0).steps()


# -- writers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_version_that_comes_while_it_runs_is_whole(place: Place, step: str) -> None:
    """At any step a writer may find the condemned bytes and use them, or store them again: what it commits stays."""
    place.add("a", x=noise(1))  # the writer knows where these bytes are
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(0)
    steps = collection(place, 7)
    until(steps, step)
    place.add("a", y=noise(1))
    place.add("new", z=noise(1))
    list(steps)
    assert place.content() == {"a:v1": {"x": noise(2)}, "a:v2": {"y": noise(1)}, "new:v0": {"z": noise(1)}}
    place.repo.gc(grace=0)
    assert place.content().keys() == {"a:v1", "a:v2", "new:v0"}
    assert place.store.keys("gc/") == set()


@pytest.mark.usefixtures("key_by_key")
@pytest.mark.parametrize("folder", ["packs/", "meta/"])
def test_a_version_that_comes_within_the_sweep_is_whole(place: Place, folder: str) -> None:
    """The list stands until the last object is gone: a writer does not take up what goes a moment later."""
    place.add("a", x=noise(1), y=b"small")
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(0)
    place.store.before.append((f"delete {folder}", lambda: place.add("a", z=noise(1), y=b"small")))
    list(collection(place, 7))
    assert place.store.before == []
    assert place.content() == {"a:v1": {"x": noise(2)}, "a:v2": {"z": noise(1), "y": b"small"}}


def test_condemned_bytes_that_came_into_use_are_spared(place: Place) -> None:
    """A version made between the first mark and the fence holds on to what the list names."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(0)
    packs = place.store.keys("packs/")
    work = Collection(place.other(), grace=0)
    steps = work.steps()
    until(steps, "chosen")
    place.add("a", y=noise(1))
    list(steps)
    assert {key for key in work.spared if key in packs}
    assert place.store.keys("packs/") == packs
    assert place.content()["a:v2"] == {"y": noise(1)}


def test_a_delete_after_the_fence_waits_for_the_next_one(place: Place) -> None:
    """What was live at the fence stays, though nothing needs it any more when the sweep comes."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(0)
    steps = collection(place, 7)
    until(steps, "chosen")
    number = place.add("a", y=noise(1))
    before = place.store.keys("packs/")
    until(steps, "fenced")
    place.repo.artifact("a").delete(number)
    list(steps)
    assert place.store.keys("packs/") == before
    place.repo.artifact("a").undelete(number)
    assert place.content()["a:v2"] == {"y": noise(1)}


def test_undelete_of_what_is_condemned_says_so(place: Place) -> None:
    """While the clean-up is under way, and when it is over."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(0)
    steps = collection(place, 7)
    until(steps, "listed")
    with pytest.raises(NotFoundError, match=r"brought back: a clean-up has taken .* or is about to"):
        place.repo.artifact("a").undelete(0)
    list(steps)
    with pytest.raises(NotFoundError, match="a:v0 cannot be brought back"):
        place.other().artifact("a").undelete(0)


def test_a_version_that_came_and_went_while_it_runs_can_be_brought_back(place: Place) -> None:
    """Its deletion is younger than the grace, though no listing has shown when that was."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(0)
    place.wait(8)
    steps = Collection(place.other()).steps()
    until(steps, "chosen")
    number = place.add("a", y=noise(1))
    place.repo.artifact("a").delete(number)
    list(steps)
    place.repo.artifact("a").undelete(number)
    assert place.content() == {"a:v1": {"x": noise(2)}, "a:v2": {"y": noise(1)}}


def test_an_artifact_that_is_registered_while_it_runs_is_fenced(place: Place) -> None:
    """Its first commit, which was under way, meets the fence and looks at what it has put."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(0)
    steps = collection(place, 7)
    until(steps, "listed")
    place.repo.register("new")
    until(steps, "fenced")
    log = place.other(8).artifact("new").find_log()
    assert log is not None
    assert len(log.refresh().versions) == 0
    assert len(log.records) == 1  # the fence
    place.add("new", z=noise(1))
    list(steps)
    assert place.content() == {"a:v1": {"x": noise(2)}, "new:v0": {"z": noise(1)}}


# -- other clean-ups --------------------------------------------------------------------------------------------------


def _inherited_from_a_version_that_another_one_sweeps(place: Place) -> None:
    """What was live at the fence dies, is swept by another clean-up, and has left its bytes to a later version."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(0)
    first = collection(place, 7)
    until(first, "chosen")  # the pack of v0 will be condemned
    place.add("a", y=noise(1))  # v2 names it
    until(first, "fenced")
    with place.repo.artifact("a").transaction() as txn:  # v3 takes it over from v2, and no list is looked at
        txn.add_bytes("z", b"more")
    place.repo.artifact("a").delete(2)
    list(collection(place, 8))  # takes the manifest of v2
    list(first)
    assert place.content() == {"a:v1": {"x": noise(2)}, "a:v3": {"y": noise(1), "z": b"more"}}


def test_what_another_clean_up_sweeps_was_inherited(place: Place) -> None:
    """The bytes stay: versions after the fence count when one that was live at it cannot be read any more."""
    _inherited_from_a_version_that_another_one_sweeps(place)


def test_that_needs_the_versions_after_the_fence(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that rule the same story ends badly, so it proves something."""
    lost = Marks._lost

    def at_the_fence_only(self: Marks, *arguments: Any) -> set[Any]:
        lost(self, *arguments)
        return set()

    monkeypatch.setattr(Marks, "_lost", at_the_fence_only)
    with pytest.raises(AssertionError, match="I7"):
        _inherited_from_a_version_that_another_one_sweeps(place)


@pytest.mark.parametrize("seed", range(30))
def test_clean_ups_and_writers_in_any_order(place: Place, seed: int) -> None:
    """Three clean-ups, step by step in any order, with commits, deletes and undeletes between any two steps."""
    random = Random(seed)
    writers = [place.other(100 + number) for number in range(2)]
    meant: dict[str, dict[str, bytes]] = {}
    running: list[Iterator[str]] = []

    def one() -> None:
        repo, name = random.choice(writers), random.choice("ab")
        files = {random.choice("xyz"): noise(random.randrange(4)) for _ in range(random.randint(1, 2))}
        if random.random() < 0.6 or not meant:
            number = place.add(name, repo, **files)
            meant[f"{name}:v{number}"] = files
        elif random.random() < 0.8:
            address = random.choice([*meant])
            name, _, number_text = address.partition(":v")
            repo.artifact(name).delete(int(number_text))
            gone[address] = meant.pop(address)
        elif gone:
            address = random.choice([*gone])
            name, _, number_text = address.partition(":v")
            with suppress(FileNotFoundError):
                repo.artifact(name).undelete(int(number_text))
                meant[address] = gone.pop(address)

    gone: dict[str, dict[str, bytes]] = {}
    for turn in range(60):
        if random.random() < 0.4:
            one()
        elif len(running) < 3 and random.random() < 0.3:
            running.append(collection(place, 1000 * seed + turn + 200))
        elif running:
            steps = random.choice(running)
            if next(steps, None) is None:
                running.remove(steps)
    for steps in running:
        list(steps)
    assert place.content() == meant
    place.other(55).gc(grace=0)
    assert place.content() == meant


# -- the end of a process, and lost requests --------------------------------------------------------------------------


def prepared(place: Place) -> dict[str, dict[str, bytes]]:
    """Garbage of every kind: deleted, removed, moved, orphaned; and the list of a dead clean-up."""
    place.add("a", x=noise(1), y=noise(2))
    place.add("a", x=noise(1), y=noise(3))
    place.add("b", x=noise(2))
    place.add("b", z=noise(4))
    place.repo.artifact("a").delete(0)
    place.repo.artifact("b").remove()
    place.add("c", w=bytes(200_000))
    place.repo.artifact("c").repack()
    place.store.put(f"tx/{'a' * 32}/0.0", b"1")
    dead = collection(place, 7)
    until(dead, "fenced")
    return place.content()


def process(store: Any, seed: int = 5) -> Repository:
    return Repository(store, threads=0, codec="raw", author=Author("gc", sleep=lambda _: None, random=Random(seed)))


@pytest.mark.usefixtures("key_by_key")
@pytest.mark.parametrize("mode", ["before", "after"])
def test_it_may_die_at_any_call(place: Place, mode: Literal["before", "after"]) -> None:
    """All that was live is whole, to the last byte, and the next clean-up frees what this one would have."""
    content = prepared(place)
    smooth = place.copy()
    counting = CrashingObjectStore(smooth.store)
    process(counting).gc(grace=0)
    assert smooth.content() == content
    calls = range(1, counting.calls + 1)
    assert len(calls) > 30
    for at in calls:
        copy = place.copy()
        with suppress(Crash):
            process(CrashingObjectStore(copy.store, at=at, mode=mode)).gc(grace=0)
        assert copy.content() == content
        process(copy.store, 6).gc(grace=0)
        assert copy.containers() == smooth.containers()
        assert copy.store.keys("tx/", "gc/") == set()


class Failing(CrashingObjectStore):
    """One call fails for good; later ones are answered."""

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return super()._call(call)
        except Crash:
            self._at = None
            raise StorageError("the disk reports a failure") from None


@pytest.mark.parametrize("mode", ["before", "after"])
def test_any_call_may_fail(place: Place, mode: Literal["before", "after"]) -> None:
    """It says so, or did not need the call; all that was live is whole, and the next clean-up frees the rest."""
    content = prepared(place)
    smooth = place.copy()
    counting = CrashingObjectStore(smooth.store)
    process(counting).gc(grace=0)
    failed = 0
    for at in range(1, counting.calls + 1):
        copy = place.copy()
        store = Failing(copy.store, at=at, mode=mode)
        try:
            repo = process(store)
            repo.gc(grace=0)
        except StorageError:
            failed += 1
        assert copy.content() == content
        process(copy.store, 6).gc(grace=0)
        assert copy.containers() == smooth.containers()
    assert failed > counting.calls // 2


@pytest.mark.parametrize("seed", range(25))
def test_a_bad_network_changes_nothing(place: Place, seed: int) -> None:
    """Requests that are lost, doubled, late or refused for nothing: the same objects go, and no others."""
    content = prepared(place)
    smooth = place.copy()
    process(smooth.store).gc(grace=0)
    store = FaultyObjectStore(place.store, Random(seed), lost=0.1, conflicts=0.1, doubled=0.1)
    with suppress(StorageError):
        process(store, 400 + seed).gc(grace=0)
    with suppress(AlreadyExistsError):
        store.flush()
    assert place.content() == content
    process(place.store, 300).gc(grace=0)
    assert place.containers() == smooth.containers()
    assert place.content() == content
