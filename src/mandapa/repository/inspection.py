"""Manifests looked at node by node, each once: their shape, their sums, and which ranges of containers they name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple, Protocol

from mandapa.content.codecs import CODECS
from mandapa.content.index import Piece, piece_of
from mandapa.content.parallel import in_order
from mandapa.content.tree import NodeReader, Tree, child_address
from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.manifest import (
    Branch,
    Chunk,
    LargeFileRow,
    Leaf,
    Node,
    NodeAddress,
    NodeCutter,
    Part,
    Row,
    UrlRow,
    node_digest,
)

__all__ = ["AHEAD", "Inspection", "Ranges", "Summary"]


AHEAD = 256
"""Nodes that are read before they are looked at; a reader should keep a few times as many."""


class Ranges(Protocol):
    """Takes the ranges that manifests name."""

    def add_node(self, address: NodeAddress) -> None:
        """A node that was read."""

    def add_chunk(self, piece: Piece) -> None:
        """A chunk, or a base of one."""


class Summary(NamedTuple):
    """What is below a node."""

    digest: bytes
    assets: int
    size: int
    level: int
    first: str
    last: str
    """The first and the last path below; empty: none."""
    open: tuple[str, ...]
    """Files whose names ``last`` starts with: a path that comes later could make folders of them."""


class Inspection:
    """Checks I4, I5 and I6 of trees, as far as no bytes of assets are needed. Nothing that a tree holds stops it.

    A node that several versions share is looked at once, and what is wrong with it is told once. One that is missing is
    not told at all: its version may have been deleted since the log was read.

    Args:
        reader: Reads nodes.
        found: Takes the number of an invariant, and a problem.
        count: Takes what was looked at, and how many of it.
        ranges: Gets what is named.
        threads: For reading nodes.

    Attributes:
        extent: Container -> where the last range ends that is named in it.
        trouble: Whether something was met that a reader would refuse.
        nodes: Nodes of which a reader refuses what is below, for a reason that is not in one node alone.
        suspects: Containers of chunks that are named in a way that no reader can follow.
    """

    def __init__(
        self,
        reader: NodeReader,
        *,
        found: Callable[[str, object], None],
        count: Callable[[str, int], None],
        ranges: Ranges | None,
        threads: int,
    ) -> None:
        self._reader = reader
        self._found = found
        self._count = count
        self._ranges = ranges
        self._threads = threads
        self._known: dict[tuple[NodeAddress, bool], Summary | None] = {}
        self._parts: set[bytes] = set()
        self.extent: dict[bytes, int] = {}
        self.trouble = False
        self.nodes: set[NodeAddress] = set()
        self.suspects: set[bytes] = set()

    def preload(self, addresses: Iterable[NodeAddress]) -> None:
        """Have nodes at hand, and what is below them, a level at a time, up to `AHEAD`.

        Several requests at once; a node that cannot be read is met again later.
        """
        room = AHEAD
        wanted = list(dict.fromkeys(addresses))
        while wanted and room > 0:
            wanted = wanted[:room]
            room -= len(wanted)
            below: list[NodeAddress] = []
            for node in in_order(self._quietly, wanted, threads=self._threads):
                if isinstance(node, Branch):
                    below += [child_address(row, node.containers) for row in node.rows]
                elif isinstance(node, Leaf):
                    below += _parts(node)
            wanted = [
                address
                for address in dict.fromkeys(below)
                if not {(address, False), (address, True)} & self._known.keys() and address.hash not in self._parts
            ]

    def _quietly(self, address: NodeAddress) -> Node | None:
        with suppress(NotFoundError, CorruptionError, FormatVersionError):
            return self._reader.load(address)
        return None

    def tree(self, root: NodeAddress) -> Summary | None:
        """Check the tree below a root; None when the root cannot be read.

        Raises:
            StorageError: The store failed.
        """
        summary = self._node(root, last=True)
        if summary is not None and summary.level:
            top = self._reader.load(root)
            if len(top.rows) == 1:
                self._found("I5", "the root of its manifest has one child alone")
        return summary

    def _refused(self, invariant: str, problem: object) -> None:
        """Something that a reader refuses, too."""
        self.trouble = True
        self._found(invariant, problem)

    def _node(self, address: NodeAddress, *, last: bool) -> Summary | None:
        """Check a node and all below it; ``last``: none follows on its level."""
        if (address, last) not in self._known:
            self._known[address, last] = self._check(address, last)
        return self._known[address, last]

    def _load(self, address: NodeAddress) -> Node | None:
        try:
            return self._reader.load(address)
        except NotFoundError:
            self.trouble = True
        except (CorruptionError, FormatVersionError) as error:
            self._refused("I4", error)
        return None

    def _check(self, address: NodeAddress, last: bool) -> Summary | None:
        node = self._load(address)
        key = container_key(address.container)
        if node is None:
            return None
        if isinstance(node, Part):
            self._refused("I4", f"{key}: a list of chunks where a node of assets should be")
            return None
        self._count("nodes", 1)
        self._name(address)
        level = node.level if isinstance(node, Branch) else 0
        if isinstance(node, Leaf):
            self._count("assets", len(node.rows))
            self._rows(node)
            needed = {number for row in node.rows for number in _numbers(row)}
            assets, size = len(node.rows), sum([row.size or 0 for row in node.rows])
            order = _Order(self._found)
            for row in node.rows:
                order.add(row.path)
        else:
            needed = {row.container for row in node.rows}
            assets, size = sum([row.assets for row in node.rows]), sum([row.size for row in node.rows])
            order = self._children(node, address, last)
        self._table(node, needed, "a manifest node's table names a container twice, or one that no row needs")
        cutter = NodeCutter(level)
        ends = [cutter.ends_after(row.path) for row in node.rows]
        if any(ends[:-1]) or not (last or ends[-1]):
            self._found("I5", f"{key}: a manifest node does not end where the format says")
        return Summary(node_digest(node), assets, size, level, order.first, order.last, tuple(order.open))

    def _table(self, node: Node, needed: set[int], problem: str) -> None:
        if needed != set(range(len(node.containers))) or len(set(node.containers)) != len(node.containers):
            self._found("I5", problem)

    def _children(self, branch: Branch, own: NodeAddress, last: bool) -> _Order:
        key = container_key(own.container)
        addresses = [child_address(row, branch.containers) for row in branch.rows]
        self.preload(a for a in addresses if not {(a, False), (a, True)} & self._known.keys())
        order = _Order(self._found)
        for at, (row, address) in enumerate(zip(branch.rows, addresses, strict=True)):
            below = self._node(address, last=last and at == len(branch.rows) - 1)
            if below is None:
                continue
            if below.level != branch.level - 1 or below.first != row.path:
                self._refused("I5", f"{key}: the node at {row.path!r} starts elsewhere, or is of another level")
                continue
            if below.digest != row.digest:
                self._refused("I6", f"{key}: the node at {row.path!r} does not hold what its parent says")
            elif (below.assets, below.size) != (row.assets, row.size):
                self._found("I6", f"{key}: the node at {row.path!r} does not hold as much as its parent says")
            if below.first <= order.last:
                self._refused("I5", f"{below.first!r} does not come after {order.last!r}")
                self.nodes.add(own)
            order.join(below, lambda prefix, address=address: self._first(address, prefix))  # type: ignore[misc]
        return order

    def _first(self, root: NodeAddress, prefix: str) -> str:
        """The first path below a node that starts with ``prefix``, or nothing."""
        with suppress(NotFoundError, CorruptionError, FormatVersionError):  # told where it is met
            for located in Tree(self._reader, root).rows(prefix):
                return located.row.path
        return ""

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _rows(self, leaf: Leaf) -> None:
        """Note what the rows of a leaf need."""
        self.preload(address for address in _parts(leaf) if address.hash not in self._parts)
        for row in leaf.rows:
            if isinstance(row, UrlRow):
                continue
            if isinstance(row, LargeFileRow):
                self._large(row, leaf.containers)
                continue
            for chunk in row.chunks:
                self._chunk(chunk, row.digest if len(row.chunks) == 1 else chunk.hash, leaf.containers, row.path)

    def _large(self, row: LargeFileRow, table: list[bytes]) -> None:
        for part in row.parts:
            address = child_address(part, table)
            node = self._load(address)
            if node is None:
                continue
            if not isinstance(node, Part) or sum([chunk.raw for chunk in node.rows]) != part.raw:
                self._refused("I5", f"a part of {row.path!r} does not hold the bytes that its row says")
                continue
            self._name(address)
            if address.hash in self._parts:
                continue
            self._parts.add(address.hash)
            needed = {number for chunk in node.rows for number in chunk.numbers()}
            self._table(
                node, needed, f"{row.path!r}: a part's table names a container twice, or one that no chunk needs"
            )
            for chunk in node.rows:
                self._chunk(chunk, chunk.hash, node.containers, row.path)

    def _chunk(self, chunk: Chunk, hash_: bytes, table: list[bytes], path: str) -> None:
        piece: Piece | None = piece_of(chunk, hash_, table)
        while piece is not None:
            self._extend(piece.container, piece.offset + piece.stored)
            if self._ranges is not None:
                self._ranges.add_chunk(piece)
            codec = CODECS.get(piece.codec)
            if codec is None:
                self.suspects.add(piece.container)
                self._refused("I6", f"{path!r} uses the codec {piece.codec}, which this mandapa does not have")
            elif codec.needs_base != (piece.base is not None):
                self.suspects.add(piece.container)
                self._refused("I6", f"{path!r}: a chunk of codec {codec.feature} has a base, or lacks one")
            piece = piece.base

    def _name(self, address: NodeAddress) -> None:
        self._extend(address.container, address.offset + address.stored)
        if self._ranges is not None:
            self._ranges.add_node(address)

    def _extend(self, container: bytes, end: int) -> None:
        if end > self.extent.get(container, 0):
            self.extent[container] = end


class _Order:
    """Paths one after the other; finds a file that is a folder, too."""

    def __init__(self, found: Callable[[str, object], None]) -> None:
        self._found = found
        self.first = ""
        self.last = ""
        self.open: list[str] = []

    def add(self, path: str) -> None:
        """One more path, which comes after all before it."""
        self.open = [file for file in self.open if path.startswith(file)]
        for file in self.open:
            if path.startswith(f"{file}/"):
                self._found("I5", f"{file!r} is a file and a folder")
        self.open.append(path)
        self.first = self.first or path
        self.last = path

    def join(self, below: Summary, look: Callable[[str], str]) -> None:
        """All paths below a node; ``look`` finds the first of them that starts with something."""
        for file in self.open:
            if below.first.startswith(file) and look(f"{file}/"):
                self._found("I5", f"{file!r} is a file and a folder")
        self.open = [file for file in self.open if below.first.startswith(file) and below.last.startswith(file)]
        self.open += below.open
        self.first = self.first or below.first
        self.last = below.last


def _parts(leaf: Leaf) -> list[NodeAddress]:
    """The parts of the large files of a leaf."""
    rows = [row for row in leaf.rows if isinstance(row, LargeFileRow)]
    return [child_address(part, leaf.containers) for row in rows for part in row.parts]


def _numbers(row: Row) -> Iterable[int]:
    """The places in the leaf's table of the containers that a row needs."""
    if isinstance(row, UrlRow):
        return ()
    if isinstance(row, LargeFileRow):
        return (part.container for part in row.parts)
    return (number for chunk in row.chunks for number in chunk.numbers())
