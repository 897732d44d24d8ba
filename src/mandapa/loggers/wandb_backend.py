"""A run's versions as W&B artifacts: what W&B is told, what it still has to read, and what it has confirmed."""

from __future__ import annotations

import base64
import errno
import hashlib
import importlib
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from mandapa.content.walk import walk
from mandapa.errors import InvalidInputError, StorageError
from mandapa.loggers.wandb_session import FLUSH, Session, supported
from mandapa.repository.best import Contest
from mandapa.repository.paths import folders_of
from mandapa.run.backend import CHECKPOINT, FolderCommit, Put, key_of
from mandapa.run.directory import RunDirectory, read_json, write_json
from mandapa.run.journal import ArtifactEntry
from mandapa.run.logger import BackendSpec
from mandapa.run.status import is_unsent

__all__ = ["WandbBackend"]

_PATIENCE = 30.0  # seconds after which it is told that W&B has not confirmed something yet
_TICK = 0.1
_STATE_MAX = 256 << 20  # bytes; a million files
_QUIET = {"silent": True, "console": "off", "x_disable_stats": True, "x_disable_meta": True, "disable_code": True}
"""Settings of a W&B run that only logs what is left: it says nothing, and watches nothing."""
_KEYS_MAX = 90  # of an artifact's metadata; W&B takes 100


class _Kept(msgspec.Struct, frozen=True, omit_defaults=True):
    """An asset of the run's folder as W&B has it."""

    size: int | None = None
    md5: str = ""
    url: str = ""
    source: str = ""
    """Of a file that grows: where it was read."""


class _State(msgspec.Struct, omit_defaults=True):
    """What W&B has of the run's folder, and which W&B run it is."""

    run: dict[str, str] = {}
    """Arguments of ``wandb.init`` with which the same W&B run is gone on with."""
    txn: str = ""
    """Of the newest version."""
    address: str = ""
    number: int | None = None
    place: str = CHECKPOINT
    best: float | None = None
    folder: dict[str, _Kept] = {}


class WandbBackend:
    """Commits to W&B. W&B reads files after it was told of them: they are kept until it needs them no more.

    Args:
        spec: The project and the artifact.
        directory: The run's.
        tell: Takes a line about what happens.
        session: The W&B run; by default one of its own, which goes on with the run's.
    """

    def __init__(
        self, spec: BackendSpec, directory: RunDirectory, tell: Callable[[str], None], session: Session | None = None
    ) -> None:
        self.facts: dict[str, Any] = {}
        self._spec = spec
        self._directory = directory
        self._tell = tell
        home = directory.kept(key_of(spec))
        self._files = os.path.join(home, "files")
        self._path = os.path.join(home, "state.json")
        self._offline_path = os.path.join(home, "offline.json")
        os.makedirs(self._files, mode=0o700, exist_ok=True)
        self._state = self._load()
        self._offline: dict[str, list[str]] = read_json(self._offline_path)
        """W&B's file of an offline run -> MD5s of the files that it needs until ``wandb sync`` has sent it."""
        self._program = session is not None
        self._session = session or Session(directory.name, directory.path, self._going_on(), _QUIET)
        self._writes_late = False  # offline, W&B before 0.31 does, when its run ends
        self._logged: tuple[str, _Confirmation] | None = None  # the newest transaction that W&B was told of

    def _load(self) -> _State:
        try:
            with open(self._path, "rb") as file:
                return msgspec.json.decode(file.read(_STATE_MAX), type=_State)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return _State()

    def _save(self) -> None:
        try:
            write_json(self._offline_path, self._offline, durable=True)
            write_json(self._path, self._state, durable=True)
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written: {error.strerror}", retryable=True) from error

    def _going_on(self) -> dict[str, Any]:
        """Arguments for a W&B run that goes on with the run's, to log what is left."""
        where = {name: value for name, value in self._spec.options.items() if value}
        kwargs = {**where, **self._state.run}
        if "WANDB_MODE" in os.environ:
            kwargs.pop("mode", None)
        return kwargs

    @property
    def is_open(self) -> bool:
        """Whether there is a W&B run."""
        return bool(self.facts) and self._session.is_open

    def open(self) -> None:
        """See to it that there is a W&B run. Raises as `Session.open`, and when W&B is switched off."""
        if not self._session.is_open:
            self._session.open()
        run = self._session.run
        if run.disabled:
            self.close()
            raise InvalidInputError("W&B is switched off here (WANDB_MODE=disabled): what waits for it stays")
        self._writes_late = not supported({FLUSH: 1.0})
        self._state.run = {**self._session.same, "mode": "offline" if run.offline else "online"}
        self._save()
        self.facts["url"] = f"W&B's file {self._session.file}" if run.offline else run.url

    def close(self) -> None:
        """End the W&B run if it is this backend's own: the program's goes on."""
        if not self._program:
            self._session.finish(0)

    # -- commits ------------------------------------------------------------------------------------------------------

    def commit_folder(self, commit: FolderCommit) -> tuple[str, int | None]:
        """Log the run's folder; returns when W&B has confirmed it.

        Raises:
            InvalidInputError: W&B will not have it.
            StorageError: W&B does not answer, or the disk fails.
        """
        state = self._state
        if state.txn == commit.txn:
            return state.address, state.number
        former = state.folder if commit.base is not None else {}
        folder = dict(former)
        for place in commit.leaves(state.place):
            _take_out(folder, place)
        for url in commit.urls():
            _put(folder, url.path, _Kept(url=url.url, size=url.size))
        for file in commit.files():
            _put(folder, file.path, self._own(file, former.get(file.path)))
        if folder == former and not commit.parts:
            return state.address, state.number
        aliases = ["latest"]
        best = state.best if commit.base is not None else None
        if commit.best is not None:
            metric = commit.best[0]
            if Contest.of(*commit.best).beats(commit.metadata, {metric: best}):
                aliases.append("best")
                best = commit.metadata[metric]
        artifact = self._make(self._spec.artifact, "model", folder, commit.txn, commit.metadata, commit.message)
        address = self._log(artifact, commit.txn, aliases, folder)
        number = 0 if state.number is None else state.number + 1
        place = commit.parts[0].place if commit.parts and not commit.incomplete else state.place
        state.folder, state.txn, state.address, state.number = folder, commit.txn, address, number
        state.place, state.best = place, best
        self._save()
        self._prune()
        return address, number

    def commit_artifact(self, entry: ArtifactEntry, txn_id: str, used: list[str]) -> str:
        """Log another artifact, of type ``artifact``. Raises as `commit_folder`."""
        source = self._directory.source(entry.source)
        folder: dict[str, _Kept] = {}
        if entry.at is not None:
            folder[entry.at] = self._own(Put(entry.at, source, os.path.getsize(source)), None)
        else:
            for found in walk(source):
                folder[found.path] = self._own(Put(found.path, found.source, os.path.getsize(found.source)), None)
        artifact = self._make(entry.name, "artifact", folder, txn_id, entry.metadata, "")
        address = self._log(artifact, txn_id, ["latest", *entry.aliases], folder)
        self._save()
        self._prune()
        return address

    def _make(
        self, name: str, kind: str, folder: Mapping[str, _Kept], txn: str, metadata: Mapping[str, Any], message: str
    ) -> Any:
        """The artifact, its manifest filled in directly: no copies are made, no reference is looked at."""
        wandb: Any = importlib.import_module("wandb")
        entries: Any = importlib.import_module("wandb.sdk.artifacts.artifact_manifest_entry")
        facts = dict(list(metadata.items())[:_KEYS_MAX])
        facts["mandapa"] = {"run": self._directory.name, "txn": txn}
        artifact = wandb.Artifact(name, type=kind, description=message or None, metadata=facts)
        for path, kept in folder.items():
            if kept.url:
                entry = entries.ArtifactManifestEntry(path=path, ref=kept.url, digest=kept.url, size=kept.size)
            else:
                entry = entries.ArtifactManifestEntry(
                    path=path,
                    digest=base64.b64encode(bytes.fromhex(kept.md5)).decode(),
                    size=kept.size,
                    local_path=os.path.join(self._files, kept.md5),
                    skip_cache=True,
                )
            artifact.manifest.add_entry(entry)
        return artifact

    def _log(self, artifact: Any, txn: str, aliases: list[str], folder: Mapping[str, _Kept]) -> str:
        """Hand an artifact to W&B and wait until it is confirmed; gives its address."""
        run, file = self._session.run, self._session.file
        recorded = f"{run.project}/{artifact.name}@{artifact.digest[:12]}"
        if self._logged is None and any(_is_recorded(known, txn) for known in self._offline):
            return recorded  # by a process that died before it could say so
        if self._logged is None or self._logged[0] != txn:
            if run.offline:  # said before W&B has it, so that what it refers to is not let go
                needed = [kept.md5 for kept in folder.values() if kept.md5]
                self._offline[file] = sorted({*self._offline.get(file, ()), *needed})
                self._save()
            start = os.path.getsize(file) if os.path.exists(file) else 0
            try:
                logged = run.log_artifact(artifact, aliases=aliases)
            except (ValueError, TypeError) as error:  # it has one of that name and another type, say
                raise InvalidInputError(f"W&B does not take the artifact {artifact.name}: {error}") from error
            except Exception as error:
                raise StorageError(f"W&B does not answer: {error}", retryable=True) from error
            seen = (lambda: _is_recorded(file, txn, start)) if run.offline else None
            self._logged = txn, _Confirmation(logged, seen)
        confirmation = self._logged[1]
        writes_late = run.offline and self._writes_late
        if writes_late and not self._program:
            self.close()
        if not confirmation.wait(1.0 if writes_late else _PATIENCE):
            when = "writes its file when its run ends" if writes_late else "goes on trying"
            raise StorageError(f"W&B has not confirmed {artifact.name} yet: it {when}", retryable=True)
        if confirmation.error is not None:
            self._logged = None  # it is logged again
            raise StorageError(f"W&B does not take the artifact {artifact.name}: {confirmation.error}", retryable=True)
        return recorded if run.offline else str(confirmation.artifact.qualified_name)

    # -- the files that W&B reads ------------------------------------------------------------------------------------

    def _own(self, put: Put, known: _Kept | None) -> _Kept:
        """Keep a file under the name of its MD5."""
        source = put.source if put.grows else ""
        if known is not None and source and (known.source, known.size) == (source, put.size):
            return known
        temporary = os.path.join(self._files, ".new")
        try:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            if put.grows or not _link(put.source, temporary):
                _copy(put.source, temporary, put.size)
            with open(temporary, "rb") as file:
                md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            os.replace(temporary, os.path.join(self._files, md5))
        except OSError as error:
            raise StorageError(f"{put.path} cannot be kept for W&B: {error.strerror}", retryable=True) from error
        return _Kept(size=put.size, md5=md5, source=source)

    def _prune(self) -> None:
        """Let go of the files that W&B needs no more."""
        unsent = {file: needed for file, needed in self._offline.items() if is_unsent(file)}
        if unsent != self._offline:
            self._offline = unsent
            self._save()
        needed = {kept.md5 for kept in self._state.folder.values()}.union(*unsent.values())
        for name in os.listdir(self._files):
            if name not in needed:
                with suppress(OSError):
                    os.unlink(os.path.join(self._files, name))


class _Confirmation:
    """What W&B says of an artifact in the end. It can be asked once, and may take its time: so a thread asks it.

    Args:
        artifact: As W&B gave it.
        seen: Offline, where W&B says nothing: whether its file has the artifact.
    """

    def __init__(self, artifact: Any, seen: Callable[[], bool] | None) -> None:
        self.artifact = artifact
        self.error: Exception | None = None
        self._seen = seen
        self._thread = threading.Thread(target=self._ask, name="mandapa-wandb", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            if self._seen is None:
                self.artifact.wait()
            else:
                while not self._seen():
                    time.sleep(_TICK)
        except Exception as error:  # noqa: BLE001 - the waiting thread gets it
            self.error = error

    def wait(self, seconds: float) -> bool:
        """Whether it has said something by then."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


def _put(folder: dict[str, _Kept], path: str, kept: _Kept) -> None:
    """Put an asset at its place; a file makes way for a folder, and a folder for a file."""
    _take_out(folder, path)
    for above in folders_of([path]):
        folder.pop(above, None)
    folder[path] = kept


def _take_out(folder: dict[str, _Kept], place: str) -> None:
    if folder.pop(place, None) is None:
        for path in [path for path in folder if path.startswith(f"{place}/")]:
            del folder[path]


def _link(source: str, target: str) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _copy(source: str, target: str, size: int) -> None:
    with open(source, "rb") as data, open(target, "wb") as copy:
        left = size
        while left and (piece := data.read(min(left, 1 << 20))):
            copy.write(piece)
            left -= len(piece)
        if left:
            raise OSError(errno.EIO, "it is shorter than it was", source)


# -- W&B's own file ----------------------------------------------------------------------------------------------------
# Source: wandb, core/internal/transactionlog and pkg/leveldb: a header of 7 bytes, then a LevelDB log with records of
# wandb_internal.proto, in blocks of 32 KiB.

_BLOCK = 32 << 10
_HEADER = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _is_recorded(path: str, txn: str, start: int = 0) -> bool:
    """Whether W&B's file has the artifact of this transaction, whole, in or after the block of ``start``."""
    needle = txn.encode()
    return any(needle in record for record in _records(path, start))


def _records(path: str, start: int) -> Iterator[bytes]:
    """The records that are there whole."""
    parts: list[bytes] | None = None
    with suppress(OSError), open(path, "rb") as file:
        file.seek(start // _BLOCK * _BLOCK)
        while block := file.read(_BLOCK):
            at = _HEADER.size if file.tell() <= _BLOCK else 0  # the file's own header is as long as a record's
            while at + _HEADER.size <= len(block):
                checksum, length, kind = _HEADER.unpack_from(block, at)
                at += _HEADER.size
                data = block[at : at + length]
                at += length
                if kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
                    break  # the rest of the block is empty
                if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
                    parts = None
                    continue
                if kind in (_FULL, _FIRST):
                    parts = []
                if parts is not None:
                    parts.append(data)
                    if kind in (_FULL, _LAST):
                        yield b"".join(parts)
                        parts = None
