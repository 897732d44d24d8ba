"""The directory of a run: where everything is, whose it is, and who is at work in it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec

from mandapa.errors import (
    ConflictError,
    FormatVersionError,
    InvalidInputError,
    NotFoundError,
    SecurityError,
    StorageError,
)
from mandapa.format.strict import FORMAT, check_name

__all__ = ["Lock", "RunDirectory", "read_json", "write_json"]

_RANK = re.compile(r"rank([0-9]{1,7})\.lock")
_LOG_MAX = 4 << 20
_PATIENCE = 1.0  # seconds; somebody who only looks holds a lock for microseconds


_held: dict[tuple[int, str], int] = {}
"""(process, path) -> descriptor of the locks of this process; a forked child has none of them."""


class Lock:
    """A lock on a file that ends with its process, and is not inherited by a forked child.

    While a process has it, it does not open the file again: closing any descriptor of it would give the lock up.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.realpath(path)

    def take(self, *, patience: float = 0.0) -> bool:
        """Whether it was free; it is ours then. One that this very process has is not free."""
        if (os.getpid(), self.path) in _held:
            return False
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        give_up = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() < give_up:
                    time.sleep(0.02)
                    continue
                os.close(fd)
                return False
            break
        _held[os.getpid(), self.path] = fd
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        return True

    def held(self) -> bool:
        """Whether a process has it now, this one included."""
        if (os.getpid(), self.path) in _held:
            return True
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def lost(self) -> bool:
        """Whether this process has it, but its file is not at its place any more: its folder was removed."""
        fd = _held.get((os.getpid(), self.path))
        if fd is None:
            return False
        try:
            return not os.path.samestat(os.fstat(fd), os.stat(self.path))
        except OSError:
            return True

    def holder(self) -> str:
        """The process id and host of who had it last, as far as is known."""
        with suppress(OSError), open(self.path, encoding="utf-8", errors="replace") as file:
            return file.read(200).strip()
        return ""

    def release(self) -> None:
        """Give it up, if this process has it."""
        fd = _held.pop((os.getpid(), self.path), None)
        if fd is not None:
            os.close(fd)


class _Marker(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    run: str


class RunDirectory:
    """``<dir>/<name>``: what the run's loggers write, and under ``.run`` what belongs to journal and uploader.

    Args:
        path: The directory of the run.
        name: Of the run; the directory is made when it is given.

    Raises:
        InvalidInputError: The name cannot be one, or the directory is another run's, or no run's.
        FormatVersionError: A newer mandapa made it.
        SecurityError: It belongs to another user.
        StorageError: It cannot be made or read.
    """

    def __init__(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        self.path = os.path.abspath(os.fspath(path))
        inner = self.inner = os.path.join(self.path, ".run")
        self.staged = os.path.join(inner, "staged")
        self.commits = os.path.join(inner, "commits")
        self.backends = os.path.join(inner, "backends")
        self.checkpoints = os.path.join(self.path, "checkpoints")
        self.status = os.path.join(inner, "status.json")
        self.log = os.path.join(inner, "uploader.log")
        self.launches = os.path.join(inner, "launches.json")
        self.request = os.path.join(inner, "commit-request")
        if name is not None:
            self._make(check_name(name))
        self.name = self._check(name)

    @classmethod
    def find(cls, path: str) -> list[RunDirectory]:
        """The run in ``path``, or else the runs in the folders of ``path``, by name.

        Raises:
            NotFoundError: There is none.
        """
        if os.path.isfile(os.path.join(path, ".run", "format.json")):
            return [cls(path)]
        names: list[str] = []
        with suppress(OSError):
            names = sorted(os.listdir(path))
        found = [os.path.join(path, name) for name in names]
        runs = [cls(folder) for folder in found if os.path.isfile(os.path.join(folder, ".run", "format.json"))]
        if runs:
            return runs
        raise NotFoundError(f"{path} holds no run: name the folder of a run, or one with folders of runs in it")

    def _make(self, name: str) -> None:
        marker = os.path.join(self.inner, "format.json")
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            self._check_owner()  # before anything is made in it
            for folder in (self.inner, self.staged, self.commits, self.backends):
                os.makedirs(folder, mode=0o700, exist_ok=True)
            os.chmod(self.path, 0o700)
            if not os.path.exists(marker):
                write_json(marker, {"format": FORMAT, "run": name}, durable=True)
        except OSError as error:
            raise StorageError(f"the run's directory {self.path} cannot be made: {error.strerror}") from error

    def _check(self, name: str | None) -> str:
        self._check_owner()
        marker = os.path.join(self.inner, "format.json")
        try:
            with open(marker, "rb") as file:
                found = msgspec.json.decode(file.read(4096), type=_Marker)
        except FileNotFoundError:
            raise InvalidInputError(f"{self.path} is not the directory of a run") from None
        except OSError as error:
            raise StorageError(f"{marker} cannot be read: {error.strerror}") from error
        except msgspec.DecodeError:
            raise InvalidInputError(
                f"{marker} is not what mandapa writes: use another dir=, or move this folder away"
            ) from None
        if found.format != FORMAT:
            raise FormatVersionError(
                f"{self.path} is of format {found.format}; this mandapa reads format {FORMAT}: upgrade it, or use "
                "another dir="
            )
        if name is not None and found.run != name:
            raise InvalidInputError(f"{self.path} is the directory of the run {found.run!r}: use another dir= or name")
        return check_name(found.run)

    def _check_owner(self) -> None:
        for path in (self.path, self.inner):
            try:
                found = os.lstat(path)
            except OSError:
                continue
            if not stat.S_ISDIR(found.st_mode):
                raise InvalidInputError(f"{path} is not a folder: use another dir=")
            if found.st_uid != os.geteuid():
                raise SecurityError(
                    f"{path} belongs to another user (uid {found.st_uid}): whoever owns it could read and change what "
                    "this run writes; use another dir="
                )

    def journal(self, rank: int) -> str:
        """The journal of a rank."""
        return os.path.join(self.inner, f"rank{rank}.journal")

    def ranks(self) -> list[int]:
        """The ranks that have ever been trained here."""
        with suppress(OSError):
            found = [_RANK.fullmatch(name) for name in os.listdir(self.inner)]
            return sorted(int(match[1]) for match in found if match)
        return []

    def rank_lock(self, rank: int) -> Lock:
        """Held by the rank's trainer as long as it lives."""
        return Lock(os.path.join(self.inner, f"rank{rank}.lock"))

    def uploader_lock(self) -> Lock:
        """Held by the uploader."""
        return Lock(os.path.join(self.inner, "uploader.lock"))

    def backend_lock(self, key: str) -> Lock:
        """Held by the process that commits to a backend, where that is not the uploader."""
        return Lock(os.path.join(self.inner, f"{key}.lock"))

    def take_rank(self, rank: int) -> Lock:
        """The lock of a rank, for its trainer.

        Raises:
            ConflictError: Another live process has it.
        """
        lock = self.rank_lock(rank)
        if not lock.take(patience=_PATIENCE):
            raise ConflictError(
                f"the run {self.name!r} is being trained by another process (pid, host: {lock.holder()}) in "
                f"{self.path}: "
                "stop that one, or use another name or dir="
            )
        return lock

    def outcomes(self, key: str) -> str:
        """The journal of what a backend did."""
        return os.path.join(self.commits, f"{key}.journal")

    def backend(self, key: str) -> str:
        """Where a backend is, without secrets."""
        return os.path.join(self.backends, f"{key}.json")

    def kept(self, key: str) -> str:
        """Where a backend keeps what it needs for itself."""
        return os.path.join(self.inner, "kept", key)

    def note(self, line: str) -> None:
        """Write a line, which holds no secrets, into the uploader's log; a full disk is no trouble."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with suppress(OSError):
            fd = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(fd).st_size > _LOG_MAX:
                    os.ftruncate(fd, 0)
                os.write(fd, f"{now} {line}\n".encode(errors="replace"))
            finally:
                os.close(fd)

    def unfinished(self, rank: int) -> str:
        """Where a rank's checkpoint is while it is written."""
        return os.path.join(self.checkpoints, f".rank{rank}")

    def source(self, source: str) -> str:
        """The absolute path of an entry's bytes."""
        return os.path.join(self.path, source)

    def relative(self, path: str) -> str:
        """How an entry names a path: relative where it is in the directory, so that the directory can be moved."""
        below = self.path + os.sep
        return path.removeprefix(below)


def write_json(path: str, value: Any, *, durable: bool = False) -> None:
    """Replace a small file, whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    data = msgspec.json.encode(value) + b"\n"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def read_json(path: str) -> dict[str, Any]:
    """The object in a small file; empty when there is none, or none that can be read."""
    with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError), open(path, "rb") as file:
        found = msgspec.json.decode(file.read(4 << 20))
        if isinstance(found, dict):
            return found
    return {}
