"""Files on this machine as a version sees them: their names, their order, and whether they hold still."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import NamedTuple

from mandapa.digest import Hasher
from mandapa.errors import AccessDeniedError, InvalidInputError, MandapaError, NotFoundError, StorageError
from mandapa.format.strict import RESERVED, check_path

__all__ = ["Found", "check_unchanged", "explain", "explained", "file_mode", "is_still", "read_small", "walk"]

_NAMED = 10  # bad entries that one error names
_READ = 1 << 20


class Found(NamedTuple):
    """One file below a folder."""

    path: str
    """Relative to the folder, ``/`` between segments, fit for a version."""
    source: str
    """Where to open it."""
    stat: os.stat_result
    """Of the file itself: a symlink was followed."""


def file_mode(stat_: os.stat_result) -> int:
    """The mode that a row keeps: 1 when the owner may execute the file, else 0."""
    return 1 if stat_.st_mode & 0o100 else 0


def walk(folder: str | os.PathLike[str], *, skip_special: bool = False) -> list[Found]:
    """Every file at or below ``folder``, sorted by path; nothing is opened, each file is stat'ed once.

    A symlink to a file stands for the file, one to a folder is followed. A folder ``.mandapa`` directly in ``folder``,
    which is reserved, is left out: it is an embedded repository, or what getting a version wrote there.

    Args:
        folder: The folder; its own name is not part of the paths.
        skip_special: Leave out dangling links, sockets, pipes and devices instead of refusing them.

    Raises:
        NotFoundError: ``folder`` is not there.
        AccessDeniedError: A folder may not be read.
        InvalidInputError: Not a folder; a symlink leads back to a folder above it; special files, or names that no
            version can hold - the message names the first ten.
    """
    root = os.path.abspath(os.fspath(folder))
    state = _Walk(skip_special)
    try:
        top = os.stat(root)
    except FileNotFoundError:
        raise NotFoundError(f"{root} is not there") from None
    except OSError as error:
        raise AccessDeniedError(f"cannot read {root}: {error.strerror}") from error
    if not stat.S_ISDIR(top.st_mode):
        raise InvalidInputError(f"{root} is not a folder")
    state.scan(root, "", ((top.st_dev, top.st_ino),))
    state.check()
    state.found.sort(key=itemgetter(0))
    return state.found


class _Walk:
    def __init__(self, skip_special: bool) -> None:
        self._skip_special = skip_special
        self.found: list[Found] = []
        self._special: list[str] = []
        self._names: list[str] = []

    def scan(self, folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> None:
        add = self.found.append
        is_regular, is_folder = stat.S_ISREG, stat.S_ISDIR
        folders: list[tuple[str, str, os.stat_result]] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = prefix + entry.name
                    try:
                        found = entry.stat()
                    except OSError as error:
                        if _is_link(entry):  # dangling, or a loop of links
                            self._special.append(path)
                        elif not isinstance(error, FileNotFoundError):  # that one is gone since the listing
                            raise
                        continue
                    mode = found.st_mode
                    if is_regular(mode):
                        try:
                            add(Found(check_path(path), entry.path, found))
                        except InvalidInputError:
                            self._names.append(path)
                    elif is_folder(mode):
                        folders.append((path, entry.path, found))
                    else:
                        self._special.append(path)
        except FileNotFoundError:
            if not prefix:
                raise NotFoundError(f"{folder} is not there") from None
            return
        except OSError as error:
            raise AccessDeniedError(f"cannot read the folder {folder}: {error.strerror}") from error
        for path, source, found in folders:
            if path == RESERVED:
                continue
            identity = (found.st_dev, found.st_ino)
            if identity in above:
                raise InvalidInputError(f"the symlink {source} leads back to a folder above it: remove it, or add less")
            self.scan(source, path + "/", (*above, identity))

    def check(self) -> None:
        if self._special and not self._skip_special:
            raise InvalidInputError(
                f"not files: {_some(self._special)} (dangling links, sockets, pipes or devices): "
                "remove them, or skip special files"
            )
        if self._names:
            raise InvalidInputError(
                f"names that a version cannot hold: {_some(self._names)}: rename them (no control characters, "
                "backslashes or bytes that are not UTF-8, 255 bytes a name and 1,024 a path, no file '.mandapa')"
            )


def _is_link(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink()
    except OSError:
        return False


def _some(paths: list[str]) -> str:
    paths.sort()
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join([repr(path) for path in paths[:_NAMED]]) + more


def read_small(fd: int, size: int, source: str) -> bytes:
    """The bytes of an open file that had ``size`` of them when asked; `InvalidInputError` when it has others now."""
    data = os.read(fd, size + 1)
    while 0 < len(data) < size:  # some file systems give less than there is
        more = os.read(fd, size + 1 - len(data))
        if not more:
            break
        data += more
    if len(data) != size:
        raise InvalidInputError(f"{source} changed while it was added: add files that nobody writes any more")
    return data


def is_still(before: os.stat_result, after: os.stat_result) -> bool:
    """Whether size and times say that a file did not change."""
    return (
        after.st_size == before.st_size
        and after.st_mtime_ns == before.st_mtime_ns
        and after.st_ctime_ns == before.st_ctime_ns
    )


def check_unchanged(fd: int, before: os.stat_result, digest_: bytes, source: str) -> bool:
    """Whether the times of an open file say that it did not change since ``before``.

    False where they do not say so, but its bytes still have the digest; reads it once more for that.

    Raises:
        InvalidInputError: It has changed.
    """
    after = os.fstat(fd)
    if is_still(before, after):
        return True
    # When only its inode moved, another name came or went (a rotated checkpoint does that), or a mode. Or not.
    same = after.st_size == before.st_size and after.st_mtime_ns == before.st_mtime_ns
    if same and _hash_file(fd) == digest_:
        return False
    raise InvalidInputError(f"{source} changed while it was added: add files that nobody writes any more")


def _hash_file(fd: int) -> bytes:
    hasher = Hasher()
    view = memoryview(bytearray(_READ))
    at = 0
    while got := os.preadv(fd, [view], at):
        hasher.update(view[:got])
        at += got
    return hasher.digest()


@contextmanager
def explained(source: str) -> Iterator[None]:
    """System errors of reading ``source`` become ours."""
    try:
        yield
    except MandapaError:
        raise
    except OSError as error:
        raise explain(error, source) from error


def explain(error: OSError, source: str) -> MandapaError:
    """What an error of reading ``source`` means to a caller."""
    if isinstance(error, MandapaError):
        return error
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{source} is not there any more")
    if isinstance(error, PermissionError):
        return AccessDeniedError(f"{source} may not be read: {error.strerror}")
    return StorageError(f"{source} cannot be read: {error.strerror}")
