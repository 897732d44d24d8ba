"""What is known of manifest nodes: the ranges and children of each, in arrays, and how this machine keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec

from mandapa.format.manifest import NodeAddress

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

    from mandapa.repository.shelf import Shelf

    Ids: TypeAlias = NDArray[int64]

__all__ = ["Known", "Learned", "Place", "key_of"]

Place: TypeAlias = tuple[bytes, int, int]
"""A range: container, offset, stored bytes."""

_ADDRESS = 17
_KEY = _ADDRESS + 4 + 4 + 32
_SEGMENTS = 16
"""Rows on the shelf; when there would be more they become one."""


def key_of(address: NodeAddress) -> bytes:
    """The address of a node as one string of bytes."""
    place = address.offset.to_bytes(4, "little") + address.stored.to_bytes(4, "little")
    return address.container + place + address.hash


class Learned(NamedTuple):
    """What a node says, that was not known."""

    key: bytes
    address: NodeAddress
    level: int
    ranges: Sequence[Place]
    """Of the chunks that it names and their bases."""
    children: Sequence[NodeAddress]


class _Segment(msgspec.Struct, array_like=True, frozen=True):
    """What one operation learned, on top of the segments before it. Arrays are of little-endian int32."""

    before: tuple[int, int, int]
    """Containers, ranges and nodes of the segments before it."""
    containers: bytes
    """17 bytes each."""
    ranges: bytes
    """Container, offset and stored bytes of each: three arrays."""
    keys: bytes
    """The address of each node."""
    nodes: bytes
    """Level, own range, number of ids, number of children of each node: four arrays."""
    ids: bytes
    """The ranges that each node names, those of its children included, sorted."""
    children: bytes
    """The numbers of each node's children."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Segment).decode


class Known:
    """Nodes by number and ranges by id; both count from 0 in the order in which they became known."""

    def __init__(self, shelf: Shelf) -> None:
        import numpy as np

        self._shelf = shelf
        self._kept = shelf.read()
        """As it was found: what is kept goes on top of it."""
        self._used: set[int] = set()
        """Nodes that an answer needed."""
        self._before = (0, 0, 0)
        """Containers, ranges and nodes that were kept."""
        self._segments = 0
        none: Ids = np.zeros(0, np.int64)
        self.containers: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self._columns: list[Ids] = [none, none, none]
        self._fresh: list[tuple[int, int, int]] = []
        self._by_container: dict[int, dict[tuple[int, int], int]] = {}
        self._sorted: tuple[Ids, Ids] | None = None
        self._keys: list[bytes] = []
        self._nodes: dict[bytes, int] = {}
        self._levels: list[int] = []
        self._roots: list[int] = []
        self._ids: Ids = none
        self._id_ends: list[int] = []
        self._children: list[int] = []
        self._child_ends: list[int] = []
        self._new_ids: list[Ids] = []
        self._new_children: list[list[bytes]] = []
        self._load()

    # -- ranges -------------------------------------------------------------------------------------------------------

    @property
    def range_count(self) -> int:
        """How many ranges are known."""
        return len(self._columns[0]) + len(self._fresh)

    def column(self, which: int) -> Ids:
        """By id: the container's index (0), the offset (1) or the stored bytes (2) of each range."""
        import numpy as np

        if self._fresh:
            new = np.array(self._fresh, np.int64).reshape(-1, 3)
            self._columns = [np.concatenate([old, new[:, at]]) for at, old in enumerate(self._columns)]
            self._fresh = []
        return self._columns[which]

    def _range(self, place: Place) -> int:
        """The id of a range, a new one if it was not known."""
        container, offset, stored = place
        number = self._numbers.setdefault(container, len(self.containers))
        if number == len(self.containers):
            self.containers.append(container)
        ids = self._by_container.get(number)
        if ids is None:
            ids = self._by_container[number] = self._stored_in(number)
        found = ids.setdefault((offset, stored), self.range_count)
        if found == self.range_count:
            self._fresh.append((number, offset, stored))
        return found

    def _stored_in(self, number: int) -> dict[tuple[int, int], int]:
        """The ranges of one container that were loaded: (offset, stored) -> id."""
        import numpy as np

        if number >= self._before[0]:
            return {}
        loaded = [column[: self._before[1]] for column in self._columns]
        if self._sorted is None:
            order = np.argsort(loaded[0], kind="stable")
            self._sorted = order, loaded[0][order]
        order, numbers = self._sorted
        ids = order[np.searchsorted(numbers, number) : np.searchsorted(numbers, number, "right")]
        return dict(zip(zip(loaded[1][ids].tolist(), loaded[2][ids].tolist(), strict=True), ids.tolist(), strict=True))

    # -- nodes --------------------------------------------------------------------------------------------------------

    def find(self, key: bytes) -> int | None:
        """The number of a node."""
        return self._nodes.get(key)

    @staticmethod
    def address_of(key: bytes) -> NodeAddress:
        """The address that `key_of` made a key of."""
        offset, stored = (int.from_bytes(key[at : at + 4], "little") for at in (_ADDRESS, _ADDRESS + 4))
        return NodeAddress(key[:_ADDRESS], offset, stored, key[_ADDRESS + 8 :])

    def level(self, node: int) -> int:
        """0 of a leaf, -1 of a part, a branch's own."""
        return self._levels[node]

    def children(self, node: int) -> list[bytes]:
        """The addresses of a node's children."""
        loaded = len(self._child_ends)
        if node >= loaded:
            return self._new_children[node - loaded]
        start = self._child_ends[node - 1] if node else 0
        return [self._keys[child] for child in self._children[start : self._child_ends[node]]]

    def root_id(self, key: bytes) -> int:
        """The id of a node's own range."""
        return self._roots[self._nodes[key]]

    def ids(self, roots: Sequence[int], nodes: Sequence[int]) -> Ids:
        """The ids that these nodes name, and ``roots``, sorted, each once; notes that the nodes are in use."""
        import numpy as np

        self._used.update(nodes)
        parts = [self._named(node) for node in nodes]
        count = sum(map(len, parts)) + len(roots)
        if count * 8 < self.range_count:
            return np.unique(np.concatenate([np.array(roots, np.int64), *parts])).astype(np.int64)
        # Marking all is faster than sorting many.
        marked: NDArray[np.bool_] = np.zeros(self.range_count, np.bool_)
        marked[list(roots)] = True
        for part in parts:
            marked[part] = True
        return np.flatnonzero(marked)

    def _named(self, node: int) -> Ids:
        loaded = len(self._id_ends)
        if node >= loaded:
            return self._new_ids[node - loaded]
        return self._ids[self._id_ends[node - 1] if node else 0 : self._id_ends[node]]

    def add(self, learned: Learned) -> None:
        """Take in what a node says."""
        import numpy as np

        below = [(child.container, child.offset, child.stored) for child in learned.children]
        own = {self._range(place) for place in chain(learned.ranges, below)}
        address = learned.address
        self._nodes[learned.key] = len(self._keys)
        self._keys.append(learned.key)
        self._levels.append(learned.level)
        self._roots.append(self._range((address.container, address.offset, address.stored)))
        self._new_ids.append(np.array(sorted(own), np.int32))
        self._new_children.append([key_of(child) for child in learned.children])

    # -- what is kept -------------------------------------------------------------------------------------------------

    def save(self, *, whole: bool) -> None:
        """Keep what is new; with ``whole``, when most nodes were of no use, only those that were."""
        total = len(self._keys)
        alone = self._segments >= _SEGMENTS
        keep: Sequence[int] = range(0 if alone else self._before[2], total)
        if whole and total > 2 * len(self._used):
            alone = True
            keep = sorted(self._used)
        before = (0, 0, 0) if alone else self._before
        keep = self._complete(keep, before[2])
        if not keep:
            return
        key = (0 if alone else self._segments).to_bytes(4, "big")
        drop = [row for row in self._kept.rows if row != key] if before == (0, 0, 0) else []
        self._shelf.write(self._kept, {key: _encode(self._segment(keep, before))}, drop)

    def _complete(self, nodes: Sequence[int], before: int) -> list[int]:
        """Those of ``nodes`` below which nothing is unknown, or left out."""
        good = set(nodes)
        while True:
            bad = []
            for node in good:
                below = [self._nodes.get(key) for key in self.children(node)]
                if not all(child is not None and (child < before or child in good) for child in below):
                    bad.append(node)
            if not bad:
                return sorted(good)
            good.difference_update(bad)

    def _segment(self, keep: Sequence[int], before: tuple[int, int, int]) -> _Segment:
        import numpy as np

        columns = [self.column(at) for at in range(3)]
        roots = np.array([self._roots[node] for node in keep], np.int64)
        named = [self._named(node) for node in keep]
        ids = np.concatenate([roots, *named]).astype(np.int64)
        # Ranges and containers of the segments before stay as they are; of the others, those that are needed.
        ranges = np.unique(ids[ids >= before[1]])
        owners = columns[0][ranges]
        fresh = np.unique(owners[owners >= before[0]])
        new_id, new_number = np.arange(self.range_count), np.arange(len(self.containers))
        new_id[ranges] = before[1] + np.arange(len(ranges))
        new_number[fresh] = before[0] + np.arange(len(fresh))
        numbers = {self._keys[node]: before[2] + at for at, node in enumerate(keep)}
        children = [[numbers.get(key, self._nodes[key]) for key in self.children(node)] for node in keep]
        ids = new_id[ids]
        return _Segment(
            before=before,
            containers=b"".join([self.containers[number] for number in fresh.tolist()]),
            ranges=_pack(new_number[owners], columns[1][ranges], columns[2][ranges]),
            keys=b"".join([self._keys[node] for node in keep]),
            nodes=_pack(
                [self._levels[node] for node in keep],
                ids[: len(keep)],
                [len(part) for part in named],
                [len(part) for part in children],
            ),
            ids=_pack(ids[len(keep) :]),
            children=_pack([number for part in children for number in part]),
        )

    def _load(self) -> None:
        """Take in what is kept; all of it, or, if a part is missing, nothing."""
        import numpy as np

        segments: list[_Segment] = []
        at = (0, 0, 0)
        for number, key in enumerate(sorted(self._kept.rows)):
            try:
                segment = _decode(self._kept.rows[key])
            except msgspec.MsgspecError:
                return
            if key != number.to_bytes(4, "big") or segment.before != at:
                return
            segments.append(segment)
            sizes = len(segment.containers) // _ADDRESS, len(segment.ranges) // 12, len(segment.keys) // _KEY
            at = (at[0] + sizes[0], at[1] + sizes[1], at[2] + sizes[2])
        if not segments:
            return
        self._before = at
        self._segments = len(segments)
        self.containers = _cut(b"".join([segment.containers for segment in segments]), _ADDRESS)
        self._numbers = {container: number for number, container in enumerate(self.containers)}
        columns = [_unpack(segment.ranges, 3) for segment in segments]
        self._columns = [np.concatenate([part[which] for part in columns]).astype(np.int64) for which in range(3)]
        self._keys = _cut(b"".join([segment.keys for segment in segments]), _KEY)
        self._nodes = {key: number for number, key in enumerate(self._keys)}
        nodes = [_unpack(segment.nodes, 4) for segment in segments]
        levels, roots, id_counts, child_counts = [np.concatenate([part[which] for part in nodes]) for which in range(4)]
        self._levels = levels.tolist()
        self._roots = roots.tolist()
        self._ids = np.concatenate([_unpack(segment.ids, 1)[0] for segment in segments])
        self._id_ends = np.cumsum(id_counts, dtype=np.int64).tolist()
        self._children = np.concatenate([_unpack(segment.children, 1)[0] for segment in segments]).tolist()
        self._child_ends = np.cumsum(child_counts, dtype=np.int64).tolist()


def _pack(*columns: Any) -> bytes:
    import numpy as np

    return b"".join([np.asarray(column, "<i4").tobytes() for column in columns])


def _unpack(data: bytes, columns: int) -> Any:
    import numpy as np

    return np.frombuffer(data, "<i4").reshape(columns, -1)


def _cut(data: bytes, length: int) -> list[bytes]:
    return [data[start : start + length] for start in range(0, len(data), length)]
