"""A log of numbered, create-only records: reading to its tail, and the one way to append. Source: docs/format.md §8."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Generic, TypeVar

from mandapa.content.parallel import in_order
from mandapa.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    FormatVersionError,
    MandapaError,
    NotFoundError,
    StorageError,
)
from mandapa.format.keys import head_key, log_key, log_prefix, parse_seq
from mandapa.format.records import (
    GC_LIST_BYTES,
    HEAD_MAX,
    FenceOp,
    Op,
    Record,
    decode_head,
    decode_record,
    encode_head,
    encode_record,
)
from mandapa.format.strict import RECORD_MAX
from mandapa.object_store.base import Buffer, ObjectStore
from mandapa.repository.state import LogState, PreconditionError, fold

__all__ = ["Author", "Log", "create_once"]

State = TypeVar("State", bound=LogState)

HEAD_EVERY = 64
"""A head is written when a 64th of the log came after the last one, 64 records at most: a constant price a commit."""

HEAD_PAYS = 3
"""A head takes two requests at least: of fewer records than this each is read by itself."""

ATTEMPTS = 40
"""Tries at one slot that stays empty before the store is given up; with back-off about two minutes."""


class Author:
    """Who appends, and with what clock and dice.

    ``at`` of a record is by this clock and only shown to people; ``sleep`` and ``random`` pace retries.
    """

    def __init__(
        self,
        by: str = "",
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], None] = time.sleep,
        random: random.Random | random.SystemRandom | None = None,
    ) -> None:
        self.by = by
        self.clock = clock
        self.sleep = sleep
        self.random = random if random is not None else _SYSTEM

    def new_id(self) -> bytes:
        """128 random bits."""
        return self.random.getrandbits(128).to_bytes(16, "big")

    def now(self) -> str:
        """The time of a record."""
        return self.clock().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def back_off(self, attempt: int, *, most: float) -> None:
        """Wait a random time that doubles with each failure, ``most`` seconds at most."""
        self.sleep(self.random.uniform(0, min(most, 0.01 * 2 ** min(attempt, 12))))


_SYSTEM = random.SystemRandom()


class Log(Generic[State]):
    """The records of one log, as far as they were read, and their folded state. Safe to use from several threads."""

    def __init__(
        self, store: ObjectStore, log_id: str, state: Callable[[], State], *, threads: int = 8, heads: bool = True
    ) -> None:
        self.id = log_id
        self._new_state = state
        self._store = store
        self._threads = threads
        self._heads = heads
        self._reset()
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._head = 0

    def _reset(self) -> None:
        self.records: list[Record] = []
        self.lines: list[bytes] = []
        self.state = self._new_state()
        self.seen: tuple[int, datetime] | None = None
        """How many records a listing showed last, and when the last of them was put: for `read_logs`."""

    def _held(self) -> threading.RLock:
        """The lock; a forked child gets a new one and an empty log: a thread of its parent may have been at work."""
        if self._pid != os.getpid():
            self._lock = threading.RLock()
            self._reset()
            self._head = 0
            self._pid = os.getpid()
        return self._lock

    def find(self, txn: str) -> Record | None:
        """The record of a transaction among those that were read."""
        return next((record for record in reversed(self.records) if record.txn == txn), None)

    def refresh(self) -> State:
        """Read on to the tail and give the state there.

        One request when nothing is new. The first time: with a head, three requests and one for each record after it;
        without, one for each 1,000 records to list them and one for each record, in parallel.

        Raises:
            CorruptionError: A record is missing, altered, or does not follow from those before it.
            FormatVersionError: A record needs a newer mandapa.
        """
        with self._held():
            if not self.records and self._heads:
                self._read_head()
            if self.records:
                try:
                    self._take(self._read(self._key(len(self.records))))
                except NotFoundError:
                    return self.state
            self._read_listed()
            return self.state

    def preload(self, lines: Iterable[bytes], *, head: int) -> None:
        """Take records that this machine kept, each checked as if it came from the store; nothing if some were read.

        That they still are the store's is for the caller to know. ``head``: how many of them a head held. No request.

        Raises:
            CorruptionError, FormatVersionError: From a line; then none was taken.
        """
        with self._held():
            if self.records:
                return
            try:
                for line in lines:
                    self._take(line)
            except (CorruptionError, FormatVersionError):
                self._reset()
                raise
            self._head = head

    def read_to(self, count: int, *, threads: int) -> State:
        """Read on until ``count`` records are known, which a listing has shown, and give the state there.

        One request for each record that is not known; of a log of which none is, those of a head at most.

        Raises:
            CorruptionError, FormatVersionError: As `refresh`.
        """
        with self._held():
            if not self.records and self._heads and count > HEAD_PAYS:
                self._read_head()
            keys = [self._key(at) for at in range(len(self.records), count)]
            try:
                for data in in_order(self._read, keys, threads=threads):
                    self._take(data)
            except NotFoundError as error:
                raise CorruptionError(f"a record that a listing showed is missing: {error}") from None
            for at in range(len(self.records) - len(keys), len(self.records)):
                if self._head_is_due(at + 1):  # whoever appended it has written one
                    self._head = at + 1
            return self.state

    def forget(self) -> None:
        """Know no record any more: the store is not the one that they were read from."""
        with self._held():
            self._reset()
            self._head = 0

    @property
    def head(self) -> int:
        """How many records the newest head holds that is known."""
        return self._head

    def append(
        self,
        txn: str,
        build: Callable[[State], Iterable[Op]],
        author: Author,
        *,
        since: int | None = None,
        on_record: Callable[[Record], None] | None = None,
        run: str = "",
        used: tuple[str, ...] = (),
    ) -> Record:
        """Append one record, exactly once, whatever the store answers. Source: docs/format.md, "Commit".

        ``build`` makes the ops for the state before the slot that is tried next, and raises if that state forbids
        them; it is called again for each slot. Records from number ``since`` on (default: those not read yet) that are
        not ours go to ``on_record`` first, which re-checks or rebases and may raise. A record of transaction ``txn``
        found among them is the answer: nothing is appended twice.

        One request when no one else commits: a create that is acknowledged needs no reading back.

        Raises:
            ConflictError, NotFoundError, InvalidInputError: From ``build`` and ``on_record``.
            StorageError: The store failed, or keeps refusing a slot that is empty. The record may still land; the same
                transaction id finds it.
        """
        with self._held():
            if not self.records and since is None:
                self.refresh()
            position = len(self.records) if since is None else since
            lost = 0
            while True:
                while position < len(self.records):
                    record = self.records[position]
                    if record.txn == txn:
                        return record
                    position += 1
                    if on_record is not None:
                        on_record(record)
                if self.state.read_only:
                    raise FormatVersionError(f"{self.id}: its log holds ops of a newer mandapa: upgrade to write to it")
                record = Record(
                    seq=position,
                    txn=txn,
                    prev=self._prev(),
                    at=author.now(),
                    by=author.by,
                    ops=self._decide(build),
                    run=run,
                    used=used,
                )
                self._take(self._put(encode_record(record), position, author))
                if self.records[position].txn == txn:
                    self._write_head()
                    return self.records[position]
                lost += 1
                author.back_off(lost, most=0.5)  # more, and a writer starves beside a busy one
                self._read_listed()

    def _decide(self, build: Callable[[State], Iterable[Op]]) -> tuple[Op, ...]:
        """The ops for the next slot, each of which fits the state that those before it leave."""
        ops = tuple(build(self.state))
        trial = self.state.copy()
        try:
            for op in ops:
                trial.apply(op, _NO_RECORD)
        except PreconditionError as error:
            raise ConflictError(str(error)) from None
        return ops

    def _put(self, data: bytes, seq: int, author: Author) -> Buffer:
        return create_once(self._store, self._key(seq), data, author)

    def _key(self, seq: int) -> str:
        return log_key(self.id, seq)

    def _prev(self) -> str:
        """What the next record names as the one before; the first names its log, so that logs cannot be exchanged."""
        return self.records[-1].seal if self.records else self.id

    def _read(self, key: str) -> Buffer:
        return self._store.get(key, limit=RECORD_MAX)

    def _take(self, data: Buffer) -> None:
        seq = len(self.records)
        key = self._key(seq)
        record = decode_record(data, key=key, seq=seq)
        if record.prev != self._prev():
            raise CorruptionError(f"{key} does not follow the record before it", key=key)
        fold(self.state, record, key=key)
        self.records.append(record)
        self.lines.append(bytes(data))

    def _read_listed(self) -> None:
        """Read every record that a listing shows after those known; keys that are none of a record are ignored."""
        gap: int | None = 0
        while gap is not None:
            known = len(self.records)
            start = self._key(known - 1) if known else ""
            keys = [info.key for info in self._store.list(log_prefix(self.id), start_after=start)]
            keys = [key for key in keys if (seq := parse_seq(key)) is not None and key == self._key(seq)]
            gap = next((at for at, key in enumerate(keys, known) if key != self._key(at)), None)
            if gap is not None:
                # A folder that grows while it is listed may show a record and not the one before it.
                self.check_there(gap, keys[gap - known])
                keys[gap - known :] = [self._key(gap)]
            for data in in_order(self._read, keys, threads=self._threads):
                self._take(data)

    def check_there(self, at: int, shown: str) -> None:
        """Raise `CorruptionError` unless record ``at`` is there, which a listing left out; ``shown`` came after it."""
        try:
            self._store.head(self._key(at))
        except NotFoundError:
            raise CorruptionError(f"{self._key(at)} is missing, though {shown} is there", key=self._key(at)) from None

    def _read_head(self) -> None:
        """Start from the head when it holds the records up to one that stands in the log; it is only a cache."""
        try:
            lines = decode_head(self._store.get(head_key(self.id), limit=HEAD_MAX), key=head_key(self.id))
            if not lines or self._read(self._key(len(lines) - 1)) != lines[-1]:
                return
        except (NotFoundError, CorruptionError):
            return
        # The last line is the log's own, and each line names the hash of the one before: so all of them are.
        try:
            for line in lines:
                self._take(line)
        except (CorruptionError, FormatVersionError):
            self._reset()
        self._head = len(self.records)

    def _head_is_due(self, count: int) -> bool:
        """Whether a head is worth its put after ``count`` records; a fence alone is no reason: gc fences every log."""
        fence = all(isinstance(op, FenceOp) for op in self.records[count - 1].ops)
        return count - self._head >= (HEAD_EVERY if fence else min(HEAD_EVERY, max(1, count // HEAD_EVERY)))

    def _write_head(self) -> None:
        if not self._head_is_due(len(self.records)):
            return
        self._head = len(self.records)
        try:
            self._store.put(head_key(self.id), encode_head(self.lines))
        except MandapaError:
            # The commit stands; a head only saves requests, and the next writer tries again.
            return


def create_once(store: ObjectStore, key: str, data: bytes, author: Author) -> Buffer:
    """Try one key with the same bytes until it is known to be taken; gives what stands there.

    Raises:
        StorageError: The store failed, or refuses the key again and again though nothing is there. It may still land.
    """
    for attempt in range(ATTEMPTS):
        try:
            store.create(key, data)
        except AlreadyExistsError:
            pass
        except StorageError as error:
            if not error.retryable:
                raise
        else:
            return data
        try:
            return store.get(key, limit=GC_LIST_BYTES)  # the largest of what is created
        except NotFoundError:
            author.back_off(attempt, most=5.0)
    raise StorageError(
        f"{store.url}: {key} is refused again and again though nothing is there; try later", retryable=True
    )


_NO_RECORD = Record(seq=0, txn="", prev="", at="", by="", ops=())
