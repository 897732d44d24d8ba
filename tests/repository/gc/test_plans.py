"""A plan of a clean-up: what it says is what happens, and applying it does no more."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mandapa.errors import InvalidInputError
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.repository.garbage import GcPlan, Share
from mandapa.repository.repository import Repository
from mandapa.repository.rewrite import plan_rewrite

if TYPE_CHECKING:
    from conftest import Place

WEEK = 7 * 86_400.0


def noise(seed: int, size: int = 70_000) -> bytes:
    return Random(seed).randbytes(size)


def scene(place: Place) -> None:
    """Two artifacts with deleted versions, a removed one, and what was put and never named."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.add("a", x=noise(3), y=noise(1))
    place.add("b", x=noise(4))
    place.add("b", x=noise(5))
    place.add("c", x=noise(6))
    place.repo.artifact("a").delete(0, 1)
    place.repo.artifact("b").delete(0)
    place.repo.artifact("c").remove()
    place.store.put(f"packs/{'0' * 32}", bytes(1000))
    place.wait(8)


def test_a_plan_says_what_happens(place: Place) -> None:
    """Whose bytes, and which versions cannot be brought back; nothing is done, and doing it does just that."""
    scene(place)
    objects = dict(place.store._objects)
    plan = place.other().plan_gc()
    assert place.store._objects == objects
    by_name = {share.artifact: share for share in plan.shares}
    # A pack and a manifest of each; the pack of a:v0 is needed by a:v2.
    assert [(by_name[name].objects, by_name[name].lost) for name in "abc"] == [(3, (0, 1)), (2, (0,)), (2, ())]
    assert by_name[None] == Share(None, 1, 1000)
    assert [share.bytes for share in plan.shares] == sorted([share.bytes for share in plan.shares], reverse=True)
    assert plan.freed == sum(share.bytes for share in plan.shares) == sum(plan.objects.values())
    done = place.other(5).gc()
    assert done.freed == plan.objects
    assert done.shares == plan.shares
    assert done.skipped == {}
    for number in (0, 1):
        with pytest.raises(FileNotFoundError, match="cannot be brought back"):
            place.other(6).artifact("a").undelete(number)


def test_versions_that_are_named_are_those_that_are_lost(place: Place) -> None:
    """Those whose bytes others need stay restorable, and are not named."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(1), y=b"1")
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(2)
    place.wait(4)
    place.repo.artifact("a").delete(0)
    place.wait(4)
    plan = place.repo.plan_gc()
    assert [share.lost for share in plan.shares] == [(2,)]
    place.repo.gc(plan)
    place.repo.artifact("a").undelete(0)
    assert place.content()["a:v0"] == {"x": noise(1)}


def test_what_was_deleted_lately_is_told(place: Place) -> None:
    """In bytes that only such versions need; a later plan frees just that."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2), y=noise(1))
    place.add("a", x=noise(3), y=noise(1))
    place.add("b", x=noise(4))
    assert place.repo.plan_gc().waiting == 0
    place.repo.artifact("a").delete(0, 1)
    place.repo.artifact("b").remove()
    plan = place.other().plan_gc()
    assert plan.objects == {}
    assert 2 * 70_000 < plan.waiting < 2 * 70_000 + 10_000  # x of a:v1, x of b, and manifests; y is needed
    place.wait(8)
    later = place.other(2).plan_gc()
    assert (later.waiting, later.freed) == (0, plan.waiting)


def test_a_version_that_was_lost_before_is_not_named_again(place: Place) -> None:
    """What is left of one whose chunks are gone belongs to its artifact, and ends nothing any more."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(0)
    place.wait(8)
    plan = place.repo.plan_gc()
    [pack] = [key for key in plan.objects if key.startswith("packs/")]
    place.store.delete([pack])
    assert [(share.artifact, share.objects, share.lost) for share in place.repo.plan_gc().shares] == [("a", 1, ())]


def test_a_plan_is_json_and_back(place: Place) -> None:
    """One line, in which everything is found again."""
    scene(place)
    plan = place.repo.plan_gc(grace=1.5)
    data = plan.to_json()
    assert data.count(b"\n") == 1
    assert GcPlan.from_json(data) == plan
    assert plan.grace == 1.5


def test_applying_deletes_only_what_the_plan_names(place: Place) -> None:
    """What became garbage since waits for a plan of its own."""
    scene(place)
    plan = GcPlan.from_json(place.repo.plan_gc().to_json())
    place.repo.artifact("a").delete(2)
    place.add("a", x=b"1")
    place.wait(30)
    done = place.other().gc(plan)
    assert done.freed == plan.objects
    assert place.repo.plan_gc().objects


def test_applying_deletes_only_what_nothing_needs(place: Place) -> None:
    """What came back into use stays, with the reason; so does what is too young for another grace, or gone."""
    scene(place)
    plan = place.repo.plan_gc()
    place.repo.artifact("b").undelete(0)
    gone = f"packs/{'0' * 32}"
    place.store.delete([gone])
    done = place.repo.gc(plan)
    used = {key for key, why in done.skipped.items() if why == "is in use"}
    assert len(used) == 2
    assert done.skipped == {**dict.fromkeys(used, "is in use"), gone: "was gone"}
    assert done.freed.keys() == plan.objects.keys() - used - {gone}
    assert place.content()["b:v0"] == {"x": noise(4)}
    place.repo.artifact("b").delete(0)
    waiting = place.repo.plan_gc(grace=0)
    done = place.repo.gc(waiting, grace=WEEK)
    assert done.freed == {}
    assert set(done.skipped.values()) == {"is in use"}  # a deleted version is, as long as the grace
    orphan = f"packs/{'1' * 32}"
    place.store.put(orphan, b"1")
    done = place.repo.gc(place.repo.plan_gc(grace=0), grace=WEEK)
    assert done.skipped[orphan] == "is younger than the grace"


def test_the_plan_has_the_grace_unless_told(place: Place) -> None:
    """A plan made without grace is applied without."""
    place.add("a", x=noise(1))
    place.add("a", x=noise(2))
    place.repo.artifact("a").delete(0)
    assert place.repo.plan_gc().objects == {}
    plan = place.repo.plan_gc(grace=0)
    assert place.repo.gc(plan).freed == plan.objects


def test_a_plan_of_another_repository_is_refused(place: Place) -> None:
    """Before anything is read of the store."""
    other = Repository.create(MemoryObjectStore(), threads=0)
    plan = other.plan_gc()
    place.store.calls.clear()
    with pytest.raises(InvalidInputError, match="another repository"):
        place.repo.gc(plan)
    assert place.store.calls == []


GOOD: dict[str, Any] = {
    "repository": "a" * 32,
    "grace": 1.0,
    "objects": {f"packs/{'a' * 32}": 1},
    "shares": [],
    "kind": "gc",
}


def test_the_good_plan_is_one() -> None:
    """What is changed below was right before."""
    assert GcPlan.from_json(msgspec.json.encode(GOOD)).freed == 1


@pytest.mark.parametrize(
    "change",
    [
        {"objects": {"mandapa.json": 1}},
        {"objects": {"log/" + "a" * 32 + "/" + "0" * 16: 1}},
        {"objects": {"catalog/" + "0" * 16: 1}},
        {"objects": {"packs/../mandapa.json": 1}},
        {"objects": {f"packs/{'A' * 32}": 1}},
        {"objects": {f"packs/{'a' * 32}\n": 1}},
        {"objects": {f"packs/{'a' * 32}": -1}},
        {"objects": [f"packs/{'a' * 32}"]},
        {"half_dead": [{"key": "log/x", "size": 1, "used": 0}]},
        {"half_dead": [{"key": "../x", "size": 1, "used": 0}]},
        {"grace": -1},
        {"grace": None},
        {"repository": "x"},
        {"kind": "repack"},
        {"kind": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_hostile_plan_is_refused(change: dict[str, Any]) -> None:
    """It can name nothing that no gc may delete, and nothing that is not understood."""
    with pytest.raises(InvalidInputError, match=r"plan|container"):
        GcPlan.from_json(msgspec.json.encode({**GOOD, **change}))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"repository":1}'])
def test_what_is_no_plan_is_refused(data: bytes) -> None:
    """With one error, whatever the bytes are."""
    with pytest.raises(InvalidInputError, match="not a plan"):
        GcPlan.from_json(data)


def test_half_dead_packs_are_emptied_and_go_later(place: Place) -> None:
    """What little is needed of a pack is stored anew by the same call; the pack goes when the grace is over."""
    keep, rest = noise(1), noise(2, 19_000_000)
    place.add("a", keep=keep, rest=rest)
    place.add("b", keep=keep, rest=rest, small=b"1")
    with place.repo.artifact("a").transaction() as txn:
        txn.remove("rest")
    place.repo.artifact("a").delete(0)
    place.repo.artifact("b").delete(0)
    place.wait(8)
    plan = place.repo.plan_gc()
    assert plan.half_dead
    assert plan.half_dead == plan_rewrite(place.repo, grace=WEEK, now=place.store.now).packs
    assert plan.later > 16_000_000 > 1_000_000 > plan.rewritten > 0
    done = place.other().gc(plan)
    assert [(one.address, one.skipped) for one in done.rewritten] == [("a:v1", "")]
    assert place.content() == {"a:v1": {"keep": keep}}
    assert {pack.key for pack in plan.half_dead} <= place.repo.gc().freed.keys()
    assert place.content() == {"a:v1": {"keep": keep}}
    assert sum(len(place.store.get(key)) for key in place.containers()) < 100_000
