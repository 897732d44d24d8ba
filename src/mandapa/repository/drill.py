"""Restore drills: a version is proven restorable by restoring it, in a process that knows nothing of it."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime

import msgspec

from mandapa import errors
from mandapa.content.folders import explain_write
from mandapa.errors import (
    CorruptionError,
    FormatVersionError,
    InvalidInputError,
    MandapaError,
    NotFoundError,
    StorageError,
)
from mandapa.format.manifest import UrlRow
from mandapa.format.records import AnnotateOp, Op
from mandapa.repository.rehearsal import Answer, Question
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState, parse_time
from mandapa.repository.version import Version

__all__ = ["RESTORED", "Drilled", "drill", "drill_all"]

RESTORED = "mandapa/restored"
"""The fact of a version that says when a drill last restored it, and who did. Source: docs/format.md §8.2."""

_BLOCK = 4096  # what a file takes on a disk is a multiple of this, about


@dataclass(frozen=True, slots=True)
class Drilled:
    """What a drill of one version has shown."""

    version: Version
    at: datetime
    """When it ended; aware, UTC, by this machine's clock."""
    problems: tuple[tuple[str, str], ...]
    """(path, what is wrong) of each file that is not what was stored; an empty path: of the version as a whole."""
    unloaded: tuple[tuple[str, str], ...]
    """(path, why) of checkpoint files that are what was stored, but of which not all tensors can be loaded."""
    files: int
    """Files that were restored, read again and found right."""
    bytes: int
    """Bytes of these."""
    urls: int
    """Assets that are URLs, of which only what is recorded was compared."""
    tensors: int
    """Tensors that were loaded from the restored files."""
    tensor_bytes: int
    seconds: float
    """From the first request until the last file was written."""
    recorded: bool = False
    """Whether the version's facts say now that it was restored."""
    unrecorded: MandapaError | None = None
    """Why they do not, though they should."""

    @property
    def ok(self) -> bool:
        """Whether the version is restorable, all of it."""
        return not self.problems


def drill(
    version: Version,
    record: bool = True,
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Drilled:
    """Restore a version and compare all of it; nothing stays on this machine, whatever happens.

    It is restored as a stranger would: by a new process, without a cache or an index, into an empty temporary folder.
    Then each file is read again from the disk and compared with its digest, the version's digest is computed from
    these files, and the tensors of checkpoint files are loaded, a quarter of a GB at a time; nothing is unpickled.

    Reads every byte of the version once from the store. With ``record`` a version that proves restorable gets the fact
    ``mandapa/restored``, by a commit; that this fails does not change what was proven (``unrecorded``).

    Args:
        version: Which.
        record: Whether to write down that it was restored.
        folder: Where the temporary folder is made; default: where the system has such folders. It must have room for
            the version.
        progress: Called with numbers of bytes as they are written.

    Raises:
        NotFoundError: The version was deleted meanwhile.
        CorruptionError: The log cannot be read.
        FormatVersionError: The version needs a feature that this mandapa lacks.
        InvalidInputError: The store cannot be reached from another process; or two paths of the version are one on
            that disk.
        StorageError: There is not enough room; the disk, the store or the process failed: there is no verdict.
    """
    repo = version.artifact.repository
    where = os.path.abspath(tempfile.gettempdir() if folder is None else folder)
    _check_room(version, where)
    with _temporary(where) as place:
        question = Question(repo.place, version.artifact.name, version.number, version.digest, place, repo.threads)
        answer = _ask(question, version.address, progress)
    now = repo.author.now()
    unrecorded = None
    if record and not answer.problems:
        try:
            _record(version, now)
        except MandapaError as error:
            unrecorded = error
    return Drilled(
        version=version,
        at=parse_time(now),
        problems=tuple(answer.problems),
        unloaded=tuple(answer.unloaded),
        files=answer.files,
        bytes=answer.bytes,
        urls=answer.urls,
        tensors=answer.tensors,
        tensor_bytes=answer.tensor_bytes,
        seconds=answer.seconds,
        recorded=record and not answer.problems and unrecorded is None,
        unrecorded=unrecorded,
    )


def drill_all(
    repository: Repository,
    record: bool = True,
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, Drilled | MandapaError]]:
    """`drill` of the newest version of every artifact, one after the other: its address, and what came of it.

    Nothing stops it: what `drill` raises is given instead. Artifacts without a live version are left out.
    """
    for artifact in repository.artifacts():
        address = artifact.name
        try:
            if artifact.state().latest() is None:
                continue
            version = artifact.version()
            address = version.address
            yield address, drill(version, record, folder=folder, progress=progress)
        except MandapaError as error:
            yield address, error


def _check_room(version: Version, where: str) -> None:
    """Raise `StorageError` when the files of a version do not fit on a disk."""
    try:
        disk = os.statvfs(where)
    except OSError as error:
        raise explain_write(error, where) from error
    free = disk.f_bavail * disk.f_frsize
    needed = version.size + version.asset_count * _BLOCK
    if needed > free:
        try:  # some of it may be URLs, which are not fetched
            needed = sum([(row.size or 0) + _BLOCK for row, _ in version.rows() if not isinstance(row, UrlRow)])
        except (CorruptionError, FormatVersionError):
            return  # the drill says of what
        if needed > free:
            raise StorageError(
                f"{version.address} takes {needed:,} bytes, and {where} has {free:,} left: name another folder (--dir)"
            )


@contextmanager
def _temporary(where: str) -> Iterator[str]:
    """An empty folder, which is gone afterwards."""
    try:
        place = tempfile.mkdtemp(prefix="mandapa-drill-", dir=where)
    except OSError as error:
        raise explain_write(error, where) from error
    try:
        yield place
    finally:
        try:
            shutil.rmtree(place)
        except OSError as error:
            raise StorageError(f"{place} could not be removed, remove it: {error.strerror}") from error


def _ask(question: Question, address: str, progress: Callable[[int], None] | None) -> Answer:
    """What another process says; it does not outlive this call."""
    try:
        data = pickle.dumps(tuple(question))
    except Exception as error:
        raise InvalidInputError(
            f"a drill runs in a process of its own, and this store cannot be handed to one: {error}"
        ) from error
    answer: Answer | None = None
    with tempfile.TemporaryFile() as said:
        try:
            child = subprocess.Popen(
                # -P: what was restored, or lies in the working folder, is never imported.
                [sys.executable, "-P", "-m", "mandapa.repository.rehearsal"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)},
            )
        except OSError as error:
            raise StorageError(f"the process of the drill cannot be started: {error.strerror}") from error
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it died at once: it says why
                child.stdin.write(len(data).to_bytes(8, "big") + data)
                child.stdin.flush()
            for line in child.stdout:
                if line.startswith(b"{"):
                    answer = msgspec.json.decode(line, type=Answer)
                    break
                if progress is not None:
                    progress(int(line))
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
            with suppress(BrokenPipeError):
                child.stdin.close()
        if answer is None:
            said.seek(0)
            why = said.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise StorageError(f"the drill of {address} died: {why or f'exit code {child.returncode}'}")
    if answer.error:
        kind = getattr(errors, answer.error, StorageError) if answer.error in errors.__all__ else StorageError
        failure: MandapaError = kind(answer.message)
        raise failure
    return answer


def _record(version: Version, at: str) -> None:
    """Write down as a fact of a version that it was restored."""
    artifact = version.artifact
    author = artifact.repository.author

    def build(state: ArtifactState) -> Iterable[Op]:
        artifact.check_open(state)
        if not version.is_in(state):
            raise NotFoundError(f"{version.address} is not there any more")
        artifact.look_up(state, version.number)
        return [AnnotateOp(version.number, {RESTORED: {"at": at, "by": author.by}})]

    artifact.open_log().append(author.new_id().hex(), build, author)
