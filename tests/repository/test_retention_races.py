"""Between plan and apply, and between look and slot: what came later stays, and what may not go any more."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest
from expiring import Shifted, add, goes, live, skipped

from mandapa.errors import ConflictError, InvalidInputError, StorageError
from mandapa.object_store import LocalObjectStore, MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.policy import Policy
from mandapa.repository.repository import Repository
from mandapa.repository.retention import ExpirePlan


@pytest.fixture
def store() -> Shifted:
    return Shifted()


@pytest.fixture
def repo(store) -> Repository:
    return Repository.create(store)


@pytest.fixture
def planned(repo):
    """Six versions, losses 5 to 0.5, of which 0 to 3 would go: the newest two, and the best, stay."""
    for n in range(5):
        add(repo, loss=5.0 - n)
    add(repo, loss=0.5)
    plan = repo.plan_expire("m", policy=Policy(keep_last=2, keep_best=("1:loss:min",)))
    assert goes(plan) == [0, 1, 2, 3]
    return plan


def test_what_came_after_the_plan_stays(repo, planned):
    """New versions, though the rule would not keep them; and a name that was given."""
    other = Repository(repo.place)
    for _ in range(4):
        add(other, loss=9.0)
    other.artifact("m").alias("prod", 1)
    done = repo.expire(planned)
    assert skipped(done) == {0: "", 1: "it stays now: alias prod", 2: "", 3: ""}
    assert live(repo) == [1, 4, 5, 6, 7, 8, 9]


def test_what_a_rule_keeps_by_now_stays(repo, planned):
    """The best two were deleted: the next is the best, and among the newest; a better one that goes is no help."""
    repo.artifact("m").delete(4, 5)
    done = repo.expire(planned)
    assert skipped(done) == {
        0: "",
        1: "",
        2: "it stays now: keep-last 2",
        3: "it stays now: newest, keep-last 2, keep-best 1:loss:min",
    }
    assert live(repo) == [2, 3]


def test_what_was_deleted_or_brought_back(repo, planned):
    """Deleted: it is told. Brought back: somebody wants it."""
    repo.artifact("m").delete(0, 1)
    repo.artifact("m").undelete(1)
    done = repo.expire(planned)
    assert skipped(done)[0] == "it was deleted already"
    assert skipped(done)[1] == "it was brought back since the plan was made"
    again = repo.expire(planned)
    assert set(skipped(again).values()) == {"it was deleted already", "it was brought back since the plan was made"}
    assert live(repo) == [1, 4, 5]


def test_a_name_that_the_plan_does_not_drop(repo):
    """A policy that drops aliases drops those that the plan has shown, wherever they are now, and no others."""
    for _ in range(4):
        add(repo)
    repo.artifact("m").alias("old", 0)
    plan = repo.plan_expire("m", policy=Policy(keep_last=1, keep_aliased=False))
    repo.artifact("m").alias("old", 1)
    repo.artifact("m").alias("new", 2)
    done = repo.expire(plan)
    assert skipped(done) == {
        0: "",
        1: "it got the name 'old' since the plan was made",
        2: "it got the name 'new' since the plan was made",
    }
    assert repo.artifact("m").aliases() == {"new": 2, "old": 1}


def test_a_stored_policy_of_by_then(repo, planned):
    """It was stored after the plan: what it keeps stays."""
    Repository(repo.place).set_policy("m", Policy(keep_last=4))
    done = repo.expire(planned)
    assert skipped(done)[2] == "it stays now: keep-last 4 (stored policy)"
    assert live(repo) == [2, 3, 4, 5]


def test_lineage_of_by_then(repo, planned):
    """What was used after the plan stays."""
    add(Repository(repo.place), "made", used=("m:v2",))
    assert skipped(repo.expire(planned))[2] == "it stays now: used by made:v0"


def test_an_artifact_that_is_gone(repo, planned):
    """Removed: told. Renamed: the plan is of the artifact, not of the name."""
    renamed = Repository(repo.place)
    renamed.artifact("m").rename("n")
    add(renamed, "m")
    done = repo.expire(planned)
    assert [(one.artifact, one.skipped) for one in done] == [("n", "")] * 4
    assert (live(repo, "n"), live(repo, "m")) == ([4, 5], [0])
    plan = repo.plan_expire("n", policy=Policy(keep_last=1))
    repo.artifact("n").remove()
    assert [one.skipped for one in repo.expire(plan)] == ["the artifact was removed"]


@pytest.mark.parametrize("event", ["commit", "alias", "delete", "remove", "undo"])
def test_a_slot_that_is_lost(repo, planned, event):
    """Another commit takes it after everything was looked at: everything is looked at again."""
    other = Repository(repo.place)
    place = repo.place
    create = place.create
    done_once = []

    def between(key, data):
        if key.startswith("log/") and not done_once:
            done_once.append(key)
            match event:
                case "commit":
                    add(other, loss=7.0)
                case "alias":
                    other.artifact("m").alias("prod", 3)
                case "delete":
                    other.artifact("m").delete(4, 5)
                case "remove":
                    other.artifact("m").remove()
                case "undo":
                    other.artifact("m").delete(2)
                    other.artifact("m").undelete(2)
        create(key, data)

    place.create = between
    found = skipped(repo.expire(planned))
    place.create = create
    if event == "remove":
        assert set(found.values()) == {"the artifact was removed"}
        return
    expected = {"commit": [4, 5, 6], "alias": [3, 4, 5], "delete": [2, 3], "undo": [2, 4, 5]}[event]
    assert live(repo) == expected
    assert [n for n, reason in found.items() if reason] == [n for n in expected if n < 4]
    assert fsck(repo, deep=True).ok


def test_a_store_that_fails_in_between(repo, planned):
    """The plan can be applied again: what is gone is told, the rest goes."""
    add(repo, "z")
    add(repo, "z")
    both = repo.plan_expire("m", "z", policy=Policy(keep_last=2, keep_best=("1:loss:min",)))
    assert goes(both, "z") == []
    both = repo.plan_expire("m", "z", policy=Policy(keep_last=1))
    place = repo.place
    create = place.create
    z = repo.artifact("z").open_log().id

    def failing(key, data):
        if key.startswith(f"log/{z}/"):
            raise StorageError("down")
        create(key, data)

    place.create = failing
    with pytest.raises(StorageError):
        repo.expire(both)
    place.create = create
    assert (live(repo), live(repo, "z")) == ([5], [0, 1])
    done = Repository(place).expire(both)
    assert set(skipped(done).values()) == {"it was deleted already"}
    assert skipped(done, "z") == {0: ""}
    assert (live(repo), live(repo, "z")) == ([5], [1])


def test_who_transacts_upon_what_goes(repo):
    """A transaction whose fixed base goes is a conflict; nothing dangling is committed."""
    for _ in range(3):
        add(repo)
    plan = repo.plan_expire("m", policy=Policy(keep_last=1))

    def commit():
        with repo.artifact("m").transaction(base=0) as txn:
            txn.add_bytes("y", b"y")
            Repository(repo.place).expire(plan)

    with pytest.raises(ConflictError):
        commit()
    assert live(repo) == [2]
    assert fsck(repo, deep=True).ok


# -- plans from elsewhere ----------------------------------------------------------------------------------------------


def test_bytes_that_are_no_plan(planned):
    """Another kind, another shape, twice the same, numbers that are none: refused, with one clear error."""
    good = msgspec.json.decode(planned.to_json())
    part = good["artifacts"][0]

    def with_part(**changes):
        return {**good, "artifacts": [{**part, **changes}]}

    bad: list[Any] = [
        [],
        {},
        {**good, "kind": "repack"},
        {**good, "more": 1},
        {**good, "repository": "x"},
        {**good, "freed": -1},
        {**good, "artifacts": [part, part]},
        with_part(goes=[{"version": 1}, {"version": 1}]),
        with_part(goes=[{"version": -1}]),
        with_part(goes=[{"version": 1 << 60}]),
        with_part(goes=[{"version": "1"}]),
        with_part(goes=[{"version": 1, "force": True}]),
        with_part(artifact="../x"),
        with_part(policy={"keep_last": 0}),
        with_part(policy=None),
        with_part(records=-1),
    ]
    for value in bad:
        with pytest.raises(InvalidInputError):
            ExpirePlan.from_json(msgspec.json.encode(value))
    for data in (b"", b"\xff\xfe", b"[" * 100_000, planned.to_json()[:-20]):
        with pytest.raises(InvalidInputError):
            ExpirePlan.from_json(data)


def test_a_plan_that_asks_for_too_much(repo, planned):
    """Whatever it names: what its rules keep stays, and what was never there is told."""
    value = msgspec.json.decode(planned.to_json())
    value["artifacts"][0]["goes"] = [{"version": n} for n in (3, 4, 5, 6, 99)]
    greedy = ExpirePlan.from_json(msgspec.json.encode(value))
    add(repo, loss=8.0)
    add(repo, loss=8.0)
    done = repo.expire(greedy)
    assert skipped(done) == {
        3: "",
        4: "",
        5: "it stays now: keep-best 1:loss:min",
        6: "it is not one of those that the plan was made of",
        99: "it is not one of those that the plan was made of",
    }


def test_a_plan_of_another_place(repo, planned, tmp_path):
    """Another repository, another artifact, and a copy of this one that went another way, are refused."""
    stranger = Repository.create(MemoryObjectStore())
    add(stranger)
    with pytest.raises(InvalidInputError, match="is for repository"):
        stranger.expire(planned)

    def changed(**changes):
        value = msgspec.json.decode(planned.to_json())
        value["artifacts"][0].update(changes)
        return ExpirePlan.from_json(msgspec.json.encode(value))

    for changes in ({"artifact": "0" * 32}, {"seal": "0" * 64}, {"records": 99}, {"records": 3}):
        with pytest.raises(InvalidInputError, match="another history"):
            repo.expire(changed(**changes))
    assert live(repo) == [0, 1, 2, 3, 4, 5]


def test_two_who_expire_at_once(tmp_path):
    """Each with a plan of its own, on a local directory: every version goes once, and no error."""
    repo = Repository.create(LocalObjectStore(tmp_path / "repo"))
    for _ in range(6):
        add(repo)
    results: list[Any] = []
    repos = [Repository(LocalObjectStore(tmp_path / "repo")) for _ in range(3)]
    plans = [one.plan_expire("m", policy=Policy(keep_last=2)) for one in repos]
    threads = [
        threading.Thread(target=lambda one=one, plan=plan: results.append(one.expire(plan)))
        for one, plan in zip(repos, plans, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.version for done in results for one in done if not one.skipped) == [0, 1, 2, 3]
    assert live(repo) == [4, 5]
    assert fsck(repo, deep=True).ok
