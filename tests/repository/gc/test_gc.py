"""What a clean-up deletes, what it leaves, by whose clock, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
from msgspec import to_builtins

from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError, NotFoundError
from mandapa.format.keys import CATALOG, log_key
from mandapa.format.records import FenceOp, decode_gc_list, encode_gc_list
from mandapa.format.strict import seal
from mandapa.object_store.local import LocalObjectStore
from mandapa.repository import gc as gc_module
from mandapa.repository.fsck import fsck
from mandapa.repository.gc import Collection
from mandapa.repository.logs import read_logs
from mandapa.repository.repository import Repository
from mandapa.testing.server import serve

if TYPE_CHECKING:
    from conftest import Place

DAY = 86_400.0
WEEK = 7 * DAY


def noise(seed: int, size: int = 70_000) -> bytes:
    return Random(seed).randbytes(size)


def writes(calls: list[str]) -> list[str]:
    """Calls that change something, but for those that ask for the time."""
    return [call for call in calls if call.split()[0] in ("put", "create", "delete") and " probe/" not in call]


# -- what goes --------------------------------------------------------------------------------------------------------


def test_bytes_of_deleted_versions_go_after_the_grace(place: Place) -> None:
    """By the store's clock, which is decades from the writers': not a second before, and nothing else."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.wait(30)
    place.repo.artifact("a").delete(0)
    before = place.containers()
    place.wait(7 - 1 / DAY)
    assert place.repo.gc().freed == {}
    assert place.containers() == before
    place.wait(1 / DAY)
    done = place.repo.gc()
    assert len(done.freed) == 2  # its pack and its manifest
    assert done.bytes > 70_000
    assert place.containers() == before - done.freed.keys()
    assert place.content() == {"a:v1": {"x": noise(2)}}
    assert place.store.keys("gc/", "probe/") == set()


def test_undelete_works_as_long_as_the_grace(place: Place) -> None:
    """A clean-up in between takes nothing of it; when its bytes are gone, undelete says so."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.wait(30)
    place.repo.artifact("a").delete(0)
    place.wait(6)
    place.repo.gc()
    place.repo.artifact("a").undelete(0)
    assert place.content()["a:v0"] == {"x": noise(1)}
    place.repo.artifact("a").delete(0)
    place.wait(8)
    place.repo.gc()
    with pytest.raises(NotFoundError, match="a:v0 cannot be brought back: its bytes are gone"):
        place.other().artifact("a").undelete(0)


def test_what_is_put_and_not_named_yet_stays_for_the_grace(place: Place) -> None:
    """A transaction's packs are no garbage while it is under way; when it never ends, they are."""
    place.add("a", x=b"1")
    place.store.before.append(("create log/", _interrupt))
    with pytest.raises(KeyboardInterrupt):
        place.add("a", new=noise(3, 200_000))
    orphans = place.store.keys("packs/")
    assert orphans
    assert place.repo.gc(grace=DAY).freed == {}
    place.wait(1)
    assert place.repo.gc(grace=DAY).freed.keys() >= orphans
    assert place.content() == {"a:v0": {"x": b"1"}}


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_removed_artifact_stays_for_the_grace(place: Place) -> None:
    """Its bytes go when it was removed long enough ago, and its log is not fenced then: nothing can come back in it."""
    place.add("a", x=noise(1))
    place.add("b", x=noise(1))
    place.add("b", x=noise(2))
    place.wait(30)
    log = place.repo.artifact("b").find_log()
    assert log is not None
    place.repo.artifact("b").delete(0)
    place.repo.artifact("b").remove()
    place.wait(6)
    assert place.repo.gc().freed == {}
    place.wait(1)
    place.store.calls.clear()
    done = place.repo.gc()
    assert [share.artifact for share in done.shares] == ["b"]
    assert not [call for call in writes(place.store.calls) if log.id in call]
    assert place.content() == {"a:v0": {"x": noise(1)}}


def test_nothing_is_written_when_nothing_can_go(place: Place) -> None:
    """No list, no fence: a clean-up that has nothing to do leaves no trace."""
    for number in range(3):
        place.add("a", x=noise(number))
    place.repo.artifact("a").delete(1)
    place.store.calls.clear()
    objects = dict(place.store._objects)
    assert place.repo.gc().freed == {}
    assert writes(place.store.calls) == []
    assert place.store._objects == objects


def test_what_others_put_into_the_prefix_is_never_touched(place: Place) -> None:
    """Keys that the format does not know are left alone, wherever they are and however old."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(0)
    strange = [
        "packs/readme",
        f"packs/{'a' * 31}",
        f"meta/{'a' * 32}.bak",
        "other/x",
        f"gc2/{'a' * 32}",
        "tx/a/b/c/d/e/f",
    ]
    for key in strange:
        place.store.put(key, b"?")
    ours = [f"packs/{'c' * 32}", f"meta/{'c' * 32}", f"tx/{'c' * 32}/0.0"]
    for key in ours:
        place.store.put(key, b"?")
    place.wait(30)
    freed = place.repo.gc().freed
    assert place.store.keys() >= {*strange}
    assert freed.keys() >= {*ours}


def test_what_probes_left_behind_goes_after_a_day(place: Place) -> None:
    """Without a list and without fences, whatever the grace."""
    place.add("a", x=b"1")
    place.store.put("probe/old/x", b"123")
    place.wait(1)
    place.store.put("probe/new/x", b"1")
    place.store.calls.clear()
    assert place.repo.gc(grace=30 * DAY).freed == {"probe/old/x": 3}
    assert place.store.keys("probe/") == {"probe/new/x"}
    assert not [call for call in place.store.calls if call.startswith("create")]


def test_bytes_that_a_repack_left_behind_go_and_the_version_stays(place: Place) -> None:
    """The old manifest and packs are its artifact's garbage."""
    place.add("a", x=bytes(2_000_000), y=noise(1, 300_000))
    done = place.repo.artifact("a").repack()
    assert [one.skipped for one in done] == [""]
    place.wait(8)
    found = place.repo.gc()
    assert [share.artifact for share in found.shares] == ["a"]
    assert found.shares[0].lost == ()
    assert place.content() == {"a:v0": {"x": bytes(2_000_000), "y": noise(1, 300_000)}}


def test_grace_is_no_negative_number(place: Place) -> None:
    """It says so before anything is done."""
    for grace in (-1.0, float("nan")):
        with pytest.raises(InvalidInputError, match="grace="):
            place.repo.gc(grace=grace)
    assert place.store.keys("probe/") == set()


# -- when it stops ----------------------------------------------------------------------------------------------------


def write(place: Place, op: dict[str, object], log_id: str | None = None) -> None:
    """Append a record as a newer mandapa might write it."""
    repo = place.other()
    log = repo.catalog if log_id == CATALOG else repo.artifact("a").open_log()
    line: dict[str, object] = {"format": 1, "seq": len(log.records), "txn": "cd" * 16, "prev": log.records[-1].seal}
    line |= {"at": "2030-01-01T00:00:00.000000Z", "by": "newer", "ops": [op]}
    place.store.create(log_key(log.id, len(log.records)), seal(line))


def garbage(place: Place) -> set[str]:
    """Something that could go, on the store for 30 days."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    before = place.containers()
    place.repo.artifact("a").delete(0)
    place.add("b", x=noise(3))
    place.wait(30)
    return before


def an_optional_op(place: Place) -> None:
    write(place, {"op": "shine", "optional": True})


def an_op_to_be_understood(place: Place) -> None:
    write(place, {"op": "shine"})


def an_op_of_the_catalog(place: Place) -> None:
    write(place, {"op": "shine", "optional": True}, CATALOG)


def an_unknown_feature(place: Place) -> None:
    root = place.repo.artifact("a").state().versions[1].root
    write(
        place, {"op": "repack", "version": 1, "was": to_builtins(root), "root": to_builtins(root), "requires": ["glow"]}
    )


def a_manifest_that_is_gone(place: Place) -> None:
    place.store.delete([place.repo.artifact("a").state().versions[1].root.object])


def a_manifest_of_other_bytes(place: Place) -> None:
    key = place.repo.artifact("a").state().versions[1].root.object
    place.store.put(key, bytes(len(place.store.get(key))))


def a_log_with_a_hole(place: Place) -> None:
    log = place.repo.artifact("b").open_log()
    place.store.create(log_key(log.id, 2), place.store.get(log_key(log.id, 0)))


@pytest.mark.parametrize(
    ("trouble", "error", "words"),
    [
        (an_optional_op, FormatVersionError, "upgrade"),
        (an_op_to_be_understood, FormatVersionError, "shine"),
        (an_op_of_the_catalog, FormatVersionError, "catalog"),
        (an_unknown_feature, FormatVersionError, "a:v1 needs glow"),
        (a_manifest_that_is_gone, CorruptionError, "a:v1 is live.*run 'mandapa fsck'"),
        (a_manifest_of_other_bytes, CorruptionError, "a:v1 is live.*run 'mandapa fsck'"),
        (a_log_with_a_hole, CorruptionError, "is missing"),
    ],
)
def test_what_cannot_be_told_stops_it(
    place: Place, trouble: Callable[[Place], None], error: type[Exception], words: str
) -> None:
    """A plan and a clean-up say what is wrong, and nothing was written or deleted."""
    garbage(place)
    trouble(place)
    place.wait(30)
    objects = dict(place.store._objects)
    for call in (lambda: place.other().plan_gc(), lambda: place.other().gc()):
        with pytest.raises(error, match=words):
            call()
        assert place.store._objects == objects


def test_a_deleted_version_whose_bytes_are_lost_stops_nothing(place: Place) -> None:
    """It could not be brought back anyway; what others need is as safe as ever."""
    garbage(place)
    key = place.repo.artifact("a").state().versions[0].root.object
    for grace in (WEEK, 31 * DAY):  # its deletion is old, or fresh
        for damaged in (b"?" * 500, None):
            copy = place.copy()
            copy.store.delete([key])
            if damaged is not None:
                copy.store._objects[key] = damaged, place.store._objects[key][1]
            copy.repo.gc(grace=grace)
            assert copy.content(whole=False).keys() == {"a:v1", "b:v0"}


@pytest.mark.parametrize("step", ["listed", "catalog fenced"])
def test_an_error_before_the_sweep_takes_the_list_back(place: Place, step: str) -> None:
    """What was condemned may be used again at once: nothing will be deleted any more."""
    garbage(place)
    before = place.containers()
    steps = Collection(place.repo).steps()
    while next(steps) != step:
        pass
    assert place.store.keys("gc/") != set()
    write(place, {"op": "shine", "optional": True})
    with pytest.raises(FormatVersionError):
        list(steps)
    assert place.containers() == before
    assert place.store.keys("gc/") == set()


def test_so_does_who_stops_it_by_hand(place: Place) -> None:
    """Ctrl-C between two fences leaves nothing condemned."""
    garbage(place)
    before = place.containers()
    place.store.before.append(("create log/", _interrupt))
    with pytest.raises(KeyboardInterrupt):
        place.repo.gc()
    assert place.store.keys("gc/") == set()
    assert place.containers() == before
    place.repo.artifact("a").undelete(0)


# -- costs ------------------------------------------------------------------------------------------------------------


def kinds(calls: list[str]) -> Counter[str]:
    """Calls by verb and folder."""
    return Counter(f"{call.split()[0]} {call.split()[1].split('/')[0]}" for call in calls)


def test_an_artifact_that_did_not_change_costs_one_put(place: Place) -> None:
    """Nothing of it is read: not by the process that knows it, nor by another one on the same machine."""
    for number in range(20):
        for seed in (1, 2):
            place.add(f"a{number}", x=noise(seed))
    place.repo.register("empty")
    place.add("a0", x=noise(3))
    place.add("a0", x=noise(4))
    logs = [facts.id for facts in read_logs(place.repo)]
    place.repo.plan_gc()  # from now on all is known
    place.repo.artifact("a0").delete(2)
    place.wait(8)
    place.store.calls.clear()
    done = place.repo.gc()
    assert done.freed
    calls = place.store.calls
    creates = [call for call in calls if call.startswith("create log/")]
    assert sorted(call.split("/")[1] for call in creates) == sorted(logs)
    assert len(creates) == 21
    assert [call for call in calls if call.split()[0] in ("get", "get_ranges", "head")] == [
        call for call in calls if call.startswith("get catalog/")
    ]
    assert not [call for call in calls if call.startswith("put ") and " probe/" not in call]


# -- lists ------------------------------------------------------------------------------------------------------------


def test_more_than_one_list(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into one list goes in another round, each with fences of its own; manifests go last."""
    monkeypatch.setattr(gc_module, "GC_LIST_MAX", 3)
    for number in range(5):
        place.add("a", x=noise(number))
    place.repo.artifact("a").delete(0, 1, 2, 3)
    place.wait(8)
    lists: list[list[str]] = []
    create = place.store.create

    def noted(key: str, data: bytes) -> None:
        if key.startswith("gc/"):
            lists.append(decode_gc_list(data, key=key).objects)
        create(key, data)

    monkeypatch.setattr(place.store, "create", noted)
    done = place.repo.gc()
    assert [len(one) for one in lists] == [3, 3, 2]
    assert [key[:5] for one in lists for key in one] == ["packs"] * 4 + ["meta/"] * 4
    assert done.freed.keys() == {key for one in lists for key in one}
    assert [(share.artifact, share.objects, share.lost) for share in done.shares] == [("a", 8, (0, 1, 2, 3))]
    assert place.content() == {"a:v4": {"x": noise(4)}}
    log = place.repo.artifact("a").open_log()
    assert sum(record.find(FenceOp) is not None for record in log.records) == 3


def test_a_list_keeps_its_limit_of_bytes(place: Place) -> None:
    """However long the keys are: of more than fit, the rest waits for another round."""
    long = [f"tx/{'a' * 250}/{number:05}.{'b' * 200}" for number in range(12_000)]
    place.store._objects.update(dict.fromkeys(long, (b"", place.store.now)))
    place.add("a", x=b"1")
    place.wait(8)
    done = place.repo.gc()
    assert done.freed.keys() == {*long}
    assert place.store.keys("gc/", "tx/") == set()
    assert len([call for call in place.store.calls if call.startswith("create gc/")]) == 2


def test_lists_of_others_go_when_nothing_of_them_is_left(place: Place) -> None:
    """Even when there is nothing else to do; while one object of a list exists, the list stays."""
    place.add("a", x=noise(1))
    [pack] = place.store.keys("packs/")
    gone = f"packs/{'0' * 32}"
    place.store.create("gc/dead", encode_gc_list("dead", [gone]))
    place.store.create("gc/open", encode_gc_list("open", [gone, pack]))
    place.repo.gc()
    assert place.store.keys("gc/") == {"gc/open"}
    garbage_before = place.store.keys("packs/")
    place.add("b", x=noise(2))
    place.repo.artifact("b").delete(0)
    place.wait(8)
    [other] = place.store.keys("packs/") - garbage_before
    place.store.create("gc/dead", encode_gc_list("dead", [other]))
    place.repo.gc()
    assert place.store.keys("gc/") == {"gc/open"}
    assert place.content() == {"a:v0": {"x": noise(1)}}


# -- places -----------------------------------------------------------------------------------------------------------


def _old_and_new(repo: Repository) -> None:
    """Two versions and a removed artifact, of which one version stays."""
    for name, seed in (("a", 1), ("a", 2), ("b", 3)):
        with repo.artifact(name).transaction() as txn:
            txn.add_bytes("x", noise(seed))
    repo.artifact("a").delete(0)
    repo.artifact("b").remove()


@pytest.mark.parametrize("single_writer", [False, True])
def test_in_a_local_directory(tmp_path: Path, single_writer: bool) -> None:
    """Also where one process writes at a time; no empty folder is left behind."""
    store = LocalObjectStore(tmp_path / "repo")
    repo = Repository.create(store, single_writer=single_writer)
    _old_and_new(repo)
    store.put(f"tx/{'a' * 32}/0.0", b"1")
    freed = repo.gc(grace=0).freed
    assert len(freed) == 5
    assert fsck(Repository(store), deep=True).ok
    empty = [path for path in (tmp_path / "repo").rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert [path.name for path in empty] == [".tmp"]


def test_in_s3() -> None:
    """Objects go many at a time; what is live is read as before."""
    with serve() as server:
        repo = Repository.create(server.s3("bucket", "gc"))
        _old_and_new(repo)
        freed = repo.gc(grace=0).freed
        assert len(freed) == 4
        assert fsck(Repository(server.s3("bucket", "gc")), deep=True).ok
        assert list(server.s3("bucket", "gc").list("gc/")) == []
        with repo["a"].open("x") as file:
            assert file.read() == noise(2)
