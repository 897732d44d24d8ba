"""One asset as a file: seekable, and only what is read is fetched."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from mandapa.content.cache import ChunkCache
from mandapa.content.fetch import Wave, chain_size, windows
from mandapa.content.ranges import Layout, Span
from mandapa.content.tree import Located
from mandapa.errors import ClosedError, CorruptionError, InvalidInputError, NotFoundError
from mandapa.format.manifest import Node, NodeAddress, UrlRow
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["AssetFile"]

_KEPT = 32 << 20  # bytes of decoded chunks that stay at hand, at least two chunks
_WINDOW = 8 << 20  # bytes that are fetched at a time
_AHEAD = 96 << 20  # bytes that may be fetched ahead at a time, bases of deltas included
_MOVES = 3

_Chunks: TypeAlias = dict[int, Buffer]


class AssetFile(io.RawIOBase):
    """An asset's bytes, read-only and seekable; every byte handed out was verified.

    Fetches the chunks that a read touches, neighbours by one request, and keeps about 32 MiB of them. For a reader that
    goes on where it stopped other threads fetch what comes next, never more than it has read so far.
    `pread` may be called from several threads; `read` and `seek` share one position. A forked child gets `ClosedError`.
    For small reads, wrap it in `io.BufferedReader`.

    Args:
        located: The row of a file.
        store: Where its containers are.
        load: Reads a node, as `NodeReader.load`; called for the parts of large files.
        moved: Called when a container is gone; gives the row as it is now, or raises what to tell the user.
        cache: Chunks that need not be fetched.
        threads: Windows of 8 MiB under way ahead of the reader, and requests at once for one of them; 0 fetches only
            what is read, in the caller's thread.

    Raises:
        InvalidInputError: The row is a URL.
    """

    def __init__(
        self,
        located: Located,
        *,
        store: ObjectStore,
        load: Callable[[NodeAddress], Node],
        moved: Callable[[], Located] | None = None,
        cache: ChunkCache | None = None,
        threads: int = 2,
    ) -> None:
        super().__init__()
        # First what `close` needs, which runs even for an object that was never whole.
        self._pid = os.getpid()
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[_Chunks]] = {}
        self._kept: OrderedDict[int, Buffer] = OrderedDict()
        row = located.row
        if isinstance(row, UrlRow):
            raise InvalidInputError(f"{row.path!r} is a URL, {row.url}: open it where it is")
        self.name = row.path
        self.size = row.size
        self._digest = row.digest
        self._store = store
        self._load = load
        self._moved = moved
        self._cache = cache
        self._threads = threads
        self._position = 0
        self._next = -1  # where the last read ended
        self._run = 0  # bytes read without a jump
        self._lock = threading.RLock()
        self._ahead_end = 0
        self._kept_bytes = 0
        self._layout = Layout(located, load)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        self._check()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position; costs nothing, and may go beyond the end."""
        self._check()
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}.get(whence)
        if start is None or start + offset < 0:
            raise InvalidInputError(f"cannot seek to {offset} (whence {whence}) in {self.size} bytes")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:  # type: ignore[override]
        """Fill ``buffer`` from the position on; returns 0 at the end, and else fills it as far as there are bytes.

        Raises:
            NotFoundError: The version was deleted.
            CorruptionError: The store's bytes are not those that were written.
        """
        self._check()
        view = memoryview(buffer).cast("B")
        if self._position != self._next:
            self._run = 0
            self._ahead.clear()
            self._ahead_end = 0
        done = self._read(view, self._position, self._run)
        self._position += done
        self._run += done
        self._next = self._position
        return done

    def pread(self, length: int, offset: int) -> bytes:
        """Up to ``length`` bytes from ``offset`` on, fewer only at the end; moves nothing. Raises as `readinto`."""
        self._check()
        if length < 0 or offset < 0:
            raise InvalidInputError("length and offset must not be negative")
        data = bytearray(min(length, max(0, self.size - offset)))
        self._read(memoryview(data), offset, 0)
        return bytes(data)

    def readall(self) -> bytes:
        """Everything from the position on. Raises as `readinto`."""
        self._check()
        data = self.pread(max(0, self.size - self._position), self._position)
        self._position += len(data)
        return data

    def close(self) -> None:
        """Forget what was fetched. Any number of times."""
        if not self.closed and self._pid == os.getpid():
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None
            self._ahead.clear()
            self._kept.clear()
        super().close()

    def _check(self) -> None:
        if self.closed:
            raise ClosedError(f"{self.name} is closed")
        if self._pid != os.getpid():
            raise ClosedError(f"{self.name} was opened by the process that forked this one: open it here")

    def _read(self, view: memoryview, offset: int, ahead: int) -> int:
        with self._lock:
            length = max(0, min(len(view), self.size - offset))
            if not length:
                return 0
            for _ in range(_MOVES):
                try:
                    self._copy(view[:length], offset, ahead)
                    return length
                except NotFoundError as error:
                    self._go_on(error)
            raise CorruptionError(
                f"{self.name}: its manifest names bytes that are not in the store: run `mandapa fsck`"
            )

    def _go_on(self, error: NotFoundError) -> None:
        """Take the row as it is now, after a container was gone."""
        if self._moved is None:
            raise error
        located = self._moved()
        row = located.row
        if isinstance(row, UrlRow) or row.digest != self._digest:
            raise CorruptionError(f"{self.name} is another file now")
        self._layout = Layout(located, self._load)
        self._ahead.clear()
        self._ahead_end = 0
        self._kept.clear()
        self._kept_bytes = 0

    def _copy(self, view: memoryview, offset: int, ahead: int) -> None:
        """Fill ``view``, and have up to ``ahead`` bytes after it fetched."""
        end = offset + len(view)
        at = offset
        while at < end:
            # A window at a time, so that memory stays bounded however much is read.
            spans = self._layout.chunks(at, min(at + _WINDOW, end))
            chunks = self._chunks(spans)
            reached = spans[-1][0] + spans[-1][1].raw
            self._fetch_ahead(reached, max(end, reached + ahead))
            for start, piece in spans:
                part = memoryview(chunks[start])[at - start : min(piece.raw, end - start)]
                view[at - offset : at - offset + len(part)] = part
                at += len(part)

    def _chunks(self, spans: list[Span]) -> _Chunks:
        found: _Chunks = {}
        missing = []
        for span in spans:
            start = span[0]
            if start not in self._kept and start in self._ahead:
                for other, value in self._take(start).items():
                    self._keep(other, value)
            kept = self._kept.get(start)
            if kept is None:
                missing.append(span)
            else:
                self._kept.move_to_end(start)
                found[start] = kept
        if missing:
            for start, value in self._fetch(missing).items():
                found[start] = value
                self._keep(start, value)
        return found

    def _take(self, start: int) -> _Chunks:
        future = self._ahead[start]
        for other in [other for other, theirs in self._ahead.items() if theirs is future]:
            del self._ahead[other]
        return future.result()

    def _keep(self, start: int, value: Buffer) -> None:
        if start not in self._kept:
            self._kept[start] = value
            self._kept_bytes += len(value)
            while self._kept_bytes > _KEPT and len(self._kept) > 2:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    def _fetch(self, spans: list[Span]) -> _Chunks:
        found: _Chunks = {}
        for window in windows(spans, lambda span: span[1]):
            wave = Wave(self._store, [piece for _, piece in window], lambda _: self.name, self._cache)
            found.update(zip([start for start, _ in window], wave.all(self._threads), strict=True))
        return found

    def _fetch_ahead(self, begin: int, stop: int) -> None:
        """Have other threads fetch what is between ``begin`` and ``stop``, as far as threads reach."""
        most = self._threads * _WINDOW
        stop = min(stop, begin + most, self.size)
        begin = max(begin, self._ahead_end)
        # Half of what may be under way at a time, so that the requests stay few.
        if begin >= stop or (stop < self.size and stop - begin < most // 2 and self._ahead):
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="mandapa-ahead")
        size = 0
        for at in range(begin, stop, _WINDOW):
            spans = self._layout.chunks(at, min(at + _WINDOW, stop))
            spans = [span for span in spans if span[0] not in self._ahead and span[0] not in self._kept]
            size += sum([chain_size(piece) for _, piece in spans])
            if size > _AHEAD:
                stop = at
                break
            if spans:
                self._ahead.update(dict.fromkeys([start for start, _ in spans], self._pool.submit(self._fetch, spans)))
        self._ahead_end = stop
