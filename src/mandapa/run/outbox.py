"""What one rank has handed over: owned, written into its journal, and followed until every backend has it."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

from mandapa.errors import ClosedError, MandapaError, StorageError
from mandapa.run.directory import RunDirectory, read_json
from mandapa.run.handle import Handle
from mandapa.run.inside import Inside
from mandapa.run.journal import (
    ENTRIES,
    AssetEntry,
    BeginEntry,
    CommitEntry,
    EndEntry,
    Entry,
    File,
    Journal,
)
from mandapa.run.limits import Limits
from mandapa.run.logger import Take
from mandapa.run.process import UploaderProcess
from mandapa.run.progress import Progress
from mandapa.run.ring import turns_in
from mandapa.run.staging import Staging, sweep
from mandapa.run.troubles import Troubles

__all__ = ["Outbox", "now"]

_T = TypeVar("_T")

_TICK = 0.02  # seconds between looks while somebody waits
_HEARTBEAT = 1.0  # seconds between looks at the uploader
_HOPELESS = 15.0  # seconds of nothing but failures after which `close` stops waiting


class Outbox:
    """The journal of a rank and the bytes that it speaks of. Safe to use from several threads, of one process.

    Args:
        directory: The run's.
        rank: Whose lock the caller holds.
        keys: The backends.
        uploader: Who empties it; None where there are no backends.
        limits: What may wait, and for how long.
        troubles: Takes what went wrong.
    """

    def __init__(
        self,
        directory: RunDirectory,
        rank: int,
        keys: Sequence[str],
        *,
        uploader: UploaderProcess | None,
        limits: Limits,
        troubles: Troubles,
    ) -> None:
        self.rank = rank
        self.keys = list(keys)
        self.progress = {key: Progress(directory, key).look() for key in keys}
        self._directory = directory
        self._uploader = uploader
        self._limits = limits
        self._troubles = troubles
        known = max([progress.done.highest(rank) for progress in self.progress.values()], default=0)
        self._journal = Journal(directory.journal(rank), ENTRIES, after=known)
        self.begun = [line for line in self._journal.found if isinstance(line, BeginEntry)]
        """How the rank began before."""
        self.turns = None if self._journal.damaged else turns_in(self._journal.found)
        """The turns of memory that it speaks of; None: it cannot be read."""
        if not self._journal.damaged:  # a line that cannot be read may name something
            sweep(directory, rank, self._journal.found)
        self._journal.found.clear()
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._closed = False
        self._attempt = 0  # none has begun
        self._beat = time.monotonic()
        self.inside: Inside | None = None
        """What commits from within this process."""
        self._waiting: dict[int, tuple[Sequence[str], int]] = {}  # number -> backends, bytes
        self._waiting_bytes = 0

    def begin(self, attempt: int, **fields: Any) -> None:
        """Open it for an attempt; ``fields`` are those of its `BeginEntry`."""
        self._attempt = attempt
        self._staging = Staging(self._directory, self.rank, attempt)
        self.append(BeginEntry, backends=sorted(self.keys), **fields)

    @contextmanager
    def working(self) -> Iterator[None]:
        """One call at a time, and only in the process that made it.

        Raises:
            ClosedError: It is closed, or this process was forked.
        """
        self._check_process()
        with self._lock:
            if self._closed:
                raise ClosedError(f"the run {self._directory.name!r} is closed")
            yield
            if time.monotonic() - self._beat >= _HEARTBEAT:
                self.check_uploader()

    def _check_process(self) -> None:
        """Before any lock is touched: a fork may have copied it while it was held."""
        if os.getpid() != self._pid:
            raise ClosedError(
                f"the run {self._directory.name!r} belongs to the process that forked this one (a DataLoader's worker, "
                "say): log from the training process only"
            )

    # -- handing over -------------------------------------------------------------------------------------------------

    def append(self, kind: Callable[..., Entry], **fields: Any) -> int:
        """Write a line into the journal; gives its number. Raises `StorageError` when the disk is full."""
        n: int = self._journal.last + 1
        self._journal.append(kind(n=n, time=now(), attempt=self._attempt, **fields))
        return n

    def try_append(self, kind: Callable[..., Entry], **fields: Any) -> int | None:
        """The same; a full disk is a trouble, of which the training need not die: None then.

        Raises:
            StorageError: Where troubles raise.
        """
        try:
            return self.append(kind, **fields)
        except StorageError as error:
            self._troubles.report(str(error))
            return None

    def hand_over(self, keys: Sequence[str], waits: int, kind: Callable[..., Entry], **fields: Any) -> Handle:
        """Write a line for these backends; ``waits`` bytes of the disk are taken until they have it."""
        n = self.try_append(kind, **fields)
        if n is None:
            return self.skipped()
        if keys:
            self._waiting[n] = (keys, waits)
            self._waiting_bytes += waits
        return Handle(self, n, keys)

    def file(self, place: str, source: str, keys: Sequence[str], take: Take) -> Handle:
        """Own a file and hand it over; raises as `Staging.take`."""
        if take == "grow":
            return self._file(place, self._staging.grow(source), keys, grows=True)
        return self._file(place, self.own(place, source, take), keys)

    def bytes(self, place: str, data: bytes | bytearray | memoryview, keys: Sequence[str], **flags: bool) -> Handle:
        """Own bytes and hand them over."""
        taken = self.make_room(place, len(data), lambda: self._staging.take_bytes(data))
        return self._file(place, taken, keys, **flags)

    def own(self, what: str, source: str, take: Take) -> tuple[str, int] | None:
        """Own a file or a folder; its place and bytes, or None when there is no room. Raises as `Staging.take`."""
        assert take != "grow"
        size = 0
        with suppress(OSError):  # whoever opens it says what is wrong
            size = os.stat(source).st_size
        own = self._staging.take_folder if os.path.isdir(source) else self._staging.take
        return self.make_room(what, size, lambda: own(source, take))

    def skipped(self) -> Handle:
        """The handle of what there was no room for."""
        return Handle(self, 0, (), taken=False)

    def local(self) -> Handle:
        """The handle of what no backend wants."""
        return Handle(self, 0, ())

    def _file(
        self, place: str, taken: tuple[str, int] | None, keys: Sequence[str], *, grows: bool = False, **flags: bool
    ) -> Handle:
        if taken is None:
            return self.skipped()
        file = File(path=place, source=self._directory.relative(taken[0]), size=taken[1])
        skip = [key for key in self.keys if key not in keys]
        return self.hand_over(keys, 0 if grows else taken[1], AssetEntry, file=file, grows=grows, skip=skip, **flags)

    def make_room(self, what: str, size: int, own: Callable[[], _T]) -> _T | None:
        """Take bytes over when there is room for them; None when there is none, and the limits say to skip.

        Raises:
            StorageError: The bytes cannot be taken for another reason; or for this one, where troubles raise.
        """
        limit = self._limits.staging_bytes
        asked = False
        while True:
            if self._has_room(size):
                try:
                    return own()
                except (OSError, RuntimeError) as error:  # torch says no more than RuntimeError of a full disk
                    if not _is_full(error) and self._has_room(0):
                        if isinstance(error, OSError) and not isinstance(error, MandapaError):
                            raise StorageError(f"{what} cannot be written: {error.strerror or error}") from error
                        raise
            if self._limits.when_full == "skip" or (limit is not None and size > limit):
                self._troubles.report(
                    f"there is no room for {what} ({size:,} bytes) in {self._directory.path}: it is not logged; free "
                    "some space, or see mandapa.Limits"
                )
                return None
            self._troubles.warn(f"there is no room in {self._directory.path}: the run waits until there is some")
            if not asked:  # nobody else may ask while the training waits here
                with suppress(StorageError):
                    self.append(CommitEntry)
                    asked = True
            self.check_uploader()
            time.sleep(_TICK)

    def _has_room(self, size: int) -> bool:
        if not self._staging.fits(size):
            return False
        limit = self._limits.staging_bytes
        if limit is not None and self._waiting_bytes + size > limit:
            self.waiting()  # to look takes longer the more there is
        return limit is None or self._waiting_bytes + size <= limit

    # -- following ----------------------------------------------------------------------------------------------------

    @property
    def last(self) -> int:
        """The number of the newest line."""
        last: int = self._journal.last
        return last

    def waiting(self) -> dict[int, tuple[Sequence[str], int]]:
        """What this process has handed over and some backend has not: number -> backends, bytes."""
        with self._lock:
            for progress in self.progress.values():
                progress.look()
            for n, (keys, waits) in list(self._waiting.items()):
                if all((self.rank, n) in self.progress[key].done for key in keys):
                    del self._waiting[n]
                    self._waiting_bytes -= waits
            return self._waiting

    def has_committed(self, n: int, keys: Sequence[str]) -> bool:
        """Whether these backends have entry ``n``."""
        self._check_process()
        with self._lock:
            return all((self.rank, n) in self.progress[key].look().done for key in keys)

    def version_of(self, n: int, keys: Sequence[str]) -> str | None:
        """The version that entry ``n`` went into, in the first of these backends."""
        self._check_process()
        with self._lock:
            return next((self.progress[key].look().version(self.rank, n) or None for key in keys), None)

    def is_durable(self, n: int) -> bool:
        """Whether the uploader has brought entry ``n`` to the disk."""
        return bool(self.uploader_status().get("durable", {}).get(str(self.rank), 0) >= n)

    def wait_for(self, n: int, keys: Sequence[str], timeout: float | None) -> bool:
        """Ask for a commit, and wait until these backends have entry ``n``; False after ``timeout`` seconds."""
        if not keys or self.has_committed(n, keys):
            return True
        if not self._closed:
            with self.working():
                self.try_append(CommitEntry)
        return self._wait(lambda: self.has_committed(n, keys), timeout)

    def flush(self, timeout: float | None) -> bool:
        """Ask for a commit, and wait until every backend has everything; False after ``timeout`` seconds."""
        with self.working():
            asked = self.try_append(CommitEntry)
        if asked is None and timeout is None:
            return False  # nobody was asked, and nobody may ever do it
        return self._wait(
            lambda: (asked is None or self.has_committed(asked, self.keys)) and not self.waiting(), timeout
        )

    def end(self, status: str, timeout: float | None) -> bool:
        """The last line; wait as `flush`, without ``timeout`` as long as the limits say. Closes the journal."""
        with self._lock:
            asked = self._journal.last
            with suppress(StorageError):  # a full disk: what was handed over before is safe
                asked = self.append(EndEntry, status=status)
            self._closed = True
        try:
            if self._limits.at_exit == "skip":
                return not self.waiting()
            return self._wait(
                lambda: self.has_committed(asked, self.keys) and not self.waiting(),
                self._limits.exit_seconds if timeout is None else timeout,
                hopeless=timeout is None,
            )
        finally:
            self._journal.close()

    def abandon(self) -> None:
        """Close it without waiting: the attempt, if one has begun, has failed."""
        with self._lock:
            if self._attempt:
                with suppress(StorageError):
                    self.append(EndEntry, status="failed")
            self._closed = True
            self._journal.close()

    def _wait(self, done: Callable[[], bool], timeout: float | None, *, hopeless: bool = False) -> bool:
        give_up = None if timeout is None else time.monotonic() + timeout
        failing: float | None = None
        while not done():
            at = time.monotonic()
            if give_up is not None and at >= give_up:
                return False
            if at - self._beat >= _HEARTBEAT:
                self.check_uploader()
                if hopeless:
                    backends = self.reports().values()
                    failing = (failing or at) if backends and not any(map(_hopeful, backends)) else None
                    if failing is not None and at - failing >= _HOPELESS:
                        return False
            time.sleep(_TICK)
        return True

    # -- the uploader -------------------------------------------------------------------------------------------------

    def uploader_status(self) -> dict[str, Any]:
        """What the uploader last said."""
        return read_json(self._directory.status) if self.keys else {}

    def reports(self) -> dict[str, dict[str, Any]]:
        """How far each backend is, as far as it is known: ``state``, ``error``, ``committed``, ``pending``, ..."""
        found = self.uploader_status().get("backends", {}) | (self.inside.reports() if self.inside else {})
        return {key: found[key] for key in self.keys if key in found}

    def check_uploader(self) -> None:
        """See to it that there is an uploader, and tell of what it could not do.

        Raises:
            StorageError: Where troubles raise.
        """
        self._beat = time.monotonic()
        if self._uploader is None:
            return
        try:
            self._uploader.ensure()
        except StorageError as error:
            self._troubles.report(str(error))
        for backend in self.reports().values():
            said = [backend.get(what, {}).get("message") for what in ("error", "refused")]
            said += [backend.get("strangers"), *backend.get("lost", ())]
            for message in filter(None, said):
                self._troubles.report(f"{message} (training goes on, and what was handed over is kept)")


def now() -> str:
    """The time of an entry."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _hopeful(backend: Mapping[str, Any]) -> bool:
    """Whether a backend, as the uploader tells of it, may still commit something."""
    refused = backend.get("refused", {}).get("count", 0)
    pending = backend.get("pending", 0)
    return backend.get("state") == "ok" and pending > refused


def _is_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
        isinstance(error, StorageError) and error.retryable
    )
