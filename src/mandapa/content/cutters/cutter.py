"""The chunks of a source, one after the other, in as few and as large reads as possible."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mandapa.content.cutters.source import Source
from mandapa.content.cutters.structured import structured_cuts
from mandapa.errors import InvalidInputError
from mandapa.format.strict import CHUNK_MAX

if TYPE_CHECKING:
    from pyfastcdc import FastCDC

__all__ = ["Cutter"]

WINDOW = 4 << 20
WHOLE_MAX = 1 << 20
CDC_MIN, CDC_AVERAGE, CDC_MAX = 64 << 10, 256 << 10, 2 << 20


class Cutter:
    """Cuts sources into chunks; keeps one buffer of 4 MiB for all of them. One source at a time; not thread-safe.

    Example:
        >>> from mandapa.content.cutters import BytesSource
        >>> [bytes(chunk) for chunk in Cutter().cut(BytesSource(b"weights"), "model.bin")]
        [b'weights']
    """

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(WINDOW))
        self._cdc: FastCDC | None = None

    def cut(
        self, source: Source, path: str, *, cuts: Sequence[int] | None = None, start: int = 0
    ) -> Iterator[memoryview]:
        """The chunks of ``source``, in order, none empty, all together exactly its bytes from ``start`` on.

        Every byte is read once, but for headers. Equal sources are cut equally, on every machine.

        Args:
            source: What to cut.
            path: Its name, for messages only.
            cuts: Where to cut, as `growing_cuts` gives it; by default the format decides, else the content.
            start: One of ``cuts``, or 0: where the first chunk starts.

        Yields:
            A view of the chunk that is valid until the next one is asked for: the buffer is used again.

        Raises:
            InvalidInputError: The source has become shorter than ``source.size``, or ``cuts`` cannot be.
            OSError: The source cannot be read.
        """
        if cuts is not None:
            _check(cuts, start, source.size)
            return self._by_cuts(source, path, cuts, start)
        if start:
            raise InvalidInputError("start needs cuts")
        return self._by_format(source, path)

    def _by_format(self, source: Source, path: str) -> Iterator[memoryview]:
        size = source.size
        cuts = structured_cuts(source)
        if cuts is not None:
            return self._by_cuts(source, path, cuts, 0)
        if size <= WHOLE_MAX:
            return self._by_cuts(source, path, [size] if size else [], 0)
        return self._by_content(source, path)

    def _by_cuts(self, source: Source, path: str, cuts: Sequence[int], start: int) -> Iterator[memoryview]:
        index = bisect_right(cuts, start)
        position = start
        while index < len(cuts):
            # All chunks that fit whole are read at once, and never more than these: nothing is read twice.
            after = max(bisect_right(cuts, position + len(self._buffer)), index + 1)
            length = cuts[after - 1] - position
            if length > len(self._buffer):
                self._buffer = memoryview(bytearray(length))
            view = self._buffer[:length]
            _fill(source, path, position, view)
            at = 0
            for cut in cuts[index:after]:
                yield view[at : cut - position]
                at = cut - position
            position += length
            index = after

    def _by_content(self, source: Source, path: str) -> Iterator[memoryview]:
        if self._cdc is None:
            from pyfastcdc import FastCDC

            self._cdc = FastCDC(CDC_AVERAGE, min_size=CDC_MIN, max_size=CDC_MAX, normalized_chunking=2)
        buffer = self._buffer
        position = kept = 0
        while position + kept < source.size:
            filled = min(len(buffer), source.size - position)
            _fill(source, path, position + kept, buffer[kept:filled])
            # What ends a chunk stands before its end, so all ends in the window but the last are those of the file.
            at = 0
            length = 0
            for chunk in self._cdc.cut_buf(buffer[:filled]):
                if length:
                    yield buffer[at : at + length]
                    at += length
                length = chunk.length
            if position + filled == source.size:
                yield buffer[at:filled]
                return
            kept = filled - at
            buffer[:kept] = buffer[at:filled]
            position += at


def _fill(source: Source, path: str, offset: int, view: memoryview) -> None:
    got = source.readinto(offset, view)
    if got != len(view):
        raise InvalidInputError(
            f"{path} changed while it was read: it has {offset + got} bytes now and had {source.size}; "
            "add files that nobody writes any more"
        )


def _check(cuts: Sequence[int], start: int, size: int) -> None:
    previous = 0
    for cut in cuts:
        if not 0 < cut - previous <= CHUNK_MAX:
            raise InvalidInputError(f"a chunk from {previous} to {cut}: cuts ascend by at most {CHUNK_MAX} bytes")
        previous = cut
    if previous != size:
        raise InvalidInputError(f"the cuts end at {previous}, the source at {size} bytes")
    if start and (index := bisect_right(cuts, start)) and cuts[index - 1] == start:
        return
    if start:
        raise InvalidInputError(f"start ({start}) is none of the cuts")
