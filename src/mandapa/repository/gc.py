"""Clean-up: what nothing reaches is condemned, then deleted, while others go on. Source: docs/format.md §10.8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from mandapa.content.parallel import in_order
from mandapa.errors import FormatVersionError, InvalidInputError, MandapaError, NotFoundError
from mandapa.format.keys import GC, may_be_swept, parse_seq
from mandapa.format.records import GC_LIST_MAX, FenceOp, Op, decode_gc_list, encode_gc_list
from mandapa.object_store.base import ObjectStore
from mandapa.repository.log import Author, create_once
from mandapa.repository.marking import Grace, History, Marks

if TYPE_CHECKING:
    from mandapa.repository.repository import Repository

__all__ = ["GRACE", "Collected", "Collection"]

GRACE = 7 * 86_400.0
"""Seconds that what was deleted, or never used, stays unless told otherwise."""

STALE = 86_400.0
"""Seconds after which what a probe has left behind may go."""

BATCH = 1000
"""Objects that are deleted at once."""

_CONTAINERS = ("packs/", "meta/", "tx/")
_KEYS_MAX = 60 * GC_LIST_MAX
"""Bytes of the keys in one list, about: with quotes and commas it stays below its limit."""


@dataclass(slots=True)
class Collected:
    """What a clean-up did."""

    epoch: str = ""
    """Its name; empty when nothing was condemned."""
    freed: dict[str, int] = field(default_factory=dict)
    """Key -> bytes of the objects that were deleted."""
    spared: list[str] = field(default_factory=list)
    """Keys of objects that came into use while it ran."""
    left: int = 0
    """Objects that were too many for one round: run it again."""

    @property
    def bytes(self) -> int:
        """Bytes freed."""
        return sum(self.freed.values())


class Look:
    """What there was to see at one time of the store's clock, before anything was marked.

    Requests: three for the time, one for each 1,000 containers and each 1,000 records, one for each new record.
    """

    def __init__(self, repository: Repository, grace: float) -> None:
        if grace < 0:
            raise InvalidInputError(f"grace={grace}: seconds, 0 or more")
        store = repository.store
        self._repo = repository
        self.grace = Grace(_now(store, repository.author), grace)
        self.listed = {
            info.key: info for prefix in _CONTAINERS for info in store.list(prefix) if may_be_swept(info.key)
        }
        self.stale = {
            info.key: info
            for info in store.list("probe/")
            if may_be_swept(info.key) and Grace(self.grace.now, STALE).over(info.last_modified)
        }
        self.marks = Marks(repository, self.grace)
        self.histories: dict[str, History] = {}

    def mark(self) -> None:
        """Read the catalog and all logs, and mark what is live.

        Raises:
            CorruptionError: A log, or a live version, is not whole.
            FormatVersionError: A log, or a live version, needs a newer mandapa.
        """
        repo = self._repo
        repo.catalog.refresh()
        times: dict[str, dict[int, datetime]] = {}
        for info in repo.store.list("log/"):
            _, _, rest = info.key.partition("/")
            seq = parse_seq(rest)
            if seq is not None:
                times.setdefault(rest.partition("/")[0], {})[seq] = info.last_modified
        for history in self.new_histories():
            history.times = times.get(history.id, {})
            history.log.refresh()
            self.marks.add(history, history.last)

    def new_histories(self) -> list[History]:
        """The logs that the catalog, as read, has registered and that were not met before."""
        state = self._repo.catalog.state
        if state.read_only:
            raise FormatVersionError("the catalog holds ops of a newer mandapa: upgrade to clean up")
        names = {id_: name for name, id_ in state.names.items()} | state.removed
        new = [History(id_, names[id_], self._repo.log(id_), {}) for id_ in sorted(names) if id_ not in self.histories]
        self.histories.update((history.id, history) for history in new)
        return new

    def unreached(self) -> dict[str, int]:
        """Key -> bytes of what nothing reaches and is old enough."""
        return {
            key: info.size
            for key, info in self.listed.items()
            if key not in self.marks.keys and self.grace.over(info.last_modified)
        }


class Collection:
    """One clean-up, from the look to the sweep.

    Args:
        repository: What to clean up.
        grace: Seconds that deleted versions and unused objects stay.
        only: Keys that may be deleted; None: all that nothing reaches.
    """

    def __init__(self, repository: Repository, *, grace: float = GRACE, only: AbstractSet[str] | None = None) -> None:
        self.result = Collected()
        self._repo = repository
        self._grace = grace
        self._only = only
        self._author = repository.author

    def steps(self) -> Iterator[str]:
        """Do it a step at a time: yields the name of each step when it is done, and goes on when asked for the next.

        ``looked``, then ``nothing to do``, or ``listed``, ``catalog fenced``, ``fenced``, ``marked``, ``swept``,
        ``done``. Left at any place, it leaves a valid repository; another clean-up starts over.
        """
        look = Look(self._repo, self._grace)
        yield "looked"
        look.mark()
        condemned = self._choose(look)
        self._drop_stale(look)
        if not condemned:
            self._drop_dead_lists()
            yield "nothing to do"
            return
        epoch = self._author.new_id().hex()
        create_once(self._repo.store, f"{GC}{epoch}", encode_gc_list(epoch, [*condemned]), self._author)
        self.result.epoch = epoch
        try:
            yield "listed"
            fence = [FenceOp(epoch)]
            closed = {history.id for history in look.histories.values() if history.log.state.closed}
            self._repo.catalog.append(epoch, lambda _: fence, self._author)
            self._repo.catalog.refresh()
            look.new_histories()
            yield "catalog fenced"
            open_ = [history for history in look.histories.values() if history.id not in closed]
            fences = [*in_order(lambda history: self._fence(history, fence), open_, threads=self._repo.threads)]
            yield "fenced"
            for history, at in zip(open_, fences, strict=True):
                look.marks.add(history, at)
            self.result.spared = [key for key in condemned if key in look.marks.keys]
            yield "marked"
        except MandapaError:
            # Nothing was deleted, and nothing will be: what was condemned may be used again.
            with suppress(MandapaError):
                self._repo.store.delete([f"{GC}{epoch}"])
            raise
        self._sweep({key: size for key, size in condemned.items() if key not in look.marks.keys})
        yield "swept"
        self._repo.store.delete([f"{GC}{epoch}"])
        self._drop_dead_lists()
        yield "done"

    def run(self) -> Collected:
        """All steps."""
        for _ in self.steps():
            pass
        return self.result

    def _choose(self, look: Look) -> dict[str, int]:
        """Key -> bytes of what this round may delete: as much as one list holds, chunks before manifests."""
        found = look.unreached()
        keys = sorted((key for key in found if self._may(key)), key=lambda key: (not key.startswith("packs/"), key))
        room, chosen = _KEYS_MAX, dict[str, int]()
        for key in keys[:GC_LIST_MAX]:
            room -= len(key) + 3
            if room < 0:
                break
            chosen[key] = found[key]
        self.result.left = len(keys) - len(chosen)
        return chosen

    def _may(self, key: str) -> bool:
        return self._only is None or key in self._only

    def _fence(self, history: History, fence: Sequence[Op]) -> int:
        """Fence a log; gives the number of the record. One request where the log has not moved."""
        return history.log.append(self.result.epoch, lambda _: fence, self._author).seq

    def _sweep(self, doomed: dict[str, int]) -> None:
        keys = [*doomed]
        for start in range(0, len(keys), BATCH):
            batch = keys[start : start + BATCH]
            self._repo.store.delete(batch)
            self.result.freed.update((key, doomed[key]) for key in batch)

    def _drop_stale(self, look: Look) -> None:
        """What probes left behind: nobody can need it, so it goes without a list."""
        stale = {key: info.size for key, info in look.stale.items() if self._may(key)}
        if stale:
            self._sweep(stale)

    def _drop_dead_lists(self) -> None:
        """Another's list goes only when none of its objects exists any more."""
        store = self._repo.store
        there: set[str] | None = None
        for info in list(store.list(GC)):
            try:
                objects = decode_gc_list(store.get(info.key), key=info.key).objects
            except NotFoundError:
                continue  # its gc is over
            if there is None:  # after the list was made, so what is not seen now is gone for good
                there = {info.key for prefix in (*_CONTAINERS, "probe/") for info in store.list(prefix)}
            if there.isdisjoint(objects):
                store.delete([info.key])


def _now(store: ObjectStore, author: Author) -> datetime:
    """The time by the store's clock. Three requests."""
    key = f"probe/{author.new_id().hex()}/now"
    store.put(key, b"")
    try:
        return store.head(key).last_modified
    finally:
        store.delete([key])
