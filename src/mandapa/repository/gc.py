"""Clean-up: what nothing reaches is condemned, then deleted, while others go on. Source: docs/format.md §10.8."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mandapa.content.parallel import in_order
from mandapa.errors import InvalidInputError, MandapaError, NotFoundError
from mandapa.format.keys import GC
from mandapa.format.records import GC_LIST_BYTES, GC_LIST_MAX, FenceOp, decode_gc_list, encode_gc_list
from mandapa.repository.garbage import GcPlan, Owners, Share, half_dead, merged
from mandapa.repository.log import create_once
from mandapa.repository.logs import LogFacts, keep_logs
from mandapa.repository.marking import CONTAINERS, Look
from mandapa.repository.rewrite import Rewritten, rewrite

if TYPE_CHECKING:
    from mandapa.repository.repository import Repository

__all__ = ["GRACE", "Collected", "Collection", "collect"]

GRACE = 7 * 86_400.0
"""Seconds that what was deleted, or never used, stays unless told otherwise."""

BATCH = 1000
"""Objects that are deleted at once."""

_KEYS_MAX = 62 * GC_LIST_MAX
"""Bytes of the keys in one list, with quotes and commas: what is around them fits, too."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What a clean-up did."""

    freed: dict[str, int]
    """Key -> bytes of the objects that were deleted."""
    shares: tuple[Share, ...]
    """The same by artifact, most bytes first."""
    skipped: dict[str, str]
    """Key -> why it stays: of objects that were condemned, or that the plan names."""
    rewritten: list[Rewritten]
    """What became of the versions that needed something of half-dead packs."""

    @property
    def bytes(self) -> int:
        """Bytes freed."""
        return sum(self.freed.values())


class Collection:
    """One round of a clean-up, from the look to the sweep.

    Args:
        repository: What to clean up.
        grace: Seconds that deleted versions and unused objects stay.
        only: Keys that may be deleted; None: all that nothing reaches.
        progress: Called with what is being counted and the count so far.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        grace: float = GRACE,
        only: Set[str] | None = None,
        progress: Callable[[str, int], None] | None = None,
    ) -> None:
        self.freed: dict[str, int] = {}
        """Key -> bytes of what was deleted."""
        self.spared: list[str] = []
        """Keys of what came into use after it was condemned."""
        self.left = 0
        """Objects that did not fit into the list."""
        self.look: Look | None = None
        self.condemned: dict[str, int] = {}
        """Key -> bytes of what the list names."""
        self._repo = repository
        self._grace = grace
        self._only = only
        self._progress = progress or (lambda *_: None)
        self._author = repository.author

    def steps(self) -> Iterator[str]:
        """Do it a step at a time: yields the name of each step when it is done, and goes on when asked for the next.

        ``looked``, then ``nothing to do``, or ``chosen``, ``listed``, ``catalog fenced``, ``fenced``, ``marked``,
        ``swept``, ``done``. Left at any place, it leaves a valid repository; another clean-up starts over.
        """
        look = self.look = Look(self._repo, self._grace)
        yield "looked"
        look.mark()
        self._choose(look)
        if not self.condemned:
            self._tidy(look)
            yield "nothing to do"
            return
        yield "chosen"
        store, epoch = self._repo.store, self._author.new_id().hex()
        create_once(store, f"{GC}{epoch}", encode_gc_list(epoch, [*self.condemned]), self._author)
        try:
            yield "listed"
            ended = {id_ for id_, facts in look.logs.items() if facts.log.state.closed}
            known = set(look.logs)
            self._repo.catalog.append(epoch, lambda _: [FenceOp(epoch)], self._author)
            self._repo.catalog.refresh()
            look.new_logs()
            yield "catalog fenced"
            logs = [facts for facts in look.logs.values() if facts.id not in ended]
            slots = self._fence(logs, known, epoch)
            yield "fenced"
            for facts, slot in zip(logs, slots, strict=True):
                look.marks.add(facts, slot)
            yield "marked"
        except (MandapaError, KeyboardInterrupt):
            # Nothing was deleted, and nothing will be: what the list names may be used again.
            with suppress(MandapaError):
                store.delete([f"{GC}{epoch}"])
            raise
        self.spared = [key for key in self.condemned if key in look.marks.keys]
        self._sweep({key: size for key, size in self.condemned.items() if key not in look.marks.keys})
        yield "swept"
        store.delete([f"{GC}{epoch}"])
        self._tidy(look)
        yield "done"

    def run(self) -> None:
        """All steps."""
        for _ in self.steps():
            pass

    def _choose(self, look: Look) -> None:
        """What this round may delete: as much as a list holds, chunks before the manifests that say whose they are."""
        found = {key: size for key, size in look.unreached().items() if key not in look.stale and self._may(key)}
        room = _KEYS_MAX
        for key in sorted(found, key=lambda key: (not key.startswith("packs/"), key))[:GC_LIST_MAX]:
            room -= len(key) + 3
            if room < 0:
                break
            self.condemned[key] = found[key]
        self.left = len(found) - len(self.condemned)

    def _may(self, key: str) -> bool:
        return self._only is None or key in self._only

    def _fence(self, logs: Sequence[LogFacts], known: Set[str], epoch: str) -> list[int]:
        """Fence logs; gives the slots. One request for each that has not moved since it was read."""
        fence = FenceOp(epoch)

        def one(facts: LogFacts) -> int:
            since = len(facts.log.records) if facts.id in known else None
            return facts.log.append(epoch, lambda _: [fence], self._author, since=since).seq

        slots = []
        for slot in in_order(one, logs, threads=self._repo.threads):
            slots.append(slot)
            self._progress("logs fenced", len(slots))
        return slots

    def _sweep(self, doomed: dict[str, int]) -> None:
        keys = [*doomed]
        for start in range(0, len(keys), BATCH):
            batch = keys[start : start + BATCH]
            self._repo.store.delete(batch)
            self.freed.update((key, doomed[key]) for key in batch)
            self._progress("objects deleted", len(self.freed))

    def _tidy(self, look: Look) -> None:
        """What needs no list: what probes left behind, and lists of gcs that have nothing to delete any more."""
        self._sweep({key: size for key, size in look.stale.items() if self._may(key)})
        store = self._repo.store
        there: set[str] | None = None
        for info in list(store.list(GC)):
            try:
                objects = decode_gc_list(store.get(info.key, limit=GC_LIST_BYTES), key=info.key).objects
            except NotFoundError:
                continue  # its gc is over
            if there is None:  # the lists were there before: what is not seen now is gone for good
                there = {info.key for prefix in (*CONTAINERS, "probe/") for info in store.list(prefix)}
            if there.isdisjoint(objects):
                store.delete([info.key])


def collect(
    repository: Repository,
    plan: GcPlan | None,
    grace: float | None,
    progress: Callable[[str, int], None] | None = None,
) -> Collected:
    """Delete what may go, a list after the other, then empty half-dead packs; see `Repository.gc`."""
    if plan is not None and plan.repository != repository.id:
        raise InvalidInputError(f"the plan is of another repository than {repository.url}")
    if grace is None:
        grace = GRACE if plan is None else plan.grace
    only = None if plan is None else plan.objects.keys()
    freed: dict[str, int] = {}
    skipped: dict[str, str] = {}
    shares: list[Share] = []
    while True:
        work = Collection(repository, grace=grace, only=only, progress=progress)
        look, owned = _one_round(work)
        freed |= work.freed
        shares += owned
        skipped |= dict.fromkeys(work.spared, "came into use while this ran")
        if not (work.left and work.freed):
            break
    for key in plan.objects.keys() - freed.keys() - skipped.keys() if plan else ():
        skipped[key] = _why(look, key)
    if plan is None:
        doomed = half_dead(look).keys  # by all logs, so that this machine knows the fences from then on
    else:
        doomed = [pack.key for pack in plan.half_dead]
        keep_logs(repository)
    return Collected(freed, merged(shares), skipped, list(rewrite(repository, doomed)))


def _one_round(work: Collection) -> tuple[Look, tuple[Share, ...]]:
    """One round, and whose the objects were that it deleted."""
    steps = work.steps()
    next(steps)
    look = work.look
    assert look is not None
    owners: Owners | None = None
    for step in steps:
        if step == "chosen":
            owners = Owners(look, work.condemned.keys())
    look.marks.reach.close(whole=True)
    return look, (owners or Owners(look, frozenset())).shares(work.freed)


def _why(look: Look, key: str) -> str:
    """Why an object stays that a plan names."""
    if key in look.marks.keys:
        return "is in use"
    if key in look.listed and not look.grace.over(look.listed[key].last_modified):
        return "is younger than the grace"
    return "was gone"
