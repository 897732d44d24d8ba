"""Backends that live in the training process: what belongs to the program can be reached only from there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mandapa.run.backend import Backend
from mandapa.run.committer import Committer, Hub
from mandapa.run.directory import RunDirectory
from mandapa.run.follower import Follower
from mandapa.run.logger import BackendSpec

__all__ = ["Inside"]

_TICK = 0.1  # seconds between looks at the journals
_LIVENESS = 1.0


class Inside:
    """Does for some backends what the uploader does for the others, in threads of the trainer.

    It lets go of no bytes: the uploader does, once all have them.

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
        self._rank = rank
        self._hub = Hub()
        self._follower = Follower(directory, self._hub, tell)
        self._committers = {
            key: Committer(key, spec, backend, directory, self._hub, commit_every=commit_every, tell=tell)
            for key, (spec, backend) in backends.items()
        }
        self._thread = threading.Thread(target=self._work, name="mandapa-inside", daemon=True)

    def start(self) -> None:
        """Begin to work, in threads."""
        self._follower.set_living(self._follower.living())
        self._follower.read()
        self._drop()
        for committer in self._committers.values():
            committer.start()
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
        for committer in self._committers.values():
            committer.stop(patience)

    def reports(self) -> dict[str, dict[str, Any]]:
        """Key -> how far it is, in the words of the uploader's ``status.json``."""
        found = {}
        with self._hub.changed:
            for key, committer in self._committers.items():
                count, size = committer.pending()
                found[key] = {**committer.report, "pending": count, "pending_bytes": size}
        return found

    def _work(self) -> None:
        looked = time.monotonic()
        while not self._hub.stopping:
            time.sleep(_TICK)
            some = False
            now = time.monotonic()
            if now - looked >= _LIVENESS:
                looked = now
                live = self._follower.living()
                some |= self._follower.read()[0]
                some |= self._follower.set_living(live) | self._follower.read_request()
            some |= self._follower.read()[0]
            if some:
                with self._hub.changed:
                    self._hub.changed.notify_all()
            if self._drop() and self._hub.urgent:
                with self._hub.changed:
                    self._hub.urgent = False

    def _drop(self) -> bool:
        """Forget what is committed; whether nothing waits."""
        done = {key: committer.done for key, committer in self._committers.items()}
        with self._hub.changed:
            self._follower.drop(done, only=True)
            return not any(committer.pending()[0] for committer in self._committers.values())
