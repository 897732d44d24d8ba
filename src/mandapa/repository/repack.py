"""Stored versions made dense, when there is time: what that would save, then doing it. Source: docs/format.md §10.7."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

import msgspec

from mandapa.content.codecs import PLANES, RAW, ZSTD, encode
from mandapa.content.edit import TreeRoot, edit_tree
from mandapa.content.encoding import counterparts
from mandapa.content.fetch import Wave, pieces_of
from mandapa.content.index import Index, Piece
from mandapa.content.reader import AssetFile
from mandapa.content.tree import Located, Tree
from mandapa.content.upload import Upload
from mandapa.errors import CorruptionError, InvalidInputError, NotFoundError
from mandapa.format.manifest import BASES_MAX, UrlRow
from mandapa.repository.move import Move, StaleError
from mandapa.repository.plan import Plan
from mandapa.repository.state import ArtifactState, VersionState
from mandapa.repository.version import root_of

if TYPE_CHECKING:
    from mandapa.repository.artifact import Artifact

__all__ = ["RepackPlan", "Repacked", "apply_repack", "plan_repack"]

_LOOSE = (RAW, ZSTD, PLANES)
"""Codecs of chunks that `dense` may store in fewer bytes."""

_SAMPLES = 8
"""Chunks of a version that are encoded to tell what the others will take."""

_LEAST = 64 << 10
"""Shorter chunks are not looked at for a plan: they are few bytes of any version that is worth it."""

_WORTH = 0.97
"""A version is repacked when at most this much of what it alone stores would be left."""


class Step(msgspec.Struct, frozen=True):
    """A version that a plan names."""

    version: int
    root: str
    """Hash of its manifest: a version that has moved since is left alone."""
    stored: int
    """Bytes that its chunks take, which no earlier version of the plan has."""
    expected: int
    """What they would take, from a sample."""


class RepackPlan(Plan, tag="repack", frozen=True):
    """What a repack of an artifact would do; as JSON it can be kept, read and applied later."""

    of: ClassVar[str] = "'mandapa repack'"

    artifact: str
    repository: str
    """Its id."""
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Repacked:
    """What became of one version of a plan."""

    version: int
    before: int
    """Bytes that its own chunks took."""
    after: int
    """Bytes that they take now; they are put beside the old ones, which stay until a clean-up."""
    skipped: str = ""
    """Why nothing was done; empty where it was."""


def plan_repack(artifact: Artifact) -> RepackPlan:
    """Which live versions would take fewer bytes, and about how many; see `Artifact.plan_repack`."""
    repo = artifact.repository
    state = artifact.state()
    steps = []
    before: dict[str, list[Piece]] = {}
    seen: set[Piece] = set()
    for version in _live(state):
        chunks: list[tuple[Piece, Piece | None]] = []
        now: dict[str, list[Piece]] = {}
        for located in Tree(repo.reader, root_of(version.root)).rows():
            if isinstance(located.row, UrlRow):
                continue
            path = located.row.path
            pieces = now[path] = list(pieces_of(located, repo.reader.load))
            old = counterparts(list(accumulate([piece.raw for piece in pieces])), before.get(path, []))
            chunks += [pair for pair in zip(pieces, old, strict=True) if pair[0] not in seen]
        seen.update([piece for piece, _ in chunks])
        before = now
        stored = sum([piece.stored for piece, _ in chunks])
        loose = [pair for pair in chunks if pair[0].codec in _LOOSE and pair[0].raw >= _LEAST]
        expected = stored - round(sum([piece.stored for piece, _ in loose]) * (1 - _kept(artifact, loose)))
        if stored and expected <= stored * _WORTH:
            steps.append(Step(version.op.number, version.root.hash, stored, expected))
    return RepackPlan(artifact.name, repo.id, tuple(steps))


def apply_repack(
    artifact: Artifact, plan: RepackPlan, *, progress: Callable[[int], None] | None = None
) -> Iterator[Repacked]:
    """Do what a plan names, version by version, oldest first; see `Artifact.repack`."""
    repo = artifact.repository
    if (plan.artifact, plan.repository) != (artifact.name, repo.id):
        raise InvalidInputError(
            f"the plan is for {plan.artifact!r} of repository {plan.repository}, not {artifact.name!r} of {repo.id}"
        )
    steps = {step.version: step for step in plan.steps}
    state = artifact.state()
    before: VersionState | None = None
    for version in _live(state):
        step = steps.pop(version.op.number, None)
        if step is None:
            before = version
            continue
        if version.root.hash != step.root:
            yield Repacked(step.version, step.stored, step.stored, "it was stored otherwise since the plan was made")
        else:
            yield _Repack(artifact, version, before, step, progress).run()
        before = artifact.state().versions.get(version.op.number)  # of another artifact, if it was made anew meanwhile
    for step in steps.values():
        yield Repacked(step.version, step.stored, step.stored, "it was deleted since the plan was made")


class _Stored:
    """A stored file as a source for `Upload`; any number of threads may read it."""

    def __init__(self, file: AssetFile) -> None:
        self._file = file

    @property
    def size(self) -> int:
        return self._file.size

    def readinto(self, offset: int, buffer: memoryview, /) -> int:
        data = self._file.pread(len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)


class _Repack:
    """One version stored otherwise."""

    def __init__(
        self,
        artifact: Artifact,
        version: VersionState,
        before: VersionState | None,
        step: Step,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._artifact = artifact
        self._repo = artifact.repository
        self._version = version
        self._before = before
        self._step = step
        self._progress = progress

    def run(self) -> Repacked:
        """Store the chunks, then the manifest, then commit; or say why not."""
        repo, number = self._repo, self._version.op.number
        log = self._artifact.open_log()
        since = len(log.records)
        # What this machine remembers is not asked: it would find the chunks where they are.
        with Upload(
            repo.store,
            index=Index(None),
            codec="dense",
            threads=repo.threads,
            new_id=repo.author.new_id,
            nodes=repo.reader,
            link=repo.link,
            cache=repo.cache,
        ) as upload:
            upload.progress = self._progress
            try:
                root, stored = self._store(upload)
            except (NotFoundError, CorruptionError) as error:
                return self._skipped(f"it cannot be read: {error}")
            if root.digest.hex() != self._version.op.digest:
                raise CorruptionError(
                    f"{self._artifact.name}:v{number} is not what its record says: run 'mandapa fsck'"
                )
            if stored > self._step.stored * _WORTH:
                return self._skipped("nothing would be saved")

            # What it has from the version before is there as that one has it.
            requires = upload.requires.union(() if self._before is None else self._before.requires)
            move = Move(self._version, root.address, requires, upload.fresh, self._before, upload.table)
            try:
                move.commit(repo, log, since)
            except StaleError as error:
                return self._skipped(str(error))
        return Repacked(number, self._step.stored, stored)

    def _store(self, upload: Upload) -> tuple[TreeRoot, int]:
        """The version's new manifest, all put; and the bytes that its own chunks take."""
        repo = self._repo
        old: Tree | None = None
        if self._before is not None:
            old = Tree(repo.reader, root_of(self._before.root))
            for leaf in old.leaves():
                upload.seed(leaf)
        rows: dict[str, Located] = {}
        own: dict[bytes, int] = {}
        for located in Tree(repo.reader, root_of(self._version.root)).rows():
            row = located.row
            if isinstance(row, UrlRow) or row.size == 0:
                rows[row.path] = located
                continue
            with AssetFile(located, store=repo.store, load=repo.reader.load, threads=0) as file:
                base = None if old is None else old.get(row.path)
                new = rows[row.path] = upload.add_stored(located, _Stored(file), base)
            own.update([(p.hash, p.stored) for p in pieces_of(new, repo.reader.load) if p.container in upload.fresh])
        root = edit_tree(repo.reader, upload, None, rows)
        upload.flush()
        return root, sum(own.values())

    def _skipped(self, why: str) -> Repacked:
        return Repacked(self._step.version, self._step.stored, self._step.stored, why)


def _live(state: ArtifactState) -> list[VersionState]:
    return [version for _, version in sorted(state.versions.items()) if version.deleted is None]


def _kept(artifact: Artifact, chunks: list[tuple[Piece, Piece | None]]) -> float:
    """How much of the stored bytes of chunks would be left, from a few of them."""
    sample = chunks[:: max(1, -(-len(chunks) // _SAMPLES))]
    stored = left = 0
    for piece, old in sample:
        bases = [] if old is None else [one for one in reversed(old.chain()) if len(one.chain()) <= BASES_MAX]
        wave = Wave(artifact.repository.store, [piece, *bases], lambda _: artifact.name, artifact.repository.cache)
        raw, *raw_bases = wave.all(artifact.repository.threads)
        stored += piece.stored
        left += min(piece.stored, len(encode(raw, "dense", raw_bases).stored))
    return left / stored if stored else 1.0
