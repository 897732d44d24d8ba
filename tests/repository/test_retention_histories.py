"""Whatever happens between plan and apply, and at the slot: what goes is what was planned and may go at that moment."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from expiring import Shifted, add, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from mandapa.errors import ConflictError, InvalidInputError, NotFoundError
from mandapa.format.keys import log_key
from mandapa.format.records import AnnotateOp, DeleteOp, UndeleteOp
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author
from mandapa.repository.policy import Policy
from mandapa.repository.repository import Repository
from mandapa.repository.retention import ExpirePlan
from mandapa.repository.state import ArtifactState, fold

EXAMPLES = 2000 if os.environ.get("MANDAPA_SOAK") else 100

metadata = st.fixed_dictionaries(
    {}, optional={"loss": st.sampled_from([1, 2.5, -3, "NaN", None]), "step": st.integers(0, 12)}
)
policies = st.builds(
    lambda rule, more, **switches: Policy(**{**rule, **more}, **switches),
    rule=st.sampled_from(
        [
            {"keep_last": 1},
            {"keep_last": 2},
            {"keep_best": ["1:loss:min"]},
            {"keep_best": ["1:loss:max", "1:loss:min"]},
            {"keep_every": 4},
            {"newer_than": "60h"},
        ]
    ),
    more=st.sampled_from([{}, {}, {"keep_last": 2}, {"newer_than": "60h"}]),
    keep_aliased=st.booleans(),
    keep_tagged=st.booleans(),
    keep_used=st.booleans(),
)
some = st.integers(0, 5)
events = st.one_of(
    st.tuples(st.just("commit"), metadata),
    st.tuples(st.just("alias"), st.sampled_from("abc"), some),
    st.tuples(st.just("tag"), st.sampled_from("xyz"), some),
    st.tuples(st.just("drop"), st.sampled_from("abcxyz")),
    st.tuples(st.just("delete"), some),
    st.tuples(st.just("undelete"), some),
    st.tuples(st.just("back"), some),
    st.tuples(st.just("note"), some),
    st.tuples(st.just("rename")),
)
days = st.tuples(st.just("day"))


class World:
    """A repository with an artifact ``m`` of which ``user:v0`` used v1, changed by somebody else."""

    def __init__(self) -> None:
        self.store = Shifted()
        self.repo = Repository.create(self.store, threads=0)
        add(self.repo)
        self.id = self.repo.artifact("m").open_log().id
        self.name = "m"
        self.at_slot: list[list[tuple[Any, ...]]] = []
        self._create = self.store.create
        add(self.repo, "user", used=("m:v1",))

    def happen(self, event: tuple[Any, ...]) -> None:
        """Let something happen, if it can."""
        artifact = self.repo.artifact(self.name)
        log = artifact.open_log()
        what, *rest = event
        if what == "back":
            for step in ("delete", "undelete"):
                self.happen((step, *rest))
            return
        try:
            match what:
                case "commit":
                    first = log.state.versions[0].op
                    op = msgspec.structs.replace(first, number=log.state.next_number, metadata=rest[0])
                    log.append(self.repo.author.new_id().hex(), lambda state: [op], self.repo.author)
                case "alias":
                    artifact.alias(*rest)
                case "tag":
                    artifact.tag(*rest)
                case "drop":
                    (artifact.alias if rest[0] in artifact.aliases() else artifact.tag)(rest[0], None)
                case "delete":
                    artifact.delete(*rest)
                case "undelete":
                    op = UndeleteOp(rest)
                    log.append(self.repo.author.new_id().hex(), lambda state: [op], self.repo.author)
                case "note":
                    op = AnnotateOp(rest[0], {"seen": True})
                    log.append(self.repo.author.new_id().hex(), lambda state: [op], self.repo.author)
                case "rename":
                    self.name += "m"
                    artifact.rename(self.name)
                case "day":
                    self.store.shift += timedelta(days=1)
        except (ConflictError, NotFoundError, InvalidInputError):
            pass

    def create(self, key: str, data: bytes) -> None:
        """The store's own, but for what happens right before a slot of the log of m is taken."""
        if key.startswith(f"log/{self.id}/") and self.at_slot:
            self.store.create = self._create
            for event in self.at_slot.pop(0):
                self.happen(event)
            self.store.create = self.create
        self._create(key, data)

    def stays(self, policy: Policy, state: ArtifactState, seq: int) -> set[int]:
        """By the oracle: what a policy keeps in a state that is followed by record ``seq``."""
        log = self.repo.log(self.id)
        at = {number: version.record.seq for number, version in state.versions.items()}
        for record in log.records[:seq]:
            for op in record.ops:
                at.update(dict.fromkeys(op.versions, record.seq) if isinstance(op, UndeleteOp) else {})
        now = datetime.now(UTC) + self.store.shift
        ages = [(now - self.store._objects[log_key(self.id, at[n])][1]).total_seconds() for n in sorted(at)]
        names = {name: ("alias", n) for name, n in state.aliases.items()}
        names |= {name: ("tag", n) for name, n in state.tags.items()}
        dead = {n for n, version in state.versions.items() if version.deleted is not None}
        return oracle(policy, [state.versions[n].op.metadata for n in sorted(at)], ages, names, {1}, dead)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    versions=st.lists(metadata, min_size=3, max_size=6),
    before=st.lists(events | days, max_size=6),
    policy=policies,
    stored=st.none() | policies,
    between=st.lists(events | days, max_size=5),
    at_slot=st.lists(st.lists(events, min_size=1, max_size=3), max_size=2),
)
def test_what_goes_was_planned_and_may_go(versions, before, policy, stored, between, at_slot):
    """In the state before the record that deletes: all that was planned and may go goes, with its names, no more."""
    world = World()
    for facts in versions:
        world.happen(("commit", facts))
        world.happen(("day",))
    for event in before:
        world.happen(event)
    expirer = Repository(world.store, threads=0, author=Author("expirer"))
    plan = ExpirePlan.from_json(expirer.plan_expire(world.name, policy=policy).to_json())
    [part] = plan.artifacts
    planned = {one.version: {*one.aliases, *one.tags} for one in part.goes}
    assert planned.keys().isdisjoint({one.version for one in part.stays})
    start = world.repo.log(world.id).refresh()
    assert set(start.live()) - planned.keys() == world.stays(policy, start, part.records)
    for event in between:
        world.happen(event)
    if stored is not None:
        world.repo.set_policy(world.name, stored)
    world.at_slot = at_slot
    world.store.create = world.create
    done = expirer.expire(plan)
    world.store.create = world._create

    log = world.repo.log(world.id)
    log.refresh()
    last = next((r for r in log.records if r.by == "expirer"), None)
    seq = len(log.records) if last is None else last.seq
    state = ArtifactState()
    for record in log.records[:seq]:
        fold(state, record, key="")
    stays = world.stays(policy, state, seq) | (set() if stored is None else world.stays(stored, state, seq))
    back = {
        n for r in log.records[part.records : seq] for op in r.ops if isinstance(op, UndeleteOp) for n in op.versions
    }
    may_go = {
        n
        for n, names in planned.items()
        if state.versions[n].deleted is None and n not in stays and n not in back and set(state.names_of(n)) <= names
    }
    gone = set() if last is None else set(last.find(DeleteOp).versions)
    assert gone == may_go
    assert {one.version for one in done if not one.skipped} == gone
    assert {one.version for one in done} == planned.keys()
    assert all(not log.state.names_of(n) for n in gone)
    assert {one.version: {*one.aliases, *one.tags} for one in done if not one.skipped} == {
        n: set(state.names_of(n)) for n in gone
    }
    assert fsck(Repository(world.store, threads=0)).ok
