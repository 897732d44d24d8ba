"""How far the backends of a run are, as their journals say: for trainers, handles and people; no process is asked."""

from __future__ import annotations

from mandapa.run.directory import RunDirectory
from mandapa.run.journal import OUTCOMES, Intervals, JournalReader, Made, Refused, Started

__all__ = ["Progress"]


class Progress:
    """What one backend has committed. For one thread at a time."""

    def __init__(self, directory: RunDirectory, key: str) -> None:
        self._reader: JournalReader[Started | Made | Refused] = JournalReader(directory.outcomes(key), OUTCOMES)
        self._started: Started | None = None
        self._versions: list[tuple[Intervals, str]] = []
        self.done = Intervals()
        """What is committed; replaced, never changed."""
        self.newest = ""
        """The address of the newest version of the run's folder."""
        self.any = False
        """Whether it has begun to commit to the run's folder: what stands in the store may not be noted yet."""

    def look(self) -> Progress:
        """Read what is new."""
        done: Intervals | None = None
        for line in self._reader.new():
            if isinstance(line, Started):
                self._started = line
                self.any |= line.folder and not line.early
                continue
            started, self._started = self._started, None
            if isinstance(line, Refused):
                continue
            if started is None or started.txn != line.txn or started.early:
                continue
            batch = Intervals()
            batch.add(started.batch)
            if done is None:
                done = Intervals()
                done.add(self.done.stretches())
            done.add(started.batch)
            self._versions.append((batch, line.version))
            if started.folder and line.version:
                self.newest = line.version
        if done is not None:
            self.done = done
        return self

    def version(self, rank: int, n: int) -> str:
        """The address of the version that an entry went into; empty when there is none."""
        for batch, version in reversed(self._versions):
            if (rank, n) in batch:
                return version
        return ""
