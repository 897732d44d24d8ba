"""Backends that live in the training process: what belongs to the program can be reached only from there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mandapa.run.backend import Backend
from mandapa.run.committer import Committer, Hub
from mandapa.run.directory import Lock, RunDirectory
from mandapa.run.follower import Follower
from mandapa.run.journal import Intervals
from mandapa.run.logger import BackendSpec

__all__ = ["Inside"]

_TICK = 0.1  # seconds between looks at the journals
_LOOK = 1.0  # seconds between looks at everything else


class Inside:
    """Does for some backends what the uploader does for the others, in threads of the trainer.

    It lets go of no bytes: the uploader does, once all have them. A backend that another process is committing to, as
    ``mandapa sync`` does after a crash, is begun with when that one is done.

    Args:
        directory: The run's.
        rank: Of this process.
        backends: Key -> where it is, and what commits there.
        commit_every: Seconds that something waits at most.
        tell: Takes a line about what happens.
    """

    def __init__(
        self,
        directory: RunDirectory,
        rank: int,
        backends: Mapping[str, tuple[BackendSpec, Backend]],
        *,
        commit_every: float,
        tell: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._rank = rank
        self._hub = Hub()
        self._follower = Follower(directory, self._hub, tell)
        self._commit_every = commit_every
        self._tell = tell
        self._waiting = dict(backends)
        self._locks: list[Lock] = []
        self._committers: dict[str, Committer] = {}
        self._counted: dict[str, tuple[Intervals, int, int]] = {}  # key -> done, and what waited then
        self._thread = threading.Thread(target=self._work, name="mandapa-inside", daemon=True)

    def start(self) -> None:
        """Begin to work, in threads."""
        self._follower.set_living(self._follower.living())
        self._follower.read()
        self._begin()
        self._drop()
        self._thread.start()

    def drain(self, patience: float) -> None:
        """Wait for the other ranks, whose work is done here, too: until they have ended and nothing waits."""
        give_up = time.monotonic() + patience
        while time.monotonic() < give_up:
            with self._hub.changed:
                feed = self._hub.feed
                at_work = [rank for rank, live in feed.live.items() if live and rank != self._rank]
                if not any((rank, feed.current.get(rank)) not in feed.ended for rank in at_work) and not any(
                    committer.pending()[0] for committer in self._committers.values()
                ):
                    return
            time.sleep(_TICK)

    def stop(self, patience: float) -> None:
        """End; a commit that is not done in ``patience`` seconds is left to whoever comes next."""
        with self._hub.changed:
            self._hub.stopping = True
            self._hub.changed.notify_all()
        self._thread.join(patience)
        for committer in self._committers.values():
            committer.stop(patience)
        for lock in self._locks:
            lock.release()

    def reports(self) -> dict[str, dict[str, Any]]:
        """Key -> how far it is, in the words of the uploader's ``status.json``; what waits, of a second ago at most."""
        found: dict[str, dict[str, Any]] = {}
        for key, committer in list(self._committers.items()):
            _, count, size = self._count(key, committer)
            found[key] = {**committer.report, "pending": count, "pending_bytes": size}
        return found

    def _count(self, key: str, committer: Committer, *, again: bool = False) -> tuple[Intervals, int, int]:
        counted = self._counted.get(key)
        if counted is None or again or counted[0] is not committer.done:
            with self._hub.changed:
                counted = self._counted[key] = (committer.done, *committer.pending())
        return counted

    def _work(self) -> None:
        looked = time.monotonic()
        while not self._hub.stopping:
            time.sleep(_TICK)
            some = False
            now = time.monotonic()
            if now - looked >= _LOOK:
                looked = now
                self._begin()
                live = self._follower.living()
                some |= self._follower.read()[0]
                some |= self._follower.set_living(live) | self._follower.read_request()
                self._drop()
            some |= self._follower.read()[0]
            if some:
                with self._hub.changed:
                    self._hub.changed.notify_all()

    def _begin(self) -> None:
        """Commit to those backends that nobody else is committing to."""
        for key, (spec, backend) in list(self._waiting.items()):
            lock = self._directory.backend_lock(key)
            if lock.take():
                del self._waiting[key]
                self._locks.append(lock)
                committer = self._committers[key] = Committer(
                    key, spec, backend, self._directory, self._hub, commit_every=self._commit_every, tell=self._tell
                )
                committer.start()

    def _drop(self) -> None:
        """Forget what is committed; what thousands that wait cost is not paid more often than once a second."""
        if self._waiting:
            return
        done = {key: committer.done for key, committer in self._committers.items()}
        with self._hub.changed:
            self._follower.drop(done, only=True)
        for key, committer in self._committers.items():
            self._count(key, committer, again=True)
