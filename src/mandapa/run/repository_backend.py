"""A run's versions in one of our own repositories."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import suppress
from typing import Any

import msgspec

from mandapa.errors import AlreadyExistsError, ConflictError, InvalidInputError, MandapaError, NotFoundError
from mandapa.format.keys import CATALOG, log_key
from mandapa.format.records import Record
from mandapa.format.strict import RECORD_MAX
from mandapa.repository.artifact import Artifact
from mandapa.repository.paths import folders_of
from mandapa.repository.repository import Repository
from mandapa.repository.transaction import Transaction
from mandapa.repository.version import Version
from mandapa.run.backend import CHECKPOINT, FolderCommit, checkpoint_place, open_repository
from mandapa.run.directory import RunDirectory
from mandapa.run.journal import ArtifactEntry
from mandapa.run.logger import BackendSpec

__all__ = ["RepositoryBackend", "newest_checkpoint"]

_TEXT_MAX = 64 << 10


class RepositoryBackend:
    """Commits to a repository in an object store.

    Args:
        spec: Where it is.
        directory: The run's.
        tell: Takes a line for the uploader's log.
    """

    def __init__(self, spec: BackendSpec, directory: RunDirectory, tell: Callable[[str], None]) -> None:
        self.facts: dict[str, Any] = {}
        self._spec = spec
        self._directory = directory
        self._tell = tell
        self._repo: Repository | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a client of the store."""
        return self._repo is not None

    def open(self) -> None:
        """Reach the store; make the repository in an empty prefix; see what it knows of the run.

        Raises:
            InvalidInputError: As `open_repository`.
            ConflictError: An artifact there has the same name but for case.
            AccessDeniedError: No right to write.
            StorageError: The store failed.
        """
        repo = open_repository(self._spec, create=True)
        _check_writing(repo)
        if "opened" not in self.facts:
            self.facts["opened"] = self._look(repo)
        self.facts["url"] = repo.url
        self._repo = repo

    def close(self) -> None:
        """Drop the client; the next one asks for credentials again: who was refused may have new ones since."""
        self._repo = None

    def _look(self, repo: Repository) -> dict[str, Any]:
        """What the store knows of the run, for a trainer that starts."""
        artifact = Artifact(repo, self._spec.artifact)
        for other in repo.artifacts():
            if other.name != artifact.name and other.name.lower() == artifact.name.lower():
                raise ConflictError(f"{repo.url} has an artifact {other.name!r}; names differ by more than case")
        try:
            own = {version.number: version for version in artifact.versions() if version.run == self._directory.name}
        except NotFoundError:
            return {}
        if not own:
            return {}
        newest = own[max(own)]
        found: dict[str, Any] = {"newest": newest.number}
        # A run that was begun afresh has no parent: what was before that is another story.
        line: list[Version] = []
        at: int | None = newest.number
        states = artifact.state().versions
        while at is not None and at in states:
            if at in own:
                line.append(own[at])
            at = states[at].op.parent
        best = newest_checkpoint(line)
        if best is not None:
            # What the run added after its checkpoint belongs to it, as long as there was no other one.
            folder = best
            for version in reversed(line[: line.index(best)]):
                if _has_step(version):
                    break
                folder = version
            facts = dict(best.metadata)
            found["checkpoint"] = {"folder": folder.number, "address": best.address, "metadata": facts}
        with suppress(MandapaError, msgspec.DecodeError, KeyError, TypeError, ValueError):  # written by whoever
            facts = msgspec.json.decode(newest.open(".mandapa/run.json").read(_TEXT_MAX))
            found["attempt"] = int(facts["attempt"])
        with suppress(MandapaError):
            text = newest.open("hparams.yaml").read(_TEXT_MAX + 1)
            if len(text) <= _TEXT_MAX:
                found["hparams"] = text.decode(errors="replace")
        return found

    # -- commits ------------------------------------------------------------------------------------------------------

    def commit_folder(self, commit: FolderCommit) -> tuple[str, int | None]:
        """Make a version of the run's folder; gives its address ("": nothing had changed), and its number.

        Raises:
            MandapaError: As `Artifact.transaction`.
        """
        assert self._repo is not None
        artifact = Artifact(self._repo, self._spec.artifact, run=self._directory.name)
        base = self._live(artifact, commit.base)
        for standing in (None, () if base is None else artifact.version(base).assets):
            try:
                with artifact.transaction(commit.message, commit.metadata, base=base, txn_id=commit.txn) as txn:
                    for address in commit.used:
                        txn.uses(address)
                    _fill(txn, commit, former=_former_place(artifact, base), standing=standing)
                    if commit.best is not None and commit.best[0] in commit.metadata:
                        txn.alias("best", if_best=commit.best)
            except InvalidInputError:
                if standing is not None:
                    raise
                continue  # a file where the folder has a folder, or the other way round: what is new takes the place
            break
        if txn.version is None:
            return "", None
        self._report_strangers(base, txn)
        return txn.version.address, txn.version.number

    def commit_artifact(self, entry: ArtifactEntry, txn_id: str, used: list[str]) -> str:
        """Make a version of another artifact; gives its address, "" when nothing had changed.

        Raises:
            MandapaError: As `Artifact.transaction`.
        """
        assert self._repo is not None
        artifact = Artifact(self._repo, entry.name, run=self._directory.name)
        with artifact.transaction("", entry.metadata, base=None, txn_id=txn_id) as txn:
            for address in used:
                txn.uses(address)
            txn.add(self._directory.source(entry.source), at=entry.at)
            for alias in entry.aliases:
                txn.alias(alias)
        return "" if txn.version is None else txn.version.address

    def _live(self, artifact: Artifact, base: int | None) -> int | None:
        """The base, or what is left of the run when somebody has deleted it."""
        if base is None:
            return None
        try:
            artifact.version(base)
        except NotFoundError as error:
            own: list[Version] = []
            with suppress(NotFoundError):
                own = [version for version in artifact.versions() if version.run == self._directory.name]
            left = own[-1] if own else None
            self._tell(f"{error}; going on from {left.address if left else 'an empty folder'}")
            return left.number if left else None
        return base

    def _report_strangers(self, base: int | None, txn: Transaction) -> None:
        """Name the versions of others that came in between: they are in the history, not in the run's folder."""
        version = txn.version
        assert version is not None
        if not txn.made or base is None:
            return
        if version.number == base + 1:
            return
        versions = version.artifact.state().versions
        numbers = range(base + 1, version.number)
        between = [number for number in numbers if not self._is_ours(versions[number].record)]
        if between:
            named = ", ".join(f"v{number}" for number in between[:5]) + (", ..." if len(between) > 5 else "")
            message = (
                f"{self._spec.artifact}: {named} were made by somebody else; what they changed is not in this run's "
                "versions"
            )
            self._tell(message)
            self.facts["strangers"] = message

    def _is_ours(self, record: Record) -> bool:
        """Whether this run has made it, on this machine."""
        assert self._repo is not None
        return record.run == self._directory.name and record.by == self._repo.author.by


def newest_checkpoint(versions: list[Version]) -> Version | None:
    """The version with the checkpoint of the highest step; of several, the newest."""
    found = [version for version in versions if _has_step(version)]
    return max(found, key=lambda version: (version.metadata["step"], version.number), default=None)


def _has_step(version: Version) -> bool:
    return type(version.metadata.get("step")) is int


def _former_place(artifact: Artifact, base: int | None) -> str:
    """Where the checkpoint is that the run's folder has now."""
    states = {} if base is None else artifact.state().versions
    while base is not None and base in states:
        if place := checkpoint_place(states[base].op.metadata):
            return place
        base = states[base].op.parent
    return CHECKPOINT


def _fill(txn: Transaction, commit: FolderCommit, *, former: str, standing: Container[str] | None) -> None:
    """Put everything into a transaction; with ``standing``, the base's files, clear the way for each."""
    # All that goes does so before anything is put: nothing of what is new is taken away again.
    if standing is not None:
        for path in (*[put.path for put in commit.files() if not put.reserved], *[url.path for url in commit.urls()]):
            _clear(txn, path, standing)
    for place in commit.leaves(former):
        with suppress(NotFoundError):
            txn.remove(place)
    for url in commit.urls():
        txn.add_url(url.path, url.url, size=url.size, checksum=url.checksum)
    for put in commit.files():
        if put.reserved:
            with open(put.source, "rb") as data:
                txn.add_bytes(put.path, data.read(), reserved=True)
        else:
            txn.add(put.source, at=put.path, length=put.size if put.grows else None)


def _clear(txn: Transaction, path: str, standing: Container[str]) -> None:
    """Take away the file that stands where a folder of ``path`` has to be, and what stands below ``path``."""
    gone = [above for above in sorted(folders_of([path])) if above in standing]
    for place in gone if path in standing else [*gone, path]:
        with suppress(NotFoundError):
            txn.remove(place)


def _check_writing(repo: Repository) -> None:
    """Ask to create what is there already, with the same bytes: nothing changes, and who may not write is told so.

    Raises:
        AccessDeniedError: No right to write.
    """
    key = log_key(CATALOG, 0)
    with suppress(AlreadyExistsError):
        repo.store.create(key, repo.store.get(key, limit=RECORD_MAX))
