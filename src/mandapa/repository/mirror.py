"""A copy of artifacts in another repository that follows their histories. Source: docs/format.md §10.10."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mandapa.errors import (
    ClosedError,
    ConflictError,
    CorruptionError,
    FormatVersionError,
    InvalidInputError,
    MandapaError,
    NotFoundError,
    StorageError,
)
from mandapa.format.records import FenceOp, Op, Record, RegisterOp, RenameOp, UndeleteOp, VersionOp
from mandapa.format.strict import shown
from mandapa.repository.log import Log
from mandapa.repository.logs import keep_logs, read_logs
from mandapa.repository.replay import (
    artifact_id,
    difference,
    follows,
    is_upkeep,
    origin_of,
    replay,
    txn_id,
)
from mandapa.repository.replica import Replica
from mandapa.repository.state import ArtifactState, CatalogState, VersionState, fold

if TYPE_CHECKING:
    from mandapa.repository.repository import Repository

__all__ = ["Mirrored", "MirroredArtifact", "mirror"]

_TRIES = 20
"""Rounds over one artifact that bring nothing, or tries at one version, that others may spoil."""

_AT_ONCE = 4
"""Artifacts that are mirrored at once."""

_LARGE = 1 << 20
"""Bytes: of larger versions one is copied at a time: what artifacts share is sent once, and memory stays bounded."""


@dataclass(frozen=True, slots=True)
class MirroredArtifact:
    """What a mirror did about one artifact."""

    artifact: str
    versions: int = 0
    """How many were copied."""
    records: int = 0
    """How many were written: one for each of the source."""
    added: int = 0
    """Bytes that were put into the destination, records not counted."""
    error: MandapaError | None = None
    """Why it does not follow its source; what was done by then stays."""
    removed: bool = False
    """It was removed in the source; the destination keeps it."""


@dataclass(frozen=True, slots=True)
class Mirrored:
    """What a mirror did."""

    artifacts: tuple[MirroredArtifact, ...]
    """Sorted by name; those that had nothing new included."""

    @property
    def ok(self) -> bool:
        """Whether all of them follow their source."""
        return all(one.error is None for one in self.artifacts)

    @property
    def added(self) -> int:
        """Bytes that were put into the destination, records not counted."""
        return sum([one.added for one in self.artifacts])


def mirror(
    source: Repository,
    destination: Repository,
    *,
    only: str | Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Mirrored:
    """Let artifacts of the destination say what those of the source say; see `Repository.mirror`."""
    if source.id == destination.id:
        raise InvalidInputError(
            f"{destination.url} is {source.url} itself, or a copy of its bytes: mirror into a repository of its own"
        )
    return _Mirror(source, destination, progress).run((only,) if isinstance(only, str) else tuple(only))


class _AgainError(Exception):
    """Somebody else wrote meanwhile: look at both logs again."""


class _NothingToDoError(Exception):
    """A record of the source says nothing in the destination."""


class _Mirror:
    """All artifacts of one call: which, and under what names."""

    def __init__(self, source: Repository, destination: Repository, progress: Callable[[int], None] | None) -> None:
        self._source = source
        self._destination = destination
        self._progress = progress
        self._all_read = False
        self._stopped = False
        self._large = threading.Lock()

    def run(self, only: tuple[str, ...]) -> Mirrored:
        # The destination first: whatever it has of the source was in the source before.
        if only:
            self._destination.catalog.refresh()
            wanted = self._wanted(only)
            here = self._here()
        else:
            self._read_all()
            wanted = dict(self._source.catalog.state.names)
            here = self._here()
        errors = self._rename(wanted)
        done = self._each([(name, id_, errors.get(id_)) for name, id_ in sorted(wanted.items())])
        for id_ in self._source.catalog.state.removed:
            found = here.get(self._id(id_))
            if found is not None and (not only or _matches(found, only)):
                done.append(MirroredArtifact(found, removed=True))
        if self._all_read:
            keep_logs(self._destination)
        return Mirrored(tuple(sorted(done, key=lambda one: one.artifact)))

    def _read_all(self) -> None:
        """Read all logs together, if they are all sound; else each is read when its turn comes."""
        try:
            read_logs(self._destination)
            read_logs(self._source)
            self._all_read = True
        except (CorruptionError, FormatVersionError):
            self._destination.catalog.refresh()
            self._source.catalog.refresh()

    def _wanted(self, only: tuple[str, ...]) -> dict[str, str]:
        """Name -> id of the artifacts of the source that the patterns name."""
        names = self._source.catalog.refresh().names
        for pattern in only:
            if not any(_matches(name, (pattern,)) for name in names):
                raise self._source.no_artifact(pattern)
        return {name: id_ for name, id_ in names.items() if _matches(name, only)}

    def _here(self) -> dict[str, str]:
        """Id -> name of the artifacts of the destination."""
        return {id_: name for name, id_ in self._destination.catalog.state.names.items()}

    def _id(self, artifact: str) -> str:
        """The id of an artifact's mirror; one that was removed is never used again, so the next one is taken."""
        removed = self._destination.catalog.state.removed
        generation = 0
        while (id_ := artifact_id(self._source.id, artifact, self._destination.id, generation)) in removed:
            generation += 1
        return id_

    def _each(self, chosen: list[tuple[str, str, MandapaError | None]]) -> list[MirroredArtifact]:
        """Several artifacts at once: for most commits waiting for the stores is all that there is to do."""
        workers = min(self._destination.threads, _AT_ONCE, len(chosen))
        if workers < 2:
            return [self._one(*one) for one in chosen]
        pool = ThreadPoolExecutor(workers, thread_name_prefix="mandapa-mirror")
        jobs = [pool.submit(self._one, *one) for one in chosen]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            self._stopped = True
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _put(self, size: int) -> None:
        """So many bytes were put: tell it, or stop whoever has put them."""
        if self._stopped:
            raise ClosedError("the mirror was stopped")
        if self._progress is not None:
            self._progress(size)

    def _one(self, name: str, id_: str, error: MandapaError | None) -> MirroredArtifact:
        one = _Artifact(self._source, self._destination, name, id_, self._id(id_), self._put, self._large)
        if error is None:
            try:
                one.run(read=self._all_read)
            except (ConflictError, CorruptionError, FormatVersionError, InvalidInputError, NotFoundError) as found:
                error = found
        removed = error is None and one.removed
        return MirroredArtifact(name, one.versions, one.records, one.added, error, removed)

    # Names

    def _rename(self, wanted: dict[str, str]) -> dict[str, MandapaError]:
        """Give mirrors the names that their artifacts have in the source; gives why not by the id there."""
        here = self._here()
        waiting = {id_: name for name, id_ in wanted.items() if here.get(self._id(id_), name) != name}
        while waiting:
            moved = [id_ for id_, name in waiting.items() if self._try_name(self._id(id_), name)]
            for id_ in moved:
                del waiting[id_]
            if not moved and not self._step_aside(waiting):
                break
        return {
            id_: ConflictError(
                f"{name!r} was renamed in the source, and {self._destination.url} has another artifact of that name: "
                "rename or remove that one, or mirror it too"
            )
            for id_, name in waiting.items()
        }

    def _step_aside(self, waiting: dict[str, str]) -> bool:
        """Free a name where names went round in a circle; whether there was one."""
        low = {name.lower(): id_ for id_, name in self._here().items()}
        mine = {self._id(id_): id_ for id_ in waiting}
        for start in waiting:
            way = [start]
            while (blocker := mine.get(low.get(waiting[way[-1]].lower(), ""))) is not None and blocker not in way:
                way.append(blocker)
            if blocker == start:
                return self._try_name(self._id(start), f"mirror-{self._id(start)}")
        return False

    def _try_name(self, artifact: str, name: str) -> bool:
        """Rename an artifact of the destination, if the name is free."""
        repo = self._destination

        def build(state: CatalogState) -> Iterable[Op]:
            if state.name_of(artifact) in (None, name):
                raise _NothingToDoError
            return [RenameOp(artifact, name)]

        with suppress(_NothingToDoError):
            try:
                repo.catalog.append(repo.author.new_id().hex(), build, repo.author)
            except ConflictError:
                return False
        return True


class _Artifact:
    """One artifact that follows another one."""

    def __init__(
        self,
        source: Repository,
        destination: Repository,
        name: str,
        artifact: str,
        mirror_id: str,
        progress: Callable[[int], None],
        large: threading.Lock,
    ) -> None:
        self._from = source
        self._to = destination
        self._name = name
        self._artifact = artifact
        self._id = mirror_id
        self._there: Log[ArtifactState] = source.log(artifact)
        self._here: Log[ArtifactState] = destination.log(mirror_id)
        self._progress = progress
        self._large = large
        self._ours: set[str] = set()
        self._told = 0
        """How many records of the source are told, as of the last look."""
        self._seen = 0
        """Records of the mirror that this round knows: what others say after them begins a new one."""
        self._current = False
        """Whether the mirror's log was read to its tail just now."""
        self.versions = self.records = self.added = 0
        self.removed = False

    def run(self, *, read: bool) -> None:
        """Tell again what is new; ``read``: both logs were just read."""
        if not read:
            self._look()
        if self._there.state.read_only:
            raise FormatVersionError(f"{self._name}: its log holds ops of a newer mandapa: upgrade to mirror it")
        tries, told = 0, -1
        while tries < _TRIES:
            try:
                return self._round()
            except _AgainError:
                self._look()
            tries = 0 if self._told > told else tries + 1
            told = self._told
        raise StorageError(f"{self._name}: others keep writing to its mirror; try later", retryable=True)

    def _look(self) -> None:
        """Read both logs: the destination's first."""
        self._here.refresh()
        self._there.refresh()

    def _round(self) -> None:
        if self._there.state.closed:
            self.removed = self._to.catalog.state.name_of(self._id) is not None
            return
        records = [record for record in self._there.records if follows(record)]
        txns = [txn_id(self._from.id, self._artifact, record, self._id) for record in records]
        self._ours = set(txns)
        if records:
            self._register()
        if self._here.state.closed:
            raise ConflictError(f"{self._name}: its mirror is being removed; 'mandapa artifact remove' ends that")
        self._seen = len(self._here.records)
        told = {record.txn for record in self._here.records}
        first = self._told = next((at + 1 for at in reversed(range(len(txns))) if txns[at] in told), 0)
        state = self._state_at(records[first - 1].seq if first else -1, all_=first == len(records))
        self._compare(state)
        for record, txn in zip(records[first:], txns[first:], strict=True):
            self._follow(record, txn)

    def _state_at(self, seq: int, *, all_: bool) -> ArtifactState:
        """What the source says at one of its records."""
        if all_:
            return self._there.state  # what came after it was upkeep
        state = ArtifactState()
        for record in self._there.records[: seq + 1]:
            fold(state, record, key=self._name)
        return state

    def _compare(self, state: ArtifactState) -> None:
        """Make sure that the mirror says what the source says, and no more."""
        found = difference(state, self._here.state, self._ours)
        if not found:
            return
        others = [one for one in self._here.records if one.txn not in self._ours and not is_upkeep(one)]
        last = f" (last changed here by {shown(others[-1].by)} at {shown(others[-1].at)})" if others else ""
        raise ConflictError(
            f"{self._name}: {self._to.url} has something of its own: {found}{last}. Put it back as it is in the "
            "source, or rename or remove the artifact there; then mirror again"
        )

    def _register(self) -> None:
        """The artifact is in the destination's catalog before anything of it is in its store."""
        catalog = self._to.catalog
        if catalog.state.name_of(self._id) is not None:
            return

        def build(state: CatalogState) -> Iterable[Op]:
            if state.name_of(self._id) is not None or self._id in state.removed:
                raise _NothingToDoError
            for other in state.names:
                if other.lower() == self._name.lower():
                    raise ConflictError(
                        f"{self._to.url} has an artifact {other!r} that does not come from {self._from.url}: "
                        "rename or remove it there, then mirror again"
                    )
            return [RegisterOp(self._name, self._id)]

        with suppress(_NothingToDoError):
            catalog.append(self._to.author.new_id().hex(), build, self._to.author)
        if self._id in catalog.state.removed:
            raise NotFoundError(f"{self._name}: its mirror was removed meanwhile; mirror again for a new one")

    # One record

    def _follow(self, record: Record, txn: str) -> None:
        """Tell one record again, with the content of the versions that it makes."""
        numbers = _brought(record)
        if numbers and not self._current:
            self._here.refresh()  # another mirror may have told it, and copied what it needs
        for other in self._here.records[self._seen :]:
            self._seen += 1
            if other.txn == txn:
                return  # by another mirror
            if not is_upkeep(other):
                raise _AgainError
        self._current = False
        copies: dict[int, Replica] = {}
        for number in numbers:
            copy = self._copy(number, txn)
            if copy is not None:
                copies[number] = copy
        origins = {
            op.number: origin_of(self._there.state.versions[op.number], self._from.id, self._from.url, self._artifact)
            for op in record.ops
            if isinstance(op, VersionOp)
        }
        contents = {number: copy.content for number, copy in copies.items()}
        fenced = False

        def notice(other: Record) -> None:
            nonlocal fenced
            fenced = fenced or other.find(FenceOp) is not None
            if not is_upkeep(other):
                raise _AgainError

        def build(state: ArtifactState) -> Iterable[Op]:
            nonlocal fenced
            if not all(copy.stands(state, fenced=fenced) for copy in copies.values()):
                raise _AgainError
            fenced = False
            ops = replay(record, state.copy(), contents, origins)
            if not ops:
                raise _NothingToDoError
            return ops

        author = self._to.author
        with suppress(_NothingToDoError):
            made = self._here.append(
                txn, build, author, since=self._seen, on_record=notice, run=record.run, used=record.used
            )
            self._seen = made.seq + 1
            self._current = True
            self.records += 1
        self.versions += len(copies)

    def _copy(self, number: int, txn: str) -> Replica | None:
        """All that a version holds put into the destination; None if it is deleted by now."""
        for _ in range(_TRIES):
            version = self._there.state.versions[number]
            if self._there.state.closed:
                raise _AgainError
            if version.deleted is not None:
                return None
            copy = Replica(self._from, self._to, self._name, version, self._here.state, self._progress)
            alone = self._large if version.op.bytes > _LARGE else nullcontext()
            try:
                with alone:
                    copy.run(f"{txn} {number}".encode())
            except (NotFoundError, ConflictError) as error:
                self._explain(version, copy.base, error)
            else:
                return copy
            finally:
                self.added += copy.added
        raise StorageError(f"{self._name}:v{number} keeps moving while it is read; try later", retryable=True)

    def _explain(self, version: VersionState, base: VersionState | None, error: MandapaError) -> None:
        """An object is not there: go on where it was moved, or find out who is to blame."""
        before = len(self._here.records)
        self._look()
        if base is not None and not self._here.state.is_live(base.op.number, base.root):
            raise _AgainError from error
        if any(not is_upkeep(record) for record in self._here.records[before:]):
            raise _AgainError from error
        number = version.op.number
        if not self._there.state.closed and self._there.state.is_live(number, version.root):
            raise CorruptionError(f"{self._name}:v{number}: {error}: run 'mandapa fsck' there") from error


def _brought(record: Record) -> list[int]:
    """The versions that a record makes or brings back."""
    numbers = [op.number for op in record.ops if isinstance(op, VersionOp)]
    return numbers + [number for op in record.ops if isinstance(op, UndeleteOp) for number in op.versions]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
