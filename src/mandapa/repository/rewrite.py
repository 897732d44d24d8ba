"""Packs of which little is needed any more are emptied: versions move on to new ones. Source: docs/format.md §10.7."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mandapa.content.moving import Mover
from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError, NotFoundError
from mandapa.repository.log import Log
from mandapa.repository.move import CondemnedError, Move, StaleError
from mandapa.repository.state import ArtifactState, VersionState
from mandapa.repository.version import root_of

if TYPE_CHECKING:
    from mandapa.repository.repository import Repository

__all__ = ["Rewritten", "rewrite"]

_GROUP_BYTES = 128 << 20
"""Stored bytes that are moved before the versions that need them are: what several versions need fills packs."""

_GROUP_VERSIONS = 256

_KEY = re.compile(r"(packs|meta)/([0-9a-f]{32})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What became of one version that needed something of the emptied packs."""

    artifact: str
    version: int
    put: int
    """Bytes put into the store since the version before, which versions after this one may share."""
    skipped: str = ""
    """Why it was not moved; empty where it was."""

    @property
    def address(self) -> str:
        """``name:v12``."""
        return f"{self.artifact}:v{self.version}"


def rewrite(
    repo: Repository, containers: Collection[str], *, progress: Callable[[int], None] | None = None
) -> Iterator[Rewritten]:
    """Every live version needs nothing of these containers any more, but for those named as skipped.

    What the versions hold, their numbers and digests stay. Chunks are copied as they are stored, each once for all
    versions and artifacts, after they were decoded and found to be what was stored; then each version that needs them
    is moved by a commit of its own, and readers go on there. The containers themselves are left to the next gc. Killed,
    it leaves every version whole, some of them moved, and objects that a gc takes. Safe beside writers, readers,
    clean-ups and other moves; a version that is made meanwhile may need the containers again.

    Requests: one or more for the catalog and each log; one for each manifest node of the live versions that is not at
    hand; about one for each of the containers, and for each that bases of its deltas are in; one put for each 16 MiB;
    two for each version that moves. Memory: see `Mover`; four threads take about 250 MB.

    Args:
        repo: The repository.
        containers: Keys, such as ``packs/...``; `plan_rewrite` says which are worth it.
        progress: Called with the bytes of each container that was put, from any thread.

    Raises:
        InvalidInputError: One is no key of a container.
        CorruptionError, FormatVersionError: A log cannot be read.
        StorageError: The store failed; what was moved by then stays moved.
    """
    doomed = {_container(key) for key in containers}
    if doomed:
        yield from _Rewrite(repo, doomed, progress).run()


def _container(key: str) -> bytes:
    found = _KEY.fullmatch(key)
    if found is None:
        raise InvalidInputError(f"{key!r} is no key of a container")
    return (b"p" if found[1] == "packs" else b"m") + bytes.fromhex(found[2])


@dataclass(frozen=True, slots=True)
class _Target:
    name: str
    log: Log[ArtifactState]
    version: VersionState


class _Rewrite:
    def __init__(self, repo: Repository, doomed: set[bytes], progress: Callable[[int], None] | None) -> None:
        self._repo = repo
        self._mover = Mover(
            repo.store, repo.reader, doomed, link=repo.link, threads=repo.threads, new_id=repo.author.new_id
        )
        self._mover.progress = progress
        self._told = 0
        self._since: dict[str, int] = {}

    def run(self) -> Iterator[Rewritten]:
        """Group after group: what its versions need is copied, then each of them is moved."""
        targets = self._targets()
        with self._mover:
            group: list[_Target] = []
            for target in targets:
                why = self._look(target)
                if why:
                    yield self._done(target, why)
                    continue
                group.append(target)
                if self._mover.waiting > _GROUP_BYTES or len(group) >= _GROUP_VERSIONS:
                    yield from self._move_all(group)
                    group = []
            yield from self._move_all(group)

    def _targets(self) -> list[_Target]:
        """All live versions; every log is read before the first put, so that a gc which comes after it shows there."""
        repo = self._repo
        found = []
        for name, id_ in sorted(repo.catalog.refresh().names.items()):
            log = repo.log(id_)
            state = log.refresh()
            self._since[id_] = len(log.records)
            if not state.closed:
                found += [_Target(name, log, state.versions[number]) for number in state.live()]
        return found

    def _look(self, target: _Target) -> str:
        """Find what a version needs; why that cannot be, or empty."""
        try:
            self._repo.check_features(target.version.requires, f"v{target.version.op.number}")
            self._mover.look(root_of(target.version.root))
        except (NotFoundError, CorruptionError, FormatVersionError) as error:
            return self._explain(target, error)
        return ""

    def _move_all(self, group: list[_Target]) -> Iterator[Rewritten]:
        self._mover.copy()
        for target in group:
            why = self._move(target)
            if why is not None:
                yield self._done(target, why)

    def _move(self, target: _Target) -> str | None:
        """Make a version's manifest anew and commit that; why not, or empty, or None where nothing of it moves."""
        repo, log, version = self._repo, target.log, target.version
        old = root_of(version.root)
        try:
            # Nothing is left of the first two to do, but after a clean-up that came in between.
            self._mover.look(old)
            self._mover.copy()
            root = self._mover.moved(old)
            if root == old:
                return None
            if repo.reader.digest(root).hex() != version.op.digest:
                raise CorruptionError("its manifest holds something else than its record says: run 'mandapa fsck'")
            self._mover.flush()
            record = Move(version, root, version.requires, self._mover.fresh).commit(repo, log, self._since[log.id])
        except (NotFoundError, CorruptionError, FormatVersionError) as error:
            return self._explain(target, error)
        except StaleError as error:
            if isinstance(error, CondemnedError):
                self._mover.forget()
            return str(error)
        # All that was put was looked at after the last fence before this record, if there was one.
        self._since[log.id] = record.seq + 1
        return ""

    def _explain(self, target: _Target, error: Exception) -> str:
        """Why a version cannot be read: it may be that it is not there any more."""
        state = target.log.refresh()
        if state.closed or not state.is_live(target.version.op.number, target.version.root):
            return "it was deleted or stored otherwise meanwhile"
        return f"it cannot be moved: {error}"

    def _done(self, target: _Target, skipped: str) -> Rewritten:
        put, self._told = self._mover.added - self._told, self._mover.added
        return Rewritten(target.name, target.version.op.number, put, skipped)
