"""Clean-up by policy: what a rule keeps stays, what came after the plan stays, and what goes can be brought back."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import pytest

from mandapa.errors import (
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from mandapa.format.keys import container_key
from mandapa.format.records import AliasOp, DeleteOp, TagOp
from mandapa.object_store import LocalObjectStore, MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.policy import Policy
from mandapa.repository.repository import Repository
from mandapa.repository.retention import ExpirePlan


class Shifted(MemoryObjectStore):
    """A store whose clock the test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = timedelta()

    def _stamp(self, key: str) -> None:
        data, at = self._objects[key]
        self._objects[key] = (data, at + self.shift)

    def put(self, key, data):
        super().put(key, data)
        self._stamp(key)

    def create(self, key, data):
        super().create(key, data)
        self._stamp(key)


@pytest.fixture
def store() -> Shifted:
    return Shifted()


@pytest.fixture
def repo(store) -> Repository:
    return Repository.create(store)


def add(
    repo: Repository, name: str = "m", *, used: tuple[str, ...] = (), run: str = "", base=..., **metadata: Any
) -> int:
    """One more version; its number."""
    artifact = repo.artifact(name)
    artifact.run = run
    with artifact.transaction(metadata=metadata, **({} if base is ... else {"base": base})) as txn:
        txn.add_bytes("x", repo.author.new_id() * 100)
        for address in used:
            txn.uses(address)
    assert txn.version is not None
    return txn.version.number


def live(repo: Repository, name: str = "m") -> list[int]:
    return [version.number for version in Repository(repo.place).artifact(name).versions()]


def goes(plan: ExpirePlan, name: str = "m") -> list[int]:
    return [one.version for part in plan.artifacts if part.name == name for one in part.goes]


def why(plan: ExpirePlan, name: str = "m") -> dict[int, tuple[str, ...]]:
    return {one.version: one.by for part in plan.artifacts if part.name == name for one in part.stays}


def skipped(done, name: str = "m") -> dict[int, str]:
    return {one.version: one.skipped for one in done if one.artifact == name}


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_changes_nothing_and_says_why(repo):
    """Each version goes, or stays by rules that are named; nothing is put, nothing deleted."""
    for n in range(8):
        add(repo, step=n * 500, loss=float(abs(n - 3)))
    repo.artifact("m").alias("prod", 1)
    repo.artifact("m").tag("paper", 2)
    before = dict(repo.place._objects)
    plan = repo.plan_expire("m", policy=Policy(keep_last=2, keep_best=("1:loss:min",), keep_every=1500))
    assert repo.place._objects == before
    assert goes(plan) == [4, 5]
    assert why(plan) == {
        0: ("keep-every 1500",),
        1: ("alias prod",),
        2: ("tag paper",),
        3: ("keep-best 1:loss:min", "keep-every 1500"),
        6: ("keep-last 2", "keep-every 1500"),
        7: ("newest", "keep-last 2"),
    }
    assert ExpirePlan.from_json(plan.to_json()) == plan
    done = repo.expire(plan)
    assert skipped(done) == {4: "", 5: ""}
    assert live(repo) == [0, 1, 2, 3, 6, 7]
    assert fsck(repo, deep=True).ok


def test_one_record_for_all(repo):
    """Names and versions go in one commit, and come back by undelete."""
    for _ in range(5):
        add(repo)
    artifact = repo.artifact("m")
    artifact.alias("a", 0)
    artifact.alias("b", 0)
    artifact.tag("t", 2)
    records = len(artifact.open_log().records)
    plan = repo.plan_expire("m", policy=Policy(keep_last=1, keep_aliased=False, keep_tagged=False))
    assert [(one.version, one.names) for one in plan.artifacts[0].goes] == [
        (0, ("a", "b")),
        (1, ()),
        (2, ("t",)),
        (3, ()),
    ]
    done = repo.expire(plan)
    log = artifact.open_log()
    assert len(log.records) == records + 1
    assert log.records[-1].ops == (AliasOp("a", None), AliasOp("b", None), TagOp("t", None), DeleteOp([0, 1, 2, 3]))
    assert [one.names for one in done] == [("a", "b"), (), ("t",), ()]
    assert live(repo) == [4]
    assert artifact.undelete(0, 1, 2, 3) == [0, 1, 2, 3]
    assert live(repo) == [0, 1, 2, 3, 4]
    assert fsck(repo, deep=True).ok


def test_names_are_kept_unless_told(repo):
    """Each kind by its own switch."""
    for _ in range(4):
        add(repo)
    repo.artifact("m").alias("a", 0)
    repo.artifact("m").tag("t", 1)
    for aliased, tagged, expected in ((True, True, [2]), (False, True, [0, 2]), (True, False, [1, 2])):
        plan = repo.plan_expire("m", policy=Policy(keep_last=1, keep_aliased=aliased, keep_tagged=tagged))
        assert goes(plan) == expected


def test_more_than_a_record_holds(repo):
    """Long names: several records, each whole; everything goes."""
    for _ in range(12):
        add(repo)
    artifact = repo.artifact("m")
    labels = [f"{'n' * 120}{at:03}" for at in range(400)]
    log = artifact.open_log()
    for start in range(0, 400, 100):
        ops = [AliasOp(label, at % 11) for at, label in enumerate(labels[start : start + 100])]
        log.append(repo.author.new_id().hex(), lambda state, ops=ops: ops, repo.author)
    records = len(log.records)
    done = repo.expire(repo.plan_expire("m", policy=Policy(keep_last=1, keep_aliased=False)))
    assert skipped(done) == dict.fromkeys(range(11), "")
    assert len(artifact.open_log().records) - records > 1
    assert (live(repo), artifact.aliases()) == ([11], {})


def test_no_rule_is_refused(repo):
    """Neither given nor stored: nearly all would go."""
    add(repo)
    for call in (lambda: repo.plan_expire("m"), repo.plan_expire):
        with pytest.raises(InvalidInputError, match="keep-last 5"):
            call()
    with pytest.raises(NotFoundError, match="did you mean 'm'"):
        repo.plan_expire("M", policy=Policy(keep_last=1))
    assert Repository.create(MemoryObjectStore()).plan_expire().artifacts == ()


def test_time_is_the_stores(repo, store):
    """The clock of who committed counts for nothing; a version that was brought back is new again."""
    for days in range(6):
        store.shift = timedelta(days=days)
        add(repo)
    store.shift = timedelta(days=6)
    assert goes(repo.plan_expire("m", policy=Policy(newer_than="3d"))) == [0, 1, 2, 3]
    assert goes(repo.plan_expire("m", policy=Policy(newer_than="100h"))) == [0, 1]
    repo.artifact("m").delete(1)
    repo.artifact("m").undelete(1)
    plan = repo.plan_expire("m", policy=Policy(newer_than="3d"))
    assert goes(plan) == [0, 2, 3]
    assert why(plan)[1] == ("newer-than 3d",)
    store.shift = timedelta(days=-400)  # a clock that was set back: too much is kept, never too little
    assert goes(repo.plan_expire("m", policy=Policy(newer_than="3d"))) == []
    assert not [key for key in store._objects if key.startswith("probe/")]


def test_a_run_finds_its_checkpoint(repo):
    """What it commits between checkpoints is newer than the one that it would go on from, which stays."""
    add(repo, run="r", step=100)
    add(repo, run="r", step=200)
    add(repo, run="r")
    add(repo, run="r")
    plan = repo.plan_expire("m", policy=Policy(keep_last=1))
    assert goes(plan) == [0, 2]
    assert why(plan) == {1: ("run r goes on from it",), 3: ("newest", "keep-last 1")}
    add(repo, run="r", base=None)  # begun afresh: it has nothing to go on from
    assert goes(repo.plan_expire("m", policy=Policy(keep_last=1))) == [0, 1, 2, 3]
    add(repo)  # not a run's
    assert goes(repo.plan_expire("m", policy=Policy(keep_last=1))) == [0, 1, 2, 3, 4]


def test_bytes_of_what_goes(repo):
    """Those of it alone, those that others need, and what a gc takes whole: by the objects that are there."""
    big = repo.author.random.randbytes(300_000)
    for n in range(3):
        with repo.artifact("m").transaction() as txn:
            txn.add_bytes("same", big)
            txn.add_bytes("own", repo.author.random.randbytes(200_000 + n))
    with repo.artifact("copy").transaction() as txn:
        txn.copy("m:v1", "own")
    plan = repo.plan_expire("m", policy=Policy(keep_last=1, keep_used=False))
    assert goes(plan) == [0, 1]
    first, second = plan.artifacts[0].goes
    # v0's own file is in one pack with what all share: no gc can take that pack; v1's file is copied elsewhere.
    assert 200_000 <= first.alone < 202_000
    assert second.alone < 2_000
    assert plan.freed == first.alone + second.alone
    assert 500_001 <= plan.shared < 503_000
    only = {container_key(c) for n in (0, 1) for c in repo[f"m:v{n}"].tree.containers()}
    only -= {container_key(c) for address in ("m:v2", "copy") for c in repo[address].tree.containers()}
    assert plan.objects == len(only) > 0
    assert plan.object_bytes <= sum(len(repo.place.get(key)) for key in only)
    assert plan.unread == ()


def test_a_version_that_cannot_be_read_is_told(repo):
    """It does not stop a clean-up, of itself neither."""
    for _ in range(3):
        add(repo)
    repo.place.delete([container_key(c) for c in repo["m:v0"].tree.containers()])
    repo = Repository(repo.place)
    plan = repo.plan_expire("m", policy=Policy(keep_last=1))
    assert plan.unread == ("m:v0",)
    assert skipped(repo.expire(plan)) == {0: "", 1: ""}
    assert fsck(repo, deep=True).ok


# -- lineage -----------------------------------------------------------------------------------------------------------


def test_what_others_used_stays(repo):
    """As long as what was made from it does; by whatever name it was used."""
    for _ in range(3):
        add(repo, "data")
    add(repo, used=("data:v0", "data:best", "data:v99", "gone:v1"))
    add(repo, used=("data:v1",))
    rule = Policy(keep_last=1)
    plan = repo.plan_expire("data", policy=rule)
    assert goes(plan, "data") == []
    assert why(plan, "data") == {0: ("used by m:v0",), 1: ("used by m:v1",), 2: ("newest", "keep-last 1")}
    assert goes(repo.plan_expire("data", policy=Policy(keep_last=1, keep_used=False)), "data") == [0, 1]
    # m:v0 goes, and what only it was made from with it; m:v1 stays.
    both = repo.plan_expire("data", "m", policy=rule)
    assert (goes(both, "data"), goes(both)) == ([0], [0])
    repo.artifact("data").rename("corpus")
    assert goes(repo.plan_expire("corpus", policy=rule), "corpus") == []
    repo.expire(Repository(repo.place).plan_expire("corpus", "m", policy=rule))
    assert (live(repo, "corpus"), live(repo)) == ([1, 2], [1])


def test_lineage_goes_all_the_way(repo):
    """What made what made a version that stays; an artifact's own history is no lineage."""
    for _ in range(2):
        add(repo, "raw")
    add(repo, "data", used=("raw:v0",))
    add(repo, "data", used=("data:v0",))
    add(repo, used=("data:v0",))
    plan = repo.plan_expire("raw", "data", policy=Policy(keep_last=1))
    assert why(plan, "data")[0] == ("used by m:v0",)
    assert why(plan, "raw")[0] == ("used by data:v0",)
    repo.artifact("m").remove()
    plan = repo.plan_expire("raw", "data", policy=Policy(keep_last=1))
    assert (goes(plan, "raw"), goes(plan, "data")) == ([0], [0])


def test_lineage_is_any_text(repo):
    """A record may say anything was used: it protects nothing, and breaks nothing."""
    for _ in range(2):
        add(repo, "data")
    add(repo)
    log = repo.artifact("m").open_log()
    op = msgspec.structs.replace(log.state.versions[0].op, number=1)
    used = ("", "\x1b[2J", "s3://bucket/data:v0", "data", "data:v0~1", "data:v0/x", "data:v" + "9" * 400, ":" * 9)
    log.append(repo.author.new_id().hex(), lambda state: [op], repo.author, used=used)
    plan = repo.plan_expire("data", policy=Policy(keep_last=1))
    assert why(plan, "data") == {0: ("used by m:v1",), 1: ("newest", "keep-last 1")}  # by data:v0/x
    log.append(repo.author.new_id().hex(), lambda state: [DeleteOp([1])], repo.author)
    assert goes(repo.plan_expire("data", policy=Policy(keep_last=1)), "data") == [0]


# -- what comes between plan and apply ---------------------------------------------------------------------------------


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
    from mandapa.errors import ConflictError

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


def test_one_writer_at_a_time():
    """The same in a repository of a single writer."""
    repo = Repository.create(MemoryObjectStore(), single_writer=True)
    for _ in range(4):
        add(repo)
    repo.set_policy(None, Policy(keep_last=1, newer_than="30s"))
    assert goes(repo.plan_expire()) == []
    repo.set_policy(None, Policy(keep_last=2))
    assert skipped(repo.expire(repo.plan_expire())) == {0: "", 1: ""}
    assert live(repo) == [2, 3]


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
    import threading

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
