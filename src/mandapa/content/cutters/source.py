"""What a cutter may look at: random access to bytes of a known size."""

from __future__ import annotations

import os
from typing import Protocol

from mandapa.errors import InvalidInputError

__all__ = ["BytesSource", "FileSource", "Source", "StartSource", "read_some"]


class Source(Protocol):
    """The bytes to be stored; nobody is expected to change them while they are read."""

    @property
    def size(self) -> int:
        """Bytes to store, fixed when the source was made."""

    def readinto(self, offset: int, buffer: memoryview, /) -> int:
        """Fill ``buffer`` with the bytes from ``offset`` on; returns how many, fewer only where the bytes end.

        Raises:
            OSError: The bytes cannot be read.
        """


class FileSource:
    """The bytes of an open file, as many as it has now. The descriptor stays the caller's, its position unchanged.

    Safe to use from several threads.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     _ = file.write(b"weights")
        ...     file.flush()
        ...     FileSource(file.fileno()).size
        7
    """

    def __init__(self, fd: int, *, size: int | None = None) -> None:
        self._fd = fd
        self._size = os.fstat(fd).st_size if size is None else size

    @property
    def size(self) -> int:
        """Bytes to store."""
        return self._size

    def readinto(self, offset: int, buffer: memoryview, /) -> int:
        """Fill ``buffer`` from ``offset`` on; see `Source.readinto`."""
        got = os.preadv(self._fd, [buffer], offset)
        if got == len(buffer) or got == 0:
            return got
        # One call moves 2 GiB at most, and some file systems less.
        while got < len(buffer):
            more = os.preadv(self._fd, [buffer[got:]], offset + got)
            if more == 0:
                break
            got += more
        return got


class StartSource(FileSource):
    """The first ``size`` bytes of an open file, to which more may be appended meanwhile.

    Raises:
        InvalidInputError: The file, which messages call ``name``, has fewer bytes; now, or when it is read.
    """

    def __init__(self, fd: int, size: int, name: str) -> None:
        super().__init__(fd, size=size)
        self._name = name
        if os.fstat(fd).st_size < size:
            raise self._too_short()

    def readinto(self, offset: int, buffer: memoryview, /) -> int:
        """Fill ``buffer`` from ``offset`` on, with nothing after the first ``size`` bytes."""
        wanted = buffer[: max(0, self._size - offset)]
        if super().readinto(offset, wanted) != len(wanted):
            raise self._too_short()
        return len(wanted)

    def _too_short(self) -> InvalidInputError:
        return InvalidInputError(
            f"{self._name} has {os.fstat(self._fd).st_size} bytes, fewer than the {self._size} that were to be added: "
            "give a length only of a file that grows and never shrinks"
        )


class BytesSource:
    """Bytes that are in memory.

    Example:
        >>> BytesSource(b"weights").size
        7
    """

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(data).cast("B")

    @property
    def size(self) -> int:
        """Bytes to store."""
        return len(self._view)

    def readinto(self, offset: int, buffer: memoryview, /) -> int:
        """Fill ``buffer`` from ``offset`` on; see `Source.readinto`."""
        part = self._view[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)


def read_some(source: Source, offset: int, length: int) -> bytearray:
    """Up to ``length`` bytes from ``offset`` on, fewer where the source ends."""
    data = bytearray(length)
    got = source.readinto(offset, memoryview(data))
    return data if got == length else data[:got]
