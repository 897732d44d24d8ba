"""Whether a source has only grown since an asset was stored: then that asset's chunks stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import accumulate
from typing import NamedTuple

from mandapa.content.cutters import Source, growing_cuts
from mandapa.content.index import Piece
from mandapa.digest import Hasher, digest
from mandapa.format.manifest import FileRow, LargeFileRow

__all__ = ["Growth", "growth_since"]

_MIN = 1 << 20  # of a source; smaller ones are quicker taken anew
_READ = 2 << 20


class Growth(NamedTuple):
    """How a source goes on from the bytes that are stored."""

    cuts: list[int] | None
    """The ends of all its chunks; None: its content decides."""
    kept: Sequence[Piece]
    """The first of them, which are stored."""
    start: int
    """Where these end."""
    hasher: Hasher
    """Has hashed the bytes before ``start``; the rest is hashed as it is stored."""


def growth_since(
    source: Source, row: FileRow | LargeFileRow, pieces: Sequence[Piece], submit: Callable[..., Future[object]]
) -> Growth | None:
    """How ``source`` goes on from the asset of ``row``, which has the chunks ``pieces``; None when it is another file.

    Reads as many bytes as the asset has, or two chunks when these tell already. ``submit`` runs a function in another
    thread, or at once.

    Raises:
        OSError: The source cannot be read.
    """
    ends = list(accumulate([piece.raw for piece in pieces]))
    if source.size < _MIN or not 0 < row.size < source.size or ends[-1:] != [row.size]:
        return None
    # The last and the first chunk tell at once in nearly every case that it is another file.
    for piece, offset in ((pieces[-1], row.size - pieces[-1].raw), (pieces[0], 0)):
        view = memoryview(bytearray(piece.raw))
        if source.readinto(offset, view) != piece.raw or digest(view) != piece.hash:
            return None
    cuts = growing_cuts(source.size, ends)
    count = _common(cuts, ends)
    start = cuts[count - 1] if count else 0
    hasher = Hasher()
    _hash(source, 0, start, hasher, submit)
    before_start = hasher.copy()
    _hash(source, start, row.size, hasher, submit)
    return Growth(cuts, pieces[:count], start, before_start) if hasher.digest() == row.digest else None


def _hash(source: Source, at: int, end: int, hasher: Hasher, submit: Callable[..., Future[object]]) -> None:
    """Hash a range of a source, or less where it ends, while the next bytes are read."""
    views = [memoryview(bytearray(_READ)), memoryview(bytearray(_READ))]
    hashing: Future[object] | None = None
    turn = 0
    while at < end:
        view = views[turn][: min(end - at, _READ)]
        got = source.readinto(at, view)
        if hashing is not None:
            hashing.result()
        if got != len(view):
            return
        hashing = submit(hasher.update, view)
        at += got
        turn ^= 1
    if hashing is not None:
        hashing.result()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many values stand at the start of both."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
