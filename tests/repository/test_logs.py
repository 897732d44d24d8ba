"""Records that others wrote: newer ops, features that we lack, ops that no command of ours makes; and broken logs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import pytest

from mandapa.content.edit import edit_tree
from mandapa.content.index import Index
from mandapa.content.upload import Upload
from mandapa.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    FormatVersionError,
    NotFoundError,
    StorageError,
)
from mandapa.format.keys import CATALOG, head_key, log_key
from mandapa.format.records import (
    AliasOp,
    AnnotateOp,
    CloseOp,
    DeleteOp,
    FenceOp,
    RenameOp,
    RepackOp,
    SettingsOp,
    TagOp,
    UndeleteOp,
    VersionOp,
)
from mandapa.format.strict import seal
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.log import ATTEMPTS, Author, Log
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState
from mandapa.repository.version import address_of

EPOCH = "e" * 32


def author():
    return Author("tests", sleep=lambda _: None)


@pytest.fixture
def store():
    return MemoryObjectStore()


@pytest.fixture
def repo(store):
    """With v0 and v1 of ``a``."""
    made = Repository.create(store, threads=0)
    put(made, x=b"0")
    put(made, x=b"1", y=b"1")
    return made


def put(repo, name="a", /, **content):
    with repo.artifact(name).transaction("m") as txn:
        for path, data in content.items():
            txn.add_bytes(path, data)
    return txn.version


def read(version):
    found = {}
    for path in version.assets:
        with version.open(path) as file:
            found[path] = file.read()
    return found


def fresh(store):
    """Another process."""
    return Repository(store, threads=0, author=author())


def write(store, repo, *ops, log=None):
    """Append a record of any ops, as a newer mandapa might; heads are of no use then."""
    log = log or repo.artifact("a").open_log()
    line = {"format": 1, "seq": len(log.records), "txn": "cd" * 16, "prev": log.records[-1].seal}
    line |= {"at": "2030-01-01T00:00:00.000000Z", "by": "newer", "ops": list(ops)}
    store.create(log_key(log.id, len(log.records)), seal(line))
    store.delete([head_key(log.id)])


def append(repo, *ops):
    """Append known ops, their preconditions unchecked as nowhere else."""
    log = repo.artifact("a").open_log()
    return log.append(author().new_id().hex(), lambda _: ops, author())


# -- ops of a newer mandapa -------------------------------------------------------------------------------------------


def test_an_unknown_op_that_is_optional(store, repo):
    """Readers read on, beyond it too; whoever would write refuses, and writes nothing."""
    write(store, repo, {"op": "shine", "optional": True, "more": [1]}, {"op": "alias", "name": "best", "version": 0})
    for again in (repo, fresh(store)):
        assert read(again["a"]) == {"x": b"1", "y": b"1"}
        assert again["a:best"].number == 0
        artifact = again.artifact("a")
        count = len(artifact.open_log().records)
        for call in (
            partial(put, again, x=b"2"),
            partial(artifact.alias, "prod", 0),
            partial(artifact.tag, "t", 0),
            partial(artifact.delete, 1),
            artifact.remove,
        ):
            with pytest.raises(FormatVersionError, match="upgrade"):
                call()
        assert len(artifact.open_log().records) == count


def test_an_unknown_op_comes_while_we_commit(store, repo):
    """A transaction that meets it on its way refuses, too."""
    txn = repo.artifact("a").transaction("m")
    with pytest.raises(FormatVersionError), txn:
        write(store, fresh(store), {"op": "shine", "optional": True})
    assert len(fresh(store).artifact("a").versions()) == 2


def test_an_unknown_op_of_the_catalog(store, repo):
    """Artifacts are read as before; none can be made, renamed or removed, while those that are there take versions."""
    write(store, repo, {"op": "shine", "optional": True}, log=repo.catalog)
    again = fresh(store)
    assert read(again["a"]) == {"x": b"1", "y": b"1"}
    assert put(again, x=b"2").number == 2
    for call in (lambda: put(again, "new", x=b"0"), lambda: again.artifact("a").rename("b")):
        with pytest.raises(FormatVersionError):
            call()


def test_an_unknown_op_that_must_be_understood(store, repo):
    """Readers refuse, each time with the same error, whatever known ops stand beside it."""
    write(store, repo, {"op": "alias", "name": "best", "version": 0}, {"op": "shine"})
    for again in (repo, fresh(store)):
        for _ in range(2):
            with pytest.raises(FormatVersionError, match="shine"):
                again["a"]
    assert put(repo, "other", x=b"0").number == 0


@pytest.mark.parametrize("member", [{"extra": 1}, {"op": "version", "flavour": "sweet"}])
def test_a_member_that_we_do_not_know(store, repo, member):
    """Means a newer mandapa, and no corruption."""
    write(store, repo, {"op": "alias", "name": "best", "version": 0} | member)
    with pytest.raises(FormatVersionError):
        repo["a"]


# -- features that we lack --------------------------------------------------------------------------------------------


def test_a_version_that_requires_a_feature(store, repo, tmp_path):
    """Is refused wherever its content is needed, and only there."""
    op = repo["a:v1"]._state.op
    old = repo.artifact("a").open_log().state.versions[0].op
    append(
        repo,
        VersionOp(number=2, parent=1, root=op.root, digest=op.digest, assets=2, bytes=2, added=0, requires=["warp"]),
        VersionOp(number=3, parent=2, root=old.root, digest=old.digest, assets=1, bytes=1, added=0),
    )
    for again in (repo, fresh(store)):
        refused = again["a:v2"]
        assert (refused.number, refused.size, refused.parent) == (2, 2, 1)
        for call in (
            partial(getattr, refused, "tree"),
            partial(list, refused.assets),
            partial(refused.open, "x"),
            partial(refused.download, tmp_path),
            partial(refused.diff, again["a:v1"]),
            partial(again["a:v1"].diff, refused),
        ):
            with pytest.raises(FormatVersionError, match="warp"):
                call()
        assert [version.number for version in again.artifact("a").versions()] == [0, 1, 2, 3]
        assert read(again["a:v1"]) == {"x": b"1", "y": b"1"}
        assert read(again["a:v3"]) == {"x": b"0"}
        with pytest.raises(FormatVersionError), again.artifact("b").transaction() as txn:
            txn.copy("a:v2", "x")
    repo.artifact("a").delete(3)
    with pytest.raises(FormatVersionError, match="warp"):
        put(repo, x=b"5")
    with repo.artifact("a").transaction(base=None) as txn:
        txn.add_bytes("x", b"6")
    assert txn.version.number == 4


# -- ops that we fold, and no command here makes ----------------------------------------------------------------------


def test_fences_change_nothing(store, repo):
    """They may stand anywhere, even after the end."""
    before = repo.artifact("a").state().copy()
    append(repo, FenceOp(EPOCH))
    after = fresh(store).artifact("a").state()
    assert (after.versions, after.aliases) == (before.versions, before.aliases)
    log = repo.artifact("a").open_log()
    append(repo, CloseOp())
    log.append("ef" * 16, lambda _: [FenceOp(EPOCH)], author())
    assert log.refresh().closed
    with pytest.raises(ConflictError):
        log.append("e0" * 16, lambda _: [AliasOp("best", 0)], author())


def test_annotate(store, repo):
    """Facts stand beside the metadata: each op replaces some, null removes one; they live and die with the version."""
    append(repo, AnnotateOp(0, {"loss": 1.5, "note": "good", "list": [1]}))
    append(repo, AnnotateOp(0, {"note": None, "loss": 2}), AnnotateOp(1, {"x": True}))
    again = fresh(store)
    assert again["a:v0"].facts == {"loss": 2, "list": [1]}
    assert again["a:v1"].facts == {"x": True}
    assert again["a:v0"].metadata == {}
    again.artifact("a").delete(0)
    with pytest.raises(ConflictError):
        append(again, AnnotateOp(0, {"x": 1}))


def move(store, repo, number, **content):
    """Repack a version that holds this, and sweep all old containers."""
    was = repo.artifact("a").open_log().state.versions[number]
    old = [info.key for info in store.list("meta/")]
    with Upload(store, index=Index(None), threads=0) as upload:
        rows = {path: upload.add_bytes(path, data) for path, data in content.items()}
        root = edit_tree(repo.reader, upload, None, rows)
        upload.flush()
    append(repo, RepackOp(number, was.root, address_of(root.address)))
    assert root.digest.hex() == was.op.digest
    store.delete(old)
    return was.root, root


def test_repack(store, repo):
    """The version is the same, its bytes are elsewhere: who had opened it goes on there when the old ones are gone."""
    version = fresh(store)["a:v1"]
    opened = version.open("x")
    was, root = move(store, repo, 1, x=b"1", y=b"1")
    with opened:
        assert opened.read() == b"1"
    assert read(version) == {"x": b"1", "y": b"1"}
    assert fresh(store)["a:v1"].tree.root == root.address
    with pytest.raises(ConflictError, match="moved meanwhile"):
        append(repo, RepackOp(1, was, address_of(root.address)))


def test_a_diff_of_versions_that_move(store, repo):
    """Goes on where either of them is now; when one is gone it says which, and does not blame the other."""
    reader = fresh(store)
    zero, one = reader["a:v0"], reader["a:v1"]
    assert list(zero.assets) == ["x"]  # what it needs of v0 is at hand
    repo.artifact("a").delete(0)
    move(store, repo, 1, x=b"1", y=b"1")
    for before, after in ((zero, one), (one, zero)):
        assert [a.path for a, _ in before.diff(after).changed] == ["x"]
    other = fresh(store)
    gone = other.artifact("a").deleted()[0]
    for before, after in ((gone, other["a:v1"]), (other["a:v1"], gone)):
        with pytest.raises(NotFoundError, match="a:v0 was deleted"):
            before.diff(after)
    store.delete([info.key for info in store.list("meta/")])
    with pytest.raises(CorruptionError):
        fresh(store)["a:v1"].diff(fresh(store)["a:v1"])


def test_the_history_of_a_path_while_gc_passes(store, repo):
    """A version that is deleted and swept while the list is made is left out."""
    put(repo, x=b"2")
    reader = fresh(store)
    log = reader.artifact("a").open_log()
    versions = dict(log.state.versions)
    repo.artifact("a").delete(0)
    store.delete([versions[0].root.object])
    first, refresh = iter([log.state]), log.refresh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "refresh", lambda: next(first, None) or refresh())
        assert [version.number for version in reader.artifact("a").versions("x")] == [1, 2]


def test_the_end_of_a_log(store, repo):
    """After `close` the artifact is gone for readers and writers, though the catalog does not know yet."""
    held = fresh(store)["a"]
    append(repo, CloseOp())
    again = fresh(store)
    for call in (lambda: again["a"], lambda: put(again, x=b"2"), lambda: again.artifact("a").alias("best", 0)):
        with pytest.raises(NotFoundError, match="was removed"):
            call()
    assert held.number == 1
    again.artifact("a").remove()
    assert again.artifacts() == []
    assert put(again, x=b"3").number == 0


@pytest.mark.parametrize(
    "ops",
    [
        [AliasOp("best", 7)],
        [AliasOp("best", None)],
        [TagOp("t", 0), TagOp("t", 0)],
        [TagOp("t", 0), TagOp("t", None), TagOp("T", 1)],
        [TagOp("t", 0), AliasOp("T", 1)],
        [AliasOp("best", 0), TagOp("best", 1)],
        [AliasOp("best", 0), AliasOp("Best", 1)],
        [DeleteOp([0]), DeleteOp([0])],
        [DeleteOp([0]), AliasOp("best", 0)],
        [DeleteOp([0, 0])],
        [DeleteOp([])],
        [AliasOp("best", 0), DeleteOp([1, 0])],
        [TagOp("t", 0), DeleteOp([0])],
        [UndeleteOp([0])],
        [UndeleteOp([5])],
        [CloseOp(), CloseOp()],
        [CloseOp(), AliasOp("best", 0)],
        [AnnotateOp(9, {})],
        [RenameOp("ab" * 16, "b")],
        [SettingsOp({})],
    ],
    ids=str,
)
def test_preconditions(store, repo, ops):
    """An op that does not fit is never appended; where it stands in a log, the log is corrupt."""
    count = len(repo.artifact("a").open_log().records)
    with pytest.raises(ConflictError):
        append(repo, *ops)
    assert len(repo.artifact("a").open_log().records) == count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "_decide", lambda self, build: tuple(build(self.state)))
        with pytest.raises(CorruptionError):
            append(repo, *ops)
    for _ in range(2):
        with pytest.raises(CorruptionError):
            fresh(store)["a"]
    assert "I3" in {finding.invariant for finding in fsck(fresh(store)).findings}


# -- reading ----------------------------------------------------------------------------------------------------------


class Listing:
    """A store whose lists are edited."""

    def __init__(self, store, edit):
        self.store, self.edit = store, edit

    def __getattr__(self, name):
        return getattr(self.store, name)

    def list(self, prefix, *, start_after=""):
        return iter(self.edit(list(self.store.list(prefix, start_after=start_after))))


def long_log(store, count=20):
    log = Log(store, CATALOG + "x", ArtifactState, threads=0, heads=False)
    for number in range(count):
        log.append(f"{number:032x}", lambda _: [FenceOp(EPOCH)], author())
    return log.records


def test_a_list_that_leaves_one_out(store):
    """A folder that grows while it is listed may show a record and not the one before: it is asked for by name."""
    records = long_log(store)
    for hidden in range(20):
        name = f"{hidden:016}"
        listing = Listing(store, lambda infos, name=name: [info for info in infos if not info.key.endswith(name)])
        log = Log(listing, CATALOG + "x", ArtifactState, threads=0, heads=False)
        log.refresh()
        log.refresh()
        assert log.records == records


def test_a_record_that_is_missing(store):
    """Is corruption, named by its key."""
    long_log(store)
    key = log_key(CATALOG + "x", 7)
    store.delete([key])
    with pytest.raises(CorruptionError, match="is missing") as caught:
        Log(store, CATALOG + "x", ArtifactState, threads=0, heads=False).refresh()
    assert caught.value.key == key


def test_keys_of_others_are_ignored(store):
    """Whatever stands below a log's prefix and is none of its records."""
    records = long_log(store)
    for key in ("0", "1x", "zz", "0000000000000000/0000000000000000", "000000000000000", "00000000000000021"):
        store.put(log_key(CATALOG + "x", 0)[:-16] + key, b"something else")
    log = Log(store, CATALOG + "x", ArtifactState, threads=0, heads=False)
    log.refresh()
    assert log.records == records


# -- appending --------------------------------------------------------------------------------------------------------


class Refusing:
    """A store that answers every create alike, and does none."""

    def __init__(self, store, error):
        self.store, self.error, self.creates = store, error, 0

    def __getattr__(self, name):
        return getattr(self.store, name)

    def create(self, key, data):
        self.creates += 1
        raise self.error


def test_a_slot_that_is_refused_for_ever(store, repo):
    """Though nothing is there: given up after many tries with growing pauses, as something that may work later."""
    pauses = []
    refusing = Refusing(store, AlreadyExistsError("taken"))
    patient = Author("tests", sleep=pauses.append)
    again = Repository(refusing, threads=0, author=patient)
    with pytest.raises(StorageError, match="though nothing is there") as caught:
        again.artifact("a").alias("best", 0)
    assert caught.value.retryable
    assert refusing.creates == ATTEMPTS == len(pauses)
    assert all(0 <= pause <= min(5, 0.01 * 2**number) for number, pause in enumerate(pauses))
    assert repo.artifact("a").aliases() == {}


def test_a_store_that_fails_for_good(store, repo):
    """Its error comes through at once."""
    refusing = Refusing(store, StorageError("the disk is full"))
    with pytest.raises(StorageError, match="the disk is full") as caught:
        Repository(refusing, threads=0).artifact("a").alias("best", 0)
    assert not caught.value.retryable
    assert refusing.creates == 1
    assert repo.artifact("a").aliases() == {}


def test_threads_share_a_repository(store, repo):
    """Transactions and commands of several threads: each happens once, and all are there."""
    barrier = threading.Barrier(6)

    def work(number):
        barrier.wait(30)
        made = []
        for turn in range(5):
            with repo.artifact("a").transaction(f"{number}") as txn:
                txn.add_bytes(f"{number}/{turn}", b"%d" % turn)
            made.append(txn.version.number)
            repo.artifact("a").alias(f"a{number}", made[-1])
        return made

    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(work, range(6)))
    assert sorted(chain.from_iterable(made)) == list(range(2, 32))
    again = fresh(store)
    assert len(again["a"].assets) == 2 + 30
    assert again.artifact("a").aliases() == {f"a{number}": numbers[-1] for number, numbers in enumerate(made)}
    assert fsck(again, deep=True).findings == []
