"""Real code under a deterministic scheduler: threads of which exactly one runs, switched at every store call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import TypeVar

from mandapa.object_store.base import Buffer, ObjectInfo, ObjectStore
from mandapa.testing.faults import Crash

_T = TypeVar("_T")


class StuckError(BaseException):
    """The actors make no progress."""


class Scheduler:
    """Passes a baton between threads; who goes on is drawn from ``random``, so a seed gives one order of events.

    Args:
        random: Seeded.
        burst: How likely an actor is to go on by itself: the nearer to 1, the more of one's work fits between two
            calls of another.
        limit: Turns after which `StuckError` ends the run.
    """

    def __init__(self, random: Random, *, burst: float, limit: int) -> None:
        self.turns = 0
        self.trace: list[str] = []
        self.failure: BaseException | None = None
        self._random = random
        self._burst = burst
        self._limit = limit
        self._ready: dict[str, threading.Semaphore] = {}
        self._asleep: dict[str, int] = {}
        self._threads: list[threading.Thread] = []
        self._running = ""
        self._over = threading.Semaphore(0)

    def add(self, name: str, act: Callable[[], None]) -> None:
        """An actor, which starts when the baton first comes to it."""
        ready = self._ready[name] = threading.Semaphore(0)

        def run() -> None:
            ready.acquire()
            try:
                if self.failure is None:
                    act()
            except BaseException as error:
                self.failure = self.failure or error
            del self._ready[name]
            self._pass_on()

        self._threads.append(threading.Thread(target=run, name=name, daemon=True))

    def run(self) -> None:
        """Until every actor has ended; raises what the first one that failed has raised."""
        for thread in self._threads:
            thread.start()
        self._pass_on()
        self._over.acquire()
        for thread in self._threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def sleep(self, turns: int) -> None:
        """Let others have so many turns, as long as there are others."""
        if turns:
            self._asleep[self._running] = self.turns + turns
            self.switch("sleep")

    def switch(self, event: str) -> None:
        """Let others go on, or not."""
        self.turns += 1
        name = self._running
        self.trace.append(f"{name} {event}")
        if self.failure is not None or self.turns > self._limit:
            raise StuckError(f"no end after {self._limit} turns")
        if self._random.random() < self._burst and self._asleep.get(name, 0) <= self.turns:
            return
        chosen = self._choose()
        if chosen != name:
            self._running = chosen
            self._ready[chosen].release()
            self._ready[name].acquire()

    def _choose(self) -> str:
        names = list(self._ready)
        awake = [name for name in names if self._asleep.get(name, 0) <= self.turns]
        return self._random.choice(awake) if awake else min(names, key=lambda name: self._asleep[name])

    def _pass_on(self) -> None:
        if self._ready:
            self._running = self._choose()
            self._ready[self._running].release()
        else:
            self._over.release()


class Life:
    """Of one process: each call of a store may be its last, and when it is over, no store hears of it again."""

    def __init__(self, random: Random, killed: float) -> None:
        self._random = random
        self._killed = killed
        self.over = False

    def risk(self) -> bool:
        """Whether it ends here."""
        self.over = self.over or self._random.random() < self._killed
        return self.over


class ProcessStore:
    """The store as one process sees it: each call gives the baton away first, and may be the process's last."""

    def __init__(self, store: ObjectStore, scheduler: Scheduler, life: Life) -> None:
        self._store = store
        self._scheduler = scheduler
        self._life = life

    @property
    def url(self) -> str:
        return self._store.url

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        return self._call("get " + key, lambda: self._store.get(key, limit=limit))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        return self._call("range " + key, lambda: self._store.get_ranges(key, ranges))

    def head(self, key: str) -> ObjectInfo:
        return self._call("head " + key, lambda: self._store.head(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """In pages of three, so that things change between them, as between the pages of real stores."""
        last = start_after
        while True:
            page = self._call("list " + prefix, lambda last=last: self._page(prefix, last))
            yield from page
            if len(page) < 3:
                return
            last = page[-1].key

    def put(self, key: str, data: Buffer) -> None:
        self._call("put " + key, lambda: self._store.put(key, data))

    def create(self, key: str, data: Buffer) -> None:
        self._call("create " + key, lambda: self._store.create(key, data))

    def delete(self, keys: Iterable[str]) -> None:
        kept = list(keys)
        self._call("delete " + " ".join(kept), lambda: self._store.delete(kept))

    def _page(self, prefix: str, last: str) -> list[ObjectInfo]:
        page = []
        for info in self._store.list(prefix, start_after=last):
            page.append(info)
            if len(page) == 3:
                break
        return page

    def _call(self, event: str, call: Callable[[], _T]) -> _T:
        if not self._life.over:
            self._scheduler.switch(event)
        if self._life.risk():
            raise Crash(event)
        result = call()
        if self._life.risk():
            raise Crash("after " + event)
        return result
