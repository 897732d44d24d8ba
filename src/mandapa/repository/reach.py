"""What versions reach: the ranges of containers that hold their manifests, chunks and bases; counted, not read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from mandapa.content.parallel import in_order
from mandapa.content.tree import child_address
from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.manifest import Branch, Chunk, LargeFileRow, Node, NodeAddress, Part, UrlRow, decode_node
from mandapa.format.records import Root
from mandapa.repository.version import root_of

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

    from mandapa.repository.repository import Repository

    Ids: TypeAlias = NDArray[int64]

__all__ = ["Reach"]

_LEAF, _PART = 0, -1
"""Levels of nodes: a branch has its own, 1 and more."""

_FAILURES = (NotFoundError, CorruptionError, FormatVersionError)


class _Found(NamedTuple):
    """What a node says."""

    level: int
    ranges: list[tuple[bytes, int, int]]
    children: list[NodeAddress]


class Reach:
    """What the versions of a repository reach, as numbers of ranges: exact, and read once by each machine.

    A range is the place of a manifest node or a chunk, bases of deltas included. Its *id* counts from 0, in the order
    in which ranges became known: ids are of this object alone. Nodes are named by hashes and never change, so a node
    that is known is not looked for again: that it still is there is not said.

    For one operation, and one thread; nodes are read by the repository's threads.
    """

    def __init__(self, repository: Repository) -> None:
        self._store = repository.store
        self._threads = repository.threads
        self.containers: list[bytes] = []
        """17 bytes each, by index."""
        self._numbers: dict[bytes, int] = {}
        self._ranges: list[tuple[int, int, int]] = []
        self._ids: dict[tuple[int, int, int], int] = {}
        self._nodes: dict[bytes, int] = {}
        self._levels: list[int] = []
        self._own: list[list[int]] = []
        self._children: list[list[bytes]] = []
        self._failed: dict[bytes, Exception] = {}

    def of(self, root: Root) -> Ids:
        """The ids of the ranges that a version with this root reaches, sorted, each once.

        One range request for each node that is not known.

        Raises:
            NotFoundError: A node is not there (any more).
            CorruptionError: A node is not what its address says, or breaks a rule of the format.
            FormatVersionError: A node needs a newer mandapa.
        """
        import numpy as np

        address = root_of(root)
        self._read([address])
        ids = {self._id(address)}
        for node in self._walk(_key(address)):
            ids.update(self._own[node])
        return np.array(sorted(ids), np.int64)

    def container_of(self, ids: Ids) -> Ids:
        """The index of each range's container in `containers`."""
        import numpy as np

        return np.array([self._ranges[at][0] for at in ids.tolist()], np.int64)

    def stored(self, ids: Ids) -> Ids:
        """The bytes that each range takes in its container."""
        import numpy as np

        return np.array([self._ranges[at][2] for at in ids.tolist()], np.int64)

    def total(self, ids: Ids) -> int:
        """The bytes that ranges take together; each id once."""
        return int(self.stored(ids).sum())

    def exclusive(self, groups: Sequence[Ids]) -> list[int]:
        """Of each group of ids, sorted and each once, the bytes of the ranges that no other group has."""
        import numpy as np

        counts: Ids = np.zeros(len(self._ranges), np.int64)
        for ids in groups:
            counts[ids] += 1
        return [self.total(ids[counts[ids] == 1]) for ids in groups]

    def close(self) -> None:
        """Write what is new to the local cache."""

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _walk(self, key: bytes) -> Iterator[int]:
        """The nodes at and below an address, each once."""
        seen = {key}
        stack = [key]
        while stack:
            key = stack.pop()
            if key in self._failed:
                raise self._failed[key]
            node = self._nodes[key]
            yield node
            below = [child for child in self._children[node] if child not in seen]
            seen.update(below)
            stack += below

    def _read(self, addresses: Iterable[NodeAddress]) -> None:
        """Learn what is at and below these addresses, level by level; what fails is noted."""
        todo = {_key(address): address for address in addresses}
        while todo:
            wanted = {key: address for key, address in todo.items() if key not in self._nodes}
            answers = in_order(self._load, wanted.values(), threads=self._threads)
            todo = {}
            for (key, _), found in zip(wanted.items(), answers, strict=True):
                if isinstance(found, Exception):
                    self._failed[key] = found
                    continue
                self._nodes[key] = len(self._levels)
                self._levels.append(found.level)
                own = {self._number(*one) for one in found.ranges} | {self._id(child) for child in found.children}
                self._own.append(sorted(own))
                self._children.append([_key(child) for child in found.children])
                todo.update({_key(child): child for child in found.children})

    def _load(self, address: NodeAddress) -> _Found | Exception:
        key = container_key(address.container)
        try:
            [stored] = self._store.get_ranges(key, [(address.offset, address.stored)])
            return _look(decode_node(stored, address.hash, key=key))
        except _FAILURES as error:
            return error

    def _id(self, address: NodeAddress) -> int:
        return self._number(address.container, address.offset, address.stored)

    def _number(self, container: bytes, offset: int, stored: int) -> int:
        """The id of a range, a new one if it was not known."""
        number = self._numbers.setdefault(container, len(self.containers))
        if number == len(self.containers):
            self.containers.append(container)
        place = (number, offset, stored)
        id_ = self._ids.setdefault(place, len(self._ranges))
        if id_ == len(self._ranges):
            self._ranges.append(place)
        return id_


def _key(address: NodeAddress) -> bytes:
    place = address.offset.to_bytes(4, "little") + address.stored.to_bytes(4, "little")
    return address.container + place + address.hash


def _look(node: Node) -> _Found:
    """The ranges and children that a node names."""
    table = node.containers
    if isinstance(node, Branch):
        return _Found(node.level, [], [child_address(row, table) for row in node.rows])
    if isinstance(node, Part):
        return _Found(_PART, [one for chunk in node.rows for one in _chain(chunk, table)], [])
    ranges = []
    children = []
    for row in node.rows:
        if isinstance(row, LargeFileRow):
            children += [child_address(part, table) for part in row.parts]
        elif not isinstance(row, UrlRow):
            ranges += [one for chunk in row.chunks for one in _chain(chunk, table)]
    return _Found(_LEAF, ranges, children)


def _chain(chunk: Chunk, table: Sequence[bytes]) -> Iterator[tuple[bytes, int, int]]:
    base: Chunk | None = chunk
    while base is not None:
        yield table[base.container], base.offset, base.stored
        base = base.base
