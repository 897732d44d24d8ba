"""Reads what the ranks of a run hand over, as they hand it over, and sees which of them live."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from mandapa.run.committer import Hub
from mandapa.run.directory import RunDirectory
from mandapa.run.journal import (
    ENTRIES,
    AssetEntry,
    CommitEntry,
    Entry,
    Intervals,
    JournalReader,
    UrlEntry,
    UseEntry,
)

__all__ = ["Follower"]


class Follower:
    """Feeds a hub from the journals of a run's directory. For one thread.

    Args:
        directory: The run's.
        hub: What committers work from.
        tell: Takes a line about what cannot be read.
        on_entry: Called with each entry, under the hub's condition.
    """

    def __init__(
        self,
        directory: RunDirectory,
        hub: Hub,
        tell: Callable[[str], None],
        on_entry: Callable[[int, Entry], None] = lambda rank, entry: None,
    ) -> None:
        self._directory = directory
        self._hub = hub
        self._tell = tell
        self._on_entry = on_entry
        self._readers: dict[int, JournalReader[Any]] = {}
        self._request = self._requested()

    def living(self) -> dict[int, bool]:
        """Which ranks there are, and whether each has a live trainer.

        Who asks before `read` knows that who is not alive has written nothing that is not read then.
        """
        ranks = self._directory.ranks()
        for rank in set(ranks) - self._readers.keys():
            self._readers[rank] = JournalReader(self._directory.journal(rank), ENTRIES)
        return {rank: self._directory.rank_lock(rank).held() for rank in ranks}

    def set_living(self, live: dict[int, bool]) -> bool:
        """Take that in; whether it changed."""
        with self._hub.changed:
            if live == self._hub.feed.live:
                return False
            self._hub.feed.live = live
        return True

    def read(self) -> tuple[bool, bool]:
        """Take in what is new in the journals; whether there was anything, and anything that may call for a commit."""
        some = calls = False
        now = time.monotonic()
        for rank, reader in self._readers.items():
            damaged = reader.damaged
            for entry in reader.new():
                calls |= not isinstance(entry, AssetEntry | UrlEntry | UseEntry)
                some = True
                with self._hub.changed:
                    self._take(rank, entry, now)
            if reader.damaged > damaged:
                self._tell(f"{reader.path}: {reader.damaged - damaged} lines are damaged and were left out")
        return some, calls

    def _take(self, rank: int, entry: Entry, now: float) -> None:
        feed = self._hub.feed
        if isinstance(entry, UseEntry) and entry.address not in feed.used:
            feed.used.append(entry.address)
        if isinstance(entry, CommitEntry):
            self._hub.asked += 1
        feed.take(rank, entry)
        self._hub.seen[rank, entry.n] = now
        self._on_entry(rank, entry)

    def read_request(self) -> bool:
        """Whether somebody has asked from outside for a commit: of everything that was handed over until then."""
        request = self._requested()
        if request == self._request:
            return False
        self._request = request
        self.read()  # what was handed over before somebody asked
        with self._hub.changed:
            self._hub.marks = {rank: reader.last for rank, reader in self._readers.items()}
            self._hub.asked += 1
        return True

    def _requested(self) -> int:
        """When somebody last asked."""
        try:
            return os.stat(self._directory.request).st_mtime_ns
        except OSError:
            return 0

    def drop(self, done: Mapping[str, Intervals], *, only: bool = False) -> list[tuple[int, Entry]]:
        """Forget, and give, what every backend of its attempt has, or with ``only`` every one of these.

        To be called under the hub's condition.
        """
        feed = self._hub.feed
        gone: list[tuple[int, Entry]] = []
        for rank, entries in feed.entries.items():
            keep = []
            for entry in entries:
                began = feed.begun.get(entry.attempt)
                keys = done if only or began is None else began.backends  # also those that are not known here
                if all(key in done and (rank, entry.n) in done[key] for key in keys):
                    gone.append((rank, entry))
                else:
                    keep.append(entry)
            if len(keep) < len(entries):
                feed.entries[rank] = keep
        for rank, entry in gone:
            self._hub.seen.pop((rank, entry.n), None)
        return gone
