"""Cuts of a file that has only grown: the old ones, and the tail; small tails are joined before they are many."""

from __future__ import annotations

from collections.abc import Sequence

from mandapa.content.cutters.layout import PIECE
from mandapa.errors import InvalidInputError

__all__ = ["growing_cuts"]

SMALL = 1 << 20
SMALL_PIECES = 16


def growing_cuts(size: int, old_cuts: Sequence[int]) -> list[int]:
    """The ends of the chunks of a file of ``size`` bytes that starts with all the bytes of an earlier version of it.

    The old cuts stay, the new bytes are cut evenly in pieces of at most 4 MiB; when that makes more than 16 pieces
    below 1 MiB in a row at the end, the last of them are joined, so a tail that is written line by line has at most
    16 small chunks. Pieces of 1 MiB and more, and all before the last 17, always stay.

    What is stored again because of it stays bounded: less than 16 MiB in one call, and a byte that is stored again
    ends, from the second time on, in a piece at least twice as large as the one it was in; so each byte is stored
    again at most ``2 + log2(1 MiB / n)`` times where each version adds ``n >= 64`` bytes or more, usually half of that.

    Args:
        size: Bytes of the file now.
        old_cuts: The ends of its chunks when it had ``old_cuts[-1]`` bytes; empty when it had none.

    Raises:
        InvalidInputError: ``old_cuts`` do not ascend from above 0 to at most ``size``.

    Example:
        >>> growing_cuts(250, [100, 200])
        [100, 200, 250]
    """
    cuts = list(old_cuts)
    previous = 0
    for cut in cuts:
        if cut <= previous:
            raise InvalidInputError("the old cuts must ascend, the first above 0")
        previous = cut
    if previous > size:
        raise InvalidInputError(f"a file that grew cannot be shorter ({size} bytes) than it was ({previous})")
    if previous == size:
        return cuts
    cuts += _evenly(previous, size)
    last = len(cuts) - SMALL_PIECES - 1
    starts = [0, *cuts]
    if last < 0 or any(cuts[i] - starts[i] >= SMALL for i in range(last, len(cuts))):
        return cuts
    # A piece is joined only with as many bytes as it has. Where no piece is that small the lengths halve from one to
    # the next, so the last two have a few bytes and may be joined whatever they are.
    for first in range(last, len(cuts) - 1):
        if cuts[first] - starts[first] <= size - cuts[first]:
            break
    return cuts[:first] + _evenly(starts[first], size)


def _evenly(start: int, end: int) -> list[int]:
    """The ends of as few pieces of at most 4 MiB as possible, of one length: no short one is left over."""
    count = -(-(end - start) // PIECE)
    return [start + (end - start) * i // count for i in range(1, count + 1)]
