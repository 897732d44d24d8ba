"""What a repository takes, by artifact, run or month: what each would take alone, shares, and what could go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.pack import HEADER, TRAILER_SIZE
from mandapa.format.records import RepackOp, Root
from mandapa.repository.logs import LogFacts, read_logs
from mandapa.repository.prices import Cost, Prices
from mandapa.repository.reach import Reach
from mandapa.repository.state import VersionState, parse_time

if TYPE_CHECKING:
    from mandapa.repository.reach import Ids
    from mandapa.repository.repository import Repository

__all__ = ["By", "Row", "Unreadable", "Usage", "usage"]

By: TypeAlias = Literal["artifact", "run", "month"]

_BROKEN = (NotFoundError, CorruptionError, FormatVersionError)
_FOLDERS = ("packs/", "meta/", "tx/")
_ENTRY = 48  # bytes of a range in its container's table


@dataclass(frozen=True, slots=True)
class Row:
    """What some versions take together. Bytes."""

    name: str
    """The artifact, run or month."""
    versions: int
    """Live ones."""
    deleted: int
    """Deleted ones whose manifest is still there, so that they may be brought back."""
    logical: int
    """What all live versions would take as plain files."""
    stored: int
    """What they take in the store, or would take alone: chunks, bases and manifests, each once."""
    exclusive: int
    """Of that, what no other row has: what would be free if all of them went."""
    reclaimable: int
    """What only deleted versions, or earlier ways to store live ones, reach; of rows that share it, in each."""
    objects: int
    """Objects that hold something of the live versions."""
    writes: int
    """About how many puts it took: one for each of these objects, and one for each commit."""
    cost: Cost
    """Bytes that rows share are split evenly between them."""

    @property
    def shared(self) -> int:
        """Of the stored bytes, what other rows have, too."""
        return self.stored - self.exclusive


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A live version whose manifest cannot be read: nothing of it is counted."""

    address: str
    problem: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a repository takes."""

    by: By
    rows: tuple[Row, ...]
    """Most stored bytes first."""
    total: Row
    """All rows together; what they share counts once. Its cost is that of every object there is, and its reclaimable
    bytes are those that no live version needs, of `unreached` objects and inside of others."""
    unreached: int
    """Objects that no live version needs: `mandapa gc` deletes them, when they are old enough. What a commit that is
    under way has put is among them."""
    unreached_bytes: int
    unreadable: tuple[Unreadable, ...]
    prices: Prices


@dataclass(slots=True)
class _Group:
    """The versions of one row."""

    live: list[tuple[LogFacts, VersionState]] = field(default_factory=list)
    past: list[Root] = field(default_factory=list)
    """Roots that no live version has any more."""
    deleted: int = 0
    commits: int = 0


def usage(
    repository: Repository, by: By, prices: Prices | None, progress: Callable[[str, int], None] | None = None
) -> Usage:
    """What a repository takes; see `Repository.usage`."""
    if by not in get_args(By):
        raise InvalidInputError(f"by={by!r}: use one of {', '.join(get_args(By))}")
    count = _Count(repository, by, prices or Prices.of(repository.url), progress)
    done = False
    try:
        found = count.run()
        done = True
    finally:
        count.reach.close(whole=done)  # what was read before an error need not be read again
    return found


class _Count:
    def __init__(
        self,
        repository: Repository,
        by: By,
        prices: Prices,
        progress: Callable[[str, int], None] | None,
    ) -> None:
        self._repo = repository
        self._by = by
        self._prices = prices
        self._unreadable: list[Unreadable] = []
        # First what is there, then what is needed of it: what a commit puts meanwhile is missing from the former.
        self._sizes = {info.key: info.size for prefix in _FOLDERS for info in repository.store.list(prefix)}
        self._facts = read_logs(repository)
        self._removed = repository.catalog.state.removed
        self.reach = Reach(repository, progress=progress)

    def run(self) -> Usage:
        import numpy as np

        reach = self.reach
        groups = self._groups()
        reach.fetch([version.root for group in groups.values() for _, version in group.live])
        reach.fetch([root for group in groups.values() for root in group.past])
        live = {name: self._live(group) for name, group in groups.items()}
        past = {name: self._past(group) for name, group in groups.items()}
        shares = reach.counted(live.values())
        self._there = np.array([container_key(one) in self._sizes for one in reach.containers], np.bool_)
        rows = [self._row(name, group, live[name], past[name], shares) for name, group in groups.items()]
        rows = [row for row in rows if row.versions or row.deleted or row.reclaimable]
        rows.sort(key=lambda row: (-row.stored, -row.reclaimable, row.name))
        return self._total(rows, shares)

    # -- which versions -----------------------------------------------------------------------------------------------

    def _groups(self) -> dict[str, _Group]:
        """The versions by row."""
        groups: defaultdict[str, _Group] = defaultdict(_Group)
        for facts in self._facts:
            name_of = self._namer(facts)
            state = facts.log.state
            for version in state.versions.values():
                group = groups[name_of(version)]
                group.commits += 1
                if version.deleted is None and not state.closed:
                    group.live.append((facts, version))
                elif version.root.object in self._sizes:
                    group.past.append(version.root)
                    group.deleted += not state.closed
            for version, root in _moved(facts):
                if root.object in self._sizes:
                    groups[name_of(version)].past.append(root)
        return groups

    def _namer(self, facts: LogFacts) -> Callable[[VersionState], str]:
        """Which row a version of this artifact belongs to."""
        if self._by == "run":
            return lambda version: version.record.run or "(no run)"
        if self._by == "month":
            return lambda version: parse_time(version.record.at).strftime("%Y-%m")
        name = facts.name
        if name is None or facts.log.state.closed:
            name = f"{self._removed.get(facts.id, name)} (removed)"
        return lambda _: name

    # -- what they reach ----------------------------------------------------------------------------------------------

    def _live(self, group: _Group) -> Ids:
        """What the live versions of a row reach; those that cannot be read are named, and taken out."""
        try:
            return self.reach.union([version.root for _, version in group.live])
        except _BROKEN:
            group.live = [found for facts, version in group.live if (found := self._readable(facts, version, group))]
            return self.reach.union([version.root for _, version in group.live])

    def _readable(self, facts: LogFacts, version: VersionState, group: _Group) -> tuple[LogFacts, VersionState] | None:
        """The version as it can be read: its bytes may have moved, or it may be deleted, since the log was read.

        Source: docs/format.md §10.9.
        """
        while True:
            try:
                self.reach.of(version.root)
                return facts, version
            except _BROKEN as error:
                state = facts.log.refresh()
                now = state.versions[version.op.number]
                if state.closed or now.deleted is not None:
                    group.deleted += 1
                    return None
                if now.root == version.root:
                    address = f"{facts.name}:v{version.op.number}"
                    self._unreadable.append(Unreadable(address, str(error)))
                    return None
                version = now

    def _past(self, group: _Group) -> Ids:
        """What is still there of the deleted versions of a row, and of what live ones were before they moved."""
        try:
            return self.reach.union(group.past)
        except _BROKEN:  # a clean-up has taken some of it
            roots = [root for root in group.past if self._is_whole(root)]
            return self.reach.union(roots)

    def _is_whole(self, root: Root) -> bool:
        try:
            self.reach.of(root)
        except _BROKEN:
            return False
        return True

    # -- what that is -------------------------------------------------------------------------------------------------

    def _row(self, name: str, group: _Group, live: Ids, past: Ids, shares: Ids) -> Row:
        reach = self.reach
        stored = reach.stored(live)
        count = shares[live]
        objects = self._objects(live)
        gone = past[shares[past] == 0]
        writes = objects + group.commits
        return Row(
            name=name,
            versions=len(group.live),
            deleted=group.deleted,
            logical=sum([version.op.bytes for _, version in group.live]),
            stored=int(stored.sum()),
            exclusive=int(stored[count == 1].sum()),
            reclaimable=int(reach.stored(gone)[self._there[reach.container_of(gone)]].sum()),
            objects=objects,
            writes=writes,
            cost=self._prices.cost(stored=round((stored / count).sum()), writes=writes, reads=objects),
        )

    def _objects(self, ids: Ids) -> int:
        """How many objects ranges are in."""
        import numpy as np

        return len(np.unique(self.reach.container_of(ids)))

    def _total(self, rows: Sequence[Row], shares: Ids) -> Usage:
        import numpy as np

        reach = self.reach
        live = np.flatnonzero(shares)
        numbers = reach.container_of(live)
        needed = np.bincount(numbers, reach.stored(live) + _ENTRY, len(reach.containers))
        dead = unreached = 0
        left = dict(self._sizes)
        for number in np.unique(numbers).tolist():
            size = left.pop(container_key(reach.containers[number]), None)
            if size is not None:
                dead += max(0, size - len(HEADER) - TRAILER_SIZE - int(needed[number]))
        unreached = sum(left.values())
        objects = self._objects(live)
        lines = [*self._repo.catalog.lines, *[line for facts in self._facts for line in facts.log.lines]]
        writes = len(self._sizes) + len(lines)
        stored = sum(self._sizes.values()) + sum(map(len, lines))
        total = Row(
            name="total",
            versions=sum([row.versions for row in rows]),
            deleted=sum([row.deleted for row in rows]),
            logical=sum([row.logical for row in rows]),
            stored=reach.total(live),
            exclusive=sum([row.exclusive for row in rows]),
            reclaimable=dead + unreached,
            objects=objects,
            writes=writes,
            cost=self._prices.cost(stored=stored, writes=writes, reads=objects),
        )
        return Usage(
            by=self._by,
            rows=tuple(rows),
            total=total,
            unreached=len(left),
            unreached_bytes=unreached,
            unreadable=tuple(self._unreadable),
            prices=self._prices,
        )


def _moved(facts: LogFacts) -> Iterator[tuple[VersionState, Root]]:
    """Versions that a repack has moved, each with a root that it had."""
    for record in facts.log.records:
        for op in record.ops:
            if isinstance(op, RepackOp):
                yield facts.log.state.versions[op.version], op.was
