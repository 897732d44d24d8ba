"""What damage costs: which versions it hurts, and what of these can still be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mandapa.content.codecs import CODECS
from mandapa.content.fetch import pieces_of
from mandapa.content.index import Piece
from mandapa.content.tree import Located, NodeReader, Tree, child_address
from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.manifest import Branch, FileRow, LargeFileRow, Leaf, NodeAddress, Part, UrlRow
from mandapa.repository.salvage import Gap, rows_and_gaps

__all__ = ["Damage", "Loss", "Losses", "content_of"]


@dataclass(frozen=True, slots=True)
class Loss:
    """A live version that cannot be read in full, and what of it can."""

    address: str
    problem: str
    """The first thing that is wrong with it."""
    whole: int
    """Assets that can be read."""
    lost: tuple[str, ...]
    """Paths of those that cannot, in order; of a report 1,000,000 at most."""
    unnamed: int
    """Assets of which not even the paths can be read."""
    more: int = 0
    """Assets that cannot be read either, and whose paths would have been too many."""
    older: str = ""
    """The nearest version before it that is whole; empty: none."""
    newer: str = ""
    """The nearest one after it."""


_NAMES = 1_000_000


class Damage:
    """All that was found broken, as a reader of assets meets it.

    Attributes:
        gone: Container -> its size, when that is too small; None: it is not there.
        chunks: (container, offset) of what does not decode to its hash -> what is wrong.
        files: What `content_of` gives for a file whose chunks do not make it -> what is wrong.
        suspects: Containers of which something else cannot be read.
        nodes: Nodes of which readers refuse what is below.
    """

    def __init__(self) -> None:
        self.gone: dict[bytes, int | None] = {}
        self.chunks: dict[tuple[bytes, int], str] = {}
        self.files: dict[int, str] = {}
        self.suspects: set[bytes] = set()
        self.nodes: set[NodeAddress] = set()

    def containers(self) -> set[bytes]:
        """Containers in which something cannot be read."""
        return {*self.gone, *self.suspects, *(container for container, _ in self.chunks)}


def content_of(row: FileRow | LargeFileRow, pieces: tuple[Piece, ...]) -> int:
    """Equal for files of one digest made of the same chunks."""
    return hash((row.digest, pieces))


class _Tally:
    """What can be read, and what cannot."""

    __slots__ = ("lost", "problem", "unnamed", "whole")

    def __init__(self) -> None:
        self.whole = 0
        self.lost: list[str] = []
        self.unnamed = 0
        self.problem = ""

    def add(self, path: str, why: str) -> None:
        if why:
            self.problem = self.problem or f"{path}: {why}"
            self.lost.append(path)
        else:
            self.whole += 1

    def take(self, other: _Tally) -> None:
        self.whole += other.whole
        self.lost += other.lost
        self.unnamed += other.unnamed
        self.problem = self.problem or other.problem


class Losses:
    """What of versions cannot be read any more.

    Args:
        reader: Reads nodes; one that several versions share is read once, as long as it is kept.
        damage: What is broken.
        missing: Takes the invariant, where, and the problem, for each object that a version turns out to miss.
    """

    def __init__(self, reader: NodeReader, damage: Damage, missing: Callable[[str, str, object], None]) -> None:
        self._reader = reader
        self._damage = damage
        self._missing = missing
        self._broken = damage.containers()
        self._clean: set[NodeAddress] = set()
        self._leaves: dict[NodeAddress, _Tally] = {}
        self._names = _NAMES

    def touches(self, address: NodeAddress) -> bool:
        """Whether something below a node cannot be read.

        Raises:
            StorageError: The store failed.
        """
        if address in self._clean:
            return False
        if address in self._damage.nodes:
            return True
        tree = Tree(self._reader, address)
        try:
            node = self._reader.load(address)
            if isinstance(node, Branch):
                for at, row in enumerate(node.rows):
                    below = child_address(row, node.containers)
                    if below not in self._clean:
                        tree.child(node, at)
                        if self.touches(below):
                            return True
            elif isinstance(node, Part) or self._hits(node):
                return True
        except (NotFoundError, CorruptionError, FormatVersionError):
            return True
        self._clean.add(address)
        return False

    def _hits(self, leaf: Leaf) -> bool:
        """Whether an asset of a leaf cannot be read."""
        rows = [Located(row, leaf.containers) for row in leaf.rows]
        if not self._damage.files and self._broken.isdisjoint(leaf.containers):
            rows = [located for located in rows if isinstance(located.row, LargeFileRow)]
        return any(self._why(located, "") for located in rows)

    def of(self, root: NodeAddress, address: str) -> Loss | None:
        """What of a version cannot be read; None when all of it can. Reads what is damaged of its manifest, once.

        Raises:
            StorageError: The store failed.
        """
        tally = _Tally()
        self._add(root, None, tally, address)
        if not tally.problem:
            return None
        named = tally.lost[: self._names]
        self._names -= len(named)
        more = len(tally.lost) - len(named)
        return Loss(address, tally.problem, tally.whole, tuple(named), tally.unnamed, more)

    def _add(self, node_address: NodeAddress, assets: int | None, tally: _Tally, address: str) -> None:
        """Count what is below a node, of which the node above says that it holds so many assets."""
        known = self._leaves.get(node_address)
        if known is not None:
            tally.take(known)
            return
        try:
            node = self._reader.load(node_address)
            if isinstance(node, Part):
                raise CorruptionError("a list of chunks where a node of assets should be")
        except (NotFoundError, CorruptionError, FormatVersionError) as error:
            self._gap(Gap("", assets, error), tally, address)
            return
        if isinstance(node, Leaf):
            known = self._leaves[node_address] = _Tally()
            for row in node.rows:
                known.add(row.path, self._why(Located(row, node.containers), address))
            tally.take(known)
        elif node_address in self._damage.nodes:
            self._add_disorder(node_address, tally, address)
        else:
            tree = Tree(self._reader, node_address)
            for at, child in enumerate(node.rows):
                below = child_address(child, node.containers)
                try:
                    if below not in self._clean:
                        tree.child(node, at)
                except (NotFoundError, CorruptionError, FormatVersionError) as error:
                    self._gap(Gap(child.path, child.assets, error), tally, address)
                    continue
                if self.touches(below):
                    self._add(below, child.assets, tally, address)
                else:
                    tally.whole += child.assets

    def _add_disorder(self, node_address: NodeAddress, tally: _Tally, address: str) -> None:
        """Below a node with paths that go back, where a reader would stop: those paths are lost."""
        last = ""
        for found in rows_and_gaps(self._reader, node_address):
            if isinstance(found, Gap):
                self._gap(found, tally, address)
                continue
            path = found.row.path
            why = f"it does not come after {last!r}" if path <= last else self._why(found, address)
            tally.add(path, why)
            last = max(path, last)

    def _gap(self, gap: Gap, tally: _Tally, address: str) -> None:
        if isinstance(gap.error, NotFoundError):
            self._missing("I4", address, gap.error)
        tally.problem = tally.problem or str(gap.error)
        tally.unnamed += gap.assets or 0

    def _why(self, located: Located, address: str) -> str:
        """Why an asset cannot be read; empty: it can. What is missing is told when ``address`` says to whom."""
        row = located.row
        if isinstance(row, UrlRow):
            return ""
        try:
            pieces = tuple(pieces_of(located, self._reader.load))
        except NotFoundError as error:
            if address:
                self._missing("I4", address, error)
            return str(error)
        except (CorruptionError, FormatVersionError) as error:
            return str(error)
        for piece in pieces:
            if why := self._chunk(piece, address):
                return why
        return self._damage.files.get(content_of(row, pieces), "") if self._damage.files else ""

    def _chunk(self, piece: Piece, address: str) -> str:
        damage = self._damage
        for one in piece.chain():
            key = container_key(one.container)
            if one.container in damage.gone:
                size = damage.gone[one.container]
                if size is None:
                    if address:
                        self._missing("I7", key, f"{key} is missing")
                    return f"{key} is missing"
                if one.offset + one.stored > size:
                    return f"{key} is cut: {size} bytes"
            if (one.container, one.offset) in damage.chunks:
                return damage.chunks[one.container, one.offset]
            if one.container in damage.suspects:
                codec = CODECS.get(one.codec)
                if codec is None:
                    return f"a chunk is stored by the codec {one.codec}, which this mandapa does not have"
                if codec.needs_base != (one.base is not None):
                    return f"a chunk of codec {codec.feature} has a base, or lacks one"
        return ""
