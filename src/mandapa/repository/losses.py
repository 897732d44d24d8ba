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
    """Paths of those that cannot, in order."""
    unnamed: int
    """Assets of which not even the paths can be read."""
    older: str = ""
    """The nearest version before it that is whole; empty: none."""
    newer: str = ""
    """The nearest one after it."""


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
        """What of a version cannot be read; None when all of it can. Reads all of its manifest.

        Raises:
            StorageError: The store failed.
        """
        whole, unnamed, problem = 0, 0, ""
        lost: list[str] = []
        last = ""
        for found in rows_and_gaps(self._reader, root):
            if isinstance(found, Gap):
                if isinstance(found.error, NotFoundError):
                    self._missing("I4", address, found.error)
                problem = problem or str(found.error)
                unnamed += found.assets or 0
                continue
            path = found.row.path
            why = self._why(found, address)
            if path <= last:
                why = f"it does not come after {last!r}"
            last = max(path, last)
            if why:
                problem = problem or f"{path}: {why}"
                lost.append(path)
            else:
                whole += 1
        return Loss(address, problem, whole, tuple(lost), unnamed) if problem else None

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
