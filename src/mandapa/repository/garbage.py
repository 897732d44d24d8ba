"""Whose bytes a gc would free, and what else it would mean: a plan, before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeAlias

import msgspec

from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError, NotFoundError
from mandapa.format.keys import may_be_swept
from mandapa.format.records import RepackOp, Root
from mandapa.format.strict import INT_MAX
from mandapa.repository.logs import LogFacts
from mandapa.repository.marking import Look
from mandapa.repository.plan import Plan
from mandapa.repository.rewrite import HalfDead, RewritePlan, plan_rewrite

if TYPE_CHECKING:
    from mandapa.repository.repository import Repository

__all__ = ["GcPlan", "Owners", "Share", "half_dead", "merged", "plan_gc"]

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=INT_MAX)]
_Id: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of the garbage was one artifact's."""

    artifact: str | None
    """Its name, or its last one; None: never committed, or of versions whose manifests are gone."""
    objects: _Count
    bytes: _Count
    lost: tuple[_Count, ...] = ()
    """Its deleted versions that cannot be brought back any more when this is gone."""


class GcPlan(Plan, tag="gc", frozen=True, kw_only=True):
    """What a gc would delete; as JSON it can be kept, read and applied later."""

    of: ClassVar[str] = "'mandapa gc'"

    repository: _Id
    grace: Annotated[float, msgspec.Meta(ge=0)]
    """Seconds that what was deleted, or never used, stays."""
    objects: dict[str, _Count]
    """Key -> bytes."""
    shares: tuple[Share, ...]
    """The same by artifact, most bytes first."""
    half_dead: tuple[HalfDead, ...] = ()
    """Packs of which little is needed: what is, is stored anew, and a later gc frees them."""
    rewritten: _Count = 0
    """Bytes that are put for that, about."""
    waiting: _Count = 0
    """Bytes that only versions need that were deleted within the grace: a later gc frees them."""

    @property
    def freed(self) -> int:
        """Bytes that would be freed."""
        return sum(self.objects.values())

    @property
    def later(self) -> int:
        """Bytes that the gc after this one can free, for what is needed of half-dead packs is stored anew."""
        return sum([pack.size for pack in self.half_dead])

    def check(self) -> None:
        """Refuse a plan that names an object that no gc may delete."""
        for pack in self.half_dead:
            pack.check()
        wrong = next((key for key in self.objects if not may_be_swept(key)), None)
        if wrong is not None:
            raise InvalidInputError(f"a plan that names {wrong[:80]!r}, which no gc may delete")


def merged(shares: Iterable[Share]) -> tuple[Share, ...]:
    """One share for each artifact, most bytes first."""
    found: dict[str | None, Share] = {}
    for share in shares:
        old = found.get(share.artifact, Share(share.artifact, 0, 0))
        lost = tuple(sorted({*old.lost, *share.lost}))
        found[share.artifact] = Share(share.artifact, old.objects + share.objects, old.bytes + share.bytes, lost)
    return tuple(sorted(found.values(), key=lambda share: (-share.bytes, share.artifact or "")))


def half_dead(look: Look) -> RewritePlan:
    """Packs of which little is needed; none as long as it cannot be told what a version needs that was just deleted."""
    grace = look.grace
    try:
        return plan_rewrite(look.repository, grace=grace.seconds, now=grace.now, reach=look.marks.reach)
    except CorruptionError:
        return RewritePlan(look.repository.id, (), 0, 0)


def plan_gc(repository: Repository, grace: float) -> GcPlan:
    """What a gc would delete now; see `Repository.plan_gc`."""
    look = Look(repository, grace)
    look.mark()
    found = look.unreached()
    rewriting = half_dead(look)
    shares = Owners(look, found.keys()).shares(found)
    waiting = look.waiting()
    look.marks.reach.close()
    return GcPlan(
        repository=repository.id,
        grace=grace,
        objects=found,
        shares=shares,
        half_dead=rewriting.packs,
        rewritten=rewriting.written,
        waiting=waiting,
    )


@dataclass(frozen=True, slots=True)
class _Past:
    """A state of a version that is not live any more."""

    id: str
    number: int
    root: Root
    last: bool
    """Whether an undelete would bring it back."""


class Owners:
    """Whose the objects are that nothing live reaches, as far as manifests can be read that once named them.

    Requests: one for each manifest node of deleted or moved versions that this machine has not seen and that is there.
    """

    def __init__(self, look: Look, keys: Set[str]) -> None:
        self._look = look
        self._of: dict[str, str] = {}
        self._lost: list[tuple[_Past, set[str]]] = []
        reach = look.marks.reach
        past = [one for facts in look.logs.values() for one in _past(facts, look)]
        reach.fetch([one.root for one in past])
        for one in past:
            try:
                needed = look.marks.keys_of(reach.of(one.root))
            except (NotFoundError, CorruptionError, FormatVersionError):
                continue
            named = needed & keys
            for key in named:
                self._of.setdefault(key, one.id)
            if one.last and named and needed <= look.listed.keys():  # else it was lost before
                self._lost.append((one, named))

    def shares(self, objects: Mapping[str, int]) -> tuple[Share, ...]:
        """Some of the objects (key -> bytes) by artifact, most bytes first; one that several had counts for one."""
        names = self._look.names
        of = {key: names[id_] for key, id_ in self._of.items()}
        found = [Share(of.get(key), 1, size) for key, size in objects.items()]
        for one, named in self._lost:
            if not named.isdisjoint(objects):
                found.append(Share(names[one.id], 0, 0, (one.number,)))
        return merged(found)


def _past(facts: LogFacts, look: Look) -> Iterable[_Past]:
    """Where versions of an artifact were that are not marked, as far as their roots are there."""
    state = facts.log.state
    for number, version in state.versions.items():
        if version.root not in look.marks and version.root.object in look.listed:
            yield _Past(facts.id, number, version.root, version.deleted is not None and not state.closed)
    for record in facts.log.records:
        for op in record.ops:
            if isinstance(op, RepackOp) and op.was not in look.marks and op.was.object in look.listed:
                yield _Past(facts.id, op.version, op.was, last=False)
