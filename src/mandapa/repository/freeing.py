"""What the store would be rid of if versions went: bytes that only they reach."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.repository.logs import LogFacts
from mandapa.repository.reach import Reach

if TYPE_CHECKING:
    from numpy import bool_, int64
    from numpy.typing import NDArray

    from mandapa.repository.repository import Repository

__all__ = ["Freed", "Place", "freed"]

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

    places: list[Place] = []
    groups: list[NDArray[int64]] = []
    unread: list[Place] = []
    reach = Reach(repo)
    try:
        for fact in facts:
            state = fact.log.state
            for number in state.live() if fact.name is not None and not state.closed else ():
                try:
                    ids = reach.of(state.versions[number].root)
                except (NotFoundError, CorruptionError, FormatVersionError):
                    unread.append((fact.id, number))
                else:
                    places.append((fact.id, number))
                    groups.append(ids)
        size = max([int(ids[-1]) + 1 for ids in groups if len(ids)], default=0)
        gone: NDArray[bool_] = np.zeros(size, np.bool_)
        held: NDArray[bool_] = np.zeros(size, np.bool_)
        for place, ids in zip(places, groups, strict=True):
            (gone if place in going else held)[ids] = True
        only = np.flatnonzero(gone & ~held)
        containers = reach.container_of(only)
        kept: NDArray[bool_] = np.zeros(len(reach.containers), np.bool_)
        kept[reach.container_of(np.flatnonzero(held))] = True
        whole = ~kept[containers]
        alone = reach.exclusive(groups)
        return Freed(
            reach.total(only),
            reach.total(np.flatnonzero(gone & held)),
            len(np.unique(containers[whole])),
            reach.total(only[whole]),
            {place: stored for place, stored in zip(places, alone, strict=True) if place in going},
            unread,
        )
    finally:
        reach.close()
