"""Bytes that a run owns: taken over before a call returns, given up when every backend has them."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

from mandapa.content.walk import walk
from mandapa.errors import InvalidInputError, MandapaError, NotFoundError, StorageError
from mandapa.run.directory import RunDirectory
from mandapa.run.journal import ArtifactEntry, AssetEntry, CheckpointEntry, Entry

__all__ = ["Staging", "drop", "drop_links", "plain_view", "release", "sweep", "take_all"]

_STAGED = re.compile(r"([0-9]+)-([0-9]+)-[0-9]+(?:\.grows)?")

_FICLONE = 0x40049409  # ioctl of Linux: share the blocks (btrfs, XFS)
_PART = 64 << 20
_RESERVE = 256 << 20  # bytes of the disk that are left to others
_NO_CLONE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.EBADF}


class Staging:
    """The folder of bytes that wait, of one rank.

    Args:
        directory: The run's.
        rank: Names of one rank never meet those of another.
        attempt: Nor those of another attempt.
    """

    def __init__(self, directory: RunDirectory, rank: int, attempt: int) -> None:
        self._directory = directory
        self._prefix = f"{attempt}-{rank}"
        self._count = 0
        self._links: dict[str, tuple[tuple[int, int], str]] = {}

    def fits(self, size: int) -> bool:
        """Whether the disk has room for so many bytes, and 256 MiB for others."""
        found = os.statvfs(self._directory.staged)
        return found.f_bavail * found.f_frsize >= size + _RESERVE

    def take(self, path: str, take: Literal["copy", "move", "link"]) -> tuple[str, int]:
        """Own the bytes of a file; gives where they are now and how many.

        Raises:
            NotFoundError: No such file.
            StorageError: It cannot be read, or the disk is full; nothing is left behind.
        """
        target = self._new(take)
        try:
            size = _take_file(path, target, take)
        except OSError as error:
            _remove(target)
            raise _explain(error, path) from error
        return target, size

    def take_bytes(self, data: bytes | bytearray | memoryview) -> tuple[str, int]:
        """Own bytes; raises `StorageError`."""
        target = self._new()
        try:
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                view = plain_view(data)
                written = 0
                while written < len(view):
                    written += os.write(fd, view[written : written + _PART])
            finally:
                os.close(fd)
        except OSError as error:
            _remove(target)
            raise _explain(error, target) from error
        return target, written

    def take_folder(self, path: str, take: Literal["copy", "move", "link"]) -> tuple[str, int]:
        """Own the files of a folder, symlinks read as what they lead to; raises as `take`, and what `walk` raises.

        With ``move`` nothing is taken away before all is taken over. What a symlink leads to stays where it is.
        """
        target = self._new(take)
        sizes, moved = take_all(path, target, take)
        drop(moved)
        return target, sum(sizes.values())

    def grow(self, path: str) -> tuple[str, int]:
        """A file that only grows, as it is now; a link keeps it from being deleted. Raises as `take`."""
        try:
            found = _regular(path)
            identity = (found.st_dev, found.st_ino)
            known = self._links.get(path)
            if known is None or known[0] != identity:
                target = self._new("grow")
                try:
                    os.link(os.path.realpath(path), target)
                except OSError as error:
                    if isinstance(error, FileNotFoundError):
                        raise
                    target = os.path.abspath(path)  # no links here: it is on its own
                known = self._links[path] = (identity, target)
        except OSError as error:
            raise _explain(error, path) from error
        return known[1], found.st_size

    def _new(self, take: str = "copy") -> str:
        self._count += 1
        suffix = {"move": ".moved", "grow": ".grows"}.get(take, "")
        return os.path.join(self._directory.staged, f"{self._prefix}-{self._count}{suffix}")


def plain_view(data: bytes | bytearray | memoryview) -> memoryview:
    """The same bytes, one after the other."""
    view = memoryview(data)
    return view.cast("B") if view.c_contiguous and view.nbytes else memoryview(view.tobytes())


def take_all(
    path: str, folder: str, take: Literal["copy", "move", "link"], *, name: str = ""
) -> tuple[dict[str, int], list[str]]:
    """Own the files of a folder, symlinks read as what they lead to, or one file, in the new folder ``folder``.

    Args:
        path: The folder; or, with ``name``, the file.
        folder: Not there yet; its parent is.
        take: ``move`` takes nothing away: the caller does, when all is safe.
        name: Of the one file, in ``folder``.

    Returns:
        The bytes of each file, by its path in ``folder``; and what to `drop` then. What a symlink leads to is not
        among that.

    Raises:
        NotFoundError, StorageError, InvalidInputError: As `Staging.take`, and what `walk` raises; nothing is left
            behind.
    """
    sizes: dict[str, int] = {}
    moved: list[str] = []
    try:
        os.mkdir(folder, 0o700)
        root = os.path.realpath(path)
        for inside, source in [(name, path)] if name else [(found.path, found.source) for found in walk(path)]:
            target = os.path.join(folder, inside)
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            way = take
            if take == "move":
                here = os.path.dirname(os.path.join(root, inside))
                own = bool(name) or os.path.realpath(os.path.dirname(source)) == here
                way = "link" if own and not os.path.islink(source) else "copy"
                moved += [source] * own
            sizes[inside] = _take_file(source, target, way)
    except OSError as error:
        _remove(folder)
        raise _explain(error, path) from error
    except InvalidInputError:
        _remove(folder)
        raise
    return sizes, moved


def drop(paths: Iterable[str]) -> None:
    """Delete files that were moved; one that may not be taken away stays, too."""
    for path in paths:
        with suppress(OSError):
            os.unlink(path)


def sweep(directory: RunDirectory, rank: int, journal: Iterable[Entry]) -> None:
    """Give up what former processes of the rank were about to own when they were killed; the caller has its lock.

    That is what no entry of the journal names, of the attempts that it knows. What was moved stays: nobody else has it.
    """
    attempts, named = set(), set()
    for entry in journal:
        attempts.add(str(entry.attempt))
        if isinstance(entry, AssetEntry):
            named.add(os.path.basename(entry.file.source))
        elif isinstance(entry, ArtifactEntry):
            named.add(os.path.basename(entry.source))
    with suppress(OSError):
        for name in os.listdir(directory.staged):
            found = _STAGED.fullmatch(name)
            if found and int(found[2]) == rank and found[1] in attempts and name not in named:
                _remove(os.path.join(directory.staged, name))
    shutil.rmtree(directory.unfinished(rank), ignore_errors=True)


def release(directory: RunDirectory, entry: Entry) -> None:
    """Give up the bytes of an entry that no backend needs any more; only what lies in the run's directory."""
    if isinstance(entry, AssetEntry):
        if not entry.grows:
            _remove_inside(directory.staged, directory.source(entry.file.source))
    elif isinstance(entry, ArtifactEntry):
        _remove_inside(directory.staged, directory.source(entry.source))
    elif isinstance(entry, CheckpointEntry):
        for file in entry.files:
            path = directory.source(file.source)
            _remove_inside(directory.checkpoints, path)
            top = os.path.realpath(directory.checkpoints)
            folder = os.path.realpath(os.path.dirname(path))
            with suppress(OSError):  # until there is one that another rank's file is in
                while folder.startswith(top + os.sep):
                    os.rmdir(folder)
                    folder = os.path.dirname(folder)


def drop_links(directory: RunDirectory, sources: Iterable[str]) -> None:
    """Give up the links to these files that grew: nobody writes them any more, and every backend has them."""
    for source in sources:
        _remove_inside(directory.staged, directory.source(source))


def _remove_inside(folder: str, path: str) -> None:
    if os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep):
        _remove(path)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def _take_file(path: str, target: str, take: Literal["copy", "move", "link"]) -> int:
    """Make ``target`` hold the bytes of the file at ``path``; gives how many."""
    _regular(path)
    if take == "move" and not os.path.islink(path):
        try:
            os.rename(path, target)
            return os.stat(target).st_size
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
    elif take == "link":
        try:
            os.link(os.path.realpath(path), target)
            return os.stat(target).st_size
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
    size = _copy(path, target)
    if take == "move":
        os.unlink(path)
    return size


def _regular(path: str) -> os.stat_result:
    """Of the file at ``path``; a pipe would be waited for, and a device has no end."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise InvalidInputError(f"{path} is not a file")
    return found


def _copy(path: str, target: str) -> int:
    """Clone where the file system can, copy elsewhere; the executable bit goes along."""
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(source)
        mode = 0o700 if found.st_mode & stat.S_IXUSR else 0o600
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            try:
                fcntl.ioctl(fd, _FICLONE, source)
            except OSError as error:
                if error.errno not in _NO_CLONE:
                    raise
                _copy_bytes(source, fd)
            return os.fstat(fd).st_size
        finally:
            os.close(fd)
    finally:
        os.close(source)


def _copy_bytes(source: int, fd: int) -> None:
    at = 0
    if hasattr(os, "sendfile"):
        with suppress(OSError):
            while sent := os.sendfile(fd, source, at, _PART):
                at += sent
            return
    while data := os.pread(source, 1 << 20, at):  # where sendfile cannot, or stopped: a full disk says so here, too
        os.lseek(fd, at, os.SEEK_SET)
        at += os.write(fd, data)


def _explain(error: OSError, path: str) -> Exception:
    if isinstance(error, MandapaError):
        return error
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"there is no file or folder {path!r}")
    return StorageError(f"{path} cannot be taken over: {error.strerror}", retryable=error.errno == errno.ENOSPC)
