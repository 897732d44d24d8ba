"""Chunks on their way to their stored bytes: how much work they may be, and what they may be deltas to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mandapa.content.cache import ChunkCache
from mandapa.content.codecs import RAW, Effort, Encoded, encode
from mandapa.content.fetch import Wave
from mandapa.content.index import Piece
from mandapa.content.link import Link, Mode
from mandapa.errors import CorruptionError, NotFoundError
from mandapa.format.manifest import BASES_MAX
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["Encoder", "New", "counterparts", "with_room"]

_COUNTERPART = 64 << 10
"""Bytes: a shorter chunk is likely to be a group of tensors, or a header."""


class New(NamedTuple):
    """A chunk that is nowhere yet."""

    hash: bytes
    data: memoryview
    old: Piece | None = None
    """The chunk that it, or one of that one's bases, may be a delta to."""


class Encoder:
    """Encodes new chunks; any number of threads may call it at once.

    Args:
        store: Where bases of deltas are read.
        mode: How chunks are stored.
        link: Says how much work they may be in mode ``auto``.
        cache: Where bases of deltas may be at hand, and where new chunks are put to be such bases; for far stores.
        cores: Threads that call at once.
        puts: Puts under way at once.
    """

    def __init__(
        self, store: ObjectStore, *, mode: Mode, link: Link, cache: ChunkCache | None, cores: int, puts: int
    ) -> None:
        self._store = store
        self._mode: Mode = mode
        self._link = link
        self._cache = cache
        self._cores = cores
        self._puts = puts
        if not self.leaves_floats:
            import numpy as np  # noqa: F401 - now, before packs take their memory: its own cannot be refused

    @property
    def leaves_floats(self) -> bool:
        """Whether floats are stored as they are, because the link is faster than any codec."""
        return self._effort() in ("raw", "fast")

    def encode(self, chunks: Sequence[New]) -> list[tuple[Encoded, Piece | None]]:
        """How each chunk is stored, and the base of that. One wave of requests for all their bases, or none."""
        effort = self._effort()
        dense = effort == "dense"
        # Those first that have the fewest bases; one that has two has no room for another.
        bases = [
            [piece for piece in reversed(one.old.chain()) if len(piece.chain()) <= BASES_MAX]
            if dense and one.old is not None
            else []
            for one in chunks
        ]
        raw = self._raw([piece for several in bases for piece in several])
        result = []
        for one, several in zip(chunks, bases, strict=True):
            started = self._link.clock()
            try:
                encoded = encode(one.data, effort, [raw.get(piece) for piece in several])
            except MemoryError:  # under a limit; the packs have their memory
                encoded = Encoded(RAW, one.data)
            self._link.coded(effort, len(one.data), self._link.clock() - started)
            if self._cache is not None and effort in ("planes", "dense"):  # a delta to it may be worth while
                self._cache.put(one.hash, one.data)
            result.append((encoded, None if encoded.base is None else several[encoded.base]))
        return result

    def _effort(self) -> Effort:
        return self._link.effort(self._mode, cores=self._cores, puts=self._puts)

    def _raw(self, pieces: Sequence[Piece]) -> dict[Piece, Buffer]:
        """The bytes of bases; without those that are not to be had without waiting for the link, or not at all."""
        found: dict[Piece, Buffer] = {}
        wanted = list(dict.fromkeys(pieces))
        if self._mode == "auto" and not self._link.near:
            for piece in wanted:
                value = None if self._cache is None else self._cache.get(piece.hash)
                if value is not None:
                    found[piece] = value
            return found
        wave = Wave(self._store, wanted, lambda _: "the version before", self._cache)
        for request in wave.requests:
            try:
                found.update([(wanted[i], value) for i, value in wave.fetch(request)])
            except (NotFoundError, CorruptionError):  # a reader of that version will say so
                continue
        return found


def counterparts(cuts: Sequence[int], old: Sequence[Piece]) -> list[Piece | None]:
    """For each chunk between ``cuts`` the chunk of an earlier version that is likely to be the same tensor's.

    Chunks of 64 KiB and more are paired from the front as long as their lengths are equal, and the rest likewise from
    the back: what was added, dropped or reshaped in between has no counterpart.

    Example:
        >>> old = [Piece(b"", 0, 0, raw, 0, bytes([raw >> 16])) for raw in (1 << 16, 3 << 16, 2 << 16)]
        >>> [one and one.hash[0] for one in counterparts([7 << 16, 10 << 16, 12 << 16], old)]
        [None, 3, 2]
    """
    found: list[Piece | None] = [None] * len(cuts)
    lengths = [end - start for start, end in zip([0, *cuts], cuts, strict=False)]
    new = [i for i, length in enumerate(lengths) if length >= _COUNTERPART]
    large = [piece for piece in old if piece.raw >= _COUNTERPART]
    first = 0
    while first < min(len(new), len(large)) and lengths[new[first]] == large[first].raw:
        found[new[first]] = large[first]
        first += 1
    last = 1
    while last <= min(len(new), len(large)) - first and lengths[new[-last]] == large[-last].raw:
        found[new[-last]] = large[-last]
        last += 1
    return found


def with_room(old: Piece) -> Piece:
    """The nearest of a chunk and its bases upon which a delta may itself be a base, as the master of a copy is."""
    return next(one for one in old.chain() if len(one.chain()) < BASES_MAX)
