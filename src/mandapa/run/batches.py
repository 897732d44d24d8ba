"""Which of the things that were handed over become the next version. Pure: no I/O, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mandapa.run.journal import (
    ArtifactEntry,
    AssetEntry,
    BeginEntry,
    CheckpointEntry,
    CommitEntry,
    EndEntry,
    Entry,
    Intervals,
    UrlEntry,
)

__all__ = ["Batch", "Feed", "complete_checkpoints", "next_batch"]

SILENCE = 30.0
"""Seconds that a checkpoint waits for a live rank that has never handed one over; then that rank does not take part."""

Handed = tuple[int, Entry]
"""A rank, and something of it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes into one commit."""

    kind: Literal["folder", "artifact"]
    attempt: int
    entries: list[Handed]
    incomplete: bool = False
    """Its checkpoint lacks parts that will never come: it is kept beside the folder's own."""

    @property
    def numbers(self) -> Intervals:
        """The entries as a set."""
        return Intervals((rank, entry.n) for rank, entry in self.entries)

    @property
    def checkpoint(self) -> list[tuple[int, CheckpointEntry]]:
        """The parts of its checkpoint, by rank."""
        return [(rank, entry) for rank, entry in self.entries if isinstance(entry, CheckpointEntry)]


@dataclass(slots=True)
class Feed:
    """What all ranks of a run have handed over and is still of interest, and which of them live."""

    entries: dict[int, list[Entry]] = field(default_factory=dict)
    """Rank -> its entries, by number."""
    begun: dict[int, BeginEntry] = field(default_factory=dict)
    """Attempt -> how it began."""
    live: dict[int, bool] = field(default_factory=dict)
    """Rank -> whether its trainer lives."""
    current: dict[int, int] = field(default_factory=dict)
    """Rank -> its newest attempt."""
    ended: set[tuple[int, int]] = field(default_factory=set)
    """(rank, attempt) that ended by themselves."""
    saved: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(rank, attempt) -> parts of checkpoints that it has handed over; what is whole by itself is none."""
    used: list[str] = field(default_factory=list)
    """Addresses of versions that went into the run."""

    def take(self, rank: int, entry: Entry) -> None:
        """Take in the next entry of a rank."""
        self.entries.setdefault(rank, []).append(entry)
        self.current[rank] = max(entry.attempt, self.current.get(rank, 0))
        if isinstance(entry, BeginEntry):
            self.begun.setdefault(entry.attempt, entry)
        elif isinstance(entry, EndEntry):
            self.ended.add((rank, entry.attempt))
        elif isinstance(entry, CheckpointEntry) and not entry.whole:
            self.saved[rank, entry.attempt] += 1

    def is_over(self, attempt: int) -> bool:
        """Whether nothing more comes from that attempt."""
        if any(newer > attempt for newer in self.current.values()):
            return True
        return not any(
            alive and self.current.get(rank) == attempt and (rank, attempt) not in self.ended
            for rank, alive in self.live.items()
        )

    def wanted(self, key: str, rank: int, entry: Entry) -> bool:
        """Whether a backend gets that entry."""
        began = self.begun.get(entry.attempt)
        return began is None or key in began.backends


def next_batch(
    feed: Feed,
    key: str,
    done: Intervals,
    *,
    urgent: bool = False,
    waited: Callable[[int, int], float] = lambda rank, n: 0.0,
) -> Batch | None:
    """What the backend ``key`` commits next; None when nothing is due.

    Versions of other artifacts come first. Then, attempt by attempt: each complete checkpoint with what its ranks
    handed over before it; without one, and if a commit was asked for, the rest. No path is in a batch twice, so that
    everything that was handed over is in a version: a later one starts the next batch. Parts of checkpoints that will
    never be whole come last.

    Args:
        feed: What there is.
        key: The backend.
        done: What it has committed.
        urgent: Commit whatever waits.
        waited: Seconds since an entry of a rank was first seen.
    """
    pending = [
        (rank, entry)
        for rank, entries in sorted(feed.entries.items())
        for entry in entries
        if (rank, entry.n) not in done and feed.wanted(key, rank, entry)
    ]
    for rank, entry in pending:
        if isinstance(entry, ArtifactEntry):
            return Batch("artifact", entry.attempt, [(rank, entry)])
    if not pending:
        return None
    attempt = min(entry.attempt for _, entry in pending)
    pending = [(rank, entry) for rank, entry in pending if entry.attempt == attempt]
    over = feed.is_over(attempt)
    rest = [(rank, entry) for rank, entry in pending if not isinstance(entry, CheckpointEntry)]
    groups = _groups(feed, attempt, pending)
    for group in groups:
        if not _lacking(feed, attempt, group, over, waited):
            parts = {rank: entry.n for rank, entry in group}
            before = [(rank, entry) for rank, entry in rest if entry.n < parts.get(rank, entry.n + 1)]
            whole = [*before, *group]
            kept = len(_without_twins(whole))
            if before and kept < len(whole):
                whole = whole[: min(kept, len(before))]  # never a part of the checkpoint without the others
            return Batch("folder", attempt, whole)
    if rest and (urgent or over or any(isinstance(entry, CommitEntry | EndEntry) for _, entry in rest)):
        return Batch("folder", attempt, _without_twins(rest))
    if groups and over:
        return Batch("folder", attempt, list(groups[0]), incomplete=True)
    return None


def complete_checkpoints(feed: Feed) -> list[list[tuple[int, CheckpointEntry]]]:
    """All checkpoints of which every part is there, those that nothing is known to lack, oldest first."""
    found = []
    for attempt in sorted({entry.attempt for entries in feed.entries.values() for entry in entries}):
        handed = [(rank, e) for rank, entries in sorted(feed.entries.items()) for e in entries if e.attempt == attempt]
        over = feed.is_over(attempt)
        found += [
            [(rank, entry) for rank, entry in group if isinstance(entry, CheckpointEntry)]
            for group in _groups(feed, attempt, handed)
            if not _lacking(feed, attempt, group, over, lambda rank, n: 0.0)
        ]
    return found


def _groups(feed: Feed, attempt: int, handed: Iterable[Handed]) -> list[Sequence[Handed]]:
    """The parts of each checkpoint of an attempt, oldest first.

    Of one step and place, the first of each rank go together, and so on; what is whole stands alone.
    """
    groups: dict[tuple[int, str, int, int], list[Handed]] = {}
    times: Counter[tuple[int, str, bool, int]] = Counter()
    order: dict[tuple[int, str, int, int], int] = {}
    for rank, entry in handed:
        if isinstance(entry, CheckpointEntry):
            same = (entry.step, entry.place, entry.whole, rank)
            times[same] += 1
            key = (entry.step, entry.place, rank if entry.whole else -1, times[same])
            groups.setdefault(key, []).append((rank, entry))
            order.setdefault(key, entry.n)
    return [groups[key] for key in sorted(groups, key=lambda key: (order[key], key))]


def _lacking(
    feed: Feed, attempt: int, group: Sequence[Handed], over: bool, waited: Callable[[int, int], float]
) -> bool:
    """Whether a checkpoint lacks a part: that of a rank which hands over checkpoints, or may still begin to."""
    if any(isinstance(entry, CheckpointEntry) and entry.whole for _, entry in group):
        return False
    began = feed.begun.get(attempt)
    here = {rank for rank, _ in group}
    expected = set(began.local_ranks) if began is not None else here
    for rank in expected - here:
        if (rank, attempt) in feed.saved:
            return True
        if (rank, attempt) in feed.ended or max(feed.saved[other, attempt] for other in here) > 1:
            continue  # it takes no part: it ended without one, or was silent for a whole interval
        opened = feed.current.get(rank) == attempt
        if opened and not feed.live.get(rank, False):
            return True  # it died before its first: nobody knows
        if not over and min(waited(other, entry.n) for other, entry in group) < SILENCE:
            return True
    return False


def _without_twins(handed: Sequence[Handed]) -> list[Handed]:
    """As many of these, from the first on, as have no two for one path; of a file that grows the last says it all."""
    seen: dict[str, str] = {}  # path -> the file that grows there; empty: none does
    folders: set[str] = set()
    for at, (_, entry) in enumerate(handed):
        for path, grows in _places(entry):
            above = _above(path)
            if (path in seen and not (grows and seen[path] == grows)) or path in folders or not above.isdisjoint(seen):
                return list(handed[:at])
            seen[path] = grows
            folders |= above
    return list(handed)


def _places(entry: Entry) -> list[tuple[str, str]]:
    """The paths of an entry in the version, and of one that grows its file."""
    if isinstance(entry, AssetEntry):
        # Facts of the run are ours: the last are the ones that count.
        return [] if entry.reserved else [(entry.file.path, entry.file.source if entry.grows else "")]
    if isinstance(entry, UrlEntry):
        return [(entry.path, "")]
    return [(file.path, "") for file in entry.files] if isinstance(entry, CheckpointEntry) else []


def _above(path: str) -> set[str]:
    parts = path.split("/")
    return {"/".join(parts[:n]) for n in range(1, len(parts))}
