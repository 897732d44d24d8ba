"""The manifest as a tree in the store: look up, walk, compare and edit without reading more than the change needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

from mandapa.errors import CorruptionError
from mandapa.format.keys import container_key
from mandapa.format.manifest import (
    Branch,
    ChildRow,
    LargeFileRow,
    Leaf,
    Node,
    NodeAddress,
    Part,
    PartAddress,
    Row,
    UrlRow,
    decode_node,
    node_digest,
)
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["Located", "NodeReader", "Tree", "child_address", "differences", "last_at_most", "same_asset"]


class Located(NamedTuple):
    """A row and the table that its container numbers refer to."""

    row: Row
    table: Sequence[bytes]


class NodeReader:
    """Reads manifest nodes, each verified, each fetched once.

    One range request a node. ``on_leaf`` gets every leaf and part that was read or written, to feed a local index.
    """

    def __init__(
        self, store: ObjectStore, *, keep: int = 4096, on_leaf: Callable[[Leaf | Part], None] | None = None
    ) -> None:
        self._store = store
        self._keep = keep
        self._on_leaf = on_leaf
        self._nodes: dict[bytes, Node] = {}
        self._digests: dict[bytes, bytes] = {}

    def load(self, address: NodeAddress) -> Node:
        """The node at ``address``.

        Raises:
            NotFoundError: Its container is not there (any more).
            CorruptionError: The bytes are not the node's.
        """
        return self.load_from(self._store, address)

    def load_from(self, store: ObjectStore, address: NodeAddress) -> Node:
        """The same, fetched from ``store``, which is the reader's own or stands before it."""
        node = self._nodes.get(address.hash)
        if node is None:
            key = container_key(address.container)
            [stored] = store.get_ranges(key, [(address.offset, address.stored)])
            node = decode_node(stored, address.hash, key=key)
            self.remember(address.hash, node)
        return node

    def approach(self, address: NodeAddress, before: int) -> ObjectStore:
        """The store to go on with from the node at ``address``, which is loaded. One request, or none if it was known.

        That request takes ``before`` bytes in front of the node along, where its commit put lists of chunks and small
        chunks; what is asked for in them costs nothing then. Raises as `load`.
        """
        if address.hash in self._nodes:
            return self._store
        start = max(0, address.offset - before)
        length = address.offset + address.stored - start
        key = container_key(address.container)
        [data] = self._store.get_ranges(key, [(start, length)])
        # Of a store only reading ranges is asked here.
        near = cast("ObjectStore", _Near(self._store, key, start, data))
        self.load_from(near, address)
        return near

    def digest(self, address: NodeAddress) -> bytes:
        """The logical digest of a leaf or branch."""
        found = self._digests.get(address.hash)
        if found is None:
            node = self.load(address)
            if isinstance(node, Part):
                raise CorruptionError(f"{container_key(address.container)}: a list of chunks instead of assets")
            found = self._digests[address.hash] = node_digest(node)
        return found

    def remember(self, hash_: bytes, node: Node) -> None:
        """Keep a node that was just read or written."""
        if len(self._nodes) >= self._keep:
            for old in list(self._nodes)[: self._keep // 4]:
                self._nodes.pop(old, None)
                self._digests.pop(old, None)
        self._nodes[hash_] = node
        if self._on_leaf is not None and not isinstance(node, Branch):
            self._on_leaf(node)


class _Near:
    """A store to read ranges from, with a part of one object at hand."""

    def __init__(self, store: ObjectStore, key: str, start: int, data: Buffer) -> None:
        self._store = store
        self._key = key
        self._start = start
        self._data = memoryview(data)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        near = [(offset - self._start, length) for offset, length in ranges]
        if key == self._key and all(at >= 0 and at + length <= len(self._data) for at, length in near):
            return [self._data[at : at + length] for at, length in near]
        return self._store.get_ranges(key, ranges)


def child_address(row: ChildRow | PartAddress, table: Sequence[bytes]) -> NodeAddress:
    """The full address of a node from the row that names it."""
    return NodeAddress(table[row.container], row.offset, row.stored, row.hash)


class Tree:
    """A version's manifest: a sorted map from paths to rows that reads only the nodes it needs."""

    def __init__(self, reader: NodeReader, root: NodeAddress) -> None:
        self.reader = reader
        self.root = root

    def get(self, path: str) -> Located | None:
        """The row at ``path``, or None. As many requests as the tree has levels, less those cached."""
        node = self.reader.load(self.root)
        while isinstance(node, Branch):
            node = self.child(node, max(last_at_most(node.rows, path), 0))
        assert isinstance(node, Leaf)
        at = last_at_most(node.rows, path)
        if at >= 0 and node.rows[at].path == path:
            return Located(node.rows[at], node.containers)
        return None

    def rows(self, prefix: str = "") -> Iterator[Located]:
        """All rows whose path starts with the string ``prefix``, in order of path; reads a leaf when it gets there."""
        for leaf in self.leaves(prefix):
            for row in leaf.rows:
                if row.path.startswith(prefix):
                    yield Located(row, leaf.containers)
                elif row.path > prefix:
                    return

    def leaves(self, prefix: str = "") -> Iterator[Leaf]:
        """The leaves that can hold a path that starts with ``prefix``, in order."""
        yield from self._leaves(self.reader.load(self.root), prefix)

    def _leaves(self, node: Node, prefix: str) -> Iterator[Leaf]:
        if isinstance(node, Leaf):
            yield node
            return
        assert isinstance(node, Branch)
        first = max(last_at_most(node.rows, prefix), 0)
        for at in range(first, len(node.rows)):
            path = node.rows[at].path
            if at > first and path > prefix and not path.startswith(prefix):
                return
            yield from self._leaves(self.child(node, at), prefix)

    def under(self, folder: str) -> Iterator[Located]:
        """All rows at or below a folder; ``""`` is the root."""
        return self.rows(f"{folder}/" if folder else "")

    def containers(self) -> Iterator[bytes]:
        """Every container that the version needs, some more than once: nodes, parts, chunks, bases."""
        yield self.root.container
        stack = [self.reader.load(self.root)]
        while stack:
            node = stack.pop()
            yield from node.containers
            if isinstance(node, Branch):
                stack += [self.child(node, at) for at in range(len(node.rows))]
            elif isinstance(node, Leaf):
                stack += [
                    self.reader.load(child_address(part, node.containers))
                    for row in node.rows
                    if isinstance(row, LargeFileRow)
                    for part in row.parts
                ]

    def diff(self, other: Tree) -> Iterator[tuple[Located | None, Located | None]]:
        """Rows that differ, as (here, there), in order of path; subtrees with equal digests are not read."""
        mine, theirs = _Walk(self), _Walk(other)
        while mine.item is not None or theirs.item is not None:
            a, b = mine.item, theirs.item
            if b is None or (a is not None and a.path < b.path):
                assert a is not None
                if a.located is None:
                    mine.descend()
                else:
                    yield a.located, None
                    mine.step()
            elif a is None or b.path < a.path:
                if b.located is None:
                    theirs.descend()
                else:
                    yield None, b.located
                    theirs.step()
            elif a.level != b.level:
                (mine if a.level > b.level else theirs).descend()
            elif a.located is None or b.located is None:
                if a.digest == b.digest:
                    mine.step()
                    theirs.step()
                else:
                    mine.descend()
                    theirs.descend()
            else:
                if not same_asset(a.located, b.located):
                    yield a.located, b.located
                mine.step()
                theirs.step()

    def child(self, branch: Branch, at: int) -> Node:
        """The node below row ``at`` of a branch, checked to fit there."""
        row = branch.rows[at]
        address = child_address(row, branch.containers)
        node = self.reader.load(address)
        level = node.level if isinstance(node, Branch) else 0
        if (
            isinstance(node, Part)
            or level != branch.level - 1
            or not node.rows
            or node.rows[0].path != row.path
            or self.reader.digest(address) != row.digest
        ):
            raise CorruptionError(f"the manifest node at {row.path!r} does not fit its parent")
        return node


def differences(old: Tree | None, new: Tree | None) -> Iterator[tuple[Located | None, Located | None]]:
    """`Tree.diff`, where None is a tree of nothing."""
    if old is not None and new is not None:
        yield from old.diff(new)
    elif old is not None:
        yield from ((located, None) for located in old.rows())
    elif new is not None:
        yield from ((None, located) for located in new.rows())


def same_asset(a: Located | None, b: Located | None) -> bool:
    """Whether two rows mean the same asset, however it is stored."""
    if a is None or b is None:
        return a is b
    x, y = a.row, b.row
    if isinstance(x, UrlRow) or isinstance(y, UrlRow):
        return x == y
    return x.digest == y.digest and x.mode == y.mode and x.path == y.path


def last_at_most(rows: Sequence[Row] | Sequence[ChildRow], path: str) -> int:
    """The place of the last row whose path is at most ``path``, or -1."""
    low, high = 0, len(rows)
    while low < high:
        middle = (low + high) // 2
        if rows[middle].path <= path:
            low = middle + 1
        else:
            high = middle
    return low - 1


class _Item(NamedTuple):
    path: str
    level: int
    digest: bytes
    located: Located | None


class _Walk:
    """A cursor over a tree that can skip a subtree or go down into it."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        node = tree.reader.load(tree.root)
        assert not isinstance(node, Part)
        self._stack: list[tuple[Leaf | Branch, int]] = [(node, 0)]
        self.item: _Item | None = None
        self._settle()

    def step(self) -> None:
        node, at = self._stack[-1]
        self._stack[-1] = (node, at + 1)
        self._settle()

    def descend(self) -> None:
        node, at = self._stack[-1]
        assert isinstance(node, Branch)
        child = self._tree.child(node, at)
        assert not isinstance(child, Part)
        self._stack.append((child, 0))
        self._settle()

    def _settle(self) -> None:
        while self._stack:
            node, at = self._stack[-1]
            if at < len(node.rows):
                if isinstance(node, Branch):
                    child = node.rows[at]
                    self.item = _Item(child.path, node.level, child.digest, None)
                else:
                    row = node.rows[at]
                    self.item = _Item(row.path, 0, b"", Located(row, node.containers))
                return
            self._stack.pop()
            if self._stack:
                above, child_at = self._stack[-1]
                self._stack[-1] = (above, child_at + 1)
        self.item = None
