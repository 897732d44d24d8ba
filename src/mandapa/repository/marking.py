"""What there is in the store, what is live, and what that reaches: the marks of a gc. Source: docs/format.md §10.8."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeAlias

from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError, NotFoundError, StorageError
from mandapa.format.keys import container_key, may_be_swept
from mandapa.format.records import CloseOp, Root
from mandapa.repository.logs import LogFacts, read_logs
from mandapa.repository.reach import Reach
from mandapa.repository.state import ArtifactState, fold

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

    from mandapa.repository.repository import Repository

__all__ = ["CONTAINERS", "Grace", "Look", "Marks", "store_time"]

CONTAINERS = ("packs/", "meta/", "tx/")
"""Where what a gc condemns stands."""

STALE = 86_400.0
"""Seconds after which what a probe has left behind may go."""

Place: TypeAlias = tuple[int, Root]
"""Number of a version, and where its manifest is."""


@dataclass(frozen=True, slots=True)
class Grace:
    """How long what was deleted, or put and never used, stays; by the store's clock alone."""

    now: datetime
    seconds: float

    def over(self, then: datetime) -> bool:
        """Whether what was written at that time of the store is old enough."""
        return (self.now - then).total_seconds() >= self.seconds


class Marks:
    """Keys of the containers that live versions reach; each manifest is read once, and once by each machine.

    A version that is deleted, by a record whose object is younger than the grace, counts as live, and so does one of an
    artifact that was removed as lately.
    """

    def __init__(self, repository: Repository, grace: Grace) -> None:
        self.keys: set[str] = set()
        self.reach = Reach(repository)
        self._repo = repository
        self._grace = grace
        self._roots: set[Root] = set()

    def __contains__(self, root: Root) -> bool:
        """Whether what this root reaches is marked."""
        return root in self._roots

    def add_all(self, several: list[LogFacts]) -> None:
        """Mark what is live at the tails of logs, as they were read. Raises as `add`."""
        live = [(facts, self._live(facts, _last(facts), _last(facts))) for facts in several]
        roots = dict.fromkeys(root for _, found in live for _, root in found)
        try:
            ids = self.reach.union(roots)
        except (NotFoundError, CorruptionError, FormatVersionError):  # one by one, to tell which
            for facts, _ in live:
                self.add(facts, _last(facts))
        else:
            self._mark(ids, roots.keys())

    def add(self, facts: LogFacts, at: int) -> None:
        """Mark what was live at record ``at`` of a log; and at all later ones, if some of it is gone.

        Then another gc has fenced the log after that record and swept a version that had died in between. Versions
        that took bytes over from it were marked by the other gc at its fence, and have to be marked here, too.

        Raises:
            CorruptionError: The manifest of a live version is not whole.
            FormatVersionError: The log, or a version to be marked, needs a newer mandapa.
        """
        gone: set[Place] = set()
        while lost := self._lost(facts, self._live(facts, at, _last(facts) if gone else at), gone):
            gone |= lost
            state = facts.log.refresh()
            for number, root in lost:
                if not state.closed and state.is_live(number, root):
                    raise self._broken(facts, number, root, "an object of its manifest is not there")

    def _live(self, facts: LogFacts, first: int, last: int) -> dict[Place, bool]:
        """What counts as live at any record from ``first`` to ``last``, and whether it really was."""
        if facts.log.state.read_only:
            raise FormatVersionError(f"{_name(facts)}: its log holds ops of a newer mandapa: upgrade to clean up")
        found: dict[Place, bool] = {}
        for state in _states(facts, first, last):
            if state.closed and not self._fresh(facts, _end(facts)):
                continue
            for number, version in state.versions.items():
                live = version.deleted is None and not state.closed
                if version.deleted is None or self._fresh(facts, version.deleted.seq):
                    self._repo.check_features(version.requires, f"{_name(facts)}:v{number}")
                    found[number, version.root] = live or found.get((number, version.root), False)
        return found

    def _fresh(self, facts: LogFacts, seq: int) -> bool:
        """Whether a record is younger than the grace; those that the listing did not show came after *now*."""
        at = facts.times.get(seq)
        return self._grace.seconds > 0 if at is None else not self._grace.over(at)

    def _lost(self, facts: LogFacts, live: dict[Place, bool], gone: set[Place]) -> set[Place]:
        """Mark these; gives the live ones whose manifests are not there."""
        lost: set[Place] = set()
        for (number, root), really in live.items():
            if root in self._roots or (number, root) in gone:
                continue
            try:
                self._mark(self.reach.of(root), {root})
            except NotFoundError:
                if really:
                    lost.add((number, root))
            except CorruptionError as error:
                if really:
                    raise self._broken(facts, number, root, str(error)) from error
        return lost

    def _mark(self, ids: NDArray[int64], roots: Set[Root]) -> None:
        self.keys |= self.keys_of(ids)
        self._roots |= roots

    def keys_of(self, ids: NDArray[int64]) -> set[str]:
        """The keys of the containers in which these ranges are."""
        import numpy as np

        containers = self.reach.containers
        return {container_key(containers[number]) for number in np.unique(self.reach.container_of(ids)).tolist()}

    @staticmethod
    def _broken(facts: LogFacts, number: int, root: Root, why: str) -> CorruptionError:
        return CorruptionError(
            f"{_name(facts)}:v{number} is live, and what it needs cannot be told: {why}. Nothing is cleaned up: run "
            "'mandapa fsck', and delete the versions that it names",
            key=root.object,
        )


class Look:
    """What there is to see at one time of the store's clock. Nothing is written, but an object that tells the time.

    Requests: three for the time, one for each 1,000 objects and 1,000 records, and those of `read_logs`; `mark` those
    of `Reach`.
    """

    def __init__(self, repository: Repository, grace: float) -> None:
        if not 0 <= grace < float("inf"):
            raise InvalidInputError(f"grace={grace}: a number of seconds, 0 or more")
        store = repository.store
        self.repository = repository
        self.grace = Grace(store_time(repository), grace)
        self.listed = {info.key: info for prefix in CONTAINERS for info in store.list(prefix) if may_be_swept(info.key)}
        """The objects that may go if nothing reaches them."""
        old = Grace(self.grace.now, STALE)
        self.stale = {
            info.key: info.size
            for info in store.list("probe/")
            if may_be_swept(info.key) and old.over(info.last_modified)
        }
        """Key -> bytes of what probes left behind."""
        self.marks = Marks(repository, self.grace)
        self.logs: dict[str, LogFacts] = {}
        self.names: dict[str, str] = {}
        """Artifact id -> its name, or its last one."""

    def mark(self) -> None:
        """Read the catalog and all logs, and mark what is live.

        Raises:
            CorruptionError: A log, or the manifest of a live version, is not whole.
            FormatVersionError: The catalog, a log, or a live version needs a newer mandapa.
        """
        facts = read_logs(self.repository)
        self._meet(facts)
        self.marks.add_all(facts)
        self.marks.reach.close()

    def new_logs(self) -> None:
        """Take in what the catalog, as it was read by now, has registered since."""
        state = self.repository.catalog.state
        names = {id_: name for name, id_ in state.names.items()}
        new = sorted({*names, *state.removed} - set(self.logs))
        self._meet([LogFacts(id_, names.get(id_), self.repository.log(id_), {}) for id_ in new])

    def _meet(self, several: list[LogFacts]) -> None:
        state = self.repository.catalog.state
        if state.read_only:
            raise FormatVersionError("the catalog holds ops of a newer mandapa: upgrade to clean up")
        self.logs.update((facts.id, facts) for facts in several)
        self.names = {**state.removed, **{id_: name for name, id_ in state.names.items()}}

    def unreached(self) -> dict[str, int]:
        """Key -> bytes of what nothing reaches and is old enough, what probes left behind included."""
        found = {
            key: info.size
            for key, info in self.listed.items()
            if key not in self.marks.keys and self.grace.over(info.last_modified)
        }
        return {**found, **self.stale}

    def waiting(self) -> int:
        """Bytes of what no version needs any more, but those that were deleted within the grace."""
        states = [facts.log.state for facts in self.logs.values() if not facts.log.state.closed]
        live = {state.versions[number].root for state in states for number in state.live()}
        needed = self.marks.keys_of(self.marks.reach.union(live))
        return sum([self.listed[key].size for key in (self.marks.keys & self.listed.keys()) - needed])


def store_time(repository: Repository) -> datetime:
    """The time by the store's clock, as exact as listings have it. Three requests."""
    store, key = repository.store, f"probe/{repository.author.new_id().hex()}/now"
    store.put(key, b"")
    try:
        for info in store.list(key):
            return info.last_modified
    finally:
        store.delete([key])
    raise StorageError(f"{store.url} does not list what was just put: 'mandapa doctor' checks the store")


def _name(facts: LogFacts) -> str:
    return facts.name or f"the removed artifact {facts.id}"


def _last(facts: LogFacts) -> int:
    """The number of the last record that was read; -1 before the first."""
    return len(facts.log.records) - 1


def _states(facts: LogFacts, first: int, last: int) -> Iterator[ArtifactState]:
    """The state after each record from ``first`` to ``last``."""
    if first == _last(facts):
        yield facts.log.state
        return
    state = ArtifactState()
    for record in facts.log.records[: last + 1]:
        fold(state, record, key=_name(facts))
        if record.seq >= first:
            yield state


def _end(facts: LogFacts) -> int:
    """The number of the record that closed a log."""
    return next(record.seq for record in facts.log.records if record.find(CloseOp) is not None)
