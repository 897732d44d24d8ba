"""Folders that files are written into: reached without following a symlink, tidied, and told apart by name."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress

from mandapa.digest import digest
from mandapa.errors import (
    AccessDeniedError,
    CorruptionError,
    FormatVersionError,
    InvalidInputError,
    MandapaError,
    SecurityError,
    StorageError,
)
from mandapa.format.keys import MARKER
from mandapa.format.records import MARKER_MAX, decode_marker

__all__ = [
    "CREATE_FLAGS",
    "FOLDERS",
    "READ_FLAGS",
    "Folder",
    "Folders",
    "check_collisions",
    "explain_write",
    "folding",
    "part_name",
]

FOLDERS = 64
"""Folders held open at most."""

READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TRIES = 4
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LEFTOVER = re.compile(r"\.mandapa-[0-9a-f]{16}-[0-9]+(A\u00e9)?\.tmp")
_PART = re.compile(r"\.mandapa-[0-9a-f]{32}\.part")


class Folder:
    """An open folder, closed when nobody needs it any more."""

    __slots__ = ("fd", "names", "path")

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path
        self.names = _sweep(fd)

    def __del__(self) -> None:
        os.close(self.fd)


def _sweep(fd: int) -> set[str]:
    """The names in a folder, after the leftovers of killed downloads were removed: those that nobody has locked."""
    names = set(os.listdir(fd))
    for name in [name for name in names if name.startswith(".mandapa-") and _LEFTOVER.fullmatch(name)]:
        _remove(name, fd)
    return names


def _remove(name: str, folder: int) -> None:
    """Remove a file unless a download has it locked."""
    with suppress(OSError):
        fd = os.open(name, READ_FLAGS, dir_fd=folder)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=folder)
        finally:
            os.close(fd)


def part_name(name: str, digest_: bytes, mode: int) -> str:
    """What the part of a large file is called until it is whole: the next download of the same file finds it."""
    told = digest(name.encode() + bytes([0, mode]) + digest_)
    return f".mandapa-{told.hex()[:32]}.part"


class Folders:
    """Folders below a root, reached step by step without following a symlink, made where missing."""

    def __init__(self, root: str, top: Folder) -> None:
        self._root = root
        self.top = top
        self._open: OrderedDict[str, Folder] = OrderedDict()
        self._seen: set[str] = set()
        self._repositories = {""} if _is_repository(top) else set()
        self._parts: set[tuple[str, str]] = set()
        self._note_parts("", top)

    def get(self, path: str) -> Folder:
        """The folder at a path below the root; ``""`` is the root."""
        if not path:
            return self.top
        folder = self._open.get(path)
        if folder is None:
            above, _, name = path.rpartition("/")
            folder = self._enter(self.get(above), name)
            self._open[path] = folder
            if path not in self._seen and (above in self._repositories or _is_repository(folder)):
                self._repositories.add(path)
            self._seen.add(path)
            self._note_parts(path, folder)
            if len(self._open) > FOLDERS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(path)
        return folder

    def check_write(self, path: str) -> None:
        """Refuse, by `SecurityError`, to write the file at ``path`` between the objects of a repository.

        That is any folder that had a marker when it was first got, and what is below it.
        """
        if self._repositories and path.rpartition("/")[0] in self._repositories:
            raise SecurityError(
                f"{self._root}/{path} would go into a repository that is there: get it into another folder, or only "
                "what you need"
            )

    def spare_part(self, path: str) -> None:
        """What is at ``path`` is nobody's part, though it may be called like one."""
        folder, _, name = path.rpartition("/")
        self._parts.discard((folder, name))

    def remove_parts(self) -> None:
        """Remove the parts of files that were found in folders, and that nobody has completed, or is about to."""
        for path, name in self._parts:
            _remove(name, self.get(path).fd)

    def _note_parts(self, path: str, folder: Folder) -> None:
        self._parts.update([(path, name) for name in folder.names if _PART.fullmatch(name)])

    def sync(self) -> None:
        """Make every folder that was used durable."""
        for path in self._seen:
            os.fsync(self.get(path).fd)
        os.fsync(self.top.fd)

    @staticmethod
    def _enter(above: Folder, name: str) -> Folder:
        path = f"{above.path}/{name}"
        for _ in range(_TRIES):
            try:
                return Folder(os.open(name, _FOLDER_FLAGS, dir_fd=above.fd), path)
            except FileNotFoundError:
                try:
                    with suppress(FileExistsError):
                        os.mkdir(name, dir_fd=above.fd)
                except OSError as error:
                    raise explain_write(error, path) from error
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise explain_write(error, path) from error
                _refuse(above, name, path)
        raise StorageError(f"{path} cannot be made: something removes or replaces it", retryable=True)


def _is_repository(folder: Folder) -> bool:
    """Whether it has the marker of a repository, of this format or of a newer one."""
    if MARKER not in folder.names:
        return False
    try:
        fd = os.open(MARKER, READ_FLAGS, dir_fd=folder.fd)
    except OSError:
        return False
    try:
        decode_marker(os.read(fd, MARKER_MAX + 1), key=MARKER)
    except (OSError, CorruptionError):
        return False
    except FormatVersionError:
        return True
    finally:
        os.close(fd)
    return True


def _refuse(above: Folder, name: str, path: str) -> None:
    """Refuse what is there instead of a folder; nothing, when something has put another thing there meanwhile."""
    try:
        mode = os.stat(name, dir_fd=above.fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise SecurityError(f"{path} is a symbolic link, where a folder is needed: remove it, or use another folder")
    if not stat.S_ISDIR(mode):
        raise InvalidInputError(f"{path} is a file, where a folder is needed: remove it, or use another folder")


def folding(top: Folder) -> Callable[[str], str] | None:
    """What this file system takes for one name, or None when it tells all names apart: tried with one empty file."""
    probe = f".mandapa-{secrets.token_hex(8)}-0A\u00e9.tmp"
    try:
        os.close(os.open(probe, CREATE_FLAGS, 0o600, dir_fd=top.fd))
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise explain_write(error, top.path) from error
        return None
    try:
        case = _exists(probe.lower(), top.fd)
        form = _exists(unicodedata.normalize("NFD", probe), top.fd)
    finally:
        with suppress(OSError):
            os.unlink(probe, dir_fd=top.fd)
    if case:
        return lambda path: unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
    if form:
        return lambda path: unicodedata.normalize("NFC", path)
    return None


def _exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return True


def check_collisions(paths: Iterable[str], fold: Callable[[str], str], root: str) -> None:
    """Refuse paths that are one name on this file system, by `InvalidInputError`."""
    seen: dict[str, str] = {}
    for path in paths:
        end = 0
        while end >= 0:
            end = path.find("/", end + 1)
            part = path if end < 0 else path[:end]
            other = seen.setdefault(fold(part), part)
            if other != part:
                raise InvalidInputError(
                    f"{other!r} and {part!r} are one name on the file system of {root}: restore them into different "
                    "folders, one after the other, or on another file system"
                )


def explain_write(error: OSError, path: str) -> MandapaError:
    """What to tell the user of a file or folder that could not be written."""
    if isinstance(error, MandapaError):
        return error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDeniedError(f"{path} may not be written: {error.strerror}")
    if error.errno in (errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG):
        return InvalidInputError(f"{path} cannot be a file on this file system: {error.strerror}")
    return StorageError(
        f"{path} cannot be written: {error.strerror}", retryable=error.errno in (errno.EMFILE, errno.ENFILE)
    )
