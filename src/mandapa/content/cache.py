"""Chunks that this machine has read or written, as files that all its processes share, up to a limit."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from mandapa.content.private import make_private
from mandapa.digest import digest
from mandapa.format.strict import CHUNK_MAX
from mandapa.object_store.base import Buffer

__all__ = ["ChunkCache"]

_LEAST = 64 << 10  # shorter chunks come by the hundreds in one request, and a file for each would cost more
_SHARE = 32
_YOUNG = 600.0  # seconds: what was used since is not thrown out, so that a restore larger than the cache passes by it
_PAUSE = 60.0  # seconds until the folder is looked at again when there was no room
_TOUCH = 60.0  # seconds: the time of use is no finer, so that a hit costs no write
_LEFTOVER = 3600.0  # seconds after which what a killed process was writing is removed
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME = 62  # hex digits, below a folder named by the first two


class _Entry(NamedTuple):
    used: float
    size: int
    path: str


class ChunkCache:
    """Raw bytes of chunks by their BLAKE3, as files; nothing fails because of it.

    What `get` gives was verified: a torn, damaged or planted file is a miss, and removed. A file that cannot be written
    (disk full, read-only, quota) is done without. Files get their names by ``rename``, readers hold no lock, and any
    number of processes and threads share a folder. Chunks below 64 KiB are not kept.

    The files together stay below ``limit``, and below half of what the disk would have free without them: a process
    looks at the folder before it puts, and again after each 1/32 of the limit, so a larger chunk is not kept. Above
    27/32 it removes what was used longest ago, down to 24/32, but nothing that was used in the last ten minutes; where
    that leaves 28/32, nothing is put for a minute. (Each process beyond four that put at once may add 1/32.)

    Args:
        folder: Where the files are; made when something is put, mode 0700. Nothing is put into one of another user, or
            that all may write to.
        limit: Bytes.
        clock: Seconds since the epoch, as file times are.

    Example:
        >>> import tempfile
        >>> cache = ChunkCache(tempfile.mkdtemp(), 1 << 30)
        >>> chunk = bytes(1 << 20)
        >>> cache.put(digest(chunk), chunk)
        >>> cache.get(digest(chunk)) == chunk
        True
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = os.path.abspath(os.fspath(folder))
        self._limit = limit
        self._clock = clock
        self._room = 0  # bytes that may be put before the next look
        self._next_look = 0.0
        self._looking = threading.Lock()  # never waited for, as a fork may inherit it held

    def has(self, hash_: bytes, raw: int) -> bool:
        """Whether there seems to be a chunk of ``raw`` bytes: one look at a file's size, no verification."""
        if raw < _LEAST:
            return False
        try:
            return os.stat(self._path(hash_)).st_size == raw
        except OSError:
            return False

    def get(self, hash_: bytes) -> bytes | None:
        """The chunk, verified, or None. Counts as a use."""
        path = self._path(hash_)
        try:
            fd = os.open(path, _READ_FLAGS)
        except OSError:
            return None
        try:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_size <= CHUNK_MAX:
                data = os.read(fd, found.st_size)
                if digest(data) == hash_:
                    now = self._clock()
                    if now - found.st_mtime > _TOUCH:
                        os.utime(fd, (now, now))
                    return data
            os.unlink(path)
        except OSError:
            pass
        finally:
            os.close(fd)
        return None

    def put(self, hash_: bytes, raw: Buffer) -> None:
        """Keep a chunk of that BLAKE3, if there is room; one that is there already is left alone."""
        size = memoryview(raw).nbytes
        if not _LEAST <= size <= self._limit // _SHARE or self.has(hash_, size):
            return
        if size > self._room:
            self._look(size)
            if size > self._room:
                return
        self._room -= size
        path = self._path(hash_)
        temp = f"{os.path.dirname(path)}/{os.urandom(16).hex()}.tmp"
        try:
            try:
                fd = os.open(temp, _WRITE_FLAGS, 0o600)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                fd = os.open(temp, _WRITE_FLAGS, 0o600)
            try:
                view = memoryview(raw).cast("B")
                while view:
                    view = view[os.write(fd, view) :]
            finally:
                os.close(fd)
            os.rename(temp, path)
        except OSError:
            self._room = 0
            self._next_look = self._clock() + _PAUSE
            with suppress(OSError):
                os.unlink(temp)

    def _path(self, hash_: bytes) -> str:
        name = hash_.hex()
        return f"{self._folder}/{name[:2]}/{name[2:]}"

    def _look(self, size: int) -> None:
        """See how much room there is, and make some; not again for a while where ``size`` bytes have none."""
        with self._looking:
            now = self._clock()
            if size > self._room and not now < self._next_look <= now + _PAUSE:
                self._look_now(size, now)

    def _look_now(self, size: int, now: float) -> None:
        try:
            entries = sorted(self._entries(now))
            total = sum([entry.size for entry in entries])
            if not make_private(self._folder):
                raise PermissionError(self._folder)
            disk = os.statvfs(self._folder)
            limit = min(self._limit, (total + disk.f_bavail * disk.f_frsize) // 2)
            share = limit // _SHARE
            if total > 27 * share:
                for used, freed, path in entries:
                    if total <= 24 * share or used > now - _YOUNG:
                        break
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                    total -= freed
            self._room = max(0, min(share, 28 * share - total))
        except OSError:
            self._room = 0
        if self._room < size:
            self._next_look = now + _PAUSE

    def _entries(self, now: float) -> Iterator[_Entry]:
        """The files of the cache; what is none of its own is left alone."""
        for i in range(256):
            with suppress(OSError), os.scandir(f"{self._folder}/{i:02x}") as found:
                for entry in found:
                    if len(entry.name) != _NAME and not entry.name.endswith(".tmp"):
                        continue
                    with suppress(OSError):
                        info = entry.stat(follow_symlinks=False)
                        if entry.name.endswith(".tmp") and info.st_mtime < now - _LEFTOVER:
                            os.unlink(entry.path)
                        else:
                            yield _Entry(info.st_mtime, info.st_size, entry.path)
