"""Ranges of one asset: which chunks hold them, and their bytes in as few round trips as possible."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain, islice
from typing import NamedTuple, TypeAlias

import msgspec

from mandapa.content.cache import ChunkCache
from mandapa.content.fetch import Request, Wave, fly, pieces_of, windows
from mandapa.content.index import Piece
from mandapa.content.parallel import in_order
from mandapa.content.tree import Located
from mandapa.errors import InvalidInputError
from mandapa.format.manifest import LargeFileRow, Node, NodeAddress, UrlRow
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["Layout", "RangeReader", "Span", "Target"]

_KEPT = 64 << 20  # bytes of decoded chunks that stay at hand
_HEAD = 96 << 10  # stored bytes at the start that are fetched before it is known what they are
_TAIL = 64 << 10
_SMALL = 64 << 10


class Span(NamedTuple):
    """One chunk, and where in the asset it starts."""

    start: int
    piece: Piece

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.start + self.piece.raw


class Target(NamedTuple):
    """A range of the asset, and where its bytes go."""

    start: int
    view: memoryview

    @property
    def end(self) -> int:
        """Where the range ends."""
        return self.start + len(self.view)

    def take(self, span: Span, value: Buffer) -> None:
        """Copy what a chunk has of the range."""
        begin, end = max(self.start, span.start), min(self.end, span.end)
        self.view[begin - self.start : end - self.start] = memoryview(value)[begin - span.start : end - span.start]


Range: TypeAlias = tuple[int, int]


class Layout:
    """Which chunks hold which bytes; parts of a large file are loaded when their bytes are asked for."""

    def __init__(self, located: Located, load: Callable[[NodeAddress], Node]) -> None:
        row, table = located
        if isinstance(row, UrlRow):
            raise InvalidInputError(f"{row.path!r} is a URL, {row.url}: read it where it is")
        self._load = load
        self.size = row.size
        self._parts: list[Located]
        if isinstance(row, LargeFileRow):
            self._parts = [Located(msgspec.structs.replace(row, parts=(part,)), table) for part in row.parts]
            self._ends = list(accumulate([part.raw for part in row.parts]))
        else:
            self._parts = [located]
            self._ends = [row.size]
        self._spans: dict[int, tuple[list[int], list[Piece]]] = {}

    def prepare(self, ranges: Iterable[Range], threads: int) -> None:
        """Load the parts that these ranges need, several at once."""
        missing = sorted({i for begin, end in ranges for i in self._touched(begin, end)} - self._spans.keys())
        for i, part in zip(missing, in_order(self._read_part, missing, threads=threads), strict=True):
            self._spans[i] = part

    def chunks(self, begin: int, end: int) -> list[Span]:
        """The chunks that hold ``[begin, end)``; none when it is empty."""
        found: list[Span] = []
        for i in self._touched(begin, end):
            starts, pieces = self._part(i)
            first = max(bisect_right(starts, begin) - 1, 0)
            last = bisect_left(starts, end)
            found += map(Span, starts[first:last], pieces[first:last])
        return found

    def part(self, number: int) -> list[Span]:
        """The chunks of one part of the list of chunks: 0 is the first, -1 the last one."""
        return list(map(Span, *self._part(range(len(self._parts))[number])))

    def _touched(self, begin: int, end: int) -> range:
        if begin >= end:
            return range(0)
        return range(bisect_right(self._ends, begin), bisect_left(self._ends, end) + 1)

    def _part(self, i: int) -> tuple[list[int], list[Piece]]:
        part = self._spans.get(i)
        if part is None:
            part = self._spans[i] = self._read_part(i)
        return part

    def _read_part(self, i: int) -> tuple[list[int], list[Piece]]:
        pieces = list(pieces_of(self._parts[i], self._load))
        start = self._ends[i - 1] if i else 0
        return list(accumulate([piece.raw for piece in pieces], initial=start))[:-1], pieces


class RangeReader:
    """An asset as a `Source` that says beforehand what it will be asked for. Every byte handed out was verified.

    Keeps about 64 MiB of chunks. For one thread.

    Args:
        located: The row of a file.
        store: Where its containers are.
        load: Reads a node, as `NodeReader.load`.
        cache: Chunks that need not be fetched.
        threads: Requests at once; 0 makes them in the caller's thread.

    Raises:
        InvalidInputError: The row is a URL.
        NotFoundError: Of every method: a container is not there (any more).
        CorruptionError: Of every method: the store's bytes are not those that were written.
    """

    def __init__(
        self,
        located: Located,
        *,
        store: ObjectStore,
        load: Callable[[NodeAddress], Node],
        cache: ChunkCache | None,
        threads: int,
    ) -> None:
        self.path = located.row.path
        self.layout = Layout(located, load)
        self._store = store
        self._cache = cache
        self._threads = threads
        self._kept: OrderedDict[int, Buffer] = OrderedDict()
        self._kept_bytes = 0

    @property
    def size(self) -> int:
        """Bytes of the asset."""
        return self.layout.size

    def readinto(self, offset: int, buffer: memoryview, /) -> int:
        """Fill ``buffer`` from ``offset`` on; see `Source.readinto`. One round trip for what is not at hand."""
        end = min(offset + len(buffer), self.size)
        spans = self.layout.chunks(offset, end)
        self._keep(spans)
        for span in spans:
            value = self._kept.get(span.start)
            if value is None:  # more than is kept: it went while the others came
                self._keep([span])
                value = self._kept[span.start]
            Target(offset, buffer[: end - offset]).take(span, value)
        return max(end - offset, 0)

    def want_ends(self) -> None:
        """Have the first and the last chunks at hand: where formats have their headers. One round trip.

        And one before it, where parts of the list of chunks are not at hand. Of small chunks several, up to 96 KiB
        stored at the start and 64 KiB at the end; of large ones only the first.
        """
        if self.size:
            self.layout.prepare([(0, 1), (self.size - 1, self.size)], self._threads)
            first, last = self.layout.part(0), self.layout.part(-1)
            # The start is needed whatever it is; a large chunk at the end is a tensor.
            self._keep([*first[:1], *_within(first[1:], _HEAD - first[0].piece.stored), *_within(last[::-1], _TAIL)])

    def want(self, ranges: Sequence[Range]) -> None:
        """Have these ranges at hand. One round trip, and one before it for parts of the list of chunks."""
        self.layout.prepare(ranges, self._threads)
        self._keep([span for begin, end in ranges for span in self.layout.chunks(begin, end)])

    def want_small(self) -> None:
        """Have the chunks below 64 KiB at hand, as far as they can be kept: headers between large tensors."""
        self.layout.prepare([(0, self.size)], self._threads)
        small = [span for span in self.layout.chunks(0, self.size) if span.piece.raw < _SMALL]
        self._keep(_within(small[::-1], _KEPT // 2))

    def forget(self) -> None:
        """Keep no chunks, only where they are."""
        self._kept.clear()
        self._kept_bytes = 0

    def fill(self, targets: Sequence[Target]) -> None:
        """Copy each range to its place, straight from where its chunks were decoded; each chunk is fetched once.

        As many requests at once as there are threads; about 24 MiB a thread, besides the targets, are in memory.
        """
        self.layout.prepare([(target.start, target.end) for target in targets], self._threads)
        missing: dict[int, _Item] = {}
        for target in targets:
            for span in self.layout.chunks(target.start, target.end):
                value = self._kept.get(span.start)
                if value is None:
                    missing.setdefault(span.start, (span, []))[1].append(target)
                else:
                    target.take(span, value)
        for _ in self._fetched(missing):
            pass

    def _keep(self, spans: Iterable[Span]) -> None:
        missing: dict[int, _Item] = {span.start: (span, []) for span in spans if span.start not in self._kept}
        for span, value in self._fetched(missing):
            self._kept[span.start] = value
            self._kept_bytes += len(value)
            while self._kept_bytes > _KEPT and len(self._kept) > 1:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    def _fetched(self, items: dict[int, _Item]) -> Iterator[tuple[Span, Buffer]]:
        """The chunks that were asked for, after threads copied them to their targets."""
        chosen = windows([items[start] for start in sorted(items)], lambda item: item[0].piece)
        waves = (_Wave(self._store, window, self.path, self._cache) for window in chosen)
        begun = list(islice(waves, 2))
        pool = None
        if self._threads and sum([len(wave.requests) for wave in begun]) > 1:
            pool = ThreadPoolExecutor(self._threads, thread_name_prefix="mandapa-get")
        try:
            for _, answers in fly(chain(begun, waves), _Wave.take, pool, most=self._threads):
                for found in answers:
                    yield from found
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)


_Item: TypeAlias = tuple[Span, list[Target]]


class _Wave(Wave):
    """Chunks that are fetched together, and where they go."""

    def __init__(self, store: ObjectStore, items: list[_Item], path: str, cache: ChunkCache | None) -> None:
        super().__init__(store, [span.piece for span, _ in items], lambda _: path, cache)
        self._items = items

    def take(self, request: Request) -> list[tuple[Span, Buffer]]:
        """What a request completes; those with a target go there and are forgotten."""
        kept = []
        for i, value in self.fetch(request):
            span, targets = self._items[i]
            for target in targets:
                target.take(span, value)
            if not targets:
                kept.append((span, value))
        return kept


def _within(spans: Iterable[Span], most: int) -> Iterator[Span]:
    """The first of them, as many as have ``most`` stored bytes together."""
    total = 0
    for span in spans:
        total += sum([piece.stored for piece in span.piece.chain()])
        if total > most:
            return
        yield span
