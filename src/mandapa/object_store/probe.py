"""Does a store really create only if absent? Ask it, as writers that race would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from mandapa.errors import AlreadyExistsError, CorruptionError, NotFoundError, StorageError
from mandapa.object_store.base import ObjectStore

if TYPE_CHECKING:
    from random import Random

__all__ = ["ProbeResult", "probe"]

_T = TypeVar("_T")

_ATTEMPTS = 10  # creates of one key by one racer; S3's spurious conflicts come once or twice in a row
_REFUSED = f"create was refused {_ATTEMPTS} times although nothing was there"
_UNSEEN = "get does not see what was just written"
_LARGEST = 4096  # bytes; what a probe writes is a line
_BARRIER_PATIENCE = 60.0  # seconds; a racer that died would leave the others waiting


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe found out."""

    verdict: Literal["ok", "refused"]
    """``refused``: with several writers this store would lose versions."""
    reasons: tuple[str, ...]
    """Why it is refused, a sentence each."""
    rounds: int
    """Races that were run."""
    spurious_conflicts: int
    """Creates answered `AlreadyExistsError` while nothing was there; some are normal on S3."""
    requests: int


def probe(store: ObjectStore, *, racers: int = 16, rounds: int = 3, random: Random | None = None) -> ProbeResult:
    """Whether ``store`` keeps the promises that commits rest on, as far as asking it can tell.

    Checked under ``probe/<random id>/``, which is removed afterwards: create refuses what is there and leaves it alone;
    of racing creates exactly one wins, by the commit protocol's own rule (who is refused reads the key, and where
    nothing is there tries the same again); what was written is seen at once by get, head, range and list.

    Costs about ``20 + (2 * racers + 1) * rounds + racers`` requests.

    Args:
        store: Probed as it is; wrap a flaky one in `RetryingObjectStore` first.
        racers: Threads, each with a connection of its own.
        rounds: Races; 3 finds a check-then-put with 20 ms in between, `doctor` runs more.
        random: Of the id.

    Raises:
        StorageError: the store failed, so there is no verdict; `AccessDeniedError` when it refused.

    Example:
        >>> from mandapa.object_store import MemoryObjectStore
        >>> probe(MemoryObjectStore()).verdict
        'ok'
    """
    from random import SystemRandom

    run = _Probe(store, f"probe/{(random or SystemRandom()).getrandbits(128):032x}/")
    try:
        run.check_create()
        run.check_reads()
        if not run.reasons:
            run.check_races(racers, rounds)
            run.check_list()
    finally:
        with suppress(StorageError):
            store.delete(run.keys)
    return ProbeResult(
        verdict="refused" if run.reasons else "ok",
        reasons=tuple(dict.fromkeys(run.reasons)),
        rounds=run.rounds,
        spurious_conflicts=run.spurious_conflicts,
        requests=run.requests,
    )


@dataclass(frozen=True, slots=True)
class _Finish:
    """How a race ended for one racer."""

    mine: bytes
    told_won: bool
    found: bytes | None


class _Probe:
    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._lock = threading.Lock()
        self.keys: list[str] = []
        self.reasons: list[str] = []
        self.rounds = 0
        self.requests = 0
        self.spurious_conflicts = 0

    def check_create(self) -> None:
        key = self._new_key("first")
        first, second = b"first writer's bytes", b"second writer's bytes"
        finish = self._create(key, first)
        if finish.found is None:
            self.reasons.append(_UNSEEN if finish.told_won else _REFUSED)
            self._ask(lambda: self._store.put(key, first))
        finish = self._create(key, second)
        if finish.told_won:
            self.reasons.append("create said yes although an object was there")
        if finish.found != first:
            self.reasons.append("create replaced an object that was there")

    def check_reads(self) -> None:
        key = self._new_key("a-b_c.d/0000000000000001")
        old, new = b"0123456789", b"abcdefghijkl"
        self._ask(lambda: self._store.put(key, old))
        seen = self._get(key)
        self._ask(lambda: self._store.put(key, new))
        if seen != old or self._get(key) != new:
            self.reasons.append(_UNSEEN)
        try:
            if self._ask(lambda: self._store.head(key)).size != len(new):
                self.reasons.append("head tells the wrong size")
            if [bytes(piece) for piece in self._ask(lambda: self._store.get_ranges(key, [(2, 3)]))] != [new[2:5]]:
                self.reasons.append("a range read gives other bytes")
        except NotFoundError:
            self.reasons.append("head or a range read does not see what was just written")
        except CorruptionError:
            self.reasons.append("a range read gives too few bytes")
        self.check_list()

    def check_list(self) -> None:
        listed = self._ask(lambda: [info.key for info in self._store.list(self._prefix)])
        if missing := set(self.keys) - set(listed):
            self.reasons.append(f"list does not show what was just written ({len(missing)} of {len(self.keys)})")
        if foreign := set(listed) - set(self.keys):
            self.reasons.append(f"list shows keys that nobody wrote, such as {min(foreign)!r}")
        if listed != sorted(listed):
            self.reasons.append("list is not in byte order")

    def check_races(self, racers: int, rounds: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        barrier = threading.Barrier(racers)
        with ThreadPoolExecutor(racers) as pool:
            # Open the connections first: a handshake would spread the racers over more time than a bad store needs.
            list(pool.map(self._get, [self.keys[0]] * racers))
            for number in range(rounds):
                key = self._new_key(f"race-{number}")

                def run(racer: int, key: str = key) -> _Finish:
                    mine = f"racer {racer}".encode()
                    barrier.wait(_BARRIER_PATIENCE)
                    return self._create(key, mine)

                finishes = list(pool.map(run, range(racers)))
                self.rounds += 1
                self._judge(finishes, self._get(key))
                if self.reasons:
                    return

    def _judge(self, finishes: list[_Finish], final: bytes | None) -> None:
        told = [finish for finish in finishes if finish.told_won]
        if any(finish.found is None and not finish.told_won for finish in finishes):
            self.reasons.append(_REFUSED)
        if len(told) > 1:
            self.reasons.append(f"create said yes to {len(told)} of {len(finishes)} racing writers of one key")
        if any(finish.mine != final for finish in told):
            self.reasons.append("a create that was acknowledged is gone")
        if any(finish.found not in {None, final} for finish in finishes):
            self.reasons.append("an object changed after it had been read")

    def _create(self, key: str, mine: bytes) -> _Finish:
        """The commit protocol's rule for one slot; what stands there in the end, None when it never came to be."""
        for _ in range(_ATTEMPTS):
            told_won = refused = False
            failure: StorageError | None = None
            try:
                self._ask(lambda: self._store.create(key, mine))
                told_won = True
            except AlreadyExistsError:
                refused = True
            except StorageError as error:  # outcome unknown: the key will tell
                if not error.retryable:
                    raise
                failure = error
            found = self._get(key)
            if found is not None or told_won:
                return _Finish(mine, told_won, found)
            with self._lock:
                self.spurious_conflicts += refused
        if failure:
            raise failure
        return _Finish(mine, False, None)

    def _get(self, key: str) -> bytes | None:
        try:
            return bytes(self._ask(lambda: self._store.get(key, limit=_LARGEST)))
        except NotFoundError:
            return None

    def _ask(self, call: Callable[[], _T]) -> _T:
        with self._lock:
            self.requests += 1
        return call()

    def _new_key(self, name: str) -> str:
        self.keys.append(self._prefix + name)
        return self.keys[-1]
