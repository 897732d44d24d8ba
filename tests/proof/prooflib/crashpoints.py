"""What users do, and what they may see when it is cut short: a process that dies, or a request that is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import TypeVar

import pytest

from mandapa.content.tree import Tree
from mandapa.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidInputError,
    MandapaError,
    NotFoundError,
    StorageError,
)
from mandapa.format.keys import container_key
from mandapa.object_store.base import Buffer, ObjectInfo, ObjectStore
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.gc import Collection
from mandapa.repository.log import Author
from mandapa.repository.mirror import mirror
from mandapa.repository.policy import Policy
from mandapa.repository.repack import RepackPlan, Step, apply_repack
from mandapa.repository.repository import Repository
from mandapa.repository.retention import apply_expire, plan_expire
from mandapa.repository.rewrite import rewrite
from mandapa.repository.version import Version, root_of
from mandapa.testing.faults import Crash, CrashingObjectStore

_T = TypeVar("_T")

TXN = "ab" * 16
PACKED = Random(0).randbytes(70_000)  # more than goes beside the manifest
SMALL = b"small enough for the manifest's container"

Content = dict[str, bytes]
Seen = dict[str, tuple[dict[int, Content], dict[str, int]]]
"""Artifact -> what each live version holds, and the aliases and tags."""

FATES = ["crash before", "crash after", "torn", "never", "no answer", "late"]
"""Of one call: the process dies before it, after it, or while a container is put; it is lost in one of three ways."""


class TearingObjectStore(CrashingObjectStore):
    """Dies in the middle of a put, of which a part is there; at once where a store does it all or not at all."""

    def put(self, key: str, data: Buffer) -> None:
        before = self.calls
        try:
            super().put(key, data)
        except Crash:
            if key.startswith(("packs/", "meta/")) and before + 1 == self._at:
                self._store.put(key, bytes(data)[: len(data) // 2])
            raise


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
    between: Callable[[Seen], list[Seen]] = lambda _: []
    """What may be seen besides all and nothing, made from all."""
    twice: type[MandapaError] | None = None
    """What it raises when it was done already; None: nothing."""
    shows: bool = True
    """Whether anybody sees that it was done."""
    tidy: bool = False
    """Whether it leaves nothing in the store that nobody needs."""


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
            seen[artifact.name] = versions, {**artifact.aliases(), **artifact.tags()}
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
        other.gc(grace=0)


def without_the_newest(all_: Seen) -> list[Seen]:
    versions, aliases = all_["a"]
    return [{"a": ({n: content for n, content in versions.items() if n != max(versions)}, aliases)}]


def registered_only(_: Seen) -> list[Seen]:
    return [{"a": ({}, {})}]


def two_artifacts(repo: Repository) -> None:
    three_versions(repo)
    commit(repo, "b", {"mine": PACKED[2:], "small": b"b"})
    repo.artifact("a").delete(0, 1)


def copy_and_name(repo: Repository, _: Repository) -> None:
    """Bytes of another artifact and of the base, and a name, in one record."""
    with repo.artifact("b").transaction("copied", txn_id=TXN) as txn:
        txn.copy("a:v2", at="taken")
        txn.alias("best")


def one_removed(repo: Repository) -> None:
    two_artifacts(repo)
    repo.artifact("a").remove()


def clean_up(repo: Repository, _: Repository) -> None:
    repo.gc(grace=0)


def repack(repo: Repository, _: Repository) -> None:
    """Two versions as dense as can be, whether or not that saves anything."""
    artifact = repo.artifact("a")
    state = artifact.state()
    steps = tuple(Step(number, state.versions[number].root.hash, 1 << 40, 0) for number in (0, 1))
    list(apply_repack(artifact, RepackPlan("a", repo.id, steps)))


def empty_the_oldest(repo: Repository, _: Repository) -> None:
    """What the oldest version is in is needed by no version any more."""
    log = repo.artifact("a").open_log()
    tree = Tree(repo.reader, root_of(log.state.versions[0].root))
    list(rewrite(repo, sorted(map(container_key, tree.containers()))))


def expire(repo: Repository, _: Repository) -> None:
    list(apply_expire(repo, plan_expire(repo, ["a"], Policy(keep_last=1))))


def half_dead(repo: Repository) -> None:
    """Garbage, and a list that a clean-up left behind when it died."""
    one_deleted(repo)
    for step in Collection(repo, grace=0).steps():
        if step == "listed":
            break


def followed(repo: Repository) -> None:
    three_versions(repo)
    repo.artifact("a").alias("best", 1)
    commit(repo, "a", {"last": b"3"})
    repo.artifact("a").delete(0)


SOURCE = MemoryObjectStore()
"""What is mirrored; never changed once it is made."""
STOPS: list[Seen] = []
"""What it said after each of its records; nothing of it at first."""


def mirror_it(repo: Repository, _: Repository) -> None:
    """The repository in danger is the one that follows."""
    assert mirror(process(SOURCE, 7), repo).ok


def make_source(_: Repository) -> None:
    """Versions, a name, a version that was deleted after it had been there for a while."""
    if STOPS:
        return
    repo = Repository.create(SOURCE, threads=0, codec="raw", author=author(6))
    followed(repo)
    versions = {n: contents(repo.artifact("a").version(n)) for n in (1, 2, 3)}
    for last, names in ((-1, {}), (0, {}), (1, {}), (2, {}), (2, {"best": 1}), (3, {"best": 1})):
        STOPS.append({"a": ({n: versions[n] for n in versions if n <= last}, names)})


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
    Command("tag", three_versions, lambda repo, _: repo.artifact("a").tag("t", 1), twice=ConflictError),
    Command("policy", three_versions, lambda repo, _: repo.set_policy("a", Policy(keep_last=2)), shows=False),
    Command("expire", three_versions, expire),
    Command("gc", one_deleted, clean_up, shows=False, tidy=True),
    Command("gc-after-one-that-died", half_dead, clean_up, shows=False, tidy=True),
    Command("gc-of-a-removed-artifact", one_removed, clean_up, shows=False, tidy=True),
    Command("copy-and-alias", two_artifacts, copy_and_name),
    Command(
        "undelete-several", two_artifacts, lambda repo, _: repo.artifact("a").undelete(0, 1), twice=InvalidInputError
    ),
    Command("repack", three_versions, repack, shows=False),
    Command("rewrite", three_versions, empty_the_oldest, shows=False),
    Command("mirror", make_source, mirror_it, lambda _: STOPS),
    Command("remove", three_versions, lambda repo, _: repo.artifact("a").remove(), registered_only, NotFoundError),
]


class Rehearsal:
    """A command that went well, call by call; then the same with one call that does not."""

    def __init__(self, command: Command, seed: int = 0) -> None:
        self.command = command
        self.seed = seed
        self.prepared = MemoryObjectStore()
        command.prepare(Repository.create(self.prepared, threads=0, codec="raw", author=author(seed + 1)))
        self.nothing_done = look(self.prepared)
        smooth = copy_of(self.prepared)
        counting = CrashingObjectStore(smooth)
        act(command, counting, smooth, seed=seed)
        self.calls = counting.calls
        """How many places there are at which something can happen."""
        self.all_done = look(smooth)
        assert (self.all_done != self.nothing_done) == command.shows
        if command.tidy:
            check_tidy(smooth)
        self.allowed = [self.nothing_done, *command.between(self.all_done), self.all_done]

    def play(self, fate: str, at: int) -> None:
        """Let that happen at one call; look; do it again; look again."""
        command, store, seed = self.command, copy_of(self.prepared), self.seed
        if fate in ("never", "no answer", "late"):
            faulty = OneFault(store, at, fate)
            act(command, faulty, store, seed=seed)
            check(store, [self.all_done])
            with suppress(AlreadyExistsError):
                faulty.late()
            if command.tidy and fate == "late":
                act(command, store, store, again=10, seed=seed)  # a list that came back is another clean-up's to take
        else:
            kind = TearingObjectStore if fate == "torn" else CrashingObjectStore
            dying = kind(store, at=at, mode="after" if fate == "crash after" else "before")
            with suppress(Crash):
                act(command, dying, store, seed=seed)
            done = check(store, self.allowed) == self.all_done
            with pytest.raises(command.twice) if done and command.twice else nullcontext():
                act(command, store, store, again=10, seed=seed)
        check(store, [self.all_done])
        if command.tidy:
            check_tidy(store)
        records = [record for log in process(store, 4)._logs.values() for record in log.records]
        assert [record.txn for record in records].count(TXN) <= 1


def check_tidy(store: MemoryObjectStore) -> None:
    """Nothing is there that no version needs, and no list of a clean-up."""
    repo = process(store, 98)
    needed = set()
    for artifact in repo.artifacts():
        for version in artifact.versions():
            needed |= set(map(container_key, version.tree.containers()))
    assert {info.key for prefix in ("packs/", "meta/", "tx/") for info in store.list(prefix)} == needed
    assert [info.key for info in store.list("gc/")] == []


def check(store: MemoryObjectStore, allowed: Sequence[Seen]) -> Seen:
    seen = look(store)
    assert seen in allowed
    return seen


def act(command: Command, store: ObjectStore, behind: MemoryObjectStore, *, again: int = 0, seed: int = 0) -> None:
    command.act(process(store, 2 + again + seed), process(behind, 3 + again + seed))
