"""Every rule of the commit is needed: switched off on the real code, a schedule that needs it breaks a promise.

Each story is one written order of events. With the rule it ends well; with the rule switched off, the same story must
end with a broken promise - else the story proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace
from prooflib.repacking import repack
from prooflib.stories import KEPT, OLD, TXN, Rule, Rules, Stage, contents, ends_badly, ends_well

from mandapa.errors import AlreadyExistsError, ConflictError, CorruptionError, NotFoundError, StorageError
from mandapa.format.manifest import Part
from mandapa.format.records import decode_record, encode_record
from mandapa.repository import artifact, packs, transaction
from mandapa.repository.log import Author, Log
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState
from mandapa.repository.transaction import Transaction
from mandapa.testing.faults import Crash

rule = Rules()


def lost() -> StorageError:
    return StorageError("the request or its reply was lost", retryable=True)


# -- what a new version names must be there, and stay -----------------------------------------------------------------


def the_base_is_deleted_and_swept(stage: Stage) -> None:
    """The bytes were taken over from the base, which is deleted, and swept, before our record."""
    stage.has("a", keep=KEPT)
    stage.has("a", keep=KEPT, old=stage.old)

    def meanwhile(_: object) -> None:
        stage.others.artifact("a").delete(1)
        stage.gc()

    stage.store.hook("before", "create", "log/", meanwhile)
    stage.commit(stage.process(), keep=KEPT)


def the_base_of_a_grown_file_is_deleted_and_swept(stage: Stage) -> None:
    """Most of the file was taken over from the base's, its lists of chunks included, of which none is at hand now."""
    stage.has("a", keep=KEPT)
    stage.has("a", keep=KEPT, new=stage.old)
    grown = stage.old + bytes(100_000)
    stage.file.write_bytes(grown)
    repo = stage.process()

    def meanwhile(_: object) -> None:
        stage.others.artifact("a").delete(1)
        stage.gc()
        for hash_ in [hash_ for hash_, node in repo.reader._nodes.items() if isinstance(node, Part)]:
            del repo.reader._nodes[hash_]

    stage.store.hook("before", "create", "log/", meanwhile)
    with repo.artifact("a").transaction(on_conflict="ours", txn_id=TXN) as txn:
        txn.add(stage.file, at="new")
    stage.told.append(("a", TXN, {"keep": KEPT, "new": grown}))


@rule(the_base_is_deleted_and_swept, "small")
@rule(the_base_of_a_grown_file_is_deleted_and_swept, "large")
def inherit_nocheck(patch: pytest.MonkeyPatch) -> None:
    """What was inherited is looked at again when its version is not live any more."""
    patch.setattr(Transaction, "_bases_stand", lambda *_: True)


def the_base_is_moved_and_swept(stage: Stage) -> None:
    """The bytes were taken over from the base, which is repacked, and its old containers swept."""
    stage.has("a", keep=KEPT, old=stage.old)

    def meanwhile(_: object) -> None:
        repack(stage.others, stage.others.artifact("a").open_log(), 0)
        stage.gc()

    stage.store.hook("before", "create", "log/", meanwhile)
    stage.commit(stage.process(), keep=KEPT, old=stage.old)


@rule(the_base_is_moved_and_swept, "small")
def inherit_oldroot(patch: pytest.MonkeyPatch) -> None:
    """A version that is live, but elsewhere, lends nothing."""
    patch.setattr(ArtifactState, "is_live", lambda self, n, _: n in self.versions and self.versions[n].deleted is None)


def a_fixed_base_is_deleted_and_swept(stage: Stage) -> None:
    """The version that we were told to start from is deleted, and swept, before our record."""
    with suppress(ConflictError):
        _upon_a_base_that_is_swept(stage)


def _upon_a_base_that_is_swept(stage: Stage) -> None:
    stage.has("a", keep=KEPT, old=stage.old)
    stage.has("a", later=KEPT)

    def meanwhile(_: object) -> None:
        stage.others.artifact("a").delete(0)
        stage.gc()

    stage.store.hook("before", "create", "log/", meanwhile)
    with stage.process().artifact("a").transaction(base=0, txn_id=TXN) as txn:
        txn.add_bytes("more", b"1")
    stage.told.append(("a", TXN, {"keep": KEPT, "old": stage.old, "more": b"1"}))


def a_fixed_base_is_moved_and_swept(stage: Stage) -> None:
    """It is repacked, and its old containers swept; other versions come and go."""
    stage.has("a", keep=KEPT, old=stage.old)
    stage.has("a", later=KEPT)

    def meanwhile(_: object) -> None:
        repack(stage.others, stage.others.artifact("a").open_log(), 0)
        stage.has("a", latest=KEPT)
        stage.others.artifact("a").delete(1)
        stage.gc()

    stage.store.hook("before", "create", "log/", meanwhile)
    with stage.process().artifact("a").transaction(base=0, txn_id=TXN) as txn:
        txn.add(stage.file, at="new")
    stage.told.append(("a", TXN, {"keep": KEPT, "old": stage.old, "new": stage.old}))


@rule(a_fixed_base_is_deleted_and_swept)
@rule(a_fixed_base_is_moved_and_swept)
def fixed_base_nocheck(patch: pytest.MonkeyPatch) -> None:
    """A fixed base is live, and read where it is, in the state before the slot that is won."""
    patch.setattr(Transaction, "_stay", lambda *_: None)


def a_hit_is_gone(stage: Stage) -> None:
    """This machine remembers a chunk of a version that was deleted and swept long ago."""
    repo = _remembers_a_deleted_version(stage)
    stage.gc()
    stage.commit(repo, keep=KEPT)


def _remembers_a_deleted_version(stage: Stage) -> Repository:
    stage.has("a", old=stage.old)
    repo = stage.process()
    assert contents(repo["a:v0"]) == {"old": stage.old}
    stage.has("a", keep=KEPT)
    stage.others.artifact("a").delete(0)
    return repo


@rule(a_hit_is_gone)
def nohead(patch: pytest.MonkeyPatch) -> None:
    """What was found by the index is looked for."""
    patch.setattr(packs, "missing", lambda *_, **__: set())


def gc_passes_before_the_record(stage: Stage) -> None:
    """A whole gc takes what we have put, before our record names it."""
    stage.has("a", keep=KEPT)
    stage.store.hook("before", "create", "log/", lambda _: stage.gc())
    stage.commit(stage.process(), keep=KEPT)


@rule(gc_passes_before_the_record)
def nohead_own(patch: pytest.MonkeyPatch) -> None:
    """After a fence our own new containers are looked for, too."""
    doubtful = Transaction._doubtful
    patch.setattr(Transaction, "_doubtful", lambda self, state: doubtful(self, state) - self._upload.fresh)


@rule(gc_passes_before_the_record)
def nofence(patch: pytest.MonkeyPatch) -> None:
    """A fence that comes in between makes us look again."""
    patch.setattr(Transaction, "_notice", lambda *_: None)


def gc_fences_while_the_log_is_read(stage: Stage) -> None:
    """The fence is before the tail that we read, so the list was there before; its gc deletes after our record."""
    repo = _remembers_a_deleted_version(stage)
    stage.store.hook("before", "get", "log/", lambda _: stage.epilogue.append(stage.gc_until("marked")))
    stage.commit(repo, keep=KEPT)


@rule(gc_fences_while_the_log_is_read)
def nolist(patch: pytest.MonkeyPatch) -> None:
    """The lists of gcs are read."""
    patch.setattr(packs, "condemned", lambda _: set())


@rule(gc_fences_while_the_log_is_read)
def lists_before_the_tail(patch: pytest.MonkeyPatch) -> None:
    """The lists are read after the log."""
    condemned, enter = packs.condemned, Transaction.__enter__
    read: list[set[str]] = []

    def read_first(self: Transaction) -> Transaction:
        read[:] = [condemned(self._repo.store)]
        return enter(self)

    patch.setattr(Transaction, "__enter__", read_first)
    patch.setattr(packs, "condemned", lambda _: read[0])


def gc_ends_while_hits_are_checked(stage: Stage) -> None:
    """The list of a gc is gone just before we read the lists, and its objects with it."""
    repo = _remembers_a_deleted_version(stage)
    finish = stage.gc_until("marked")
    stage.store.hook("before", "list", "gc/", lambda _: finish())
    stage.commit(repo, keep=KEPT)


@rule(gc_ends_while_hits_are_checked)
def head_before_lists(patch: pytest.MonkeyPatch) -> None:
    """In no list first, THEN found."""
    condemned, missing = packs.condemned, packs.missing

    def the_other_way_round(store: object, containers: object, *, threads: int) -> set[bytes]:
        gone = missing(store, sorted(containers), threads=threads)
        listed = condemned(store)
        return gone | {c for c in containers if packs.container_key(c) in listed}

    patch.setattr(transaction, "condemned_or_missing", the_other_way_round)


def what_is_found_instead_is_condemned(stage: Stage) -> None:
    """Copied bytes are swept; the index learns where they are, too, and there another gc is about to delete them."""
    for name in ("a", "b"):
        stage.has(name, old=stage.old)
    stage.has("c", keep=KEPT)
    cache = stage.file.parent / "cache"
    repo = stage.process(cache)

    def meanwhile(_: object) -> None:
        repo.index.flush()
        neighbour = stage.process(cache)
        assert contents(neighbour["b:v0"]) == {"old": stage.old}
        neighbour.index.close()
        stage.others.artifact("a").delete(0)
        stage.gc()
        stage.others.artifact("b").delete(0)
        stage.epilogue.append(stage.gc_until("marked"))

    stage.store.hook("before", "create", "log/", meanwhile)
    with repo.artifact("c").transaction(txn_id=TXN) as txn:
        txn.copy("a:v0", "old", at="new")
    stage.told.append(("c", TXN, {"keep": KEPT, "new": stage.old}))


@rule(what_is_found_instead_is_condemned)
def secure_once(patch: pytest.MonkeyPatch) -> None:
    """What is named instead of something bad is looked at, too."""

    def once(self: Transaction, doubtful: Callable[[], set[bytes]]) -> bool:
        bad = self._bad(doubtful())
        self._restore(bad)
        return bool(bad)

    patch.setattr(Transaction, "_secure", once)


def what_is_found_instead_was_inherited(stage: Stage) -> None:
    """The same, but it is found in the base, which is not live any more either."""
    stage.has("a", keep=KEPT)
    stage.has("a", keep=KEPT, old=stage.old)
    stage.has("b", old=stage.old)

    def meanwhile(_: object) -> None:
        stage.others.artifact("b").delete(0)
        stage.gc()
        stage.others.artifact("a").delete(1)
        stage.epilogue.append(stage.gc_until("marked"))

    stage.store.hook("before", "create", "log/", meanwhile)
    with stage.process().artifact("a").transaction(txn_id=TXN) as txn:
        txn.add_bytes("more", b"1")
        txn.copy("b:v0", "old", at="new")
    stage.told.append(("a", TXN, {"keep": KEPT, "more": b"1", "new": stage.old}))


@rule(what_is_found_instead_was_inherited, "small")
def secure_hits_only(patch: pytest.MonkeyPatch) -> None:
    """What is named instead, and inherited from a version that is not live any more, is looked at, too."""

    def hits_only(self: Transaction, doubtful: Callable[[], set[bytes]]) -> bool:
        stored, rest, looked = False, doubtful(), set()
        while bad := self._bad(rest):
            looked |= rest
            self._restore(bad)
            rest, stored = self._named() & self._upload.hits - looked, True
        return stored

    patch.setattr(Transaction, "_secure", hits_only)


def gc_fences_before_the_artifact_is_known(stage: Stage) -> None:
    """A gc lists what the first commit of an artifact has put, and fences every log that it knows of."""
    stage.store.hook("after", "put", "meta/", lambda _: stage.epilogue.append(stage.gc_until("fenced")))
    stage.commit(stage.process())


@rule(gc_fences_before_the_artifact_is_known)
def register_late(patch: pytest.MonkeyPatch) -> None:
    """An artifact is registered before anything of it is put."""
    register, build = Transaction._register, Transaction._build

    def build_then_register(self: Transaction, edits: object) -> None:
        build(self, edits)
        register(self)

    patch.setattr(Transaction, "_register", lambda _: None)
    patch.setattr(Transaction, "_build", build_then_register)


# -- undelete ---------------------------------------------------------------------------------------------------------


def undelete_before_the_sweep(stage: Stage) -> None:
    """A gc has marked for the last time, and is about to delete what the version needs."""
    stage.has("a", old=stage.old)
    stage.has("a", keep=KEPT)
    stage.others.artifact("a").delete(0)
    stage.epilogue.append(stage.gc_until("marked"))
    _undelete(stage)


def undelete_while_gc_passes(stage: Stage) -> None:
    """A whole gc passes between the look at the bytes and the record."""
    stage.has("a", old=stage.old)
    stage.has("a", keep=KEPT)
    stage.others.artifact("a").delete(0)
    stage.store.hook("before", "create", "log/", lambda _: stage.gc())
    _undelete(stage)


def _undelete(stage: Stage) -> None:
    with suppress(NotFoundError):
        stage.process().artifact("a").undelete(0)


@rule(undelete_before_the_sweep)
def undelete_headonly(patch: pytest.MonkeyPatch) -> None:
    """What is brought back is in no list."""
    patch.setattr(packs, "condemned", lambda _: set())


@rule(undelete_while_gc_passes)
def undelete_nofence(patch: pytest.MonkeyPatch) -> None:
    """A fence makes an undelete look again."""
    patch.setattr(artifact._Revival, "notice", lambda *_: None)


# -- preconditions ----------------------------------------------------------------------------------------------------


def the_version_gets_an_alias(stage: Stage) -> None:
    """Another names the version that we are about to delete."""
    stage.has("a", old=stage.old)
    stage.has("a", keep=KEPT)
    stage.store.hook("before", "create", "log/", lambda _: stage.others.artifact("a").alias("best", 0))
    with pytest.raises((ConflictError, CorruptionError)):
        stage.process().artifact("a").delete(0)


def the_version_is_deleted(stage: Stage) -> None:
    """Another deletes the version that we are about to name."""
    stage.has("a", old=stage.old)
    stage.has("a", keep=KEPT)
    stage.store.hook("before", "create", "log/", lambda _: stage.others.artifact("a").delete(0))
    with pytest.raises((NotFoundError, CorruptionError)):
        stage.process().artifact("a").alias("best", 0)


def _decide_once(patch: pytest.MonkeyPatch) -> None:
    decide = Log._decide
    decided: dict[object, object] = {}

    def once(self: Log[ArtifactState], build: Callable[..., object]) -> object:
        if build not in decided:
            decided[build] = decide(self, build)
        return decided[build]

    patch.setattr(Log, "_decide", once)


@rule(the_version_gets_an_alias)
def noprecond_delete(patch: pytest.MonkeyPatch) -> None:
    """Our own preconditions hold at the slot that we get, not only at the one that we lost."""
    _decide_once(patch)


@rule(the_version_is_deleted)
def noprecond_alias(patch: pytest.MonkeyPatch) -> None:
    """The same of an alias."""
    _decide_once(patch)


# -- one slot after the other, once -----------------------------------------------------------------------------------


def the_writer_dies_after_its_record(stage: Stage) -> None:
    """It is started again with the same transaction id, when another version has come after its own."""
    stage.has("a", keep=KEPT)

    def die(_: object) -> None:
        raise Crash

    stage.store.hook("after", "create", "log/", die)
    with pytest.raises(Crash):
        stage.commit(stage.process(), keep=KEPT)
    stage.has("a", more=KEPT)
    stage.commit(stage.process(), keep=KEPT)


@rule(the_writer_dies_after_its_record)
def restart_noscan(patch: pytest.MonkeyPatch) -> None:
    """Who takes a transaction up again looks for it first."""
    patch.setattr(Log, "find", lambda *_: None)


def the_create_comes_late(stage: Stage) -> None:
    """Nobody knows what became of the create; it lands when all seems over."""
    stage.has("a", keep=KEPT)

    def late(call: Callable[[], object]) -> None:
        stage.epilogue.append(lambda: _refused(call))
        raise lost()

    stage.store.hook("instead", "create", "log/", late)
    stage.commit(stage.process(), keep=KEPT)


def _refused(call: Callable[[], object]) -> None:
    with suppress(AlreadyExistsError):
        call()


def the_create_is_lost(stage: Stage) -> None:
    """Nobody knows what became of the create; it never was done."""
    stage.has("a", keep=KEPT)

    def never(_: object) -> None:
        raise lost()

    stage.store.hook("instead", "create", "log/", never)
    stage.commit(stage.process(), keep=KEPT)


def the_create_is_refused_for_nothing(stage: Stage) -> None:
    """The store says that the slot is taken, though nothing is there."""
    stage.has("a", keep=KEPT)

    def conflict(_: object) -> None:
        raise AlreadyExistsError("a spurious 409")

    stage.store.hook("instead", "create", "log/", conflict)
    stage.commit(stage.process(), keep=KEPT)


def the_create_arrives_twice(stage: Stage) -> None:
    """The first of the two is done, the answer is that of the second: taken."""
    stage.has("a", keep=KEPT)

    def doubled(call: Callable[[], object]) -> None:
        call()
        call()

    stage.store.hook("instead", "create", "log/", doubled)
    stage.commit(stage.process(), keep=KEPT)


def _next_slot(self: Log[ArtifactState], data: bytes, seq: int) -> bytes:
    """The same record, one slot further."""
    record = replace(decode_record(data, key="", seq=seq), seq=seq + 1)
    self._store.create(self._key(seq + 1), encode_record(record))
    return data


@rule(the_create_is_lost)
def leave_the_slot_lost(patch: pytest.MonkeyPatch) -> None:
    """After an unknown outcome the SAME slot is tried again: else the log has a gap."""
    _leave_after(patch, StorageError)


@rule(the_create_comes_late)
def leave_the_slot_late(patch: pytest.MonkeyPatch) -> None:
    """The same: else both records stand there in the end."""
    _leave_after(patch, StorageError)


@rule(the_create_is_refused_for_nothing)
def trust_already_exists_spurious(patch: pytest.MonkeyPatch) -> None:
    """AlreadyExists is read back: the slot may be empty."""
    _leave_after(patch, AlreadyExistsError)


@rule(the_create_arrives_twice)
def trust_already_exists_doubled(patch: pytest.MonkeyPatch) -> None:
    """AlreadyExists is read back: what stands there may be ours."""
    _leave_after(patch, AlreadyExistsError)


def _leave_after(patch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def put(self: Log[ArtifactState], data: bytes, seq: int, author: Author) -> bytes:
        try:
            self._store.create(self._key(seq), data)
        except kind:
            return _next_slot(self, data, seq)
        return data

    patch.setattr(Log, "_put", put)


@rule(the_create_is_lost)
def no_readback(patch: pytest.MonkeyPatch) -> None:
    """An unknown outcome is no acknowledgement."""

    def put(self: Log[ArtifactState], data: bytes, seq: int, author: Author) -> bytes:
        with suppress(StorageError):
            self._store.create(self._key(seq), data)
        return data

    patch.setattr(Log, "_put", put)


# -- and now ----------------------------------------------------------------------------------------------------------


@rule.each()
def test_with_the_rule_the_story_ends_well(rule: Rule, tmp_path: Path) -> None:
    """Acknowledged means there, whole, once; whatever the store and the others did."""
    ends_well(rule, tmp_path)


@rule.each()
def test_without_the_rule_a_promise_is_broken(rule: Rule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is needed, and the story shows it."""
    ends_badly(rule, tmp_path, monkeypatch)


def test_a_fixed_base_that_is_swept_is_refused(tmp_path: Path) -> None:
    """The slot after the delete is not taken: the writer is told, and no version is made."""
    stage = Stage(tmp_path, OLD["small"])
    with pytest.raises(ConflictError, match=r"a:v0, .* was deleted meanwhile .* run it again"):
        _upon_a_base_that_is_swept(stage)
    stage.check()
    assert [version.number for version in stage.others.artifact("a").versions()] == [1]
