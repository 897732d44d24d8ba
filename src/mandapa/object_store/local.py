"""Objects as files of a local (or network) directory, by plain system calls."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from stat import S_ISDIR, S_ISREG

from mandapa.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    CorruptionError,
    MandapaError,
    NotFoundError,
    StorageError,
)
from mandapa.object_store.base import Buffer, ObjectInfo
from mandapa.object_store.keys import check_key, check_prefix, check_ranges, check_size, is_segment

__all__ = ["LocalObjectStore"]

_TEMP = ".tmp"  # on the objects' own file system, and no key: segments do not start with a dot
_LEFTOVER_AGE = 86_400.0  # seconds; no single put takes a day
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would be waited for
_REMADE_PARENTS = 10  # deletes that may take a directory away under one put before it is an error

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space, or use another directory",
    errno.EDQUOT: "the disk quota is used up: free some space, or ask for more",
    errno.EFBIG: "the file is larger than the process or the file system allows: raise the limit (ulimit -f)",
    errno.EIO: "the disk reports a failure: check the system's log and the disk before going on",
    errno.EROFS: "the file system is read-only: mount it for writing, or use another directory",
    errno.EACCES: "permission denied: let this user read and write the directory",
    errno.EPERM: "not permitted: let this user read and write the directory",
    errno.EISDIR: "a directory stands where the object would go: in a local directory no key is the folder of another",
    errno.EEXIST: "a file stands where a directory is needed: remove it, or use another directory",
    errno.ENOTDIR: "a file stands where a directory is needed: in a local directory no key is the folder of another",
    errno.EXDEV: "part of the directory is on another file system: keep the whole directory on one",
    errno.ELOOP: "a symbolic link stands where an object is expected: links are not objects",
}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}  # to a reader; a link is no object
_PASSING = {errno.EAGAIN, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalObjectStore:
    """An object store in a directory: one file an object, at the path that its key spells.

    A write goes to a temporary file in ``.tmp/``, is fsynced, gets its name by ``rename`` (put) or ``link`` (create),
    and the directory is fsynced: readers see whole objects only, and an acknowledged one survives a power cut. Safe for
    any number of threads, processes and forks; across machines as far as the file system's ``link`` and ``rename`` are
    (NFS: yes). The directory is made by the first write. Symbolic links inside it are not objects.

    Args:
        path: The directory; a relative one is taken from the working directory of now.
        fsync: False gives up the power cut, not the rest: for caches and tests.

    Example:
        >>> import tempfile
        >>> store = LocalObjectStore(tempfile.mkdtemp())
        >>> store.put("packs/0a", b"bytes")
        >>> [info.key for info in store.list("packs/")]
        ['packs/0a']
    """

    # No lock, so that a forked child can never inherit a held one: the two caches only ever save work.

    def __init__(self, path: str | os.PathLike[str], *, fsync: bool = True) -> None:
        self._root = os.path.abspath(os.fspath(path))
        self._fsync = fsync
        self._ready: set[str] = set()  # directories whose whole path is known to be durable
        self._swept = False

    @property
    def url(self) -> str:
        """``file://`` and the absolute path, percent-encoded."""
        from pathlib import Path  # not needed otherwise, and slow to import

        return Path(self._root).as_uri()

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        """Raises `NotFoundError`, `AccessDeniedError`, `StorageError`, and `CorruptionError` above ``limit``."""
        with self._opened(key) as (fd, stat):
            check_size(key, stat.st_size, limit)
            return _read(fd, stat.st_size, 0, key)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """The bytes of each range by one ``pread`` each. Raises as `get`, and `CorruptionError` beyond the end."""
        check_ranges(ranges)
        check_key(key)
        if not any(length for _, length in ranges):
            return [b"" for _ in ranges]
        with self._opened(key) as (fd, _):
            return [_read(fd, length, offset, key) if length else b"" for offset, length in ranges]

    def head(self, key: str) -> ObjectInfo:
        """Size and mtime. Raises as `get`."""
        with self._opened(key) as (_, stat):
            return _info(key, stat)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects under ``prefix`` in byte order: one scan of each directory, one stat of each object handed out.

        Raises `AccessDeniedError`, `StorageError`. What vanishes meanwhile is left out.
        """
        folder = check_prefix(prefix)[: prefix.rfind("/") + 1]
        with self._explained("list", prefix):
            yield from self._walk(folder, prefix, start_after)

    def put(self, key: str, data: Buffer) -> None:
        """Store ``data``, durably. Raises `AccessDeniedError`, `StorageError`; nothing is left behind."""
        self._write(key, data, os.replace)

    def create(self, key: str, data: Buffer) -> None:
        """Store ``data``, durably, unless the key is taken. Raises as `put`, and `AlreadyExistsError`."""
        target = self._path(key)
        if os.path.lexists(target):  # a loser that comes late needs no write
            raise AlreadyExistsError(f"{target} is there already")
        self._write(key, data, _link)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, durably, and directories that are empty then. Raises `AccessDeniedError`, `StorageError`."""
        parents = set()
        for key in [check_key(key) for key in keys]:
            with self._explained("delete", key), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                target = self._path(key)
                os.unlink(target)
                parents.add(os.path.dirname(target))
        for parent in parents:
            with self._explained("delete under", parent), suppress(FileNotFoundError):
                self._sync_directory(self._prune(parent))

    def foreign(self) -> str | None:
        """The name of something in the directory that cannot be an object of this store, such as ``README.md``."""
        with self._explained("list", ""):
            try:
                names = sorted(os.listdir(self._root))
            except FileNotFoundError:
                return None
            return next((name for name in names if name != _TEMP and not is_segment(name)), None)

    def __repr__(self) -> str:
        return f"LocalObjectStore({self._root!r}{'' if self._fsync else ', fsync=False'})"

    def __reduce__(self) -> tuple[partial[LocalObjectStore], tuple[()]]:
        return partial(LocalObjectStore, self._root, fsync=self._fsync), ()

    # Reading

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    @contextmanager
    def _opened(self, key: str) -> Iterator[tuple[int, os.stat_result]]:
        path = self._path(key)
        with self._explained("read", key):
            try:
                fd = os.open(path, _READ_FLAGS)
            except OSError as error:
                if error.errno in _ABSENT:
                    raise NotFoundError(f"{path} is not there") from None
                raise
            try:
                stat = os.fstat(fd)
                if S_ISDIR(stat.st_mode):
                    raise NotFoundError(f"{path} is not there: other keys have it as their folder")
                if not S_ISREG(stat.st_mode):
                    raise NotFoundError(f"{path} is a pipe or a device, and no object")
                yield fd, stat
            finally:
                os.close(fd)

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        found: list[tuple[str, os.DirEntry[str]]] = []
        try:
            with os.scandir(f"{self._root}/{folder}") as entries:
                for entry in entries:
                    key = folder + entry.name
                    if key <= start_after and not start_after.startswith(key):
                        continue  # nothing at it, nor below it, is asked for
                    if key.startswith(prefix) and is_segment(entry.name) and not entry.is_symlink():
                        # A directory sorts as its keys do: `a.b` comes before `a/b`.
                        found.append((key + "/" if entry.is_dir() else key, entry))
        except (FileNotFoundError, NotADirectoryError):
            return
        found.sort(key=lambda pair: pair[0])
        for key, entry in found:
            if key.endswith("/"):
                yield from self._walk(key, prefix, start_after)
            elif key > start_after:
                try:
                    stat = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield _info(key, stat)

    # Writing

    def _write(self, key: str, data: Buffer, publish: Callable[[str, str], None]) -> None:
        target = self._path(key)
        parent = os.path.dirname(target)
        with self._explained("write", key):
            temp = self._write_temp(data)
            try:
                for left in reversed(range(_REMADE_PARENTS)):
                    try:
                        self._make_durable(parent)
                        publish(temp, target)
                        break
                    except FileNotFoundError:  # a delete took an emptied directory away
                        self._ready.clear()
                        if not left:
                            raise
                self._sync_directory(parent)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temp)

    def _write_temp(self, data: Buffer) -> str:
        folder = f"{self._root}/{_TEMP}"
        if not self._swept:
            os.makedirs(folder, exist_ok=True)
            _sweep(folder)
            self._swept = True
        temp = f"{folder}/{os.urandom(16).hex()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(temp, flags, 0o666)
        except FileNotFoundError:  # somebody tidied up
            os.makedirs(folder, exist_ok=True)
            fd = os.open(temp, flags, 0o666)
        try:
            try:
                view = memoryview(data).cast("B")
                while view:
                    view = view[os.write(fd, view) :]
                if self._fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)
        except BaseException:
            os.unlink(temp)
            raise
        return temp

    def _make_durable(self, folder: str) -> None:
        """``folder`` is there, and so it is after a power cut: each level up to the root is fsynced into its parent.

        Even one that was there already: its maker may not have come to that yet.
        """
        if folder in self._ready:
            return
        parent = os.path.dirname(folder)
        if folder == self._root:
            missing = [folder]
            while not os.path.isdir(parent):
                missing.append(parent)
                parent = os.path.dirname(parent)
            os.makedirs(folder, exist_ok=True)
            for made in missing:
                with suppress(PermissionError):  # above the root we may be allowed to enter, but not to read
                    self._sync_directory(os.path.dirname(made))
        else:
            self._make_durable(parent)
            try:
                os.mkdir(folder)
            except FileExistsError:
                # One look: a delete may take it away right now, which is FileNotFoundError and tried again.
                if not S_ISDIR(os.stat(folder).st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, "not a directory") from None
            self._sync_directory(parent)
        self._ready.add(folder)

    def _prune(self, folder: str) -> str:
        """Remove ``folder`` and those above it that are empty, below the root; the first directory that stays."""
        while folder != self._root:
            try:
                os.rmdir(folder)
            except OSError:
                break
            self._ready.discard(folder)
            folder = os.path.dirname(folder)
        return folder

    def _sync_directory(self, folder: str) -> None:
        if not self._fsync:
            return
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems write directories through, and say so like this
                raise
        finally:
            os.close(fd)

    @contextmanager
    def _explained(self, doing: str, key: str) -> Iterator[None]:
        """System errors become ours, with advice."""
        try:
            yield
        except MandapaError:
            raise
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
            message = f"cannot {doing} {key!r} in {self._root}: {advice}"
            if error.errno in _DENIED:
                raise AccessDeniedError(message) from error
            raise StorageError(message, retryable=error.errno in _PASSING) from error


def _link(temp: str, target: str) -> None:
    try:
        os.link(temp, target)
    except FileExistsError:
        raise AlreadyExistsError(f"{target} is there already") from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise StorageError(
            f"the file system of {target} has no hard links, and create-if-absent needs them: use another directory"
        ) from error


def _read(fd: int, length: int, offset: int, key: str) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    pieces = [data]  # one call gives 2 GiB at most
    while data and (done := sum(map(len, pieces))) < length:
        pieces.append(data := os.pread(fd, length - done, offset + done))
    if not data:
        raise CorruptionError(f"{key} ends before byte {offset + length}", key=key)
    return b"".join(pieces)


def _info(key: str, stat: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))


def _sweep(folder: str) -> None:
    """Remove what killed processes left in ``folder`` more than a day ago."""
    horizon = time.time() - _LEFTOVER_AGE
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # another sweeper was faster, or may do it
                if entry.stat(follow_symlinks=False).st_mtime < horizon:
                    os.unlink(entry.path)
