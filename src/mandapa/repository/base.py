"""The version that a transaction starts from, read as far as its changes need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mandapa.content.tree import Located, NodeReader, Tree
from mandapa.errors import ConflictError, NotFoundError
from mandapa.format.manifest import Branch, Leaf, Node, NodeAddress
from mandapa.format.records import Root
from mandapa.repository.state import VersionState
from mandapa.repository.version import root_of

__all__ = ["Base"]

SEED_LEAVES = 64
"""Leaves of the base version that are read for chunks to share, at most."""


class _Reader(NodeReader):
    """The repository's nodes for one transaction: a base that was deleted and swept meanwhile is a conflict."""

    def __init__(self, shared: NodeReader, name: str) -> None:
        self._shared = shared
        self._name = name

    def load(self, address: NodeAddress) -> Node:
        with self._conflict():
            return self._shared.load(address)

    def digest(self, address: NodeAddress) -> bytes:
        with self._conflict():
            return self._shared.digest(address)

    def remember(self, hash_: bytes, node: Node) -> None:
        self._shared.remember(hash_, node)

    @contextmanager
    def _conflict(self) -> Iterator[None]:
        try:
            yield
        except NotFoundError as error:
            raise ConflictError(
                f"{self._name}: the version that this transaction starts from was deleted meanwhile; run it again"
            ) from error


class Base:
    """A version, where its manifest was when it became the base; or, without ``state``, nothing.

    Reading raises `ConflictError` when the version was deleted and swept meanwhile.
    """

    def __init__(self, state: VersionState | None, nodes: NodeReader, name: str) -> None:
        self.state = state
        self.reader = _Reader(nodes, name)
        self.tree = None if state is None else Tree(self.reader, root_of(state.root))
        self._rows: dict[str, Located] = {}

    @property
    def place(self) -> tuple[int, Root] | None:
        """Which version it is, and where its manifest is."""
        return None if self.state is None else (self.state.op.number, self.state.root)

    def row(self, path: str) -> Located | None:
        """The row at ``path``; no look into the manifest where `read` has met it."""
        return self._rows.get(path) or (None if self.tree is None else self.tree.get(path))

    def known_row(self, path: str) -> Located | None:
        """The row at ``path`` if `read` has met it."""
        return self._rows.get(path)

    def read(self, folder: str) -> None:
        """Keep the rows at or below a folder at hand."""
        self._rows.update((located.row.path, located) for located in self.under(folder))

    def under(self, folder: str) -> Iterator[Located]:
        """All rows at or below a folder; ``""`` is the root."""
        return iter(()) if self.tree is None else self.tree.under(folder)

    def leaves(self) -> Iterator[Leaf]:
        """Leaves with chunks to share, as far as few requests reach: all, or none."""
        if self.tree is None:
            return
        top = self.reader.load(self.tree.root)
        if isinstance(top, Leaf):
            yield top
        elif isinstance(top, Branch) and top.level == 1 and len(top.rows) <= SEED_LEAVES:
            for at in range(len(top.rows)):
                node = self.tree.child(top, at)
                assert isinstance(node, Leaf)
                yield node
