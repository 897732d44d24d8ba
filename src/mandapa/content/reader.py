"""One asset as a file: seekable, and only what is read is fetched."""

from __future__ import annotations

import io
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import TypeAlias

from mandapa.content.index import Piece
from mandapa.content.transfer import fetch, pieces_of, plan
from mandapa.content.tree import Located
from mandapa.errors import ClosedError, CorruptionError, InvalidInputError, NotFoundError
from mandapa.format.manifest import Node, NodeAddress, UrlRow
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["AssetFile"]

_KEPT = 32 << 20  # bytes of decoded chunks that stay at hand, at least two chunks
_AHEAD = 8 << 20  # bytes that one thread fetches ahead of a reader that goes on where it stopped
_MOVES = 3

_Chunks: TypeAlias = dict[int, Buffer]


class AssetFile(io.RawIOBase):
    """An asset's bytes, read-only and seekable; every byte handed out was verified.

    Fetches the chunks that a read touches, neighbours by one request, and keeps about 32 MiB of them. A reader that
    goes on where it stopped is given what comes next from other threads. `pread` may be called from several threads;
    `read` and `seek` share one position. A forked child gets `ClosedError`. For small reads, wrap it in
    `io.BufferedReader`.

    Args:
        located: The row of a file.
        store: Where its containers are.
        load: Reads a node, as `NodeReader.load`; called for files of more than 256 chunks.
        moved: Called when a container is gone; gives the row as it is now, or raises what to tell the user.
        threads: Requests under way ahead of the reader; 0 fetches only what is read, in the caller's thread.

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
        threads: int = 2,
    ) -> None:
        super().__init__()
        row = located.row
        if isinstance(row, UrlRow):
            raise InvalidInputError(f"{row.path!r} is a URL, {row.url}: open it where it is")
        self.name = row.path
        self.size = row.size
        self._digest = row.digest
        self._store = store
        self._load = load
        self._moved = moved
        self._threads = threads
        self._position = 0
        self._next = -1  # where the last read ended
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[_Chunks]] = {}
        self._kept: OrderedDict[int, Buffer] = OrderedDict()
        self._kept_bytes = 0
        self._pieces: list[Piece] | None = None
        self._ends: list[int] = []
        self._located = located

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
        done = self._read(view, self._position)
        self._position += done
        return done

    def pread(self, length: int, offset: int) -> bytes:
        """Up to ``length`` bytes from ``offset`` on, fewer only at the end; moves nothing. Raises as `readinto`."""
        self._check()
        if length < 0 or offset < 0:
            raise InvalidInputError("length and offset must not be negative")
        data = bytearray(min(length, max(0, self.size - offset)))
        self._read(memoryview(data), offset)
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

    def _read(self, view: memoryview, offset: int) -> int:
        with self._lock:
            length = max(0, min(len(view), self.size - offset))
            if not length:
                return 0
            for _ in range(_MOVES):
                try:
                    self._copy(view[:length], offset)
                    break
                except NotFoundError:
                    self._go_on()
            else:
                raise CorruptionError(
                    f"{self.name}: its manifest names bytes that are not in the store: run `mandapa fsck`"
                )
            self._next = offset + length
            return length

    def _go_on(self) -> None:
        """Take the row as it is now, after a container was gone."""
        if self._moved is None:
            raise  # noqa: PLE0704 - called while the NotFoundError is handled
        located = self._moved()
        row = located.row
        if isinstance(row, UrlRow) or row.digest != self._digest:
            raise CorruptionError(f"{self.name} is another file now")
        self._located = located
        self._pieces = None
        self._ahead.clear()
        self._kept.clear()
        self._kept_bytes = 0

    def _copy(self, view: memoryview, offset: int) -> None:
        if self._pieces is None:
            self._pieces = list(pieces_of(self._located, self._load))
            self._ends = list(accumulate([piece.raw for piece in self._pieces]))
        ends = self._ends
        first = bisect_right(ends, offset)
        end = offset + len(view)
        sequential = offset == self._next
        at = first
        done = 0
        while done < len(view):
            # As much at a time as may be kept, so that memory stays bounded however much is read.
            last = self._reach(at, _AHEAD)
            last = min(last, bisect_right(ends, end - 1) + 1)
            chunks = self._chunks(at, last)
            if self._threads and (sequential or last - 1 < bisect_right(ends, end - 1)):
                self._fetch_ahead(last)
            for i in range(at, last):
                start = ends[i - 1] if i else 0
                part = memoryview(chunks[i])[max(0, offset + done - start) : end - start]
                view[done : done + len(part)] = part
                done += len(part)
            at = last

    def _reach(self, first: int, size: int) -> int:
        """The end of the chunks from ``first`` on that have ``size`` bytes together, at least one."""
        assert self._pieces is not None
        start = self._ends[first - 1] if first else 0
        return min(max(first + 1, bisect_right(self._ends, start + size)), len(self._pieces))

    def _chunks(self, first: int, last: int) -> _Chunks:
        found: _Chunks = {}
        missing = []
        for i in range(first, last):
            if i not in self._kept and i in self._ahead:
                for j, value in self._take(i).items():
                    self._keep(j, value)
            value_ = self._kept.get(i)
            if value_ is None:
                missing.append(i)
            else:
                self._kept.move_to_end(i)
                found[i] = value_
        if missing:
            for i, value in self._fetch(missing).items():
                found[i] = value
                self._keep(i, value)
        return found

    def _take(self, i: int) -> _Chunks:
        future = self._ahead[i]
        for j in [j for j, other in self._ahead.items() if other is future]:
            del self._ahead[j]
        return future.result()

    def _keep(self, i: int, value: Buffer) -> None:
        if i not in self._kept:
            self._kept[i] = value
            self._kept_bytes += len(value)
            while self._kept_bytes > _KEPT and len(self._kept) > 2:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    def _fetch(self, wanted: list[int]) -> _Chunks:
        assert self._pieces is not None
        pieces = [self._pieces[i] for i in wanted]
        found: _Chunks = {}
        for request in plan(pieces):
            values = fetch(self._store, request, pieces, lambda _: self.name)
            found.update(zip([wanted[i] for i in request.wanted], values, strict=True))
        return found

    def _fetch_ahead(self, first: int) -> None:
        """Have other threads fetch what comes from chunk ``first`` on."""
        assert self._pieces is not None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="mandapa-ahead")
        for i in [i for i in self._ahead if i < first]:
            del self._ahead[i]  # the reader went elsewhere
        for _ in range(self._threads):
            if first >= len(self._pieces):
                return
            last = self._reach(first, _AHEAD)
            wanted = [i for i in range(first, last) if i not in self._ahead and i not in self._kept]
            if wanted:
                future = self._pool.submit(self._fetch, wanted)
                self._ahead.update(dict.fromkeys(wanted, future))
            first = last
