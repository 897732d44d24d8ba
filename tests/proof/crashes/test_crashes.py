"""A process that dies, or a request that is lost, at any store call of any command: all of it happened, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from random import Random
from typing import TypeVar

import pytest
from prooflib.collector import collect_all

from mandapa.errors import AlreadyExistsError, InvalidInputError, MandapaError, NotFoundError, StorageError
from mandapa.object_store.base import Buffer, ObjectInfo, ObjectStore
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.object_store.probe import ProbeResult
from mandapa.repository import repository
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository
from mandapa.repository.version import Version
from mandapa.testing.faults import Crash, CrashingObjectStore

_T = TypeVar("_T")

TXN = "ab" * 16
PACKED = Random(0).randbytes(70_000)  # more than goes beside the manifest
SMALL = b"small enough for the manifest's container"

Content = dict[str, bytes]
Seen = dict[str, tuple[dict[int, Content], dict[str, int]]]
"""Artifact -> what each live version holds, and the aliases."""


class OneFault:
    """The same store, but one call is lost: never done, done without an answer, or done when all is over."""

    def __init__(self, store: ObjectStore, at: int, fate: str) -> None:
        self._store = store
        self._at = at
        self._fate = fate
        self._calls = 0
        self.late: Callable[[], object] = lambda: None

    @property
    def url(self) -> str:
        return self._store.url

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        return self._call(lambda: self._store.get(key, limit=limit))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        return self._call(lambda: self._store.get_ranges(key, ranges))

    def head(self, key: str) -> ObjectInfo:
        return self._call(lambda: self._store.head(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        yield from self._call(lambda: [*self._store.list(prefix, start_after=start_after)])

    def put(self, key: str, data: Buffer) -> None:
        kept = bytes(data)
        self._call(lambda: self._store.put(key, kept), write=True)

    def create(self, key: str, data: Buffer) -> None:
        kept = bytes(data)
        self._call(lambda: self._store.create(key, kept), write=True)

    def delete(self, keys: Iterable[str]) -> None:
        kept = list(keys)
        self._call(lambda: self._store.delete(kept), write=True)

    def _call(self, call: Callable[[], _T], *, write: bool = False) -> _T:
        self._calls += 1
        if self._calls != self._at:
            return call()
        if self._fate == "late" and write:
            self.late = call
        elif self._fate == "no answer":
            call()
        raise StorageError("the request or its reply was lost", retryable=True)


@dataclass
class Command:
    """Something that a user does."""

    name: str
    prepare: Callable[[Repository], object]
    act: Callable[[Repository, Repository], object]
    """By the process in danger; the other repository is that of another process."""
    between: Callable[[Seen], Seen] | None = None
    """What may be seen besides all and nothing, made from all."""
    twice: type[MandapaError] | None = None
    """What it raises when it was done already; None: nothing."""


def author(seed: int) -> Author:
    noon = datetime(2027, 1, 1, tzinfo=UTC)
    return Author("proof", random=Random(seed), clock=lambda: noon, sleep=lambda _: None)


def process(store: ObjectStore, seed: int) -> Repository:
    return Repository(store, threads=0, codec="raw", author=author(seed))


def look(store: ObjectStore) -> Seen:
    """Everything that a new process can read; and the repository is whole."""
    repo = process(store, 99)
    assert fsck(repo, deep=True).findings == []
    seen: Seen = {}
    for artifact in repo.artifacts():
        try:
            versions = {version.number: contents(version) for version in artifact.versions()}
            seen[artifact.name] = versions, artifact.aliases()
        except NotFoundError:  # its log is closed, and the process died before the catalog knew
            seen[artifact.name] = {}, {}
    return seen


def contents(version: Version) -> Content:
    found = {}
    for path in version.assets:
        with version.open(path) as file:
            found[path] = file.read()
    return found


def copy_of(store: MemoryObjectStore) -> MemoryObjectStore:
    copy = MemoryObjectStore()
    copy._objects.update(store._objects)
    return copy


# -- commands ---------------------------------------------------------------------------------------------------------


def commit(repo: Repository, name: str, puts: Content, txn: str | None = None) -> None:
    with repo.artifact(name).transaction("a message", txn_id=txn) as made:
        for path, data in puts.items():
            made.add_bytes(path, data)


def nothing(_: Repository) -> None:
    pass


def three_versions(repo: Repository) -> None:
    """v0 and v2 share bytes, v1 has its own."""
    commit(repo, "a", {"keep": SMALL, "data": PACKED})
    commit(repo, "a", {"keep": b"other", "data": PACKED[::-1]})
    commit(repo, "a", {"keep": SMALL, "data": PACKED, "more": b"1"})


def one_deleted(repo: Repository) -> None:
    three_versions(repo)
    repo.artifact("a").delete(1)


def while_another_commits(repo: Repository, other: Repository) -> None:
    with repo.artifact("a").transaction(txn_id=TXN) as txn:
        txn.add_bytes("new", PACKED[:66_000])
        if len(other.artifact("a").open_log().records) == 3:
            commit(other, "a", {"from another": b"2"})


def while_gc_passes(repo: Repository, other: Repository) -> None:
    """What was put already is swept; a copy of a deleted version's bytes is, too."""
    with repo.artifact("a").transaction(txn_id=TXN) as txn:
        txn.add_bytes("data", PACKED)
        txn.add_bytes("new", SMALL)
        collect_all(other)


def without_the_newest(all_: Seen) -> Seen:
    versions, aliases = all_["a"]
    return {"a": ({n: content for n, content in versions.items() if n != max(versions)}, aliases)}


def registered_only(_: Seen) -> Seen:
    return {"a": ({}, {})}


PACKS = {"one": PACKED, "two": PACKED[::-1], "three": SMALL, "empty": b""}

COMMANDS = [
    Command("first-commit", nothing, lambda repo, _: commit(repo, "a", {"x": SMALL}, TXN), registered_only),
    Command("first-commit-with-packs", nothing, lambda repo, _: commit(repo, "a", PACKS, TXN), registered_only),
    Command("commit", three_versions, lambda repo, _: commit(repo, "a", {"keep": b"new", "new": PACKED[1:]}, TXN)),
    Command("commit-rebased", three_versions, while_another_commits, without_the_newest),
    Command("commit-stored-again", three_versions, while_gc_passes),
    Command("delete", three_versions, lambda repo, _: repo.artifact("a").delete(0, 1), twice=NotFoundError),
    Command("alias", three_versions, lambda repo, _: repo.artifact("a").alias("best", 1)),
    Command("undelete", one_deleted, lambda repo, _: repo.artifact("a").undelete(1), twice=InvalidInputError),
    Command("rename", three_versions, lambda repo, _: repo.artifact("a").rename("b"), twice=NotFoundError),
    Command("remove", three_versions, lambda repo, _: repo.artifact("a").remove(), registered_only, NotFoundError),
]
FATES = ["crash before", "crash after", "never", "no answer", "late"]


def check(store: MemoryObjectStore, allowed: Sequence[Seen]) -> Seen:
    seen = look(store)
    assert seen in allowed
    return seen


def act(command: Command, store: ObjectStore, behind: MemoryObjectStore, *, again: int = 0) -> None:
    command.act(process(store, 2 + again), process(behind, 3 + again))


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_all_or_nothing(command: Command, fate: str) -> None:
    """Whichever store call is the one: earlier versions stay byte for byte, the new state is seen whole or not at all.

    Run again, with the same transaction id where there is one, the command is done exactly once. A lost request or
    reply is not even noticed.
    """
    prepared = MemoryObjectStore()
    command.prepare(Repository.create(prepared, threads=0, codec="raw", author=author(1)))
    nothing_done = look(prepared)
    smooth = copy_of(prepared)
    counting = CrashingObjectStore(smooth)
    act(command, counting, smooth)
    all_done = look(smooth)
    assert all_done != nothing_done
    between = [command.between(all_done)] if command.between else []

    for at in range(1, counting.calls + 1):
        store = copy_of(prepared)
        if fate.startswith("crash"):
            with suppress(Crash):
                act(command, CrashingObjectStore(store, at=at, mode=fate.removeprefix("crash ")), store)
            seen = check(store, [nothing_done, *between, all_done])
            done = seen == all_done
            with pytest.raises(command.twice) if done and command.twice else nullcontext():
                act(command, store, store, again=10)
        else:
            faulty = OneFault(store, at, fate)
            act(command, faulty, store)
            check(store, [all_done])
            with suppress(AlreadyExistsError):
                faulty.late()
        check(store, [all_done])
        records = [record for log in process(store, 4)._logs.values() for record in log.records]
        assert [record.txn for record in records].count(TXN) <= 1


@pytest.mark.parametrize("single_writer", [False, True])
@pytest.mark.parametrize("fate", FATES)
def test_a_repository_that_is_half_made_is_made_again(
    fate: str, single_writer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no repository, or all of it, its single-writer promise included; making it again ends well."""

    def probe(store: ObjectStore) -> ProbeResult:
        store.put("probe/left/behind", b"")
        return ProbeResult("refused" if single_writer else "ok", (), 1, 0, 1)

    monkeypatch.setattr(repository, "probe", probe)
    make = partial(Repository.create, threads=0, single_writer=single_writer)
    smooth = CrashingObjectStore(MemoryObjectStore())
    make(smooth, author=author(1))
    for at in range(1, smooth.calls + 1):
        store = MemoryObjectStore()
        if fate.startswith("crash"):
            with suppress(Crash):
                make(CrashingObjectStore(store, at=at, mode=fate.removeprefix("crash ")), author=author(1))
            with suppress(NotFoundError):
                assert process(store, 2).settings()["writers"] == ("single" if single_writer else "many")
        else:
            faulty = OneFault(store, at, fate)
            make(faulty, author=author(1))
            with suppress(AlreadyExistsError):
                faulty.late()
        repo = make(store, author=author(5))
        assert repo.settings()["writers"] == ("single" if single_writer else "many")
        assert fsck(repo, deep=True).findings == []
