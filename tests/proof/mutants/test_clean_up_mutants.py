"""Every rule of clean-ups, moves, readers and mirrors is needed; see test_mutants."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
from prooflib import switches
from prooflib.hooks import HookedObjectStore
from prooflib.repacking import repack
from prooflib.stories import KEPT, TXN, BrokenPromise, Rule, Rules, Stage, contents, ends_badly, ends_well

from mandapa.errors import CorruptionError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.gc import Collection
from mandapa.repository.repository import Repository
from mandapa.repository.rewrite import rewrite
from mandapa.repository.version import Version
from mandapa.testing.faults import Crash

T = TypeVar("T")

rule = Rules()


# -- gc ---------------------------------------------------------------------------------------------------------------


def _one_deleted(stage: Stage) -> None:
    stage.has("a", old=stage.old)
    stage.others.artifact("a").delete(0)


def the_version_comes_back_before_the_list(stage: Stage) -> None:
    """A gc has marked, and not told yet what it will delete: the version is undeleted, and nothing forbids that."""
    _one_deleted(stage)
    cleaning = stage.begin_gc("chosen")
    stage.process().artifact("a").undelete(0)
    cleaning.finish()


rule(the_version_comes_back_before_the_list)(switches.mark_once)


rule(the_version_comes_back_before_the_list)(switches.mark_before_the_fence)


def the_base_dies_after_the_fence(stage: Stage) -> None:
    """It came back before the list, and is deleted after the fence, when a writer has taken its bytes over."""
    _one_deleted(stage)
    cleaning = stage.begin_gc("chosen")
    stage.others.artifact("a").undelete(0)
    cleaning.go_on("fenced")

    def meanwhile(_: object) -> None:
        stage.others.artifact("a").delete(0)
        cleaning.finish()

    stage.store.hook("before", "create", "log/", meanwhile)
    stage.commit(stage.process())


rule(the_base_dies_after_the_fence, "small")(switches.mark_beyond_the_fence)


def gc_passes_before_the_record(stage: Stage) -> None:
    """A whole gc takes what the writer has put, before its record names it."""
    stage.has("a", keep=KEPT)
    stage.store.hook("before", "create", "log/", lambda _: stage.gc())
    stage.commit(stage.process(), keep=KEPT)


rule(gc_passes_before_the_record)(switches.no_fences)


def a_new_artifact_comes_before_the_list(stage: Stage) -> None:
    """A gc has read the catalog, and not told yet what it will delete: a new artifact needs some of that."""
    stage.has("a", old=stage.old)
    repo = stage.process()
    assert contents(repo["a:v0"]) == {"old": stage.old}
    stage.others.artifact("a").delete(0)
    cleaning = stage.begin_gc("chosen")
    stage.commit(repo, "b")
    cleaning.finish()


rule(a_new_artifact_comes_before_the_list)(switches.catalog_read_once)


def the_tail_is_read_after_the_fence(stage: Stage) -> None:
    """The writer reads the log when the fence is there, so that only the list can tell; the gc deletes at the end."""
    stage.has("a", old=stage.old)
    repo = stage.process()
    assert contents(repo["a:v0"]) == {"old": stage.old}
    stage.has("a", keep=KEPT)
    stage.others.artifact("a").delete(0)
    stage.store.hook("before", "get", "log/", lambda _: stage.epilogue.append(stage.gc_until("marked")))
    stage.commit(repo, keep=KEPT)


rule(the_tail_is_read_after_the_fence)(switches.the_list_is_kept_to_itself)


def another_gc_meets_the_list(stage: Stage) -> None:
    """One gc is about to delete; another one passes; a writer remembers what the first will delete."""
    stage.has("a", old=stage.old)
    repo = stage.process()
    assert contents(repo["a:v0"]) == {"old": stage.old}
    stage.has("a", keep=KEPT)
    stage.others.artifact("a").delete(0)
    stage.epilogue.append(stage.gc_until("marked"))
    Collection(Repository(stage.memory, threads=0), grace=0, only=frozenset()).run()
    stage.commit(repo, keep=KEPT)


rule(another_gc_meets_the_list)(switches.remove_others)


def a_gc_has_died_before_its_fences(stage: Stage) -> None:
    """What it listed is in use; then it is not; then another gc passes, while a writer is taking it over."""
    _one_deleted(stage)
    cleaning = stage.begin_gc("chosen")
    stage.others.artifact("a").undelete(0)
    cleaning.go_on("listed")

    def meanwhile(_: object) -> None:
        stage.others.artifact("a").delete(0)
        Collection(Repository(stage.memory, threads=0), grace=0, only=frozenset()).run()

    stage.store.hook("before", "create", "log/", meanwhile)
    stage.commit(stage.process())


rule(a_gc_has_died_before_its_fences, "small")(switches.resume)


def a_gc_passes_within_the_grace(stage: Stage) -> None:
    """Old bytes of a version that was deleted a moment ago; it is wanted back."""
    stage.has("a", old=stage.old)
    stage.has("a", keep=KEPT)
    stage.days_pass(30)
    stage.others.artifact("a").delete(0)
    stage.days_pass(6)
    stage.others.gc(grace=7 * 86_400)

    def want_it_back() -> None:
        try:
            stage.process().artifact("a").undelete(0)
        except NotFoundError as error:
            raise BrokenPromise("it was deleted less than the grace ago") from error

    stage.epilogue.append(want_it_back)


rule(a_gc_passes_within_the_grace)(switches.grace_of_objects_alone)


# -- readers ----------------------------------------------------------------------------------------------------------


def a_reader_comes_late(stage: Stage) -> None:
    """A version is in hand when it is deleted, and swept."""
    stage.has("a", old=stage.old)
    version = stage.process()["a:v0"]
    stage.others.artifact("a").delete(0)
    stage.gc()
    stage.epilogue.append(lambda: _read(version, "was deleted"))


def a_reader_is_overtaken(stage: Stage) -> None:
    """A version is in hand when it is moved, and its old containers are swept."""
    stage.has("a", old=stage.old)
    version = stage.process()["a:v0"]
    repack(stage.others, stage.others.artifact("a").open_log(), 0)
    stage.gc()
    stage.epilogue.append(lambda: _read(version, None))


def _read(version: Version, told: str | None) -> None:
    """The reader gets what was put or, if ``told``, is told that."""
    try:
        found = contents(version)
    except (NotFoundError, CorruptionError) as error:
        if told is None or told not in str(error):
            raise BrokenPromise(f"a reader is told: {error}") from error
    else:
        assert told is None
        assert found


rule(a_reader_comes_late)(switches.no_second_look)
rule(a_reader_is_overtaken)(switches.no_second_look)


rule(a_reader_is_overtaken)(switches.stay_where_it_was)


# -- moves ------------------------------------------------------------------------------------------------------------


def _move(stage: Stage, repo: Repository) -> None:
    """Empty the container of the oldest version's chunks; by the writer of the story."""
    tree = repo["a:v0"].tree
    list(rewrite(repo, [container_key(min(tree.containers(), key=lambda one: one == tree.root.container))]))


def another_moves_the_version(stage: Stage) -> None:
    """All of it, elsewhere, and the old containers are swept, when the new manifest is made, and names some of them."""
    stage.has("a", keep=KEPT, old=stage.old)

    def meanwhile(_: object) -> None:
        repack(stage.others, stage.others.artifact("a").open_log(), 0)
        stage.gc()

    stage.store.hook("before", "create", "log/", meanwhile)
    _move(stage, stage.process())


rule(another_moves_the_version, "large")(switches.move_without_was)


def gc_passes_before_the_move(stage: Stage) -> None:
    """A whole gc takes what was put for the move, before the record names it."""
    stage.has("a", keep=KEPT, old=stage.old)
    stage.store.hook("before", "create", "log/", lambda _: stage.gc())
    _move(stage, stage.process())


rule(gc_passes_before_the_move)(switches.move_without_fence)


# -- mirrors ----------------------------------------------------------------------------------------------------------


def _source(stage: Stage) -> Repository:
    """The repository of the story follows it, and is checked in the end."""
    source = Repository.create(MemoryObjectStore(), threads=0, author=stage.author("source"))
    with source.artifact("m").transaction(txn_id=TXN) as txn:
        txn.add(stage.file, at="file")
    source.artifact("m").alias("best", 0)

    def in_the_end() -> None:
        result = source.mirror(Repository(stage.memory, threads=0))
        if not result.ok:
            raise BrokenPromise(f"it does not follow: {[one.error for one in result.artifacts]}")
        try:
            found = contents(Repository(stage.memory, threads=0)["m:best"])
        except CorruptionError as error:
            raise BrokenPromise(str(error)) from error
        assert found == {"file": stage.old}

    stage.epilogue.append(in_the_end)
    return source


def the_mirror_dies_after_a_record(stage: Stage) -> None:
    """It is started again, and knows nothing of what it has told."""
    source = _source(stage)

    def die(_: object) -> None:
        raise Crash

    stage.store.hook("after", "create", "log/", die)
    with suppress(Crash):
        source.mirror(stage.process())
    source.mirror(stage.process())


rule(the_mirror_dies_after_a_record)(switches.tell_by_chance)


def gc_passes_before_the_mirror_tells(stage: Stage) -> None:
    """A whole gc takes what the mirror has put, before its record names it."""
    source = _source(stage)
    stage.store.hook("before", "create", "log/", lambda _: stage.gc())
    source.mirror(stage.process())


rule(gc_passes_before_the_mirror_tells)(switches.mirror_without_fence)


class Overtaken(HookedObjectStore):
    """Before one of its calls something else happens, whatever the call is."""

    def __init__(self, store: MemoryObjectStore, at: int, event: Callable[[], object]) -> None:
        super().__init__(store)
        self._at = at
        self._event = event
        self.count = 0

    def _call(self, verb: str, key: str, call: Callable[[], T]) -> T:
        self.count += 1
        if self.count == self._at:
            self._event()
        return super()._call(verb, key, call)


@rule.each()
def test_with_the_rule_the_story_ends_well(rule: Rule, tmp_path: Path) -> None:
    """Nothing that anybody needs is gone, and everybody is told the truth."""
    ends_well(rule, tmp_path)


@rule.each()
def test_without_the_rule_a_promise_is_broken(rule: Rule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is needed, and the story shows it."""
    ends_badly(rule, tmp_path, monkeypatch)


@pytest.mark.parametrize("size", [40, 70_000])
def test_a_mirror_may_be_overtaken_at_any_call(size: int) -> None:
    """Another one that tells everything at any moment: nothing is told twice, or after what came later."""
    source = Repository.create(MemoryObjectStore(), threads=0)
    artifact = source.artifact("m")
    for number in range(3):
        with artifact.transaction() as txn:
            txn.add_bytes("file", bytes([number]) * size)
        if number == 0:
            artifact.tag("first", 0)
            continue
        artifact.delete(number)  # gone before it is copied: telling that it went says nothing
        artifact.undelete(number)
        artifact.alias("best", number)
    artifact.alias("best", None)
    at = 0
    while True:
        at += 1
        memory = MemoryObjectStore()
        Repository.create(memory, threads=0)
        store = Overtaken(memory, at, lambda memory=memory: source.mirror(Repository(memory, threads=0)))
        assert source.mirror(Repository(store, threads=0)).ok
        copy = Repository(memory, threads=0)
        assert fsck(copy, deep=True).findings == []
        assert [version.digest for version in copy.artifact("m").versions()] == [
            version.digest for version in artifact.versions()
        ]
        assert (copy.artifact("m").aliases(), copy.artifact("m").tags()) == ({}, {"first": 0})
        if store.count < at:
            return
