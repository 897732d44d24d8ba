"""Clean-up by policy: a plan says what goes, what stays and why, and it comes back when it was wrong."""

from __future__ import annotations

from datetime import timedelta

import msgspec
import pytest
from expiring import Shifted, add, goes, live, skipped, why

from mandapa.errors import InvalidInputError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.records import AliasOp, DeleteOp, TagOp
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.policy import Policy
from mandapa.repository.repository import Repository
from mandapa.repository.retention import ExpirePlan
from mandapa.testing.faults import CountingObjectStore


@pytest.fixture
def store() -> Shifted:
    return Shifted()


@pytest.fixture
def repo(store) -> Repository:
    return Repository.create(store)


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
    assert [(one.version, one.aliases + one.tags) for one in plan.artifacts[0].goes] == [
        (0, ("a", "b")),
        (1, ()),
        (2, ("t",)),
        (3, ()),
    ]
    done = repo.expire(plan)
    log = artifact.open_log()
    assert len(log.records) == records + 1
    assert log.records[-1].ops == (AliasOp("a", None), AliasOp("b", None), TagOp("t", None), DeleteOp([0, 1, 2, 3]))
    assert [one.aliases for one in done] == [("a", "b"), (), (), ()]
    assert [one.tags for one in done] == [(), (), ("t",), ()]
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


def test_a_plan_that_measures_nothing_reads_no_manifest(repo):
    """It names the same versions; its bytes are unknown, not 0; it can be applied."""
    for _ in range(3):
        add(repo)
    policy = Policy(keep_last=1)
    measured = repo.plan_expire("m", policy=policy)
    repo = Repository(repo.place)
    reads = []
    repo.place.get_ranges = lambda key, ranges: reads.append(key)
    plan = repo.plan_expire("m", policy=policy, measure=False)
    assert reads == []
    assert goes(plan) == goes(measured) == [0, 1]
    assert (plan.freed, plan.shared, plan.objects, plan.artifacts[0].goes[0].alone) == (None, None, None, None)
    assert skipped(repo.expire(ExpirePlan.from_json(plan.to_json()))) == {0: "", 1: ""}


def test_what_it_costs(store, tmp_path):
    """A known repository: a listing and the catalog to plan; two requests for each artifact that something goes of."""
    repo = Repository.create(store, cache_dir=tmp_path, threads=0)
    for name in ("m", "n", "o"):
        for _ in range(3 if name != "o" else 1):
            add(repo, name)
    repo.set_policy(None, Policy(keep_last=1))
    repo.plan_expire()
    counting = CountingObjectStore(store)
    repo = Repository(counting, cache_dir=tmp_path, threads=0)
    counting.requests.clear()
    plan = repo.plan_expire()
    planning = dict(counting.requests)
    assert (planning.pop("list"), sum(planning.values())) == (1, 1)
    counting.requests.clear()
    repo.expire(plan)
    applying = dict(counting.requests)
    assert plan.requests == 4
    assert (applying.pop("create"), applying.pop("head"), applying.pop("list")) == (2, 2, 1)
    assert sum(applying.values()) <= 1 + 2  # the catalog; and heads, which are a cache


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
