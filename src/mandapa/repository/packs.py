"""Containers that may be on their way out: which are there, and in no list of a gc. Source: docs/format.md §10.5."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

from mandapa.content.fetch import pieces_of
from mandapa.content.parallel import in_order
from mandapa.content.tree import Located, NodeReader
from mandapa.errors import NotFoundError
from mandapa.format.keys import GC, container_key
from mandapa.format.manifest import LargeFileRow
from mandapa.format.records import GC_LIST_BYTES, decode_gc_list
from mandapa.object_store.base import ObjectStore

__all__ = ["condemned", "condemned_or_missing", "containers_of", "missing"]


def condemned_or_missing(store: ObjectStore, containers: Collection[bytes], *, threads: int) -> set[bytes]:
    """Those of ``containers`` that a gc has listed, or that are not there: in no list first, THEN found.

    One request to list ``gc/``, one for each list there, one for each container that no list names.
    """
    if not containers:
        return set()
    listed = condemned(store)
    bad = {container for container in containers if container_key(container) in listed}
    return bad | missing(store, sorted(set(containers) - bad), threads=threads)


def condemned(store: ObjectStore) -> set[str]:
    """Keys of all objects that some gc may be about to delete."""
    listed: set[str] = set()
    for info in list(store.list(GC)):
        try:
            listed.update(decode_gc_list(store.get(info.key, limit=GC_LIST_BYTES), key=info.key).objects)
        except NotFoundError:
            continue  # its gc is over
    return listed


def missing(store: ObjectStore, containers: Sequence[bytes], *, threads: int) -> set[bytes]:
    """Those of ``containers`` that are not there."""

    def gone(container: bytes) -> bool:
        try:
            store.head(container_key(container))
        except NotFoundError:
            return True
        return False

    answers = in_order(gone, containers, threads=threads)
    return {container for container, answer in zip(containers, answers, strict=True) if answer}


def containers_of(reader: NodeReader, located: Located) -> Iterator[bytes]:
    """The containers that one row needs: of its parts, its chunks, and their bases; of a part that is gone, its own."""
    row, table = located
    if isinstance(row, LargeFileRow):
        yield from [table[part.container] for part in row.parts]
    with suppress(NotFoundError):
        for piece in pieces_of(located, reader.load):
            yield from [one.container for one in piece.chain()]
