"""One backend of a run: takes what was handed over, batch by batch, and makes versions of it."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mandapa.errors import AccessDeniedError, ConflictError, InvalidInputError, MandapaError, StorageError
from mandapa.run.backend import CHECKPOINT, Backend, FolderCommit
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
from mandapa.run.ring import settle

__all__ = ["Committer", "Hub", "size_of", "waits"]

_IDLE = 1.0  # seconds between looks when nothing happens; what happens is told at once
_PAUSE_FIRST, _PAUSE_MOST = 0.5, 60.0  # seconds after a failure
_USED_MAX = 100  # addresses that a record names, the newest: with the longest names they leave room for the rest


@dataclass
class Hub:
    """What the threads of an uploader share; every field is read and written under `changed`."""

    feed: Feed = field(default_factory=Feed)
    seen: dict[tuple[int, int], float] = field(default_factory=dict)
    """(rank, number) -> when the entry was first seen, by the monotonic clock."""
    urgent: bool = False
    """Everything is to be committed as soon as it comes."""
    marks: dict[int, int] = field(default_factory=dict)
    """Rank -> up to which number somebody has asked for a commit from outside."""
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
        backend: What makes versions there.
        directory: The run's.
        hub: Shared with the uploader.
        commit_every: Seconds that something waits at most.
        tell: Takes a line for the uploader's log.
    """

    def __init__(
        self,
        key: str,
        spec: BackendSpec,
        backend: Backend,
        directory: RunDirectory,
        hub: Hub,
        *,
        commit_every: float,
        tell: Callable[[str], None],
    ) -> None:
        self.key = key
        self._thread = threading.Thread(target=self._work, name=f"mandapa-{key}", daemon=True)
        self._spec = spec
        self._backend = backend
        self._directory = directory
        self._hub = hub
        self._commit_every = commit_every
        self._tell = tell
        self._journal = Journal(directory.outcomes(key), OUTCOMES)
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
        if not self._thread.is_alive():
            self._backend.close()

    def _work(self) -> None:
        """Work until the uploader stops; whatever fails is tried again, after longer and longer pauses."""
        while not self._hub.stopping:
            try:
                self._step(_IDLE)
            except Exception as error:  # noqa: BLE001 - nothing may end this thread: bytes would wait for ever
                self._fail(error)

    def _step(self, patience: float = 0.0) -> bool:
        """Do the next thing; when there is none, wait until something happens, ``patience`` seconds at most."""
        if not self._backend.is_open:
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
        urgent = hub.urgent or any(
            entry.n <= hub.marks.get(rank, 0) or hub.waited(rank, entry.n) >= self._commit_every
            for rank, entries in feed.entries.items()
            for entry in entries
            if waits(feed, self.key, handled, rank, entry)
        )
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
        self._backend.close()  # a new client asks for credentials again
        pause = min(_PAUSE_MOST, _PAUSE_FIRST * 2 ** min(self._failures - 1, 10))
        with self._hub.changed:
            self._hub.changed.notify_all()
            asked, give_up = self._hub.asked, time.monotonic() + pause
            while not self._hub.stopping and self._hub.asked == asked and (left := give_up - time.monotonic()) > 0:
                self._hub.changed.wait(left)

    # -- the repository -----------------------------------------------------------------------------------------------

    # -- commits ------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._backend.open()
        self.report = {name: value for name, value in self.report.items() if name != "error"}
        self.report |= {"state": "ok", **self._backend.facts}
        with self._hub.changed:
            self._hub.changed.notify_all()

    @property
    def failures(self) -> int:
        """How often it has failed since its last commit."""
        return self._failures

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
        if self._hub.stopping:
            return  # somebody else may have the journal by now; by its id the commit is found
        made = Made(n=self._journal.last + 1, txn=started.txn, version=version, number=number)
        self._journal.append(made, durable=True)
        self._fold(made)
        self._failures = 0
        self.report = {**self.report, **self._backend.facts}
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
        entries = self._present([entry for _, entry in handed])
        if any(isinstance(entry, ArtifactEntry) for entry in entries):
            (entry,) = entries
            assert isinstance(entry, ArtifactEntry)
            return self._backend.commit_artifact(entry, started.txn, used), None
        if not any(isinstance(entry, AssetEntry | UrlEntry | CheckpointEntry) for entry in entries):
            return "", base if started.folder else None
        parts = [entry for entry in entries if isinstance(entry, CheckpointEntry)]
        whole = bool(parts) and not started.as_incomplete
        message, metadata = _describe(parts) if whole else (_ended(entries), {})
        commit = FolderCommit(
            directory=self._directory,
            txn=started.txn,
            base=base,
            entries=entries,
            incomplete=started.as_incomplete,
            message=message,
            metadata=metadata,
            used=used,
            best=parts[0].best if whole else None,
        )
        return self._backend.commit_folder(commit)

    def _present(self, entries: list[Entry]) -> list[Entry]:
        """Those whose bytes are all there; what a machine's crash, or somebody else, took away is told of."""
        lost: list[Entry] = []
        for entry in entries:
            if isinstance(entry, AssetEntry):
                if not _has(self._directory.source(entry.file.source), entry.file.size, or_more=entry.grows):
                    self._lost(entry.file.path)
                    lost.append(entry)
            elif isinstance(entry, ArtifactEntry):
                if not os.path.exists(self._directory.source(entry.source)):
                    self._lost(f"the artifact {entry.name}")
                    lost.append(entry)
            elif isinstance(entry, CheckpointEntry):
                gone = [file for file in entry.files if not settle(self._directory, file)]
                if gone:
                    held = any(file.memory is not None for file in gone)
                    self._lost(f"the checkpoint of step {entry.step} ({', '.join(f.path for f in gone)})", held=held)
                    lost += [other for other in entries if isinstance(other, CheckpointEntry)]
        return [entry for entry in entries if entry not in lost] if lost else entries

    def _lost(self, what: str, *, held: bool = False) -> None:
        where = "neither in memory nor in the run's directory" if held else "not in the run's directory"
        message = f"{what}: its bytes are {where} any more; it is left out"
        self._tell(message)
        self.report = {**self.report, "lost": [*self.report.get("lost", []), message][-20:]}


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
    if parts[0].place != CHECKPOINT:
        metadata["checkpoint"] = parts[0].place
    return f"step {parts[0].step}", metadata


def _has(source: str, size: int, *, or_more: bool = False) -> bool:
    try:
        found = os.stat(source).st_size
    except OSError:
        return False
    return found >= size if or_more else found == size
