"""A manifest read as far as it can be: rows, and between them the gaps that an unreadable node leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mandapa.content.tree import Located, NodeReader, Tree
from mandapa.errors import CorruptionError, FormatVersionError, MandapaError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.manifest import Branch, Leaf, NodeAddress, Part

__all__ = ["Gap", "rows_and_gaps"]


@dataclass(frozen=True, slots=True)
class Gap:
    """Assets of which not even the names can be read."""

    path: str
    """The first of them; empty: of the whole version."""
    assets: int | None
    """How many; None where the node above does not say."""
    error: MandapaError
    """Why."""


def rows_and_gaps(reader: NodeReader, root: NodeAddress) -> Iterator[Located | Gap]:
    """The rows below a root in the manifest's order, and a gap for each node that a reader would refuse.

    As many requests as there are nodes, less those cached. Nothing but the store's own failures is raised.

    Raises:
        StorageError: The store failed.
    """
    tree = Tree(reader, root)
    try:
        top = reader.load(root)
        if isinstance(top, Part):
            key = container_key(root.container)
            raise CorruptionError(f"{key}: a list of chunks where a node of assets should be", key=key)
    except (NotFoundError, CorruptionError, FormatVersionError) as error:
        yield Gap("", None, error)
        return
    yield from _below(tree, top)


def _below(tree: Tree, node: Leaf | Branch) -> Iterator[Located | Gap]:
    if isinstance(node, Leaf):
        yield from (Located(row, node.containers) for row in node.rows)
        return
    for at, row in enumerate(node.rows):
        try:
            child = tree.child(node, at)
        except (NotFoundError, CorruptionError, FormatVersionError) as error:
            yield Gap(row.path, row.assets, error)
            continue
        assert not isinstance(child, Part)
        yield from _below(tree, child)
