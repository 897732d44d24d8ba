"""Stored bytes read again: all of them, or a share of the containers that chance and a seed choose."""

from __future__ import annotations

import struct
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mandapa.content.codecs import CODECS, ZSTD, decode
from mandapa.content.fetch import Wave, windows
from mandapa.content.index import Piece
from mandapa.digest import digest
from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.manifest import NodeAddress, decode_node
from mandapa.format.pack import KIND_CHUNK, PackEntry, read_pack_table
from mandapa.format.strict import CONTAINER_MAX, is_id
from mandapa.object_store.base import ObjectInfo, ObjectStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Flaw", "Named", "Sample", "Sampled", "container_of", "examine"]

_RANGE = struct.Struct("<IIIH32s")


@dataclass(frozen=True, slots=True)
class Sampled:
    """Which part of the stored bytes was read again."""

    share: float
    """Asked for: 0.01 is a hundredth of the bytes."""
    seed: int
    """Chose the containers: the same seed chooses the same ones."""
    containers: int
    """Containers that were read."""
    bytes: int
    """Bytes of these, as they are stored."""
    of_containers: int
    of_bytes: int
    """How much there is."""


class Sample:
    """Some containers: those whose keys, hashed with a seed, come first, until their bytes are the share asked for.

    One at least, where there are any. 12 bytes of memory for each container.

    Args:
        listed: All containers.
        share: 0 to 1.
        seed: Any integer.
    """

    def __init__(self, listed: Iterable[ObjectInfo], share: float, seed: int) -> None:
        import numpy as np

        self.share = share
        self.seed = seed
        self._salt = str(seed).encode() + b"/"
        places, sizes = array("Q"), array("Q")
        for info in listed:
            container = container_of(info.key)
            if container is not None:
                places.append(self._place(container))
                sizes.append(info.size)
        self._last = -1
        if places:
            where: NDArray[np.uint64] = np.frombuffer(places, np.uint64)
            order = np.argsort(where, kind="stable")
            until = np.cumsum(np.frombuffer(sizes, np.uint64)[order])
            enough = int(np.searchsorted(until, share * float(until[-1]), side="left"))
            self._last = int(where[order[min(enough, len(order) - 1)]])

    def has(self, container: bytes) -> bool:
        """Whether it was chosen."""
        return self._place(container) <= self._last

    def _place(self, container: bytes) -> int:
        return int.from_bytes(digest(self._salt + container)[:8], "big")


class Named:
    """The ranges that manifests name, in containers that are to be read: about 100 bytes each.

    Args:
        has: Whether a container is to be read.
        deltas: Whether to remember what deltas stand on: for those who do not read whole files.
    """

    def __init__(self, has: Callable[[bytes], bool], *, deltas: bool) -> None:
        self._has = has
        self._with_deltas = deltas
        self._rows: dict[bytes, bytearray] = {}
        self._unique: dict[bytes, int] = {}
        self._deltas: defaultdict[bytes, set[Piece]] = defaultdict(set)

    def add_node(self, address: NodeAddress) -> None:
        """A node that was read."""
        if self._has(address.container):
            self._add(address.container, _RANGE.pack(address.offset, address.stored, 0, ZSTD, address.hash))

    def add_chunk(self, piece: Piece) -> None:
        """A chunk, or a base of one."""
        if self._has(piece.container):
            self._add(piece.container, _RANGE.pack(piece.offset, piece.stored, piece.raw, piece.codec, piece.hash))
            if self._with_deltas and piece.base is not None:
                self._deltas[piece.container].add(piece)

    def _add(self, container: bytes, row: bytes) -> None:
        rows = self._rows.setdefault(container, bytearray())
        rows += row
        # Versions name the same ranges again and again: each doubling is sifted.
        if len(rows) > 2 * self._unique.get(container, 2048):
            rows[:] = b"".join({bytes(rows[at : at + _RANGE.size]) for at in range(0, len(rows), _RANGE.size)})
            self._unique[container] = max(len(rows), 2048)

    def ranges(self, container: bytes) -> set[_Range]:
        """What is named in a container."""
        return {_Range(*row) for row in _RANGE.iter_unpack(self._rows.get(container, b""))}

    def deltas(self, container: bytes) -> set[Piece]:
        """The deltas that are named in a container, with what they stand on."""
        return self._deltas.get(container, set())


class _Range(NamedTuple):
    offset: int
    stored: int
    raw: int
    """0: a node."""
    codec: int
    hash: bytes


class Flaw(NamedTuple):
    """Something that is wrong with a container."""

    offset: int | None
    """Of the chunk or node that cannot be read; None: of the container, and what is in it may well be read."""
    problem: str


def container_of(key: str) -> bytes | None:
    """The 17 bytes that name the container of a key; None for any other key."""
    folder, _, id_ = key.partition("/")
    return folder[:1].encode() + bytes.fromhex(id_) if folder in ("packs", "meta") and is_id(id_) else None


def examine(store: ObjectStore, container: bytes, named: Named) -> list[Flaw]:
    """What is wrong with a container, its table, and each chunk and node in it; nothing, if it is not there.

    One request, and where deltas are asked for as many as it takes to read them. Memory: the container, and a window of
    chunks where there are deltas.

    Raises:
        StorageError: The store failed.
    """
    key = container_key(container)
    try:
        data = memoryview(store.get(key, limit=CONTAINER_MAX))
    except NotFoundError:
        return []  # a gc took it meanwhile; that one is missing which is needed shows elsewhere
    except CorruptionError as error:
        return [Flaw(None, str(error))]
    flaws: list[Flaw] = []
    listed: set[tuple[int, int, int, bytes]] = set()
    readable = True
    try:
        for entry in read_pack_table(data, key=key):
            listed.add((entry.offset, entry.stored, entry.codec, entry.hash))
            flaws += _entry(data, entry, key)
    except (CorruptionError, FormatVersionError) as error:
        flaws.append(Flaw(None, str(error)))
        readable, listed = False, set()
    for one in sorted(named.ranges(container)):
        if (one.offset, one.stored, one.codec, one.hash) not in listed:
            if readable:
                flaws.append(
                    Flaw(None, f"{key}: a manifest names a chunk at {one.offset} that its table does not have")
                )
            flaws += _range(data, one, key)
    return [*flaws, *_deltas(store, named.deltas(container))]


def _entry(data: memoryview, entry: PackEntry, key: str) -> Iterator[Flaw]:
    if entry.kind == KIND_CHUNK:
        return _range(data, _Range(entry.offset, entry.stored, entry.raw, entry.codec, entry.hash), key)
    return _range(data, _Range(entry.offset, entry.stored, 0, entry.codec, entry.hash), key)


def _range(data: memoryview, one: _Range, key: str) -> Iterator[Flaw]:
    """What is wrong with a chunk or a node, as far as its container tells."""
    stored = data[one.offset : one.offset + one.stored]
    if len(stored) < one.stored:
        return  # cut: that shows in the sizes of containers
    if one.raw and one.codec in CODECS and CODECS[one.codec].needs_base:
        return  # of which base, only a manifest says
    try:
        if not one.raw:
            decode_node(stored, one.hash, key=key)
        elif digest(decode(one.codec, stored, one.raw)) != one.hash:
            yield Flaw(one.offset, f"{key}: the chunk at {one.offset} is not what was stored")
    except (CorruptionError, FormatVersionError) as error:
        yield Flaw(one.offset, f"{key}: the chunk at {one.offset}: {error}" if one.raw else str(error))


def _deltas(store: ObjectStore, pieces: set[Piece]) -> Iterator[Flaw]:
    """Deltas that do not decode upon what they stand on."""
    for window in windows(sorted(pieces, key=lambda piece: piece[:2]), lambda piece: piece):
        try:
            Wave(store, window, lambda _: "a delta").all(threads=0)
        except (NotFoundError, CorruptionError, FormatVersionError):
            for piece in window:
                try:
                    Wave(store, [piece], lambda _: "a delta").all(threads=0)
                except NotFoundError:
                    continue  # a base is missing: told where containers are looked for
                except (CorruptionError, FormatVersionError) as error:
                    yield Flaw(piece.offset, str(error))
