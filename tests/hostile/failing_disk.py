"""A disk that fails at one call: the k-th that would change something below some folders."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

WRITES = ("write", "pwrite", "sendfile")
BY_DESCRIPTOR = (*WRITES, "fsync", "ftruncate", "posix_fallocate", "fchmod", "utime")
BY_PATH = ("open", "mkdir", "rename", "replace", "link", "symlink", "truncate", "chmod")
CREATES = os.O_CREAT | os.O_TRUNC

REAL: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in (*BY_DESCRIPTOR, *BY_PATH)}


class FailingDisk:
    """While it is entered, the ``at``-th call (from 0) that concerns ``places`` fails with ``code``.

    Of a write half of the bytes get there first, as when the last block is taken. ``lasting``: so do all calls that
    follow. ``all_threads``: those of other threads count, too. ``mark``: a file that is made when it happens.
    """

    def __init__(
        self,
        *places: str,
        at: int,
        code: int = errno.ENOSPC,
        lasting: bool = False,
        all_threads: bool = False,
        mark: str = "",
    ) -> None:
        self._places = places
        self.at = at
        self._code = code
        self._lasting = lasting
        self._mark = mark
        self._thread = None if all_threads else threading.get_ident()
        self._lock = threading.Lock()
        self.calls: list[str] = []
        """What was counted: the name of each call and the last part of its path."""

    @property
    def failed(self) -> bool:
        """Whether a call was made to fail."""
        return len(self.calls) > self.at

    def __enter__(self) -> FailingDisk:
        for name in REAL:
            setattr(os, name, self._patched(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in REAL.items():
            setattr(os, name, real)

    def _patched(self, name: str) -> Callable[..., Any]:
        real = REAL[name]

        def call(*given: Any, **options: Any) -> Any:
            if self._concerns(name, given, options) and self._fails(name, given):
                if name == "write":
                    real(given[0], memoryview(given[1]).cast("B")[: len(memoryview(given[1]).cast("B")) // 2])
                elif name == "pwrite":
                    real(given[0], memoryview(given[1]).cast("B")[: memoryview(given[1]).nbytes // 2], *given[2:])
                if self._mark:
                    os.close(REAL["open"](self._mark, os.O_WRONLY | os.O_CREAT))
                raise OSError(self._code, os.strerror(self._code), None if name in BY_DESCRIPTOR else given[0])
            return real(*given, **options)

        return call

    def _concerns(self, name: str, given: tuple[Any, ...], options: dict[str, Any]) -> bool:
        if self._thread is not None and threading.get_ident() != self._thread:
            return False
        if name == "open" and not given[1] & CREATES:
            return False
        path = path_of(name, given, options)
        if name == "mkdir" and os.path.isdir(path):
            return False  # which is another error
        return any(path.startswith(place) for place in self._places)

    def _fails(self, name: str, given: tuple[Any, ...]) -> bool:
        with self._lock:
            self.calls.append(f"{name} {os.path.basename(path_of(name, given, {}))}")
            count = len(self.calls) - 1
        return count == self.at or (self._lasting and count > self.at)


def path_of(name: str, given: tuple[Any, ...], options: dict[str, Any]) -> str:
    """The path that a call would change."""
    target = given[0]
    if name in ("rename", "replace", "link", "symlink"):
        target = given[1]
    if isinstance(target, int):
        return _path(target)
    folder = options.get("dst_dir_fd", options.get("dir_fd"))
    text = os.fsdecode(target)
    return text if folder is None or text.startswith("/") else f"{_path(folder)}/{text}"


def _path(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
