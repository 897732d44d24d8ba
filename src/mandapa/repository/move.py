"""A version whose manifest was made anew elsewhere: the one commit that says so. Source: docs/format.md §10.7."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mandapa.format.manifest import NodeAddress
from mandapa.format.records import FenceOp, Op, Record, RepackOp
from mandapa.repository.log import Log
from mandapa.repository.packs import condemned_or_missing
from mandapa.repository.state import ArtifactState, VersionState
from mandapa.repository.version import address_of

if TYPE_CHECKING:
    from mandapa.repository.repository import Repository

__all__ = ["CondemnedError", "Move", "StaleError"]


class StaleError(Exception):
    """What was prepared may not be committed; the message says why."""


class CondemnedError(StaleError):
    """A gc that came in between has listed, or deleted, what was put."""


@dataclass(frozen=True, slots=True)
class Move:
    """A live version, and its manifest made anew: the same content, stored otherwise, all of it put."""

    version: VersionState
    """Where it was; what it reaches there is inherited."""
    root: NodeAddress
    requires: Collection[str]
    fresh: Collection[bytes]
    """Containers that were put for it."""
    beside: VersionState | None = None
    """Another version: what that one reaches is inherited, too."""
    named: Collection[bytes] = ()
    """Containers that have to be looked at once ``beside`` is deleted or moved."""

    def commit(self, repo: Repository, log: Log[ArtifactState], since: int) -> Record:
        """Append the record. One request where nobody else commits.

        Args:
            repo: The repository.
            log: Of the version's artifact.
            since: How many records it had when the first of ``fresh`` was put, or when they were all looked at.

        Raises:
            StaleError: The version was deleted, or moved by someone else.
            CondemnedError: A gc came in between: everything of ``fresh`` has to be put again.
            FormatVersionError: The log has ops of a newer mandapa.
            StorageError: The store failed. The record may still land, and does no harm then.
        """
        number = self.version.op.number
        fenced = False

        def notice(record: Record) -> None:
            nonlocal fenced
            fenced = fenced or record.find(FenceOp) is not None

        def build(state: ArtifactState) -> Iterable[Op]:
            nonlocal fenced
            if state.closed or not state.is_live(number, self.version.root):
                raise StaleError("it was deleted or stored otherwise meanwhile")
            beside = self.beside
            stands = beside is None or state.is_live(beside.op.number, beside.root)
            if fenced or not stands:
                doubtful = {*self.fresh} if stands else {*self.fresh, *self.named}
                if condemned_or_missing(repo.store, doubtful, threads=repo.threads):
                    raise CondemnedError("a clean-up came in between: run it again")
                fenced = False
            yield RepackOp(number, self.version.root, address_of(self.root), sorted(self.requires))

        return log.append(repo.author.new_id().hex(), build, repo.author, since=since, on_record=notice)
