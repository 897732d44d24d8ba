"""One backend of a run: takes what was handed over, batch by batch, and makes versions of it."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mandapa.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ConflictError,
    InvalidInputError,
    MandapaError,
    NotFoundError,
    StorageError,
)
from mandapa.format.keys import CATALOG, log_key
from mandapa.format.records import Record
from mandapa.repository.artifact import Artifact
from mandapa.repository.paths import folders_of
from mandapa.repository.repository import Repository
from mandapa.repository.transaction import Transaction
from mandapa.repository.version import Version
from mandapa.run.backend import open_repository
from mandapa.run.batches import Batch, Feed, Handed, next_batch
from mandapa.run.directory import RunDirectory
from mandapa.run.journal import (
    OUTCOMES,
    ArtifactEntry,
    AssetEntry,
    CheckpointEntry,
    EndEntry,
    Entry,
    Intervals,
    Journal,
    Made,
    Refused,
    Started,
    UrlEntry,
)
from mandapa.run.logger import BackendSpec

__all__ = ["CHECKPOINT", "INCOMPLETE", "Committer", "Hub", "newest_checkpoint", "size_of", "waits"]

CHECKPOINT = "checkpoint"
"""The folder of a version in which its checkpoint is."""
INCOMPLETE = "incomplete-checkpoint"
"""The folder for the parts of a checkpoint whose other parts were never handed over."""

_IDLE = 1.0  # seconds between looks when nothing happens; what happens is told at once
_PAUSE_FIRST, _PAUSE_MOST = 0.5, 60.0  # seconds after a failure
_TEXT_MAX = 64 << 10
_USED_MAX = 100  # addresses that a record names, the newest: with the longest names they leave room for the rest


@dataclass
class Hub:
    """What the threads of an uploader share; every field is read and written under `changed`."""

    feed: Feed = field(default_factory=Feed)
    seen: dict[tuple[int, int], float] = field(default_factory=dict)
    """(rank, number) -> when the entry was first seen, by the monotonic clock."""
    urgent: bool = False
    """Everything that waits is to be committed."""
    asked: int = 0
    """How often somebody asked for a commit; who pauses tries again at once then."""
    newest_first: bool = False
    """The machine is about to go."""
    stopping: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def waited(self, rank: int, n: int) -> float:
        """Seconds since an entry was first seen."""
        return time.monotonic() - self.seen.get((rank, n), time.monotonic())


class Committer:
    """Commits to one backend, in its own time: a store that is down holds up nobody else.

    Args:
        key: Of the backend.
        spec: Where it is.
        directory: The run's.
        hub: Shared with the uploader.
        commit_every: Seconds that something waits at most.
        tell: Takes a line for the uploader's log.
    """

    def __init__(
        self,
        key: str,
        spec: BackendSpec,
        directory: RunDirectory,
        hub: Hub,
        *,
        commit_every: float,
        tell: Callable[[str], None],
    ) -> None:
        self.key = key
        self._thread = threading.Thread(target=self._work, name=f"mandapa-{key}", daemon=True)
        self._spec = spec
        self._directory = directory
        self._hub = hub
        self._commit_every = commit_every
        self._tell = tell
        self._journal = Journal(directory.outcomes(key), OUTCOMES)
        self._repo: Repository | None = None
        self._failures = 0
        self.refused: set[tuple[int, int]] = set()
        """(rank, number) of versions of other artifacts that the repository would not have."""
        self._started: Started | None = None
        self._ahead: list[tuple[int, int]] = []  # the parts of the checkpoint that was last committed out of turn
        self.done = Intervals()
        """What is committed; replaced, never changed."""
        self.report: dict[str, Any] = {"state": "opening", "store": spec.store, "artifact": spec.artifact}
        """The backend as `status.json` tells it."""
        self._tip: int | None = None
        self._attempt = 0  # the newest one that something was committed of
        for line in self._journal.found:
            self._fold(line)
        self._journal.found.clear()

    def _fold(self, line: Started | Made | Refused) -> None:
        if isinstance(line, Started):
            self._started = line
            return
        started, self._started = self._started, None
        if isinstance(line, Refused):
            return
        if line.version:
            self.report["committed"] = line.version
        if started is None or started.txn != line.txn or started.early:
            return
        done = Intervals()
        done.add(self.done.stretches())
        done.add(started.batch)
        self.done = done
        if started.folder:
            self._tip = line.number
            self._attempt = max(self._attempt, started.attempt)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work, in a thread."""
        self._thread.start()

    def stop(self, patience: float) -> None:
        """Wait until the thread has seen that the uploader stops; one that hangs in a store is left behind."""
        self._thread.join(patience)

    def _work(self) -> None:
        """Work until the uploader stops; whatever fails is tried again, after longer and longer pauses."""
        while not self._hub.stopping:
            try:
                self._step(_IDLE)
            except Exception as error:  # noqa: BLE001 - nothing may end this thread: bytes would wait for ever
                self._fail(error)

    def _step(self, patience: float = 0.0) -> bool:
        """Do the next thing; when there is none, wait until something happens, ``patience`` seconds at most."""
        if self._repo is None:
            self._open()
        if self._started is not None:
            self._finish(self._started)
            return True
        if self._hub.newest_first and self._early():
            return True
        with self._hub.changed:
            batch = self._next()
            if batch is None:
                if not (self._hub.stopping or self._hub.newest_first):
                    self._hub.changed.wait(patience)  # in the hold in which it looked: nothing comes unheard in between
                return False
        self._begin(batch)
        return True

    def _next(self) -> Batch | None:
        feed, hub, handled = self._hub.feed, self._hub, self._handled()
        oldest = max(
            (
                hub.waited(rank, entry.n)
                for rank, entries in feed.entries.items()
                for entry in entries
                if waits(feed, self.key, handled, rank, entry)
            ),
            default=0.0,
        )
        urgent = hub.urgent or oldest >= self._commit_every
        return next_batch(feed, self.key, handled, urgent=urgent, waited=hub.waited)

    def pending(self) -> tuple[int, int]:
        """How many things wait, and their bytes. Call it under the hub's condition."""
        count = size = 0
        for rank, entries in self._hub.feed.entries.items():
            for entry in entries:
                if waits(self._hub.feed, self.key, self.done, rank, entry):
                    count += 1
                    size += size_of(entry)
        return count, size

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        known = isinstance(error, MandapaError)
        if not known:
            self._tell(traceback.format_exc())
        state = "failed"
        if isinstance(error, AccessDeniedError):
            state = "refused"
        elif isinstance(error, StorageError) and error.retryable:
            state = "unreachable"
        message = str(error) if known else f"{type(error).__name__}: {error}"
        if self.report.get("error", {}).get("message") != message:
            self._tell(f"{self._spec.store}: {message}")
        self.report = {
            **self.report,
            "state": state,
            "error": {"type": type(error).__name__, "message": message, "failures": self._failures},
        }
        # A new client asks for credentials again: what was refused may have been given new ones since.
        self._repo = None
        pause = min(_PAUSE_MOST, _PAUSE_FIRST * 2 ** min(self._failures - 1, 10))
        with self._hub.changed:
            self._hub.changed.notify_all()
            asked, give_up = self._hub.asked, time.monotonic() + pause
            while not self._hub.stopping and self._hub.asked == asked and (left := give_up - time.monotonic()) > 0:
                self._hub.changed.wait(left)

    # -- the repository -----------------------------------------------------------------------------------------------

    def _open(self) -> None:
        repo = open_repository(self._spec, create=True)
        _check_writing(repo)
        opened = self.report.get("opened")
        if opened is None:
            opened = self._look(repo)
        self._repo = repo
        self.report = {name: value for name, value in self.report.items() if name != "error"}
        self.report |= {"state": "ok", "url": repo.url, "opened": opened}
        with self._hub.changed:
            self._hub.changed.notify_all()

    def _look(self, repo: Repository) -> dict[str, Any]:
        """What the store knows of the run, for a trainer that starts."""
        artifact = Artifact(repo, self._spec.artifact)
        for other in repo.artifacts():
            if other.name != artifact.name and other.name.lower() == artifact.name.lower():
                raise ConflictError(f"{repo.url} has an artifact {other.name!r}; names differ by more than case")
        try:
            own = {version.number: version for version in artifact.versions() if version.run == self._directory.name}
        except NotFoundError:
            return {}
        if not own:
            return {}
        newest = own[max(own)]
        found: dict[str, Any] = {"newest": newest.number}
        # A run that was begun afresh has no parent: what was before that is another story.
        line: list[Version] = []
        at: int | None = newest.number
        states = artifact.state().versions
        while at is not None and at in states:
            if at in own:
                line.append(own[at])
            at = states[at].op.parent
        best = newest_checkpoint(line)
        if best is not None:
            # What the run added after its checkpoint belongs to it, as long as there was no other one.
            folder = best
            for version in reversed(line[: line.index(best)]):
                if _has_step(version):
                    break
                folder = version
            facts = dict(best.metadata)
            found["checkpoint"] = {"folder": folder.number, "address": best.address, "metadata": facts}
        with suppress(MandapaError, msgspec.DecodeError, KeyError, TypeError, ValueError):  # written by whoever
            facts = msgspec.json.decode(newest.open(".mandapa/run.json").read(_TEXT_MAX))
            found["attempt"] = int(facts["attempt"])
        with suppress(MandapaError):
            text = newest.open("hparams.yaml").read(_TEXT_MAX + 1)
            if len(text) <= _TEXT_MAX:
                found["hparams"] = text.decode(errors="replace")
        return found

    @property
    def failures(self) -> int:
        """How often it has failed since its last commit."""
        return self._failures

    # -- commits ------------------------------------------------------------------------------------------------------

    def _begin(self, batch: Batch, *, early: bool = False) -> None:
        started = Started(
            n=self._journal.last + 1,
            txn=os.urandom(16).hex(),
            batch=batch.numbers.stretches(),
            attempt=batch.attempt,
            folder=batch.kind == "folder",
            as_incomplete=batch.incomplete,
            early=early,
        )
        self._journal.append(started, durable=True)
        self._fold(started)
        self._finish(started)

    def _finish(self, started: Started) -> None:
        wanted = Intervals()
        wanted.add(started.batch)
        with self._hub.changed:
            handed = [
                (rank, entry)
                for rank, entries in sorted(self._hub.feed.entries.items())
                for entry in entries
                if (rank, entry.n) in wanted
            ]
            used = self._hub.feed.used[-_USED_MAX:]
            began = self._hub.feed.begun.get(started.attempt)
        base = self._tip
        if started.attempt > self._attempt and began is not None and self.key in began.base:
            base = began.base[self.key]
        handed = [(rank, entry) for rank, entry in handed if self.key not in getattr(entry, "skip", ())]
        try:
            version, number = self._commit(started, handed, base, used)
        except (ConflictError, InvalidInputError) as error:
            if started.folder:
                raise
            self._refuse(started, str(error))
            return
        made = Made(n=self._journal.last + 1, txn=started.txn, version=version, number=number)
        self._journal.append(made, durable=True)
        self._fold(made)
        self._failures = 0
        if version:
            self._tell(f"{version} is in {self.report.get('url', self._spec.store)}")
        with self._hub.changed:
            self._hub.changed.notify_all()

    def _refuse(self, started: Started, reason: str) -> None:
        """Go on without a version of another artifact that cannot be made as things are; its bytes stay."""
        refused = Refused(n=self._journal.last + 1, txn=started.txn, reason=reason[:1000])
        self._journal.append(refused, durable=True)
        self._fold(refused)
        self.refused.update((int(rank), first) for rank, found in started.batch.items() for first, _ in found)
        self._tell(reason)
        self.report = {**self.report, "refused": {"count": len(self.refused), "message": reason}}

    def _handled(self) -> Intervals:
        """What is not to be looked at again by this uploader: what is done, and what was refused."""
        if not self.refused:
            return self.done
        handled = Intervals(self.refused)
        handled.add(self.done.stretches())
        return handled

    def _early(self) -> bool:
        """On a machine that goes away: the newest checkpoint, before what waits in front of it."""
        with self._hub.changed:
            feed, done = self._hub.feed, Intervals()
            done.add(self._handled().stretches())
            batches: list[Batch] = []
            while (batch := next_batch(feed, self.key, done, urgent=True, waited=self._hub.waited)) is not None:
                batches.append(batch)
                done.add(batch.numbers.stretches())
        newest = max((at for at, batch in enumerate(batches) if batch.checkpoint and not batch.incomplete), default=0)
        ahead = [(rank, entry.n) for rank, entry in batches[newest].checkpoint] if newest else []
        if not ahead or ahead == self._ahead:
            return False
        self._ahead = ahead
        attempt = batches[newest].attempt
        merged: list[Handed] = []
        for batch in batches[:newest]:
            if batch.kind == "folder" and batch.attempt == attempt:
                merged += [(rank, entry) for rank, entry in batch.entries if not isinstance(entry, CheckpointEntry)]
        merged += batches[newest].entries
        self._begin(Batch("folder", attempt, merged), early=True)
        return True

    def _commit(
        self, started: Started, handed: list[Handed], base: int | None, used: list[str]
    ) -> tuple[str, int | None]:
        """Make the version; gives its address ("": none), and the number of the run's folder after it."""
        repo = self._repo
        assert repo is not None
        entries = [entry for _, entry in handed]
        if entries and isinstance(entries[0], ArtifactEntry):
            made = self._commit_artifact(repo, entries[0], started.txn, used)
            return ("" if made is None else made.address), None
        entries = self._present(entries)
        if not any(isinstance(entry, AssetEntry | UrlEntry | CheckpointEntry) for entry in entries):
            return "", base
        artifact = Artifact(repo, self._spec.artifact, run=self._directory.name)
        parts = [entry for entry in entries if isinstance(entry, CheckpointEntry)]
        whole = bool(parts) and not started.as_incomplete
        message, metadata = _describe(parts) if whole else (_ended(entries), {})
        base = self._live(artifact, base)
        for standing in (None, () if base is None else artifact.version(base).assets):
            try:
                with artifact.transaction(message, metadata, base=base, txn_id=started.txn) as txn:
                    for address in used:
                        txn.uses(address)
                    self._fill(txn, entries, incomplete=started.as_incomplete, standing=standing)
                    best = parts[0].best if whole else None
                    if best is not None and best[0] in metadata:
                        txn.alias("best", if_best=best)
            except InvalidInputError:
                if standing is not None:
                    raise
                continue  # a file where the folder has a folder, or the other way round: what is new takes the place
            break
        if txn.version is None:
            return "", None
        self._report_strangers(base, txn)
        return txn.version.address, txn.version.number

    def _present(self, entries: list[Entry]) -> list[Entry]:
        """Those whose bytes are all there; what a machine's crash, or somebody else, took away is told of."""
        lost: list[Entry] = []
        for entry in entries:
            if isinstance(entry, AssetEntry):
                if not _has(self._directory.source(entry.file.source), entry.file.size, or_more=entry.grows):
                    self._lost(entry.file.path)
                    lost.append(entry)
            elif isinstance(entry, CheckpointEntry):
                gone = [f.path for f in entry.files if not _has(self._directory.source(f.source), f.size)]
                if gone:
                    self._lost(f"the checkpoint of step {entry.step} ({', '.join(gone)})")
                    lost += [other for other in entries if isinstance(other, CheckpointEntry)]
        return [entry for entry in entries if entry not in lost] if lost else entries

    def _live(self, artifact: Artifact, base: int | None) -> int | None:
        """The base, or what is left of the run when somebody has deleted it."""
        if base is None:
            return None
        try:
            artifact.version(base)
        except NotFoundError as error:
            own: list[Version] = []
            with suppress(NotFoundError):
                own = [version for version in artifact.versions() if version.run == self._directory.name]
            left = own[-1] if own else None
            self._tell(f"{error}; going on from {left.address if left else 'an empty folder'}")
            return left.number if left else None
        return base

    def _fill(
        self, txn: Transaction, entries: list[Entry], *, incomplete: bool, standing: Container[str] | None
    ) -> None:
        """Put the entries into a transaction; with ``standing``, the base's files, clear the way for each."""
        grown = {entry.file.path: entry for entry in entries if isinstance(entry, AssetEntry) and entry.grows}
        parts = [entry for entry in entries if isinstance(entry, CheckpointEntry)]
        # All that goes does so before anything is put: nothing of what is new is taken away again.
        if standing is not None:
            for entry in entries:
                if isinstance(entry, AssetEntry | UrlEntry):
                    _clear(txn, entry.file.path if isinstance(entry, AssetEntry) else entry.path, standing)
        if parts:
            for folder in (INCOMPLETE,) if incomplete else (INCOMPLETE, CHECKPOINT):
                with suppress(NotFoundError):
                    txn.remove(folder)
        for entry in entries:
            if isinstance(entry, UrlEntry):
                txn.add_url(entry.path, entry.url, size=entry.size, checksum=entry.checksum)
            elif isinstance(entry, AssetEntry) and grown.get(entry.file.path, entry) is entry:
                self._put(txn, entry)
        for part in parts:
            for file in part.files:
                path = file.path
                if incomplete:
                    path = f"{INCOMPLETE}/step-{part.step}{path.removeprefix(CHECKPOINT)}"
                txn.add(self._directory.source(file.source), at=path)

    def _put(self, txn: Transaction, entry: AssetEntry) -> None:
        source, path = self._directory.source(entry.file.source), entry.file.path
        if entry.reserved:
            with open(source, "rb") as data:
                txn.add_bytes(path, data.read(), reserved=True)
        else:
            txn.add(source, at=path, length=entry.file.size if entry.grows else None)

    def _lost(self, what: str) -> None:
        message = f"{what}: its bytes are not in the run's directory any more; it is left out"
        self._tell(message)
        self.report = {**self.report, "lost": [*self.report.get("lost", []), message][-20:]}

    def _commit_artifact(self, repo: Repository, entry: ArtifactEntry, txn_id: str, used: list[str]) -> Version | None:
        source = self._directory.source(entry.source)
        if not os.path.exists(source):
            self._lost(f"the artifact {entry.name}")
            return None
        artifact = Artifact(repo, entry.name, run=self._directory.name)
        with artifact.transaction("", entry.metadata, base=None, txn_id=txn_id) as txn:
            for address in used:
                txn.uses(address)
            txn.add(source, at=entry.at)
            for alias in entry.aliases:
                txn.alias(alias)
        return txn.version

    def _report_strangers(self, base: int | None, txn: Transaction) -> None:
        """Name the versions of others that came in between: they are in the history, not in the run's folder."""
        version = txn.version
        assert version is not None
        if not txn.made or base is None:
            return
        if version.number == base + 1:
            return
        versions = version.artifact.state().versions
        numbers = range(base + 1, version.number)
        between = [number for number in numbers if not self._is_ours(versions[number].record)]
        if between:
            named = ", ".join(f"v{number}" for number in between[:5]) + (", ..." if len(between) > 5 else "")
            message = (
                f"{self._spec.artifact}: {named} were made by somebody else; what they changed is not in this run's "
                "versions"
            )
            self._tell(message)
            self.report = {**self.report, "strangers": message}

    def _is_ours(self, record: Record) -> bool:
        """Whether this run has made it, on this machine."""
        assert self._repo is not None
        return record.run == self._directory.name and record.by == self._repo.author.by


def newest_checkpoint(versions: list[Version]) -> Version | None:
    """The version with the checkpoint of the highest step; of several, the newest."""
    found = [version for version in versions if _has_step(version)]
    return max(found, key=lambda version: (version.metadata["step"], version.number), default=None)


def _has_step(version: Version) -> bool:
    return type(version.metadata.get("step")) is int


def waits(feed: Feed, key: str, done: Intervals, rank: int, entry: Entry) -> bool:
    """Whether an entry has something for a backend that the backend does not have yet."""
    if not isinstance(entry, AssetEntry | UrlEntry | CheckpointEntry | ArtifactEntry):
        return False
    return (rank, entry.n) not in done and feed.wanted(key, rank, entry) and key not in getattr(entry, "skip", ())


def size_of(entry: Entry) -> int:
    """Bytes that an entry hands over."""
    if isinstance(entry, AssetEntry):
        return entry.file.size
    if isinstance(entry, ArtifactEntry):
        return entry.size
    return sum(file.size for file in entry.files) if isinstance(entry, CheckpointEntry) else 0


def _ended(entries: list[Entry]) -> str:
    """How the attempt ended, when the entries say so: the message of a version without a checkpoint."""
    return next((entry.status for entry in entries if isinstance(entry, EndEntry)), "")


def _describe(parts: list[CheckpointEntry]) -> tuple[str, dict[str, Any]]:
    """Message and metadata of a checkpoint's version; the metrics are those of the lowest rank that has some."""
    metadata = dict(next((part.metrics for part in parts if part.metrics), {}))
    metadata["step"] = parts[0].step
    if parts[0].epoch is not None:
        metadata["epoch"] = parts[0].epoch
    return f"step {parts[0].step}", metadata


def _has(source: str, size: int, *, or_more: bool = False) -> bool:
    try:
        found = os.stat(source).st_size
    except OSError:
        return False
    return found >= size if or_more else found == size


def _clear(txn: Transaction, path: str, standing: Container[str]) -> None:
    """Take away the file that stands where a folder of ``path`` has to be, and what stands below ``path``."""
    gone = [above for above in sorted(folders_of([path])) if above in standing]
    for place in gone if path in standing else [*gone, path]:
        with suppress(NotFoundError):
            txn.remove(place)


def _check_writing(repo: Repository) -> None:
    """Ask to create what is there already, with the same bytes: nothing changes, and who may not write is told so.

    Raises:
        AccessDeniedError: No right to write.
    """
    key = log_key(CATALOG, 0)
    with suppress(AlreadyExistsError):
        repo.store.create(key, repo.store.get(key))
