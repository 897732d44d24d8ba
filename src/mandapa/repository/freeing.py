"""What the store would be rid of if versions went: bytes that only they reach."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.repository.logs import LogFacts
from mandapa.repository.reach import Reach

if TYPE_CHECKING:
    from numpy import bool_
    from numpy.typing import NDArray

    from mandapa.repository.reach import Ids
    from mandapa.repository.repository import Repository
    from mandapa.repository.state import ArtifactState, VersionState

__all__ = ["Freed", "Place", "freed"]

_BROKEN = (NotFoundError, CorruptionError, FormatVersionError)

_AT_ONCE = 256
"""Versions whose ranges are looked at together: a bound for memory."""

Place: TypeAlias = tuple[str, int]
"""Artifact id and number of a version."""


class Freed(NamedTuple):
    """What goes with some versions when a gc has passed."""

    bytes: int
    """Stored bytes that only they reach."""
    shared: int
    """Stored bytes that they reach and others, which stay, reach too."""
    objects: int
    """Containers that nothing else reaches: a gc deletes them whole. Other bytes wait until their container is
    rewritten."""
    object_bytes: int
    """Of ``bytes``, those in such containers."""
    alone: dict[Place, int]
    """Of each version the bytes that no other version reaches, whether that goes or stays."""
    unread: list[Place]
    """Live versions whose manifest cannot be read: with any of them, the figures are about right at best."""


def freed(repo: Repository, facts: Sequence[LogFacts], going: Set[Place]) -> Freed:
    """Measure versions against all others that are live; see `Freed`. Costs what `Reach` costs.

    Raises:
        StorageError: The store failed.
    """
    import numpy as np

    live = [(fact, version) for fact in facts if fact.name is not None for version in _live(fact.log.state)]
    places: list[Place] = []
    groups: list[Ids] = []
    unread: list[Place] = []
    reach = Reach(repo)
    reach.fetch([version.root for _, version in live])
    for fact, version in live:
        place = fact.id, version.op.number
        try:
            ids = _ids(reach, fact, version)
        except _BROKEN:
            unread.append(place)
        else:
            if ids is not None:
                places.append(place)
                groups.append(ids)
    size = max([int(ids[-1]) + 1 for ids in groups], default=0)
    goes: NDArray[bool_] = np.zeros(size, np.bool_)
    stays: NDArray[bool_] = np.zeros(size, np.bool_)
    for place, ids in zip(places, groups, strict=True):
        (goes if place in going else stays)[ids] = True
    only = np.flatnonzero(goes & ~stays)
    containers = reach.container_of(only)
    needed: NDArray[bool_] = np.zeros(len(reach.containers), np.bool_)
    needed[reach.container_of(np.flatnonzero(stays))] = True
    whole = ~needed[containers]
    alone = _alone(reach, groups, size)
    reach.close()
    return Freed(
        reach.total(only),
        reach.total(np.flatnonzero(goes & stays)),
        len(np.unique(containers[whole])),
        reach.total(only[whole]),
        {place: stored for place, stored in zip(places, alone, strict=True) if place in going},
        unread,
    )


def _live(state: ArtifactState) -> list[VersionState]:
    return [] if state.closed else [state.versions[number] for number in state.live()]


def _ids(reach: Reach, fact: LogFacts, version: VersionState) -> Ids | None:
    """What a version reaches, where a repack has moved it if need be; None when it was deleted meanwhile.

    Source: docs/format.md §10.9.
    """
    while True:
        try:
            return reach.of(version.root)
        except _BROKEN:
            state = fact.log.refresh()
            now = state.versions[version.op.number]
            if state.closed or now.deleted is not None:
                return None
            if now.root == version.root:
                raise
            version = now


def _alone(reach: Reach, groups: Sequence[Ids], size: int) -> list[int]:
    """Of each group of ids, none of them empty, the stored bytes that no other group has."""
    import numpy as np

    counts: Ids = np.zeros(size, np.int64)
    for at in range(0, len(groups), _AT_ONCE):
        counts += np.bincount(np.concatenate(groups[at : at + _AT_ONCE]), minlength=size)
    found: list[int] = []
    for at in range(0, len(groups), _AT_ONCE):
        some = groups[at : at + _AT_ONCE]
        ids = np.concatenate(some)
        ends = np.cumsum([len(group) for group in some])
        sums = np.concatenate([[0], np.cumsum(np.where(counts[ids] == 1, reach.stored(ids), 0))])
        found += np.diff(sums[np.concatenate([[0], ends])]).tolist()
    return found
