"""What versions reach: the ranges of containers that hold their manifests, chunks and bases; counted, not read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from mandapa.content.parallel import in_order
from mandapa.content.tree import child_address
from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.manifest import Branch, Chunk, LargeFileRow, Node, NodeAddress, Part, UrlRow, decode_node
from mandapa.format.records import Root
from mandapa.object_store.base import ObjectStore
from mandapa.repository.known import Known, Learned, Place, key_of
from mandapa.repository.version import root_of

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

    from mandapa.repository.repository import Repository

    Ids: TypeAlias = NDArray[int64]

__all__ = ["Reach"]

_LEAF, _PART = 0, -1
"""Levels of nodes; a branch has its own, 1 and more."""

_TOGETHER = 64
"""Nodes of one container that are asked for in one call, at most."""

_TOGETHER_BYTES = 4 << 20
"""Stored bytes that they take together, or one takes alone: a hostile manifest may name the same bytes many times."""

_WAVE = 16_384
"""Nodes that are read before what they say is taken in."""

_FAILURES = (NotFoundError, CorruptionError, FormatVersionError)


class _Found(NamedTuple):
    """What a node says."""

    level: int
    ranges: list[Place]
    children: list[NodeAddress]


class Reach:
    """What the versions of a repository reach, as numbers of ranges: exact, and read once by each machine.

    A range is the place of a manifest node or of a chunk, bases of deltas included. Its *id* counts from 0, in the
    order in which ranges became known, and is one of this object alone. Nodes are named by hashes and never change, so
    what was learned of them is kept in the repository's cache folder (without one, in memory). A node that is known is
    not looked for again: that it still is there is not said.

    For one operation, and one thread; nodes are read by the repository's threads. `close` keeps what is new.

    Args:
        repository: Whose versions.
        progress: Called with ``manifest nodes`` and how many were read so far.
    """

    def __init__(self, repository: Repository, *, progress: Callable[[str, int], None] | None = None) -> None:
        self._store = repository.store
        self._threads = repository.threads
        self._known = Known(repository.kept_nodes)
        self._failed: dict[bytes, Exception] = {}
        self._progress = progress
        self._done = 0

    @property
    def containers(self) -> list[bytes]:
        """17 bytes each, by index; more may follow when more nodes are read."""
        return self._known.containers

    def of(self, root: Root) -> Ids:
        """The ids of the ranges that a version with this root reaches, sorted, each once.

        One range request for each node that is not known. Of many versions, `fetch` them first.

        Raises:
            NotFoundError: A node is not there (any more).
            CorruptionError: A node is not what its address says, or breaks a rule of the format.
            FormatVersionError: A node needs a newer mandapa.
        """
        key = self._start(root_of(root))
        nodes = list(self._walk([key]))
        return self._known.ids([self._known.root_id(key)], nodes)

    def union(self, roots: Iterable[Root]) -> Ids:
        """The ids of the ranges that any of these roots reaches, sorted, each once; a node counts once, not by root.

        As `of` for each, many nodes at once. Raises as `of`.
        """
        addresses = [root_of(root) for root in roots]
        self._read(addresses)
        keys = [key_of(address) for address in addresses]
        nodes = list(self._walk(keys))
        return self._known.ids([self._known.root_id(key) for key in keys], nodes)

    def fetch(self, roots: Iterable[Root]) -> None:
        """Read the nodes of many versions that are not known, level by level, several at once.

        What is missing or broken is left for `of` to say.
        """
        self._read([root_of(root) for root in roots])

    def node(self, address: NodeAddress) -> tuple[Ids, list[NodeAddress]]:
        """The ids of the ranges that one node names, those of the nodes right below it included; and these nodes.

        Raises as `of`.
        """
        number = self._node(self._start(address))
        children = self._known.children(number)
        for key in children:
            self._check_child(number, self._node(key), key)
        return self._known.ids([], [number]), [Known.address_of(key) for key in children]

    def container_of(self, ids: Ids) -> Ids:
        """The index of each range's container in `containers`."""
        return self._known.column(0)[ids]

    def stored(self, ids: Ids) -> Ids:
        """The bytes that each range takes in its container."""
        return self._known.column(2)[ids]

    def total(self, ids: Ids) -> int:
        """The bytes that ranges take together; ``ids`` has each once."""
        return int(self.stored(ids).sum())

    def exclusive(self, groups: Sequence[Ids]) -> list[int]:
        """Of each group of ids, which has each once, the bytes of the ranges that no other group has."""
        counts = self.counted(groups)
        return [self.total(ids[counts[ids] == 1]) for ids in groups]

    def counted(self, groups: Iterable[Ids]) -> Ids:
        """By id: how many of the groups, each of which has an id once at most, have it."""
        import numpy as np

        counts: Ids = np.zeros(self._known.range_count, np.int64)
        for ids in groups:
            counts[ids] += 1
        return counts

    def close(self, *, whole: bool = False) -> None:
        """Keep what was learned on this machine. No request.

        With ``whole`` every version of the repository was asked for: nodes that no answer needed need not be kept.
        """
        self._known.save(whole=whole)

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _start(self, root: NodeAddress) -> bytes:
        key = key_of(root)
        if self._known.find(key) is None:
            self._read([root])
        return key

    def _walk(self, keys: Iterable[bytes]) -> Iterator[int]:
        """The nodes at and below addresses, each once."""
        known = self._known
        seen: set[int] = set()
        stack = []
        for key in keys:
            node = self._node(key)
            if node not in seen:
                seen.add(node)
                stack.append(node)
        while stack:
            node = stack.pop()
            yield node
            for key in known.children(node):
                child = self._node(key)
                if child not in seen:
                    self._check_child(node, child, key)
                    seen.add(child)
                    stack.append(child)

    def _node(self, key: bytes) -> int:
        node = self._known.find(key)
        if node is None:
            if key not in self._failed:  # its parent was known, and it was not
                self._read([Known.address_of(key)])
                return self._node(key)
            error = self._failed[key]
            raise type(error)(str(error)) from error
        return node

    def _check_child(self, node: int, child: int, key: bytes) -> None:
        """Whether a child is of the level that its place asks for."""
        level = self._known.level(node)
        if self._known.level(child) != (level - 1 if level > 0 else _PART):
            where = container_key(key[:17])
            raise CorruptionError(f"{where}: a manifest node is of another level than its parent says", key=where)

    def _read(self, addresses: Iterable[NodeAddress]) -> None:
        """Learn what is at and below these addresses, level by level; what fails is noted."""
        todo = {key_of(address): address for address in addresses}
        while todo:
            known = self._known
            wanted = [(key, todo[key]) for key in todo if key not in self._failed and known.find(key) is None]
            todo = {}
            for start in range(0, len(wanted), _WAVE):
                for key, address, found in self._load(wanted[start : start + _WAVE]):
                    self._done += 1
                    if self._progress is not None:
                        self._progress("manifest nodes", self._done)
                    if isinstance(found, Exception):
                        self._failed[key] = found
                        continue
                    children = {key_of(child): child for child in found.children}
                    known.add(Learned(key, address, found.level, found.ranges, list(children.values())))
                    todo.update(children)

    def _load(
        self, wanted: Sequence[tuple[bytes, NodeAddress]]
    ) -> Iterator[tuple[bytes, NodeAddress, _Found | Exception]]:
        """Nodes, those of one container together."""
        together: defaultdict[bytes, list[tuple[bytes, NodeAddress]]] = defaultdict(list)
        for key, address in wanted:
            together[address.container].append((key, address))
        batches: list[list[tuple[bytes, NodeAddress]]] = []
        for several in together.values():
            batches.append([])
            size = 0
            for one in several:
                size += one[1].stored
                if batches[-1] and (size > _TOGETHER_BYTES or len(batches[-1]) == _TOGETHER):
                    batches.append([])
                    size = one[1].stored
                batches[-1].append(one)

        def load(batch: list[tuple[bytes, NodeAddress]]) -> list[_Found | Exception]:
            return _look_at(self._store, [address for _, address in batch])

        for batch, answers in zip(batches, in_order(load, batches, threads=self._threads), strict=True):
            for (key, address), found in zip(batch, answers, strict=True):
                yield key, address, found


def _look_at(store: ObjectStore, addresses: Sequence[NodeAddress]) -> list[_Found | Exception]:
    """What the nodes at addresses in one container say, or why they cannot be read."""
    where = container_key(addresses[0].container)
    try:
        stored = store.get_ranges(where, [(address.offset, address.stored) for address in addresses])
    except NotFoundError as error:
        return [error] * len(addresses)
    except CorruptionError as error:
        if len(addresses) == 1:
            return [error]
        return [found for address in addresses for found in _look_at(store, [address])]
    answers: list[_Found | Exception] = []
    for address, data in zip(addresses, stored, strict=True):
        try:
            answers.append(_look(decode_node(data, address.hash, key=where)))
        except _FAILURES as error:
            answers.append(error)
    return answers


def _look(node: Node) -> _Found:
    """The ranges and children that a node names."""
    table = node.containers
    if isinstance(node, Branch):
        return _Found(node.level, [], [child_address(row, table) for row in node.rows])
    ranges: list[Place] = []
    if isinstance(node, Part):
        for chunk in node.rows:
            _take(chunk, table, ranges)
        return _Found(_PART, ranges, [])
    children = []
    for row in node.rows:
        if isinstance(row, LargeFileRow):
            children += [child_address(part, table) for part in row.parts]
        elif not isinstance(row, UrlRow):
            for chunk in row.chunks:
                _take(chunk, table, ranges)
    return _Found(_LEAF, ranges, children)


def _take(chunk: Chunk | None, table: Sequence[bytes], ranges: list[Place]) -> None:
    """The range of a chunk, of its base, and of the base of that."""
    while chunk is not None:
        ranges.append((table[chunk.container], chunk.offset, chunk.stored))
        chunk = chunk.base
