"""Changes to a manifest: a new tree that shares every node that did not change with the old one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import msgspec

from mandapa.content.tree import Located, NodeReader, Tree, child_address, last_at_most
from mandapa.digest import digest
from mandapa.format.manifest import (
    Branch,
    ChildRow,
    FileRow,
    LargeFileRow,
    Leaf,
    Node,
    NodeAddress,
    NodeCutter,
    Part,
    Row,
    encode_node,
    node_digest,
)

__all__ = ["NodeWriter", "TreeRoot", "edit_tree"]


class TreeRoot(NamedTuple):
    """What a record says of a version's manifest."""

    address: NodeAddress
    digest: bytes
    assets: int
    size: int
    """Bytes of all assets; a URL of unknown size counts 0."""


class NodeWriter(Protocol):
    """Takes manifest nodes; `Upload` is one."""

    def put_node(self, hash_: bytes, stored: bytes, raw_size: int) -> NodeAddress:
        """Put a node into a container of this transaction."""
        ...


def edit_tree(
    reader: NodeReader, writer: NodeWriter, root: NodeAddress | None, edits: Mapping[str, Located | None]
) -> TreeRoot:
    """A tree like the one at ``root`` (None: an empty one) with rows put (or dropped, where None).

    Reads and writes only the nodes that change, and gives the tree that building it from nothing would give, whatever
    the order of edits was. Source: docs/format.md §6.3.
    """
    return _Edit(reader, writer).run(root, edits)


_Placed: TypeAlias = tuple[str, Row | ChildRow, Sequence[bytes]]
_Change: TypeAlias = tuple[str, tuple[Row | ChildRow, Sequence[bytes]] | None]


class _Edit:
    def __init__(self, reader: NodeReader, writer: NodeWriter) -> None:
        self._reader = reader
        self._writer = writer

    def run(self, root: NodeAddress | None, edits: Mapping[str, Located | None]) -> TreeRoot:
        changes: list[_Change] = sorted(edits.items(), key=lambda item: item[0])
        if root is None:
            nodes = self._build(0, [(path, *item) for path, item in changes if item is not None])
            level = 0
        else:
            top = self._reader.load(root)
            assert not isinstance(top, Part)
            level = top.level if isinstance(top, Branch) else 0
            for below in range(level):
                changes = self._splice(root, below, changes)
            items = list(_merge(_items(top), iter(changes)))
            nodes = self._build(level, items)
        while len(nodes) > 1:
            level += 1
            nodes = self._build(level, [(row.path, row, table) for row, table in nodes])
        if not nodes:
            return self._root(self._write(0, []))
        found = self._root(nodes[0])
        node = self._reader.load(found.address)
        while isinstance(node, Branch) and len(node.rows) == 1:
            found = self._root((node.rows[0], node.containers))
            node = self._reader.load(found.address)
        return found

    @staticmethod
    def _root(node: tuple[ChildRow, Sequence[bytes]]) -> TreeRoot:
        row, table = node
        return TreeRoot(child_address(row, table), row.digest, row.assets, row.size)

    def _build(self, level: int, items: Iterable[_Placed]) -> list[tuple[ChildRow, Sequence[bytes]]]:
        cutter = NodeCutter(level)
        nodes = []
        part: list[_Placed] = []
        for item in items:
            part.append(item)
            if cutter.ends_after(item[0]):
                nodes.append(self._write(level, part))
                part = []
        if part:
            nodes.append(self._write(level, part))
        return nodes

    def _splice(
        self,
        root: NodeAddress,
        level: int,
        changes: list[_Change],
    ) -> list[_Change]:
        """Apply changes to the nodes of one level below the root; returns what changes for the level above."""
        above: dict[str, tuple[Row | ChildRow, Sequence[bytes]] | None] = {}
        at = 0
        cursor = _Cursor(self._reader, root, level)
        while at < len(changes):
            cursor.seek(changes[at][0])
            cutter = NodeCutter(level)
            part: list[_Placed] = []
            new: list[tuple[ChildRow, Sequence[bytes]]] = []
            while True:
                node, first, limit = cursor.node, cursor.first, cursor.next_first
                above[first] = None
                end = at
                while end < len(changes) and (limit is None or changes[end][0] < limit):
                    end += 1
                for item in _merge(_items(node), iter(changes[at:end])):
                    part.append(item)
                    if cutter.ends_after(item[0]):
                        new.append(self._write(level, part))
                        part = []
                at = end
                if not part or not cursor.advance():
                    break
            if part:
                new.append(self._write(level, part))
            for row, table in new:
                above[row.path] = (row, table)
        return sorted(above.items(), key=lambda item: item[0])

    def _write(self, level: int, items: Sequence[_Placed]) -> tuple[ChildRow, Sequence[bytes]]:
        table: list[bytes] = []
        numbers: dict[bytes, int] = {}

        def number(container: bytes) -> int:
            found = numbers.get(container)
            if found is None:
                found = numbers[container] = len(table)
                table.append(container)
            return found

        node: Leaf | Branch
        if level == 0:
            rows = [_move_row(row, old, number) for _, row, old in items if not isinstance(row, ChildRow)]
            node = Leaf(table, rows)
            assets, size = len(rows), sum([row.size or 0 for row in rows])
        else:
            children = [
                msgspec.structs.replace(row, container=number(old[row.container]))
                for _, row, old in items
                if isinstance(row, ChildRow)
            ]
            node = Branch(table, level, children)
            assets, size = sum([row.assets for row in children]), sum([row.size for row in children])
        raw, stored = encode_node(node)
        hash_ = digest(raw)
        address = self._writer.put_node(hash_, stored, len(raw))
        self._reader.remember(hash_, node)
        first = node.rows[0].path if node.rows else ""
        child = ChildRow(first, 0, address.offset, address.stored, hash_, node_digest(node), assets, size)
        return child, (address.container,)


def _items(node: Leaf | Branch) -> Iterator[_Placed]:
    table = node.containers
    for row in node.rows:
        yield row.path, row, table


def _merge(
    old: Iterator[_Placed],
    changes: Iterator[_Change],
) -> Iterator[_Placed]:
    """Old rows with changes laid over them, both in order of path."""
    change = next(changes, None)
    for item in old:
        while change is not None and change[0] < item[0]:
            if change[1] is not None:
                yield (change[0], *change[1])
            change = next(changes, None)
        if change is not None and change[0] == item[0]:
            if change[1] is not None:
                yield (change[0], *change[1])
            change = next(changes, None)
        else:
            yield item
    while change is not None:
        if change[1] is not None:
            yield (change[0], *change[1])
        change = next(changes, None)


def _move_row(row: Row, table: Sequence[bytes], number: Callable[[bytes], int]) -> Row:
    """The row with its container numbers taken from another table."""
    if isinstance(row, FileRow):
        chunks = row.chunks
        if len(chunks) == 1:
            chunk = chunks[0]
            at = number(table[chunk.container])
            if at == chunk.container and chunk.base is None:
                return row
        return FileRow(row.path, row.size, row.mode, row.digest, tuple([c.moved(table, number) for c in chunks]))
    if isinstance(row, LargeFileRow):
        parts = tuple([msgspec.structs.replace(p, container=number(table[p.container])) for p in row.parts])
        # The packs that the parts need stand in the parts' own tables.
        return msgspec.structs.replace(row, parts=parts)
    return row


class _Cursor:
    """A cursor over the nodes of one level, that reads branches only where it goes."""

    def __init__(self, reader: NodeReader, root: NodeAddress, level: int) -> None:
        self._tree = Tree(reader, root)
        self._level = level
        self._path: list[tuple[Branch, int]] = []
        self.node: Leaf | Branch
        self.first = ""
        self.next_first: str | None = None

    def seek(self, path: str) -> None:
        """Go to the node where ``path`` is, or belongs."""
        node = self._tree.reader.load(self._tree.root)
        self._path = []
        while isinstance(node, Branch) and node.level > self._level:
            at = max(last_at_most(node.rows, path), 0)
            self._path.append((node, at))
            node = self._tree.child(node, at)
        self._arrive(node)

    def advance(self) -> bool:
        """Go to the node after; False when there is none."""
        while self._path:
            branch, at = self._path[-1]
            if at + 1 < len(branch.rows):
                break
            self._path.pop()
        else:
            return False
        self._path[-1] = (branch, at + 1)
        node = self._tree.child(branch, at + 1)
        while isinstance(node, Branch) and node.level > self._level:
            self._path.append((node, 0))
            node = self._tree.child(node, 0)
        self._arrive(node)
        return True

    def _arrive(self, node: Node) -> None:
        assert not isinstance(node, Part)
        self.node = node
        branch, at = self._path[-1]
        self.first = branch.rows[at].path
        self.next_first = None
        for branch, at in reversed(self._path):
            if at + 1 < len(branch.rows):
                self.next_first = branch.rows[at + 1].path
                break
