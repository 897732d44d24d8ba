"""Logs as a check reads them: every record, whatever heads say, and as far as can be where one is damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mandapa.content.parallel import in_order
from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.format.keys import CATALOG, head_key, log_prefix, parse_seq
from mandapa.format.manifest import NodeAddress
from mandapa.format.records import HEAD_MAX, Root, decode_head
from mandapa.format.strict import is_id
from mandapa.object_store.base import ObjectStore
from mandapa.repository.log import Log
from mandapa.repository.state import ArtifactState, CatalogState, VersionState
from mandapa.repository.version import root_of

__all__ = ["Histories", "Live"]

_State = TypeVar("_State", CatalogState, ArtifactState)

_Problem = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Live:
    """A live version, as its log told it."""

    artifact: str
    """Id."""
    name: str
    """Of the artifact; its id where that is all that is known."""
    number: int
    root: Root
    requires: tuple[str, ...]
    digest: str
    assets: int
    bytes: int

    @classmethod
    def of(cls, artifact: str, name: str, version: VersionState) -> Live:
        """From the state of a log."""
        op = version.op
        return cls(artifact, name, op.number, version.root, version.requires, op.digest, op.assets, op.bytes)

    @property
    def address(self) -> str:
        """``name:v12``."""
        return f"{self.name}:v{self.number}"

    @property
    def node(self) -> NodeAddress | None:
        """The root of its manifest; None when the record names no such thing."""
        with suppress(CorruptionError):
            return root_of(self.root)
        return None


@dataclass(slots=True)
class _Reading(Generic[_State]):
    """A log, and what was found while it was read."""

    log: Log[_State]
    problems: list[_Problem] = field(default_factory=list)
    opens: bool = True
    """Whether a reader gets to its tail."""


class Histories:
    """All logs of a repository.

    Args:
        store: Where they are.
        threads: Requests at once.
        found: Takes the number of an invariant, where, and a problem.
    """

    def __init__(self, store: ObjectStore, threads: int, found: Callable[[str, str, str], None]) -> None:
        self._store = store
        self._threads = threads
        self._found = found
        self._again: Log[ArtifactState] | None = None
        self.unreadable: list[str] = []
        """Artifacts that nobody can open."""

    def live(self, count: Callable[[str, int], None]) -> Iterator[Live]:
        """Check I2, I3 and I9, and give the live versions of all artifacts, as far as logs can be read.

        Raises:
            StorageError: The store failed.
        """
        catalog = self._tell(self._read(CATALOG, CatalogState, "I2", "catalog", self._threads))
        state = catalog.log.state
        known = {id_: name for name, id_ in state.names.items()} | state.removed
        strangers = self._strangers(set(known), whole=catalog.opens)
        artifacts = [*sorted(known.items(), key=lambda item: item[1]), *((id_, id_) for id_ in strangers)]
        several = len(artifacts) >= self._threads

        def read(item: tuple[str, str]) -> _Reading[ArtifactState]:
            return self._read(item[0], ArtifactState, "I3", item[1], 0 if several else self._threads)

        readings = in_order(read, artifacts, threads=self._threads if several else 0)
        for (id_, name), reading in zip(artifacts, readings, strict=True):
            self._tell(reading)
            count("artifacts", 1)
            if not (catalog.opens and reading.opens) and id_ not in state.removed:
                self.unreadable.append(name)
            log = reading.log
            if not log.state.closed:
                if id_ in state.removed:
                    self._found("I3", name, "the artifact was removed, but its log was not closed")
                yield from (Live.of(id_, name, log.state.versions[number]) for number in log.state.live())

    def still_wanted(self, one: Live) -> bool:
        """Whether, after another look, the log still says that the version is live and stored there.

        One request, and the log for the first version of an artifact.
        """
        if self._again is None or self._again.id != one.artifact:
            self._again = self._read(one.artifact, ArtifactState, "I3", one.name, self._threads).log
        else:
            with suppress(CorruptionError, FormatVersionError):  # found by I3
                self._again.refresh()
        state = self._again.state
        return not state.closed and state.is_live(one.number, one.root)

    def _tell(self, reading: _Reading[_State]) -> _Reading[_State]:
        for problem in reading.problems:
            self._found(*problem)
        return reading

    def _strangers(self, known: set[str], *, whole: bool) -> list[str]:
        """No log is of an artifact that was never registered; where the catalog is broken, gives those it may have."""
        logs = {info.key.split("/")[1] for info in self._store.list("log/")} - known
        if not whole:
            return sorted(log for log in logs if is_id(log))
        if logs:  # registered since the catalog was read, perhaps
            catalog = Log(self._store, CATALOG, CatalogState, threads=self._threads)
            with suppress(CorruptionError, FormatVersionError):  # found by I2
                catalog.refresh()
            logs -= {*catalog.state.names.values(), *catalog.state.removed}
        for log in sorted(logs):
            self._found("I3", f"log/{log}", "is the log of no artifact that was ever registered")
        return []

    def _read(
        self, id_: str, state: Callable[[], _State], invariant: str, where: str, threads: int
    ) -> _Reading[_State]:
        """Records without gaps, sealed, chained, each op fitting the state before it; and the head says the same."""
        log = Log(self._store, id_, state, threads=threads, heads=False)
        reading = _Reading(log)
        try:
            log.refresh()
        except (CorruptionError, FormatVersionError) as error:
            reading.problems.append((invariant, where, str(error)))
            self._as_readers_do(reading, state, threads)
            log = reading.log
        twice = [txn for txn, times in Counter(record.txn for record in log.records).items() if times > 1]
        if twice:
            reading.problems.append((invariant, where, f"the transaction {twice[0]} is in the log twice"))
        key = head_key(id_)
        try:
            lines = decode_head(self._store.get(key, limit=HEAD_MAX), key=key)
        except NotFoundError:
            return reading
        except CorruptionError as error:
            reading.problems.append(("I9", key, str(error)))
            return reading
        # One whose last line is not the log's does not count, and is no fault.
        if lines and lines[-1:] == log.lines[len(lines) - 1 : len(lines)] and lines != log.lines[: len(lines)]:
            reading.problems.append(("I9", key, "does not hold the log's records"))
        return reading

    def _as_readers_do(self, reading: _Reading[_State], state: Callable[[], _State], threads: int) -> None:
        """A damaged log as its head has it, if that counts; else as far as it can be read, which no reader does."""
        log = reading.log
        by_head = Log(self._store, log.id, state, threads=threads)
        try:
            by_head.refresh()
        except (CorruptionError, FormatVersionError):
            reading.opens = False
        else:
            reading.log = by_head
            return
        listed = [parse_seq(info.key) for info in self._store.list(log_prefix(log.id))]
        whole = next((at for at, seq in enumerate(listed) if seq != at), len(listed))
        with suppress(CorruptionError, FormatVersionError):
            log.read_to(whole, threads=threads)
