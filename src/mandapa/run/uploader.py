"""The uploader: one lean process for a run's directory, which makes versions of what its ranks hand over.

::

    python -m mandapa.run.uploader DIR        # started by a run, in a session of its own; backends on standard input

It outlives a killed trainer until all is committed, and may itself be killed at any moment: its journals say where to
go on. It loads no trainer and no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from mandapa.errors import InvalidInputError, MandapaError, StorageError
from mandapa.run.backend import WANDB, Backend, key_of, public, spec_from, value_of
from mandapa.run.committer import Committer, Hub
from mandapa.run.directory import RunDirectory, read_json, write_json
from mandapa.run.follower import Follower
from mandapa.run.journal import ArtifactEntry, AssetEntry, CheckpointEntry, Entry, File, Intervals
from mandapa.run.logger import BackendSpec
from mandapa.run.process import fingerprint
from mandapa.run.progress import Progress
from mandapa.run.repository_backend import RepositoryBackend
from mandapa.run.ring import drop_slots, is_held, remove_free, settle
from mandapa.run.secrets import redact
from mandapa.run.staging import drop_links, release

__all__ = ["Uploader", "main", "saved_backends"]

_TICK = 0.05  # seconds between looks at the journals
_LIVENESS = 0.2
_STATUS = 0.2
_SYNC = 0.5  # seconds between two rounds of fsync, which hold up whoever makes files on the same disk
_AGAIN = 2.0  # seconds until a state in memory is written again for which the disk had no room
_NICE = 10

Make = Callable[[BackendSpec, RunDirectory, Callable[[str], None]], Backend]
"""Makes the backend of a spec; the last argument takes a line for the log."""


class Uploader:
    """Follows the journals of a run's directory and drives a committer for each backend.

    Args:
        directory: The run's, whose uploader lock the caller holds.
        specs: Backends by key.
        make: By the store of a spec, what makes its backend; a repository for any other. What has None is committed to
            by others: this uploader keeps its bytes until they have.
        current: Those that are looked at though nothing waits for them.
        linger: Seconds to go on trying after the last trainer is gone.
        commit_every: Seconds that something waits at most.
        once: Commit all that waits, and end when that is done or when a backend has failed.
        config: What `fingerprint` is made of, to tell trainers which backends this uploader has.
    """

    def __init__(
        self,
        directory: RunDirectory,
        specs: Mapping[str, BackendSpec],
        *,
        make: Mapping[str, Make | None] = {WANDB: None},
        current: Collection[str] = (),
        linger: float = 1800.0,
        commit_every: float = 600.0,
        once: bool = False,
        config: bytes = b"",
    ) -> None:
        self._directory = directory
        self._linger = linger
        self._current = current
        self._once = once
        self._hub = Hub(urgent=once)
        self._follower = Follower(directory, self._hub, self.tell, self._take)
        self._durable: dict[int, int] = {}
        self._unsynced: list[tuple[int, Entry]] = []
        self._unsettled: list[File] = []
        self._slots: set[str] = set()
        self._unnoticed = False  # there are entries that call for no commit, and were not counted yet
        self._retired: dict[int, list[CheckpointEntry]] = {}
        self._counts: dict[str, tuple[int, int]] = {}
        self._seen_done: list[Intervals] = []
        self._idle: dict[str, Intervals] = {}
        self._grown: set[str] = set()
        self._ending = self._hurrying = False
        self._failures: dict[str, int] = {}
        self._status: dict[str, Any] = {}
        self._status_at = 0.0
        salt = os.urandom(16).hex()
        self._identity = {"pid": os.getpid(), "salt": salt, "config": fingerprint(config, salt)}
        self.committers: dict[str, Committer] = {}
        self._others: dict[str, Progress] = {}
        for key, spec in specs.items():
            made = make.get(spec.store, RepositoryBackend)
            if made is None:
                self._others[key] = Progress(directory, key)
                continue
            backend = made(spec, directory, self.tell)
            self.committers[key] = Committer(
                key, spec, backend, directory, self._hub, commit_every=commit_every, tell=self.tell
            )

    def tell(self, text: str) -> None:
        """A line for the log, without secrets."""
        self._directory.note(redact(text))

    def end_soon(self) -> None:
        """The machine is about to go: the newest checkpoint first, then the rest, then the end. For signal handlers."""
        self._ending = True

    def run(self, on_opened: Callable[[], None] = lambda: None) -> bool:
        """Work until there is nothing left to do; whether everything is committed then.

        ``on_opened`` is called once each store has answered, or failed.
        """
        live = self._follower.living()
        self._poll()
        self._follower.set_living(live)
        self._release()
        idle = [key for key, (count, _) in self._counts.items() if not count and key not in self._current]
        for key in idle:
            self._idle[key] = self.committers.pop(key).done
            del self._counts[key]
        for committer in self.committers.values():
            committer.start()
        for work in (self._settle, self._sync):
            threading.Thread(target=work, name="mandapa-disk", daemon=True).start()
        looked = last_alive = time.monotonic()
        drained = opened = False
        lock = self._directory.uploader_lock()
        while True:
            time.sleep(_TICK)
            ending = self._ending
            if lock.lost():  # the run was removed; what may be at its place now has an uploader of its own
                self._stop()
                drop_slots(self._slots)
                return False
            now = time.monotonic()
            look = now - looked >= _LIVENESS
            # Before the journals: who is not alive then has written nothing that is not read now.
            live = self._follower.living() if look else live
            changed = self._poll()
            if self._unnoticed and (look or self._once or self._ending):
                changed = True  # what thousands that wait cost is not paid for each that comes
            if look:
                looked = now
                changed |= self._follower.set_living(live)
                changed |= self._follower.read_request()
            if ending and not self._hurrying:  # only now: the newest checkpoint is among those that have been read
                self._hurrying = changed = True
                self._failures = {key: committer.failures for key, committer in self.committers.items()}
                with self._hub.changed:
                    self._hub.urgent = self._hub.newest_first = True
                    self._hub.asked += 1
            if changed:
                self._unnoticed = False
                with self._hub.changed:
                    self._hub.changed.notify_all()
            if changed or any(a is not b for a, b in zip(self._done().values(), self._seen_done, strict=True)):
                self._release()
            drained = not any(count for count, _ in self._counts.values())
            self._write_status()
            if not opened and all(c.report["state"] != "opening" for c in self.committers.values()):
                opened = True
                on_opened()
            if any(self._hub.feed.live.values()):
                last_alive = now
            if self._is_over(drained, now - last_alive):
                break
        self._stop()
        self._release()
        self._write_status(last=True)
        for rank, live_now in self._hub.feed.live.items():
            if not live_now:
                remove_free(self._directory, rank)
        if drained and not any(self._hub.feed.live.values()):
            waiting = [source for entries in self._hub.feed.entries.values() for e in entries for source in _sources(e)]
            drop_links(self._directory, self._grown.difference(waiting))
        return drained

    def _stop(self) -> None:
        with self._hub.changed:
            self._hub.stopping = True
            self._hub.changed.notify_all()
        for committer in self.committers.values():
            committer.stop(0.2)

    def _is_over(self, drained: bool, alone: float) -> bool:
        stuck = all(self._counts[c.key][0] <= len(c.refused) for c in self.committers.values())
        if self._once:
            waiting = [c for c in self._waiting() if not c.refused or self._counts[c.key][0] > len(c.refused)]
            return drained or all(c.report["state"] not in ("opening", "ok") for c in waiting)
        if self._hurrying and all(c.failures > self._failures[c.key] for c in self._waiting()):
            return True  # there is nothing left to do, or nothing that can be done before the machine is gone
        return not any(self._hub.feed.live.values()) and (drained or stuck or alone >= self._linger)

    def _waiting(self) -> list[Committer]:
        return [c for c in self.committers.values() if self._counts[c.key][0] or c.report["state"] == "opening"]

    # -- the journals -------------------------------------------------------------------------------------------------

    def _poll(self) -> bool:
        """Read what is new in the journals; whether there is anything that may call for a commit."""
        some, calls = self._follower.read()
        self._unnoticed |= some
        return calls

    def _take(self, rank: int, entry: Entry) -> None:
        self._unsynced.append((rank, entry))
        held = [file for file in _files(entry) if file.memory is not None]
        self._unsettled += held
        self._slots.update(self._directory.source(file.memory.slot) for file in held if file.memory is not None)

    # -- durable ------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Write what was handed over in memory, before anything else is done with it: the memory is free then."""
        said = ""
        while not self._hub.stopping:
            with self._hub.changed:
                while not self._unsettled and not self._hub.stopping:
                    self._hub.changed.wait()
                waiting, self._unsettled = self._unsettled, []
            for at, file in enumerate(waiting):
                try:
                    settle(self._directory, file)
                except StorageError as error:
                    if said != (said := str(error)):
                        self.tell(said)
                    with self._hub.changed:
                        self._unsettled[:0] = waiting[at:]
                    time.sleep(_AGAIN)
                    break

    def _sync(self) -> None:
        """Bring what was handed over onto the disk, again and again: a second later the machine may restart."""
        while not self._hub.stopping:
            time.sleep(_SYNC)
            with self._hub.changed:
                while not self._unsynced and not self._hub.stopping:
                    self._hub.changed.wait()
                waiting, self._unsynced = self._unsynced, []
            ranks: dict[int, int] = {}
            later: list[tuple[int, Entry]] = []
            for rank, entry in waiting:  # a rank's number says that all before it is durable, too
                if any(rank == other for other, _ in later) or any(is_held(self._directory, f) for f in _files(entry)):
                    later.append((rank, entry))
                    continue
                for source in _sources(entry):
                    _fsync(self._directory.source(source))
                    if isinstance(entry, ArtifactEntry):
                        for folder, _, names in os.walk(self._directory.source(source)):
                            for path in (*names, "."):
                                _fsync(os.path.join(folder, path))
                ranks[rank] = entry.n
            if ranks:
                _fsync(self._directory.staged)
            for rank, n in ranks.items():
                _fsync(self._directory.journal(rank))
                self._durable[rank] = n
            with self._hub.changed:
                self._unsynced[:0] = later

    # -- letting go ---------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        """Drop what every backend has; its bytes go, but for the newest checkpoints. Then count what waits."""
        done = self._done()
        self._seen_done = list(done.values())
        with self._hub.changed:
            gone = self._follower.drop(done)
            self._counts = {key: committer.pending() for key, committer in self.committers.items()}
        for rank, entry in gone:
            if isinstance(entry, CheckpointEntry):
                retired = self._retired.setdefault(rank, [])
                retired.append(entry)
                while len(retired) > entry.keep_local:
                    release(self._directory, retired.pop(0))
            elif isinstance(entry, AssetEntry) and entry.grows:
                self._grown.add(entry.file.source)
            else:
                release(self._directory, entry)

    def _done(self) -> dict[str, Intervals]:
        """What each backend has."""
        others = {key: progress.look().done for key, progress in self._others.items()}
        return self._idle | others | {key: committer.done for key, committer in self.committers.items()}

    # -- telling ------------------------------------------------------------------------------------------------------

    def _write_status(self, *, last: bool = False) -> None:
        """Replace ``status.json`` when it says something new: at once of a store's state, else a few times a second."""
        now = time.monotonic()
        states = [committer.report["state"] for committer in self.committers.values()]
        told = [backend["state"] for backend in self._status.get("backends", {}).values()]
        if now - self._status_at < _STATUS and states == told and not last:
            return
        backends = {}
        with self._hub.changed:
            for key, committer in self.committers.items():
                count, size = self._counts[key]
                backends[key] = {**committer.report, "pending": count, "pending_bytes": size}
            live = [rank for rank, alive in self._hub.feed.live.items() if alive]
            tail = {str(rank): entries[-1].n for rank, entries in self._hub.feed.entries.items() if entries}
        status = {
            **self._identity,
            "running": not last,
            "live": live,
            "durable": {str(rank): n for rank, n in self._durable.items()},
            "waiting_for": tail,
            "backends": backends,
        }
        if status != self._status:
            self._status, self._status_at = status, now
            try:
                write_json(self._directory.status, redact(status))
            except OSError as error:
                self._status = {}
                self.tell(f"the status cannot be written: {error}")


def _files(entry: Entry) -> list[File]:
    return entry.files if isinstance(entry, CheckpointEntry) else []


def _sources(entry: Entry) -> list[str]:
    if isinstance(entry, AssetEntry):
        return [entry.file.source]
    if isinstance(entry, CheckpointEntry):
        files = [file.source for file in entry.files]
        folders = {os.path.dirname(file) for file in files}
        return [*files, *folders, *{os.path.dirname(folder) for folder in folders}]
    return [entry.source] if isinstance(entry, ArtifactEntry) else []


def _fsync(path: str) -> None:
    """The file or folder is on the disk when this returns, as far as it is there and the disk works."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def saved_backends(directory: RunDirectory) -> dict[str, dict[str, Any]]:
    """The backends that the run has ever had, as far as the disk knows them: without secrets."""
    found = {}
    with suppress(OSError):
        for name in sorted(os.listdir(directory.backends)):
            value = read_json(os.path.join(directory.backends, name))
            if name.endswith(".json") and {"store", "options", "artifact"} <= value.keys():
                found[name.removesuffix(".json")] = value
    return found


def _configured(directory: RunDirectory, config: bytes) -> dict[str, BackendSpec]:
    """The backends on standard input; they are noted, without their secrets."""
    specs: dict[str, BackendSpec] = {}
    for value in msgspec.json.decode(config)["backends"] if config else ():
        spec = spec_from(value)
        specs[key_of(spec)] = spec
        write_json(directory.backend(key_of(spec)), public(value_of(spec)), durable=True)
    return specs


def _step_back() -> None:
    """Take of the CPU what training leaves: Linux may share it out among sessions first, and nice counts within one."""
    with suppress(OSError), open("/proc/self/autogroup", "w", encoding="ascii") as file:
        file.write(str(_NICE))


def main(arguments: list[str]) -> int:
    """Run as a program; 0: everything is committed, 1: not, 3: another uploader is at work."""
    (path,) = arguments
    config = b"" if sys.stdin is None else sys.stdin.buffer.read()
    with suppress(OSError):
        os.nice(_NICE)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy makes room for as many threads; none is needed here
    try:
        directory = RunDirectory(path)
        lock = directory.uploader_lock()
        if not lock.take(patience=2.0):
            return 3
        options = msgspec.json.decode(config).get("limits", {}) if config else {}
        configured = _configured(directory, config)
        former = {key: spec_from(value) for key, value in saved_backends(directory).items()}
        uploader = Uploader(directory, {**former, **configured}, current=configured, config=config, **options)
    except (MandapaError, InvalidInputError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: uploader.end_soon())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    drained = uploader.run(_step_back)  # training waits for the stores' first answers, and begins now
    # Threads may hang in a store that never answers.
    os._exit(0 if drained else 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
