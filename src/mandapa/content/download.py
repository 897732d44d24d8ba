"""Versions into a folder: equal files stay, others are replaced whole, and nothing outside is ever touched."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, compress, count, islice, repeat
from typing import NamedTuple

from mandapa.content.cache import ChunkCache
from mandapa.content.fetch import Request, Room, Wave, fly, pieces_of
from mandapa.content.folders import (
    CREATE_FLAGS,
    FOLDERS,
    READ_FLAGS,
    Folder,
    Folders,
    check_collisions,
    explain_write,
    folding,
    part_name,
)
from mandapa.content.index import Index, Piece
from mandapa.content.parallel import in_order
from mandapa.content.tree import Located
from mandapa.content.walk import Found
from mandapa.digest import Hasher, digest
from mandapa.errors import CorruptionError, InvalidInputError, NotFoundError
from mandapa.format.manifest import FileRow, LargeFileRow, Node, NodeAddress, UrlRow
from mandapa.format.strict import check_prefix
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["DownloadResult", "download"]

_GROUP = 2048
_RESUMED = 64 << 20  # bytes; a part of a file this large is worth its while
_MOVES = 3  # times that a row may move while it is read
_PART_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(slots=True)
class DownloadResult:
    """What a download did; as a path it is the folder it filled."""

    path: str
    """The folder."""
    files: int = 0
    """Files written."""
    bytes: int = 0
    """Bytes of these."""
    resumed: int = 0
    """Bytes of these that an interrupted download had written, and that were verified instead of fetched."""
    skipped: int = 0
    """Files that were there already, equal."""
    urls: list[str] = field(default_factory=list)
    """Paths of assets that are URLs: they are not fetched."""

    def __fspath__(self) -> str:
        """The folder."""
        return self.path


def download(
    rows: Iterable[Located],
    dest: str | os.PathLike[str],
    *,
    store: ObjectStore,
    load: Callable[[NodeAddress], Node],
    index: Index | None = None,
    cache: ChunkCache | None = None,
    moved: Callable[[str], Located] | None = None,
    threads: int = 4,
    fsync: bool = False,
    progress: Callable[[int], None] | None = None,
) -> DownloadResult:
    """Make the files of ``rows`` be in ``dest``, each of them whole or not at all.

    A file that has the row's bytes stays (its x bit is set right), another is replaced atomically, what no row names is
    left alone. Nothing outside ``dest`` is touched, whatever the rows say and whoever swaps folders for symlinks
    meanwhile; ``dest`` itself may be a symlink.

    Interrupted, it leaves whole files, and of a file of 64 MiB or more what was written of it, as ``.mandapa-*.part``:
    the next download of the same file into that folder goes on from there, after each chunk of the part was verified.
    A download that succeeds removes parts that it had no use for from the folders it wrote to. Killed, it leaves
    ``.mandapa-*.tmp`` as well, which the next download removes.

    Requests: one for about 8 MiB of neighbouring chunks. Memory: about (``threads`` + 1) * 16 MiB, 24 MiB where chunks
    are deltas, and 128 MiB at most; and the rows where the file system does not tell case or normal forms apart.

    Args:
        rows: What to restore, best in order of path.
        dest: A folder; made if missing.
        store: Where the containers are.
        load: Reads a node, as `NodeReader.load`.
        index: Knows files that need not be hashed again.
        cache: Chunks that need not be fetched.
        moved: Called with the path of a row when one of its containers is gone; gives the row as it is now, or raises.
        threads: Requests and writes under way at once; 0 does all in the caller's thread.
        fsync: Whether files and folders shall survive a power cut once this returns.
        progress: Called with numbers of bytes written, or found in parts, from several threads.

    Raises:
        SecurityError: A symlink stands where a folder is needed; a file would go between the objects of a repository.
        InvalidInputError: A path is none; two paths are the same name on this file system, and nothing was written;
            a file stands where a folder is needed, or a folder where a file is.
        NotFoundError: A container is not there, and ``moved`` was not given, or says that the version was deleted.
        CorruptionError: Stored bytes are not those that were written.
        AccessDeniedError: A file or folder may not be written.
        StorageError: The disk or the store failed.
    """
    root = os.path.abspath(os.fspath(dest))
    try:
        os.makedirs(root, exist_ok=True)
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileExistsError:
        raise InvalidInputError(f"{root} is a file: name a folder") from None
    except OSError as error:
        raise explain_write(error, root) from error
    folders = Folders(root, Folder(root_fd, root))
    fold = folding(folders.top)
    if fold is not None:
        rows = list(rows)
        check_collisions([located.row.path for located in rows], fold, root)
    work = _Download(folders, store, load, index, cache, threads, fsync, progress)
    try:
        work.restore(rows)
        for _ in range(_MOVES):
            lost, work.lost = work.lost, []
            if not lost:
                break
            if moved is None:
                raise lost[0].error or NotFoundError(f"the bytes of {lost[0].row.path!r} are not there")
            work.drop(lost)
            work.restore([moved(target.row.path) for target in lost])
        else:
            if work.lost:
                path = work.lost[0].row.path
                raise CorruptionError(f"{path}: its manifest names bytes that are not in the store: run `mandapa fsck`")
        folders.remove_parts()
        if fsync:
            folders.sync()
    finally:
        work.close()
    return work.result


class _Target:
    """One file on its way."""

    __slots__ = ("error", "fd", "folder", "left", "lock", "name", "part", "row", "temp")

    def __init__(self, row: FileRow | LargeFileRow, folder: Folder, name: str) -> None:
        self.row = row
        self.folder = folder
        self.name = name
        self.left = 0  # pieces that are not written yet
        self.fd = -1
        self.temp = ""
        self.part = False  # whether what is written stays when the download is interrupted
        self.lock = threading.Lock()
        self.error: NotFoundError | None = None


class _Item(NamedTuple):
    """One chunk, and where in which file it goes."""

    piece: Piece
    target: _Target
    offset: int


class _Wave(Wave):
    """Items whose chunks are fetched together."""

    def __init__(self, store: ObjectStore, items: list[_Item], cache: ChunkCache | None) -> None:
        super().__init__(store, [item.piece for item in items], lambda i: items[i].target.row.path, cache)
        self.items = items


class _Download:
    def __init__(
        self,
        folders: Folders,
        store: ObjectStore,
        load: Callable[[NodeAddress], Node],
        index: Index | None,
        cache: ChunkCache | None,
        threads: int,
        fsync: bool,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._folders = folders
        self._store = store
        self._load = load
        self._index = index
        self._cache = cache
        self._threads = threads
        self._fsync = fsync
        self._progress = progress
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mandapa-get") if threads else None
        self._prefix = f".mandapa-{secrets.token_hex(8)}-"
        self._counter = count()
        self._begun: set[_Target] = set()
        self._lock = threading.Lock()
        self.result = DownloadResult(folders.top.path)
        self.lost: list[_Target] = []

    def restore(self, rows: Iterable[Located]) -> None:
        """Restore rows; those of which a container is gone are in ``lost`` afterwards."""
        waves = (_Wave(self._store, window, self._cache) for window in _windows(self._items(iter(rows))))
        for _ in fly(waves, self._transfer, self._pool, most=self._threads):
            pass

    def close(self) -> None:
        """Wait for what is under way, remove what is not whole."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self.drop(list(self._begun))

    def drop(self, targets: list[_Target]) -> None:
        """Give up files of which nothing is under way: a part stays, other bytes are removed."""
        for target in targets:
            if target in self._begun:
                self._begun.discard(target)
                with suppress(OSError):
                    if not target.part or not os.fstat(target.fd).st_size:
                        os.unlink(target.temp, dir_fd=target.folder.fd)
                with suppress(OSError):
                    os.close(target.fd)

    # Which files

    def _items(self, rows: Iterator[Located]) -> Iterator[_Item]:
        while group := list(islice(rows, _GROUP)):
            for located, target in self._different(group):
                row = target.row
                if row.size == 0:
                    try:
                        self._begin(target)
                        self._finish(target)
                    except OSError as error:
                        raise explain_write(error, f"{target.folder.path}/{target.name}") from error
                    continue
                try:
                    pieces = list(pieces_of(located, self._load))
                except NotFoundError as error:
                    self._lose(target, error)
                    continue
                target.left = len(pieces)
                starts = accumulate([piece.raw for piece in pieces], initial=0)
                items: Iterable[_Item] = map(_Item, pieces, repeat(target), starts)
                if any(piece.base is not None for piece in pieces):
                    items = _beside_bases(list(items))
                if row.size >= _RESUMED and self._begin_part(target):
                    items = self._missing(target, list(items))
                yield from items

    def _different(self, group: list[Located]) -> Iterator[tuple[Located, _Target]]:
        """The rows of a group that are not there yet."""
        targets: list[tuple[Located, _Target, os.stat_result | None]] = []
        there: list[Found] = []
        last, folder = "\0", self._folders.top
        for located in group:
            row = located.row
            if isinstance(row, UrlRow):
                self.result.urls.append(row.path)
                continue
            if not check_prefix(row.path):
                raise InvalidInputError("a path must not be empty")
            above, _, name = row.path.rpartition("/")
            if above != last:
                folder, last = self._folders.get(above), above
            if name.startswith(".mandapa-"):
                self._folders.spare_part(row.path)
            target = _Target(row, folder, name)
            found = _same_size(target) if name in folder.names else None
            if found is not None:
                there.append(Found(row.path, f"{folder.path}/{name}", found))
            targets.append((located, target, found))
        known = iter(self._index.known_files(there) if self._index is not None else [None] * len(there))
        checks: list[bool | Future[bool]] = []
        for _, target, found in targets:
            if found is None:
                checks.append(False)
            elif next(known) == target.row.digest:
                checks.append(True)
            elif self._pool is None or found.st_size < 1 << 20:
                checks.append(self._equal(target))
            else:
                checks.append(self._pool.submit(self._equal, target))
        for (located, target, found), check in zip(targets, checks, strict=True):
            if check if isinstance(check, bool) else check.result():
                assert found is not None
                self._set_mode(target, found)
                self.result.skipped += 1
            else:
                self._folders.check_write(target.row.path)
                yield located, target

    def _equal(self, target: _Target) -> bool:
        """Whether the file that is there has the row's bytes: reads it."""
        started = time.time_ns()
        try:
            fd = os.open(target.name, READ_FLAGS, dir_fd=target.folder.fd)
        except OSError:
            return False
        try:
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):
                return False
            hasher = Hasher()
            while data := os.read(fd, 1 << 20):
                hasher.update(data)
            after = os.fstat(fd)
        except OSError:
            return False
        finally:
            os.close(fd)
        if hasher.digest() != target.row.digest:
            return False
        if self._index is not None and (before.st_mtime_ns, before.st_ctime_ns) == (
            after.st_mtime_ns,
            after.st_ctime_ns,
        ):
            self._index.remember_file(f"{target.folder.path}/{target.name}", before, target.row.digest, started)
        return True

    @staticmethod
    def _set_mode(target: _Target, found: os.stat_result) -> None:
        mode = stat.S_IMODE(found.st_mode)
        if target.row.mode == (1 if mode & 0o100 else 0):
            return
        # Who may read it may run it, which is what umask gives a new file.
        mode = mode | (mode & 0o444) >> 2 if target.row.mode else mode & ~0o111
        try:
            fd = os.open(target.name, READ_FLAGS, dir_fd=target.folder.fd)
            try:
                os.fchmod(fd, mode)
            finally:
                os.close(fd)
        except OSError as error:
            raise explain_write(error, f"{target.folder.path}/{target.name}") from error

    # Bytes

    def _transfer(self, wave: _Wave, request: Request) -> None:
        """One request: fetch, verify, write."""
        try:
            found = wave.fetch(request)
        except NotFoundError as error:
            for i, _ in request.wanted:
                self._lose(wave.items[i].target, error)
            return
        written = 0
        for i, value in found:
            _, target, offset = wave.items[i]
            self._write(target, value, offset)
            written += len(value)
        if self._progress is not None:
            self._progress(written)

    def _lose(self, target: _Target, error: NotFoundError) -> None:
        with self._lock:
            if target.error is None:
                target.error = error
                self.lost.append(target)

    def _write(self, target: _Target, value: Buffer, offset: int) -> None:
        try:
            with target.lock:
                if target.fd < 0:
                    self._begin(target)
            view = memoryview(value)
            while view:
                done = os.pwrite(target.fd, view, offset)
                view = view[done:]
                offset += done
            with target.lock:
                target.left -= 1
                last = not target.left
            if last:
                self._finish(target)
        except OSError as error:
            raise explain_write(error, f"{target.folder.path}/{target.name}") from error

    def _begin(self, target: _Target) -> None:
        target.temp = f"{self._prefix}{next(self._counter)}.tmp"
        # The mode goes through umask here, and nowhere else could it without a race.
        mode = 0o777 if target.row.mode else 0o666
        target.fd = os.open(target.temp, CREATE_FLAGS, mode, dir_fd=target.folder.fd)
        self._begun.add(target)
        with suppress(OSError):  # a file system without locks: then leftovers of others may be swept too early
            fcntl.flock(target.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _begin_part(self, target: _Target) -> bool:
        """Begin a file under the name by which a later download finds it; False when that cannot be had."""
        folder = target.folder.fd
        name = part_name(target.name, target.row.digest, target.row.mode)
        try:
            fd = os.open(name, _PART_FLAGS, 0o777 if target.row.mode else 0o666, dir_fd=folder)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another download may be at it
            mine, named = os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False)
            # A file of somebody else, or with another name, is not to be written to.
            if (
                stat.S_ISREG(mine.st_mode)
                and mine.st_nlink == 1
                and mine.st_uid == os.geteuid()
                and os.path.samestat(mine, named)
            ):
                if mine.st_size > target.row.size:
                    os.ftruncate(fd, target.row.size)
                target.fd, target.temp, target.part = fd, name, True
                self._begun.add(target)
                return True
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:  # a file system without locks: no parts there
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)
        os.close(fd)
        return False

    def _missing(self, target: _Target, items: list[_Item]) -> Iterable[_Item]:
        """The items that the part of a file lacks; the file is finished when there are none."""
        size = os.fstat(target.fd).st_size
        if not size:
            return items

        def lacks(item: _Item) -> bool:
            piece, _, offset = item
            if offset + piece.raw > size:
                return True
            try:
                return digest(os.pread(target.fd, piece.raw, offset)) != piece.hash
            except OSError:
                return True

        lacking = list(in_order(lacks, items, threads=self._threads))
        there = sum([item.piece.raw for item, lack in zip(items, lacking, strict=True) if not lack])
        with self._lock:
            self.result.resumed += there
        target.left = sum(lacking)
        if not target.left:
            try:
                self._finish(target)
            except OSError as error:
                raise explain_write(error, f"{target.folder.path}/{target.name}") from error
        if self._progress is not None and there:
            self._progress(there)
        return compress(items, lacking)

    def _finish(self, target: _Target) -> None:
        folder = target.folder.fd
        if self._fsync:
            os.fsync(target.fd)
        try:
            os.rename(target.temp, target.name, src_dir_fd=folder, dst_dir_fd=folder)
        except IsADirectoryError:
            raise InvalidInputError(
                f"{target.folder.path}/{target.name} is a folder, where a file is needed: remove it"
            ) from None
        self._begun.discard(target)
        os.close(target.fd)
        target.fd = -1
        with self._lock:
            self.result.files += 1
            self.result.bytes += target.row.size


def _beside_bases(items: list[_Item]) -> list[_Item]:
    """The items of a file, deltas after their bases where these are in the same file: those are fetched once then."""
    places = {item.piece: place for place, item in enumerate(items)}

    def key(item: _Item) -> tuple[int, bool]:
        base = item.piece.base
        return places[item.piece] if base is None else places.get(base, places[item.piece]), base is not None

    return sorted(items, key=key)


def _windows(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Items in groups as large as a `Room`, in at most 64 folders."""
    window: list[_Item] = []
    room = Room()
    folders = 0
    last: Folder | None = None
    for item in items:
        folders += item.target.folder is not last
        last = item.target.folder
        full = not room.takes(item.piece)
        if folders > FOLDERS and not full:
            full = True
            room = Room()
            room.takes(item.piece)
        if full:
            yield window
            window, folders = [], 1
        window.append(item)
    if window:
        yield window


def _same_size(target: _Target) -> os.stat_result | None:
    try:
        found = os.stat(target.name, dir_fd=target.folder.fd, follow_symlinks=False)
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) and found.st_size == target.row.size else None
