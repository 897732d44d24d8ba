"""Clean-up by policy: a plan of which versions go, then deleting those that may go by then. Source: docs/design/015."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeAlias

import msgspec
from msgspec.structs import replace

from mandapa.address import parse_address
from mandapa.errors import FormatVersionError, InvalidInputError, MandapaError, NotFoundError
from mandapa.format.keys import log_key
from mandapa.format.records import AliasOp, DeleteOp, Op, Record, RegisterOp, RenameOp, TagOp, UndeleteOp
from mandapa.format.strict import INT_MAX
from mandapa.repository.freeing import Place, freed
from mandapa.repository.logs import LogFacts, read_logs
from mandapa.repository.marking import store_time
from mandapa.repository.plan import Plan
from mandapa.repository.policy import Policy, keeps, policy_of
from mandapa.repository.state import ArtifactState

if TYPE_CHECKING:
    from mandapa.repository.repository import Repository

__all__ = ["ExpirePlan", "Expired", "apply_expire", "plan_expire"]

GRACE = timedelta(days=7)
"""How long a deleted version can be brought back at least, unless a gc is told otherwise."""

_OPS_MAX = 40_000
"""Bytes of ops that go into one record, about."""

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=INT_MAX)]
_Id: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class Going(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version that goes."""

    version: _Count
    aliases: tuple[str, ...] = ()
    """Those that are dropped with it."""
    tags: tuple[str, ...] = ()
    """Likewise: their names are never used again."""
    alone: _Count | None = None
    """Stored bytes that no other live version reaches; None: not measured."""


class Staying(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version that stays."""

    version: _Count
    by: tuple[str, ...]
    """The rules that keep it, in words."""


class ArtifactPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes of one artifact."""

    artifact: _Id
    name: str
    policy: Policy
    records: _Count
    """How many records its log had: what came later is not touched."""
    seal: str
    """Of the last of them: the plan is good for this history alone."""
    goes: tuple[Going, ...]
    stays: tuple[Staying, ...]


class ExpirePlan(Plan, tag="expire", frozen=True, kw_only=True):
    """What an expire would delete, and what it would keep and why; as JSON it can be kept, read and applied later."""

    of: ClassVar[str] = "'mandapa expire'"

    repository: _Id
    artifacts: tuple[ArtifactPlan, ...]
    freed: _Count | None = None
    """Stored bytes that only what goes reaches: what gc and repack free in the end. None: not measured."""
    shared: _Count | None = None
    """Stored bytes that it reaches, and that others need which stay."""
    objects: _Count | None = None
    """Objects in the store that only what goes reaches, which the next gc after the grace deletes."""
    object_bytes: _Count | None = None
    """Of ``freed``, the bytes in those."""
    unread: tuple[str, ...] = ()
    """Addresses of live versions whose manifest cannot be read: then the bytes are about right at best."""

    @property
    def requests(self) -> int:
        """How many requests deleting takes, when nobody else commits, besides reading the logs."""
        return sum([2 for part in self.artifacts for _ in _batches(part.goes)])

    def check(self) -> None:
        """Refuse a plan that names something twice."""
        ids = [part.artifact for part in self.artifacts]
        twice = any(len({one.version for one in part.goes}) < len(part.goes) for part in self.artifacts)
        if twice or len(set(ids)) < len(ids):
            raise InvalidInputError("a plan that names an artifact, or a version, twice")


@dataclasses.dataclass(frozen=True, slots=True)
class Expired:
    """What became of one version of a plan."""

    artifact: str
    version: int
    aliases: tuple[str, ...] = ()
    """Those that were dropped with it."""
    tags: tuple[str, ...] = ()
    """Likewise."""
    until: datetime | None = None
    """Until then at least it can be brought back, by the store's clock; None when it was not deleted, or not known."""
    skipped: str = ""
    """Why it was not deleted; empty where it was."""


def plan_expire(repo: Repository, names: Sequence[str], policy: Policy | None, *, measure: bool = True) -> ExpirePlan:
    """What would go; see `Repository.plan_expire`."""
    world = _World(repo)
    wanted = _wanted(world, names, policy)
    judged = {id_: _Judge(world, id_, policies) for id_, policies in wanted.items()}
    candidates = {(id_, number) for id_ in judged for number in world.facts[id_].log.state.live()}
    used = _lineage(world, judged, candidates)
    drafts = [_draft(judge, judge.kept(judge.fact.log.state, used.get(id_, {}))) for id_, judge in judged.items()]
    plan = ExpirePlan(repository=repo.id, artifacts=tuple(sorted(drafts, key=lambda part: part.name)))
    # What the logs said when they were read is what was judged: measuring may read them on.
    return _measured(world, plan) if measure else plan


def _measured(world: _World, plan: ExpirePlan) -> ExpirePlan:
    """A plan with its bytes."""
    going = {(part.artifact, one.version) for part in plan.artifacts for one in part.goes}
    found = freed(world.repo, list(world.facts.values()), going)
    parts = []
    for part in plan.artifacts:
        goes = [replace(one, alone=found.alone.get((part.artifact, one.version), 0)) for one in part.goes]
        parts.append(replace(part, goes=tuple(goes)))
    return replace(
        plan,
        artifacts=tuple(parts),
        freed=found.bytes,
        shared=found.shared,
        objects=found.objects,
        object_bytes=found.object_bytes,
        unread=tuple([f"{_name(world.facts[id_])}:v{number}" for id_, number in found.unread]),
    )


def _draft(judge: _Judge, kept: Mapping[int, Sequence[str]]) -> ArtifactPlan:
    """What goes of an artifact, not measured yet."""
    fact = judge.fact
    state, records = fact.log.state, fact.log.records
    aliases, tags = _by_version(state.aliases), _by_version(state.tags)
    return ArtifactPlan(
        artifact=fact.id,
        name=_name(fact),
        policy=judge.policies[0],
        records=len(records),
        seal=records[-1].seal if records else "",
        goes=tuple([Going(n, aliases.get(n, ()), tags.get(n, ())) for n in state.live() if n not in kept]),
        stays=tuple([Staying(n, tuple(kept[n])) for n in state.live() if n in kept]),
    )


def apply_expire(repo: Repository, plan: ExpirePlan) -> Iterator[Expired]:
    """Delete what a plan names and its policies still let go; see `Repository.expire`."""
    if plan.repository != repo.id:
        raise InvalidInputError(f"the plan is for repository {plan.repository}, not {repo.id} at {repo.url}")
    world = _World(repo)
    judged: dict[str, _Judge] = {}
    for part in plan.artifacts:
        fact = world.facts.get(part.artifact)
        if fact is None or not _knows(fact, part):
            raise InvalidInputError(f"the plan was made of another history of {part.name!r}: plan again")
        if not _removed(fact):
            judged[part.artifact] = _Judge(world, part.artifact, _policies(world, fact, part.policy))
    candidates = {(part.artifact, one.version) for part in plan.artifacts for one in part.goes}
    used = _lineage(world, judged, candidates)
    for part in plan.artifacts:
        if part.artifact in judged:
            yield from _Expiry(repo, judged[part.artifact], part, used.get(part.artifact, {})).run()
        else:
            yield from [Expired(part.name, one.version, skipped="the artifact was removed") for one in part.goes]


def _knows(fact: LogFacts, part: ArtifactPlan) -> bool:
    """Whether a log goes on from where it was when the plan was made."""
    records = fact.log.records
    return part.records == 0 or (len(records) >= part.records and records[part.records - 1].seal == part.seal)


class _NothingError(Exception):
    pass


class _World:
    """All logs of a repository, as they were read at one time, and what time that is to the store."""

    def __init__(self, repo: Repository) -> None:
        self.repo = repo
        self.facts = {fact.id: fact for fact in read_logs(repo)}
        self.settings = repo.catalog.state.settings
        self._now: datetime | None = None

    def now(self) -> datetime:
        """By the store's clock; three requests, once."""
        if self._now is None:
            self._now = store_time(self.repo)
        return self._now

    def former_names(self) -> dict[str, set[str]]:
        """Every name that an artifact ever had -> ids of those that had it."""
        found: dict[str, set[str]] = {}
        for record in self.repo.catalog.records:
            for op in record.ops:
                if isinstance(op, RegisterOp | RenameOp):
                    found.setdefault(op.name, set()).add(op.artifact)
        return found


class _Judge:
    """What policies keep of one artifact."""

    def __init__(self, world: _World, id_: str, policies: Sequence[Policy]) -> None:
        self.policies = policies
        """The one that was asked for first, then the stored one, if that is another."""
        self.fact = world.facts[id_]
        self._world = world
        self._made: dict[int, int] | None = None

    def kept(self, state: ArtifactState, used: Mapping[int, str]) -> dict[int, list[str]]:
        """Live versions that stay, each with the rules that keep it."""
        found: dict[int, list[str]] = {}
        for at, policy in enumerate(self.policies):
            for number, why in keeps(policy, state, age=self._age, used=used).items():
                known = found.setdefault(number, [])
                known += [f"{reason} (stored policy)" if at else reason for reason in why if reason not in known]
        return found

    def _age(self, number: int) -> float:
        if self._made is None:
            # Who brings a version back wants it: it is as new as that.
            self._made = {}
            for record in self.fact.log.records:
                for op in record.ops:
                    if isinstance(op, UndeleteOp):
                        self._made.update(dict.fromkeys(op.versions, record.seq))
        seq = self._made.get(number, self.fact.log.state.versions[number].record.seq)
        at = self.fact.times.get(seq)
        return 0.0 if at is None else (self._world.now() - at).total_seconds()


class _Expiry:
    """Deletes the versions of one artifact that a plan names."""

    def __init__(self, repo: Repository, judge: _Judge, part: ArtifactPlan, used: Mapping[int, str]) -> None:
        self._repo = repo
        self._judge = judge
        self._part = part
        self._used = used
        self._log = judge.fact.log
        self._name = _name(judge.fact)
        self._gone: dict[int, Expired] = {}
        self._skipped: dict[int, str] = {}

    def run(self) -> Iterator[Expired]:
        """One commit for as many versions as a record holds."""
        for batch in _batches(self._part.goes):
            author = self._repo.author
            until: datetime | None = None
            try:
                record = self._log.append(author.new_id().hex(), partial(self._ops, batch), author)
                with suppress(MandapaError):  # the commit stands
                    until = self._repo.store.head(log_key(self._log.id, record.seq)).last_modified + GRACE
            except _NothingError:
                pass
            except FormatVersionError as error:
                self._gone, self._skipped = {}, dict.fromkeys([one.version for one in batch], str(error))
            for one in batch:
                if one.version in self._gone:
                    yield dataclasses.replace(self._gone[one.version], until=until)
                else:
                    yield Expired(self._name, one.version, skipped=self._skipped[one.version])

    def _ops(self, batch: Sequence[Going], state: ArtifactState) -> Iterable[Op]:
        """The ops for the slot after ``state``: names first, as a version with a name cannot be deleted."""
        kept = self._judge.kept(state, self._used)
        back = _brought_back(self._log.records[self._part.records :])
        aliases, tags = _by_version(state.aliases), _by_version(state.tags)
        self._gone, self._skipped = {}, {}
        for one in batch:
            now = Expired(self._name, one.version, aliases.get(one.version, ()), tags.get(one.version, ()))
            if why := self._obstacle(state, one, now, kept, back):
                self._skipped[one.version] = why
            else:
                self._gone[one.version] = now
        if not self._gone:
            raise _NothingError
        gone = self._gone.values()
        ops: list[Op] = [AliasOp(name, None) for one in gone for name in one.aliases]
        ops += [TagOp(name, None) for one in gone for name in one.tags]
        return [*ops, DeleteOp(sorted(self._gone))]

    def _obstacle(
        self,
        state: ArtifactState,
        one: Going,
        now: Expired,
        kept: Mapping[int, Sequence[str]],
        back: set[int],
    ) -> str:
        """Why a version may not go now; empty when it may."""
        version = state.versions.get(one.version)
        if state.closed:
            return "the artifact was removed"
        if version is None or version.record.seq >= self._part.records:
            return "it is not one of those that the plan was made of"
        if version.deleted is not None:
            return "it was deleted already"
        if one.version in back:
            return "it was brought back since the plan was made"
        if one.version in kept:
            return f"it stays now: {', '.join(kept[one.version])}"
        if new := [*({*now.aliases} - {*one.aliases}), *({*now.tags} - {*one.tags})]:
            return f"it got the name {min(new)!r} since the plan was made"
        return ""


def _by_version(names: Mapping[str, int]) -> dict[int, tuple[str, ...]]:
    """Names of each version that has some, sorted."""
    found: dict[int, tuple[str, ...]] = {}
    for name, number in sorted(names.items()):
        found[number] = (*found.get(number, ()), name)
    return found


def _brought_back(records: Iterable[Record]) -> set[int]:
    return {n for record in records for op in record.ops if isinstance(op, UndeleteOp) for n in op.versions}


def _batches(goes: Sequence[Going]) -> Iterator[list[Going]]:
    """Versions whose ops fit one record together."""
    batch: list[Going] = []
    size = 0
    for one in goes:
        more = len(str(one.version)) + 1 + sum([len(name) + 48 for name in (*one.aliases, *one.tags)])
        if batch and size + more > _OPS_MAX:
            yield batch
            batch, size = [], 0
        batch.append(one)
        size += more
    if batch:
        yield batch


def _wanted(world: _World, names: Sequence[str], policy: Policy | None) -> dict[str, list[Policy]]:
    """Artifact ids and the policies that they are judged by."""
    found: dict[str, list[Policy]] = {}
    current = {_name(fact): fact for fact in world.facts.values() if not _removed(fact)}
    for name in dict.fromkeys(names) or sorted(current):
        world.repo.artifact(name)  # a name that no artifact can have is told as such
        if name not in current:
            if name in world.repo.catalog.state.names:
                raise NotFoundError(f"the artifact {name!r} was removed")
            raise world.repo.no_artifact(name)
        policies = _policies(world, current[name], policy)
        if policies:
            found[current[name].id] = policies
        elif names:
            raise InvalidInputError(
                f"{name} has no policy, and no rule was given: nearly all would go. Give one, such as --keep-last 5 "
                f"or Policy(keep_last=5), or store one: 'mandapa policy set {name} --keep-last 5'"
            )
    if not found and current:
        raise InvalidInputError(
            "no policy is stored, and no rule was given: nearly all would go. Give one, such as --keep-last 5 or "
            "Policy(keep_last=5), or store one: 'mandapa policy set --default --keep-last 5'"
        )
    return found


def _policies(world: _World, fact: LogFacts, asked: Policy | None) -> list[Policy]:
    """The policy that was asked for, and the stored one: what either keeps, stays."""
    stored = policy_of(world.settings, fact.id, _name(fact))
    return list(dict.fromkeys([policy for policy in (asked, stored) if policy is not None]))


def _lineage(world: _World, judged: Mapping[str, _Judge], candidates: set[Place]) -> dict[str, dict[int, str]]:
    """Of candidates, those that a version which stays names as used: artifact id -> number -> who names it.

    What goes together with all that was made from it is not in it; of one artifact, its own history is no lineage.
    """
    names = world.former_names()
    targets: dict[Place, list[Place]] = {}
    for fact in world.facts.values():
        if _removed(fact):
            continue
        state = fact.log.state
        for number in state.live():
            if used := state.versions[number].record.used:
                found = [(id_, n) for name, n in map(_parsed, used) for id_ in names.get(name, ())]
                targets[fact.id, number] = [place for place in found if place[0] != fact.id and place in candidates]
    going = set(candidates)
    for id_, judge in judged.items():
        going -= {(id_, number) for number in judge.kept(judge.fact.log.state, {})}
    result: dict[str, dict[int, str]] = {}
    queue = deque(place for place in targets if place not in going)
    while queue:
        user = queue.popleft()
        for id_, number in targets.get(user, ()):
            if number in result.setdefault(id_, {}):
                continue
            result[id_][number] = f"{_name(world.facts[user[0]])}:v{user[1]}"
            if (id_, number) in going and any(policy.keep_used for policy in judged[id_].policies):
                going.discard((id_, number))
                queue.append((id_, number))
    return result


def _parsed(address: str) -> tuple[str, int]:
    """Name and number of a version that was used; a record may hold any text."""
    with suppress(InvalidInputError):
        parsed = parse_address(address)
        if parsed.number is not None and not parsed.back:
            return parsed.name, parsed.number
    return "", -1


def _name(fact: LogFacts) -> str:
    return fact.name or fact.id


def _removed(fact: LogFacts) -> bool:
    return fact.name is None or fact.log.state.closed
