"""Mirrors that die anywhere, run side by side, or meet writers and clean-ups: nothing is lost or doubled."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from random import Random

import numpy as np
import pytest

from mandapa.errors import StorageError
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository
from mandapa.testing.faults import Crash, CrashingObjectStore, FaultyObjectStore

sys.path.insert(0, os.path.dirname(__file__))
from mirroring import (
    Watched,
    annotate,
    check,
    checkpoints,
    commit,
    reopened,
    repository,
    says,
    stored,
    sweep,
    whole,
)


def small_history(repo: Repository) -> None:
    """A few of everything, in few objects."""
    data = np.random.default_rng(0).bytes(100_000)
    commit(repo, alias="best", x=data, y=b"1")
    commit(repo, alias="best", x=data + b"more", y=b"2")
    net = repo.artifact("m")
    net.tag("paper", 0)
    commit(repo, y=b"3")
    net.delete(2)
    commit(repo, alias="best", z=data[::-1])
    annotate(repo, "m", 1, good=True)
    commit(repo, "other", x=data)


STEP = 1 if os.environ.get("MANDAPA_SOAK") else 3
"""Of many calls at which the same happens every third has its turn; each of them when there is time."""


@pytest.fixture
def source() -> Repository:
    repo = repository(codec="raw")
    small_history(repo)
    return repo


def prefixes(repo: Repository) -> list[dict[str, object]]:
    """What the artifact ``m`` said after each of its records, but for content: aliases, tags, live and deleted."""
    log = reopened(repo).artifact("m").open_log()
    found = []
    for count in range(len(log.records) + 1):
        state = type(log.state)()
        for record in log.records[:count]:
            for op in record.ops:
                state.apply(op, record)
        found.append(outline(state))
    return found


def outline(state) -> dict[str, object]:
    return {
        "versions": [version.op.digest for version in state.versions.values()],
        "live": state.live(),
        "aliases": state.aliases,
        "tags": state.tags,
    }


@pytest.mark.parametrize("side", ["source", "destination"])
# As long as there is one thread, a crash after a call is one before the next call.
@pytest.mark.parametrize("mode", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_killed_at_any_call(source, side, mode):
    """What is there is whole and a state that the source was in; the next call brings the rest, and nothing twice."""
    states, wanted = prefixes(source), says(source)
    for state in states:  # v2 was deleted before anybody could copy it
        state["live"] = [number for number in state["live"] if number != 2]
    counting = CrashingObjectStore(source.place if side == "source" else MemoryObjectStore())
    clean = repository(threads=0)
    if side == "source":
        Repository(counting, threads=0).mirror(clean)
    else:
        clean = Repository.create(counting, threads=0)
        before = counting.calls
        reopened(source, threads=0).mirror(reopened(clean, threads=0))
        assert before < counting.calls
    expected = stored(clean)
    for at in range(1 + (side == "source"), counting.calls + 1, STEP):
        destination = repository(threads=0)
        dying = CrashingObjectStore(source.place if side == "source" else destination.place, at=at, mode=mode)
        with suppress(Crash):  # to make the destination takes more calls than to open it
            there, here = (dying, destination.place) if side == "source" else (source.place, dying)
            Repository(there, threads=0).mirror(Repository(here, threads=0))
        half = reopened(destination, threads=0)
        whole(half)
        if half.artifact("m").exists():
            assert outline(half.artifact("m").state()) in states
        assert reopened(source, threads=0).mirror(half).ok
        records = [record.txn for record in half.artifact("m").open_log().records]
        assert len(records) == len(set(records))
        sweep(half)
        # What the other artifact shares is known to nobody who starts with an empty memory: it is there once more.
        assert stored(half) <= expected + 102_000
        assert says(half) == wanted
        whole(half)


@pytest.mark.parametrize("where", ["source", "destination"])
def test_a_clean_up_at_any_call(source, where):
    """Without any grace, on either side, while the mirror runs: it copies again what was taken, and ends whole."""

    def run(at: int | None) -> int:
        destination = repository(threads=0)
        stray = {info.key: source.place.get(info.key) for info in source.place.list("")}
        own = MemoryObjectStore()
        for key, data in stray.items():
            own.put(key, data)
        here = Repository(own)
        other = destination if where == "destination" else here
        watched = Watched(other.place, at, lambda: sweep(other))
        if where == "destination":
            done = here.mirror(Repository(watched, threads=0))
        else:
            done = Repository(watched, threads=0).mirror(destination)
        assert done.ok, [one.error for one in done.artifacts]
        check(here, destination)
        sweep(destination)
        check(here, destination)
        return watched.calls

    for at in range(1, run(None) + 1):
        run(at)


def test_a_repack_in_the_destination_at_any_call():
    """What a version was to inherit from is stored otherwise, and the old bytes are gone: it is made anew upon that."""
    source = repository(codec="raw")
    for data in checkpoints(3, size=30_000):
        commit(source, alias="best", w=data, kept=data[:70_000])

    def run(at: int | None) -> int:
        destination = repository(threads=0, codec="dense")
        source.mirror(destination)
        later = repository()
        for info in source.place.list(""):
            later.place.put(info.key, source.place.get(info.key))
        grown = Repository(later.place, codec="raw")
        commit(grown, alias="best", w=b"another" * 30_000)

        def act() -> None:
            other = reopened(destination)
            assert any(not one.skipped for one in other.artifact("m").repack())
            sweep(other)

        watched = Watched(destination.place, at, act)
        done = grown.mirror(Repository(watched, threads=0))
        assert done.ok, [one.error for one in done.artifacts]
        check(grown, destination)
        return watched.calls

    for at in range(1, run(None) + 1):
        run(at)


def test_a_clean_up_while_a_version_is_brought_back():
    """What the mirror has of a deleted version is used, and may go at any call: the version is whole at the end."""
    data = np.random.default_rng(0).bytes(200_000)

    def run(at: int | None) -> int:
        source, destination = repository(codec="raw"), repository(threads=0)
        commit(source, a=data)
        commit(source, a=b"1", b=b"2")
        source.mirror(destination)
        source.artifact("m").delete(0)
        source.mirror(destination)
        source.artifact("m").undelete(0)
        watched = Watched(destination.place, at, lambda: sweep(destination))
        done = reopened(source).mirror(Repository(watched, threads=0))
        assert done.ok, [one.error for one in done.artifacts]
        assert at is not None or done.added < 10_000
        check(source, destination)
        return watched.calls

    for at in range(1, run(None) + 1):
        run(at)


CHANGES: dict[str, Callable[[Repository], object]] = {
    "delete the newest": lambda repo: (repo.artifact("m").alias("best", 0), repo.artifact("m").delete(3)),
    "delete the first and sweep": lambda repo: (
        repo.artifact("m").tag("paper", None),
        repo.artifact("m").delete(0),
        sweep(repo),
    ),
    "bring back": lambda repo: repo.artifact("m").undelete(2),
    "repack and sweep": lambda repo: (repo.artifact("m").repack(), sweep(repo)),
    "commit": lambda repo: commit(repo, alias="best", n=b"new"),
    "rename": lambda repo: repo.artifact("m").rename("n"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_source_that_changes_at_any_call(what):
    """What is there at the end is a state that the source was in; the next call brings the rest."""
    calls, at = 1, len(what) % STEP + 1 - STEP
    while at < calls:
        at += STEP
        source = repository(codec="raw")
        data = checkpoints(1, size=30_000)[0]
        small_history(source)
        commit(source, "m", w=data)
        commit(source, "m", alias="best", w=data)
        destination = repository(threads=0)
        watched = Watched(source.place, at, lambda source=source: CHANGES[what](reopened(source, codec="dense")))
        done = Repository(watched, threads=0).mirror(destination)
        assert done.ok, (at, [one.error for one in done.artifacts])
        whole(destination)
        calls = watched.calls
        assert reopened(source).mirror(reopened(destination)).ok
        check(source, destination)


def test_a_removed_source_at_any_call():
    """An artifact that is removed while it is mirrored: what was there stays, the others are mirrored."""
    calls, at = 1, 0
    while at < calls:
        at += 1
        source = repository()
        small_history(source)
        destination = repository(threads=0)
        watched = Watched(source.place, at, lambda source=source: (source.artifact("m").remove(), sweep(source)))
        done = Repository(watched, threads=0).mirror(destination)
        assert done.ok, (at, [one.error for one in done.artifacts])
        whole(destination)
        calls = watched.calls
        assert says(destination)["other"] == says(source)["other"]


def test_a_writer_in_the_destination_at_any_call(source):
    """Somebody commits to the mirror: a conflict that names it, and never a number twice or a version mixed."""

    def run(at: int | None) -> int:
        destination = repository(threads=0)
        eve = reopened(destination, author=Author("eve"))

        def write() -> None:
            if eve.artifact("m").exists():
                commit(eve, "m", mine=b"!")

        watched = Watched(destination.place, at, write)
        done = source.mirror(Repository(watched, threads=0))
        whole(destination)
        log = reopened(destination).artifact("m").open_log()
        mine = [record for record in log.records if record.by == "eve"]
        assert mine or done.ok, [one.error for one in done.artifacts]
        if mine:
            again = source.mirror(reopened(destination)) if done.ok else done  # it came after the last look
            [bad] = [one.error for one in again.artifacts if one.error is not None]
            assert "'eve'" in str(bad) or "an artifact 'm'" in str(bad)
            assert says(destination)["other"] == says(source)["other"]
        else:
            check(source, destination)
        return watched.calls

    for at in range(1, run(None) + 1):
        run(at)


def test_several_at_once(source):
    """Every version once, whoever was first, in threads that all see different things."""
    destination = repository()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            assert reopened(source).mirror(reopened(destination)).ok
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    check(source, destination)
    records = reopened(destination).artifact("m").open_log().records
    assert len(records) == len({record.txn for record in records}) == 6


def test_another_mirror_at_any_call(source):
    """A second mirror that does all of it at one call of the first: nothing twice, and no conflict."""

    def run(at: int | None) -> int:
        destination = repository(threads=0)
        watched = Watched(destination.place, at, lambda: reopened(source).mirror(reopened(destination)))
        done = reopened(source).mirror(Repository(watched, threads=0))
        assert done.ok, [one.error for one in done.artifacts]
        check(source, destination)
        records = reopened(destination).artifact("m").open_log().records
        assert len(records) == len({record.txn for record in records})
        return watched.calls

    for at in range(1, run(None) + 1):
        run(at)


@pytest.mark.parametrize("seed", range(12))
def test_a_bad_network(source, seed):
    """Requests and replies that are lost, late or doubled on both sides: mirrored again until it says that it is ok."""
    destination = repository()
    random = Random(seed)
    for _ in range(60):
        stores = [
            FaultyObjectStore(repo.place, random, lost=0.05, conflicts=0.05, doubled=0.05)
            for repo in (source, destination)
        ]
        try:
            there, here = (Repository(store, author=Author(sleep=lambda _: None), threads=0) for store in stores)
            done = there.mirror(here).ok
        except StorageError:
            done = False
        for store in stores:
            store.flush()
        whole(destination)
        if done:
            break
    assert done
    check(source, destination)
