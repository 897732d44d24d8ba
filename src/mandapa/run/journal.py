"""The local record of what was handed over, and of what became of it: append-only files of sealed lines.

One writer a file, one ``write`` a line, nothing is ever changed: a reader needs no lock, a torn last line counts as not
written, and a line that was damaged later is left out without hurting those around it. The writer does not fsync: the
page cache outlives every process, and the uploader fsyncs for the machine's death.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, Literal, TypeVar

import msgspec

from mandapa.errors import CorruptionError, StorageError
from mandapa.format.strict import FORMAT, open_sealed, seal

__all__ = [
    "ArtifactEntry",
    "AssetEntry",
    "BeginEntry",
    "CheckpointEntry",
    "CommitEntry",
    "EndEntry",
    "Entry",
    "File",
    "InMemory",
    "Intervals",
    "Journal",
    "JournalReader",
    "Made",
    "Outcome",
    "Refused",
    "Started",
    "UrlEntry",
    "UseEntry",
]

LINE_MAX = 1 << 20
"""Bytes of a line; longer ones are damage."""

_READ = 1 << 20


class Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Something that a rank handed over, asked for or said."""

    format: int = FORMAT
    n: int
    """Its number in the rank's journal, from 1, ascending."""
    time: str
    """UTC, by the machine's clock; shown only."""
    attempt: int


class BeginEntry(Entry, frozen=True, kw_only=True, tag="begin"):
    """A process of the run has started."""

    launch: str
    """Equal for all ranks that were started together."""
    local_ranks: list[int]
    """All ranks of this launch on this machine that may save checkpoints."""
    fresh: bool = False
    """Nothing of former attempts is gone on from."""
    backends: list[str]
    """Keys of the backends that get this attempt's entries."""
    base: dict[str, int | None]
    """Backend -> the version that the run's folder is from here on, None: empty. Not there: as it was."""


class InMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes of a file are until they are in the file."""

    slot: str
    """The file of the memory: absolute, or relative to the run's directory."""
    turn: str
    """Which use of the slot, 16 hex digits; in another turn it holds something else."""
    outline: int
    """Bytes of the outline, at 4096."""
    digest: str
    """BLAKE3 of the outline, in hex."""


class File(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bytes that the run owns."""

    path: str
    """In the version."""
    source: str
    """Relative to the run's directory, or absolute."""
    size: int
    memory: InMemory | None = None
    """Where they are until somebody has written them to ``source``."""


class AssetEntry(Entry, frozen=True, kw_only=True, tag="asset"):
    """A file for the run's folder."""

    file: File
    grows: bool = False
    """Of a file to which bytes are only appended: its first ``file.size`` bytes."""
    reserved: bool = False
    skip: list[str] = []
    """Backends that do not want it."""


class UrlEntry(Entry, frozen=True, kw_only=True, tag="url"):
    """A URL for the run's folder."""

    path: str
    url: str
    size: int | None = None
    checksum: str = ""
    skip: list[str] = []


class CheckpointEntry(Entry, frozen=True, kw_only=True, tag="checkpoint"):
    """This rank's files of a checkpoint, at its place or below; those of all ranks together are the checkpoint."""

    step: int
    epoch: int | None = None
    metrics: dict[str, Any] = {}
    files: list[File]
    best: tuple[str, Literal["min", "max"]] | None = None
    """The metric, and which way is better, by which the alias ``best`` is kept."""
    keep_local: int = 1
    place: str = "checkpoint"
    """The file or folder of the version that is the checkpoint; equal for all its parts."""
    whole: bool = False
    """It is all of it: no other rank has a part."""


class ArtifactEntry(Entry, frozen=True, kw_only=True, tag="artifact"):
    """A version of another artifact, to be committed at once."""

    name: str
    source: str
    """A file or a folder that the run owns."""
    at: str | None
    size: int
    aliases: list[str] = []
    metadata: dict[str, Any] = {}


class UseEntry(Entry, frozen=True, kw_only=True, tag="use"):
    """A version that went into the run."""

    address: str


class CommitEntry(Entry, frozen=True, kw_only=True, tag="commit"):
    """Whatever was handed over is to be committed now."""


class EndEntry(Entry, frozen=True, kw_only=True, tag="end"):
    """The rank is done."""

    status: Literal["finished", "failed"]


Any_ = BeginEntry | AssetEntry | UrlEntry | CheckpointEntry | ArtifactEntry | UseEntry | CommitEntry | EndEntry


class Outcome(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """What a backend did; its journal is its cursor."""

    format: int = FORMAT
    n: int
    txn: str


class Started(Outcome, frozen=True, kw_only=True, tag="started"):
    """A commit has been chosen: durable before the first put, so that a restart finishes the same one."""

    batch: dict[str, list[tuple[int, int]]]
    """Rank -> numbers of its entries, as first and last of each stretch."""
    attempt: int
    folder: bool
    """Of the run's own folder; else a version of another artifact."""
    as_incomplete: bool = False
    """The batch holds parts of checkpoints whose other parts will never come."""
    early: bool = False
    """Out of turn, because the machine is about to go: the entries are committed in their turn, too."""


class Made(Outcome, frozen=True, kw_only=True, tag="made"):
    """The commit is done."""

    version: str
    """Its address; empty when nothing had changed."""
    number: int | None = None
    """The version of the run's folder after it."""


_T = TypeVar("_T", bound=msgspec.Struct)


class Refused(Outcome, frozen=True, kw_only=True, tag="refused"):
    """The repository will not have it as it is: it is tried again by the next uploader, and holds up nothing."""

    reason: str


ENTRIES = msgspec.json.Decoder(Any_)
OUTCOMES = msgspec.json.Decoder(Started | Made | Refused)


class JournalReader(Generic[_T]):
    """Reads a journal on from where it was, for any number of readers beside the one writer.

    Args:
        path: The file, which need not be there yet.
        decoder: Of the lines.
    """

    def __init__(self, path: str, decoder: msgspec.json.Decoder[_T]) -> None:
        self.path = path
        self._decoder = decoder
        self._offset = 0
        self.last = 0
        """The number of the last line that was read."""
        self.end = 0
        """Where the last whole line that was read ends."""
        self.damaged = 0
        """Lines that could not be read."""

    def new(self) -> Iterator[_T]:
        """The lines since the last call, in order; a last line without its end waits for the next call.

        Raises:
            FormatVersionError: A newer mandapa wrote it.
            StorageError: The file cannot be read.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror}") from error
        try:
            if os.fstat(fd).st_size < self._offset:
                self._offset = self.end = 0  # somebody has cut it; numbers tell what is known
            rest = b""
            while data := self._read(fd, self._offset + len(rest)):
                lines = (rest + data).split(b"\n")
                rest = lines.pop()
                for line in lines:
                    found = self._decode(line + b"\n")
                    self._offset += len(line) + 1
                    self.end = self._offset
                    if found is not None:
                        yield found
                if len(rest) > LINE_MAX:
                    self._offset += len(rest)
                    rest = b""
                    self.damaged += 1
        finally:
            os.close(fd)

    def _read(self, fd: int, at: int) -> bytes:
        try:
            return os.pread(fd, _READ, at)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror}") from error

    def _decode(self, line: bytes) -> _T | None:
        try:
            body, _ = open_sealed(line, key=self.path, limit=LINE_MAX)
            found = self._decoder.decode(body)
        except (CorruptionError, msgspec.DecodeError):
            self.damaged += 1
            return None
        n: int = found.n  # type: ignore[attr-defined]
        if n <= self.last:
            return None
        self.last = n
        return found


class Journal:
    """The writing end of a journal. One for each file at a time; not for several threads.

    Args:
        path: The file; made if missing. What stands after its last whole line is cut off.
        after: The numbers of new lines are above this one, and above all that the file has.
    """

    def __init__(self, path: str, decoder: msgspec.json.Decoder[Any], *, after: int = 0) -> None:
        reader = JournalReader(path, decoder)
        self.found: list[Any] = list(reader.new())
        """What the file held already."""
        self.damaged = reader.damaged
        """Lines of it that were left out."""
        self.path = path
        self.last = max([after, *[line.n for line in self.found]])
        """The number of the last line."""
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, reader.end)
        self._torn = False

    def append(self, line: msgspec.Struct, *, durable: bool = False) -> None:
        """Write a line whose number is `last` + 1; with ``durable`` it is on the disk when this returns.

        Raises:
            StorageError: The disk is full or fails; the line counts as not written, or, where the disk refuses even to
                take it back, may be read.
        """
        data = seal(line)
        if len(data) > LINE_MAX:
            raise StorageError(f"{self.path}: a line of {len(data):,} bytes; {LINE_MAX:,} at most")
        try:
            before = os.fstat(self._fd).st_size
            if self._torn:
                data = b"\n" + data  # ends what could not be cut off
            try:
                if os.write(self._fd, data) != len(data):
                    raise OSError(errno.ENOSPC, "the disk is full")
                if durable:
                    os.fsync(self._fd)
            except OSError:
                self._cut(before)
                raise
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror}", retryable=True) from error
        self._torn = False
        self.last += 1

    def _cut(self, size: int) -> None:
        """Take away what was written of a line; where the disk refuses that too, its number is not used again."""
        try:
            os.ftruncate(self._fd, size)
        except OSError:
            self._torn = True
            self.last += 1

    def sync(self) -> None:
        """Everything appended so far survives the machine's restart when this returns."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Intervals:
    """Sets of numbers, a set for each rank, kept as stretches.

    Example:
        >>> some = Intervals([(0, 1), (0, 2), (0, 5)])
        >>> some.stretches()
        {'0': [(1, 2), (5, 5)]}
        >>> (0, 2) in some, (1, 2) in some
        (True, False)
    """

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self._sets: dict[int, list[tuple[int, int]]] = {}
        for rank, n in sorted(pairs):
            self._add(rank, n, n)

    def __contains__(self, pair: tuple[int, int]) -> bool:
        """Whether the rank's number is in it."""
        rank, n = pair
        # New entries come at the end, where the search starts.
        for first, last in reversed(self._sets.get(rank, ())):
            if first <= n <= last:
                return True
            if last < n:
                return False
        return False

    def add(self, stretches: Mapping[str, Iterable[tuple[int, int]]]) -> None:
        """Take in what `stretches` gave."""
        for rank, found in stretches.items():
            for first, last in found:
                self._add(int(rank), first, last)

    def stretches(self) -> dict[str, list[tuple[int, int]]]:
        """Rank -> (first, last) of each stretch."""
        return {str(rank): list(found) for rank, found in self._sets.items()}

    def highest(self, rank: int) -> int:
        """The highest number of a rank; 0 when it has none."""
        found = self._sets.get(rank)
        return found[-1][1] if found else 0

    def _add(self, rank: int, first: int, last: int) -> None:
        found = [*self._sets.get(rank, ()), (first, last)]
        if len(found) > 1:
            found.sort()
            joined = [found[0]]
            for a, b in found[1:]:
                if a <= joined[-1][1] + 1:
                    joined[-1] = (joined[-1][0], max(joined[-1][1], b))
                else:
                    joined.append((a, b))
            found = joined
        self._sets[rank] = found
