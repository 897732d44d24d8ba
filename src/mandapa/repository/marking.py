"""What is live, and which containers that reaches: the marks of a gc. Source: docs/format.md §10.8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeAlias

from mandapa.content.tree import Tree
from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.records import CloseOp, Root
from mandapa.repository.log import Log
from mandapa.repository.state import ArtifactState, VersionState, fold
from mandapa.repository.version import root_of

if TYPE_CHECKING:
    from mandapa.repository.repository import Repository

__all__ = ["Grace", "History", "Marks"]

Live: TypeAlias = dict[tuple[int, Root], VersionState]
"""Versions, and where their manifests are."""


@dataclass(frozen=True, slots=True)
class Grace:
    """How long what was deleted, or put and never used, stays; by the store's clock alone."""

    now: datetime
    seconds: float

    def over(self, then: datetime) -> bool:
        """Whether what was written at that time of the store is old enough."""
        return (self.now - then).total_seconds() >= self.seconds


@dataclass(slots=True)
class History:
    """The log of an artifact, and when its records came into being."""

    id: str
    name: str
    """Its name, or the last one."""
    log: Log[ArtifactState]
    times: dict[int, datetime]
    """Number of a record -> last-modified of its object. Records that came later than *now* are missing."""

    @property
    def last(self) -> int:
        """The number of the last record that was read; -1 before the first."""
        return len(self.log.records) - 1

    def live(self, grace: Grace, first: int, last: int) -> Live:
        """What was live at any record from ``first`` to ``last``.

        What was deleted, or closed, by a record that is younger than the grace counts as live.
        """
        found: Live = {}
        for state in self._states(first, last):
            if state.closed and not self._fresh(self._end(), grace):
                continue
            for number, version in state.versions.items():
                if version.deleted is None or self._fresh(version.deleted.seq, grace):
                    found[number, version.root] = version
        return found

    def _states(self, first: int, last: int) -> Iterator[ArtifactState]:
        if first == self.last:
            yield self.log.state
            return
        state = ArtifactState()
        for record in self.log.records[: last + 1]:
            fold(state, record, key=self.name)
            if record.seq >= first:
                yield state

    def _end(self) -> int:
        return next(record.seq for record in self.log.records if record.find(CloseOp) is not None)

    def _fresh(self, seq: int, grace: Grace) -> bool:
        at = self.times.get(seq)
        return grace.seconds > 0 if at is None else not grace.over(at)


class Marks:
    """Keys of the containers that live versions reach; each manifest is read once."""

    def __init__(self, repository: Repository, grace: Grace) -> None:
        self.keys: set[str] = set()
        self._repo = repository
        self._grace = grace
        self._roots: set[Root] = set()

    def add(self, history: History, at: int) -> None:
        """Mark what was live at record ``at`` of a log; and at all later ones, if some of it is gone.

        Then another gc has fenced the log after that record and swept a version that had died in between. Versions
        that took bytes over from it were marked by the other gc at its fence, and have to be marked here, too.

        Raises:
            CorruptionError: An object that a live version needs is gone.
            FormatVersionError: The log, or a version to be marked, needs a newer mandapa.
        """
        log, gone = history.log, set[tuple[int, Root]]()
        while lost := self._lost(history, history.live(self._grace, at, history.last if gone else at), gone):
            gone |= lost
            state = log.refresh()
            for number, root in lost:
                if not state.closed and state.is_live(number, root):
                    raise CorruptionError(
                        f"{history.name}:v{number} needs an object that is not there, and what else it needs cannot be "
                        "told: run 'mandapa fsck', delete the versions that it names, and clean up then",
                        key=root.object,
                    )

    def _lost(self, history: History, live: Live, gone: set[tuple[int, Root]]) -> set[tuple[int, Root]]:
        """Mark these; gives those whose manifests are not there."""
        if history.log.state.read_only:
            raise FormatVersionError(f"{history.name}: its log holds ops of a newer mandapa: upgrade to clean up")
        lost = set()
        for (number, root), version in live.items():
            if root in self._roots or (number, root) in gone:
                continue
            self._repo.check_features(version.requires, f"{history.name}:v{number}")
            try:
                containers = {*Tree(self._repo.reader, root_of(root)).containers()}
            except NotFoundError:
                lost.add((number, root))
                continue
            self.keys.update(map(container_key, containers))
            self._roots.add(root)
        return lost
