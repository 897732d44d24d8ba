"""Packs of which little is needed any more are emptied: versions move on to new ones. Source: docs/format.md §10.7."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar

import msgspec

from mandapa.content.moving import Mover
from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.manifest import NodeAddress
from mandapa.format.records import CloseOp
from mandapa.repository.log import Log
from mandapa.repository.logs import LogFacts, read_logs
from mandapa.repository.move import CondemnedError, Move, StaleError
from mandapa.repository.plan import Plan
from mandapa.repository.reach import Reach
from mandapa.repository.state import ArtifactState, VersionState
from mandapa.repository.version import root_of

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy import int64
    from numpy.typing import NDArray

    from mandapa.repository.repository import Repository

    Ids: TypeAlias = NDArray[int64]
    _Counted: TypeAlias = tuple[LogFacts, VersionState]

__all__ = ["HalfDead", "RewritePlan", "Rewritten", "plan_rewrite", "rewrite"]

_GROUP_BYTES = 128 << 20
"""Stored bytes that are moved before the versions that need them are: what several versions need fills packs."""

_GROUP_VERSIONS = 256

_ENTRY = 48
"""Bytes that a container's table takes for each chunk."""

_VERSION = 1 << 10
"""Bytes that it takes to move a version, besides its nodes: a record, and header and table of a container."""

_FAILURES = (NotFoundError, CorruptionError, FormatVersionError)

_KEY = re.compile(r"(packs|meta)/([0-9a-f]{32})", re.ASCII)


class HalfDead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pack of which live versions need at most half."""

    key: str
    size: int
    """Its bytes."""
    used: int
    """Those that live versions need."""

    def check(self) -> None:
        """Refuse a key that is none of a container."""
        _container(self.key)


class RewritePlan(Plan, tag="rewrite", frozen=True):
    """What rewriting packs would free, and what it takes; as JSON it can be kept, read and applied later."""

    of: ClassVar[str] = "rewriting packs"

    repository: str
    """Its id."""
    packs: tuple[HalfDead, ...]
    """Largest gain first."""
    manifests: int
    """Bytes of manifest nodes that would be made anew."""
    versions: int
    """How many versions would move."""

    @property
    def keys(self) -> list[str]:
        """The keys of the packs, for `rewrite`."""
        return [pack.key for pack in self.packs]

    @property
    def freed(self) -> int:
        """Bytes that a gc can free when all is done."""
        return sum([pack.size for pack in self.packs])

    @property
    def written(self) -> int:
        """Bytes that are put for that, about."""
        return sum([pack.used for pack in self.packs]) + self.manifests + self.versions * _VERSION

    def check(self) -> None:
        """Refuse a plan that names anything but containers."""
        for pack in self.packs:
            pack.check()


def plan_rewrite(
    repo: Repository, *, grace: float, least: int = 4 << 20, now: datetime | None = None, reach: Reach | None = None
) -> RewritePlan:
    """Which packs are worth being emptied: at least half dead, and more is freed than has to be written. No write.

    Left out are packs that are younger than ``grace``, which a commit under way may need; those that a version needs
    which was deleted less than ``grace`` ago, for a gc could not take them yet; and those that a version needs which
    only a newer mandapa can move. A pack that nothing needs is a gc's business, not this one's.

    Requests: one for each 1,000 packs, those of `read_logs`, and those of `Reach` for what this machine has not seen.

    Args:
        repo: The repository.
        grace: Seconds.
        least: Bytes; a plan that frees no more than that, less what is written, is empty.
        now: The store's time, by which ages are told; by default this machine's, which decides nothing about safety.
        reach: What versions reach, if at hand.

    Raises:
        CorruptionError: A log, or the manifest of a live version, is not whole.
        FormatVersionError: One needs a newer mandapa.
        StorageError: The store failed.
    """
    own = Reach(repo) if reach is None else reach
    plan = _Plan(repo, grace, now or repo.author.clock(), own).make(least)
    if reach is None:
        own.close()
    return plan


class _Plan:
    def __init__(self, repo: Repository, grace: float, now: datetime, reach: Reach) -> None:
        self._repo = repo
        self._grace = grace
        self._now = now
        self._reach = reach

    def make(self, least: int) -> RewritePlan:
        """What is worth it."""
        listed = {info.key: info for info in self._repo.store.list("packs/") if _KEY.fullmatch(info.key)}
        live: list[_Counted] = []
        held: list[_Counted] = []
        for facts in read_logs(self._repo):
            for version in self._counted(facts):
                (live if self._moves(facts.log.state, version) else held).append((facts, version))
        needed = self._bytes(self._union(held))
        found = {}
        for container, used in self._bytes(self._union(live)).items():
            info = listed.get(container_key(container))
            if info is None or container in needed or self._is_young(info.last_modified) or 2 * used > info.size:
                continue
            found[container] = HalfDead(info.key, info.size, used)
        plan = RewritePlan(self._repo.id, (), 0, 0)
        if sum([pack.size - pack.used for pack in found.values()]) > least:
            plan = self._worth(found, live)
        return plan if plan.freed - plan.written > least else RewritePlan(self._repo.id, (), 0, 0)

    def _counted(self, facts: LogFacts) -> Iterator[VersionState]:
        """The versions that count as live for a gc: docs/format.md §10.8."""
        state = facts.log.state
        if state.closed:
            end = next(record.seq for record in facts.log.records if record.find(CloseOp) is not None)
            if not self._is_young(facts.times.get(end)):
                return
        for version in state.versions.values():
            if version.deleted is None or self._is_young(facts.times.get(version.deleted.seq)):
                yield version

    def _moves(self, state: ArtifactState, version: VersionState) -> bool:
        """Whether a version is live, and of what this mandapa knows all of."""
        with suppress(FormatVersionError):
            self._repo.check_features(version.requires, "")
            return version.deleted is None and not state.closed and not state.read_only
        return False

    def _is_young(self, time: datetime | None) -> bool:
        return time is None or (self._now - time).total_seconds() < self._grace

    def _reached(self, facts: LogFacts, version: VersionState) -> Ids:
        import numpy as np

        try:
            return self._reach.of(version.root)
        except NotFoundError as error:
            state = facts.log.refresh()
            if not state.closed and state.is_live(version.op.number, version.root):
                where = f"{facts.name}:v{version.op.number}"
                raise CorruptionError(f"{where}: {error}; run 'mandapa fsck'", key=version.root.object) from error
            return np.zeros(0, np.int64)  # deleted, or moved, and swept meanwhile

    def _union(self, several: list[_Counted]) -> Ids:
        try:
            return self._reach.union([version.root for _, version in several])
        except NotFoundError:
            return self._reach.union([version.root for facts, version in several if len(self._reached(facts, version))])

    def _bytes(self, ids: Ids) -> dict[bytes, int]:
        """Container -> bytes that these ranges take there, entries of its table included."""
        import numpy as np

        numbers, stored = self._reach.container_of(ids), self._reach.stored(ids) + _ENTRY
        sums = np.bincount(numbers, stored, len(self._reach.containers)).astype(np.int64)
        return {self._reach.containers[number]: int(sums[number]) for number in np.unique(numbers).tolist()}

    def _worth(self, found: dict[bytes, HalfDead], roots: list[_Counted]) -> RewritePlan:
        """Those packs of which the gain is more than the manifests that they alone, or with others, take."""
        nodes = _Nodes(self._reach, found)
        while True:
            nodes.containers = frozenset(found)
            gain = {container: float(pack.size - pack.used) for container, pack in found.items()}
            costs: list[tuple[int, frozenset[bytes]]] = []
            for facts, version in roots:
                try:
                    costs.append((_VERSION, nodes.below(root_of(version.root))))
                except NotFoundError:
                    self._reached(facts, version)
            versions = sum([bool(below) for _, below in costs])
            costs += nodes.made()
            for size, below in costs:
                for container in below:
                    gain[container] -= size / len(below)
            lost = [container for container in found if gain[container] <= 0]
            if not lost:
                break
            for container in lost:
                del found[container]
        packs = sorted(found.values(), key=lambda pack: (pack.used - pack.size, pack.key))
        return RewritePlan(self._repo.id, tuple(packs), sum([size for size, _ in nodes.made()]), versions)


class _Nodes:
    """Which manifest nodes name some of a set of containers, themselves or by what is below them."""

    def __init__(self, reach: Reach, containers: Collection[bytes]) -> None:
        self._reach = reach
        self._known: dict[NodeAddress, frozenset[bytes]] = {}
        self.containers = frozenset(containers)
        """They may become fewer."""

    def below(self, address: NodeAddress) -> frozenset[bytes]:
        """Those of the containers that a tree needs."""
        found = self._known.get(address)
        if found is None:
            ids, children = self._reach.node(address)
            numbers = set(self._reach.container_of(ids).tolist())
            own = self.containers.intersection([address.container, *[self._reach.containers[at] for at in numbers]])
            found = self._known[address] = own.union(*map(self.below, children))
        return found & self.containers

    def made(self) -> list[tuple[int, frozenset[bytes]]]:
        """Stored bytes of each node that was asked for and would be made anew, and the containers for which."""
        found = [(address.stored, below & self.containers) for address, below in self._known.items()]
        return [(size, below) for size, below in found if below]


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What became of one version that needed something of the emptied packs."""

    artifact: str
    version: int
    put: int
    """Bytes put into the store since the version before, which versions after this one may share."""
    skipped: str = ""
    """Why it was not moved; empty where it was."""

    @property
    def address(self) -> str:
        """``name:v12``."""
        return f"{self.artifact}:v{self.version}"


def rewrite(
    repo: Repository, containers: Collection[str], *, progress: Callable[[int], None] | None = None
) -> Iterator[Rewritten]:
    """Every live version needs nothing of these containers any more, but for those named as skipped.

    What the versions hold, their numbers and digests stay. Chunks are copied as they are stored, each once for all
    versions and artifacts, after they were decoded and found to be what was stored; then each version that needs them
    is moved by a commit of its own, and readers go on there. The containers themselves are left to the next gc. Killed,
    it leaves every version whole, some of them moved, and objects that a gc takes. Safe beside writers, readers,
    clean-ups and other moves; a version that is made meanwhile may need the containers again.

    Requests: those of `read_logs`, and those of `Reach` for what this machine has not seen; one for each manifest node
    that is made anew; about one for each of the containers, and for each that bases of its deltas are in; one put for
    each 16 MiB; two for each version that moves. Memory: see `Mover`; with four threads about 250 MB.

    Args:
        repo: The repository.
        containers: Keys, such as ``packs/...``; `plan_rewrite` says which are worth it.
        progress: Called with the bytes of each container that was put, from any thread.

    Raises:
        InvalidInputError: One is no key of a container.
        CorruptionError, FormatVersionError: A log cannot be read.
        StorageError: The store failed; what was moved by then stays moved.
    """
    doomed = {_container(key) for key in containers}
    if doomed:
        yield from _Rewrite(repo, doomed, progress).run()


def _container(key: str) -> bytes:
    found = _KEY.fullmatch(key)
    if found is None:
        raise InvalidInputError(f"{key!r} is no key of a container")
    return (b"p" if found[1] == "packs" else b"m") + bytes.fromhex(found[2])


@dataclass(frozen=True, slots=True)
class _Target:
    name: str
    log: Log[ArtifactState]
    version: VersionState


class _Rewrite:
    def __init__(self, repo: Repository, doomed: set[bytes], progress: Callable[[int], None] | None) -> None:
        self._repo = repo
        self._reach = Reach(repo)
        self._nodes = nodes = _Nodes(self._reach, doomed)
        self._mover = Mover(
            repo.store,
            repo.reader,
            doomed,
            touches=lambda address: bool(nodes.below(address)),
            link=repo.link,
            threads=repo.threads,
            new_id=repo.author.new_id,
        )
        self._mover.progress = progress
        self._told = 0
        self._since: dict[str, int] = {}

    def run(self) -> Iterator[Rewritten]:
        """Group after group: what its versions need is copied, then each of them is moved."""
        with self._mover:
            group: list[_Target] = []
            for target in self._targets():
                why = self._look(target)
                if why:
                    yield self._done(target, why)
                    continue
                group.append(target)
                if self._mover.waiting > _GROUP_BYTES or len(group) >= _GROUP_VERSIONS:
                    yield from self._move_all(group)
                    group = []
            yield from self._move_all(group)

    def _targets(self) -> Iterator[_Target]:
        """The live versions that need the containers, or cannot be read.

        Every log is read before the first put, so that a gc which comes after it shows there.
        """
        found = []
        for facts in read_logs(self._repo):
            state = facts.log.state
            self._since[facts.id] = len(facts.log.records)
            if facts.name is not None and not state.closed:
                found += [_Target(facts.name, facts.log, state.versions[number]) for number in state.live()]
        found.sort(key=lambda target: (target.name, target.version.op.number))
        self._reach.fetch([target.version.root for target in found])
        self._reach.close()
        for target in found:
            try:
                if self._nodes.below(root_of(target.version.root)):
                    yield target
            except _FAILURES:
                yield target  # who moves it will say why it cannot be

    def _look(self, target: _Target) -> str:
        """Find what a version needs; why that cannot be, or empty."""
        try:
            self._repo.check_features(target.version.requires, f"v{target.version.op.number}")
            self._mover.look(root_of(target.version.root))
        except _FAILURES as error:
            return self._explain(target, error)
        return ""

    def _move_all(self, group: list[_Target]) -> Iterator[Rewritten]:
        self._mover.copy()
        for target in group:
            why = self._move(target)
            if why is not None:
                yield self._done(target, why)

    def _move(self, target: _Target) -> str | None:
        """Make a version's manifest anew and commit that; why not, or empty, or None where nothing of it moves."""
        repo, log, version = self._repo, target.log, target.version
        old = root_of(version.root)
        try:
            # Nothing is left of the first two to do, but after a clean-up that came in between.
            self._mover.look(old)
            self._mover.copy()
            root = self._mover.moved(old)
            if root == old:
                return None
            if repo.reader.digest(root).hex() != version.op.digest:
                raise CorruptionError("its manifest holds something else than its record says: run 'mandapa fsck'")
            self._mover.flush()
            record = Move(version, root, version.requires, self._mover.fresh).commit(repo, log, self._since[log.id])
        except (*_FAILURES, InvalidInputError) as error:  # the last: a node would be larger than one may be
            return self._explain(target, error)
        except StaleError as error:
            if isinstance(error, CondemnedError):
                self._mover.forget()
            return str(error)
        # All that was put was looked at after the last fence before this record, if there was one.
        self._since[log.id] = record.seq + 1
        return ""

    def _explain(self, target: _Target, error: Exception) -> str:
        """Why a version cannot be read: it may be that it is not there any more."""
        state = target.log.refresh()
        if state.closed or not state.is_live(target.version.op.number, target.version.root):
            return "it was deleted or stored otherwise meanwhile"
        return f"it cannot be moved: {error}"

    def _done(self, target: _Target, skipped: str) -> Rewritten:
        put, self._told = self._mover.added - self._told, self._mover.added
        return Rewritten(target.name, target.version.op.number, put, skipped)
