"""Numbered, create-only records: what they say together, reading on, and the one way to append."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from model.store import Lost, Missing, Store, Taken

_T = TypeVar("_T")

Steps: TypeAlias = Generator[int, None, _T]
"""Work that yields before each call of the store, and when it rests: for so many turns of its own."""

PACKS, LISTS, CATALOG = "packs", "gc", "catalog"

Packs: TypeAlias = frozenset[int]


@dataclass(slots=True, eq=False)
class Record:
    """One record; a version is named by the transaction that made it."""

    kind: str
    """``version``, ``delete``, ``undelete``, ``repack``, ``alias``, ``fence`` or, in the catalog, ``register``."""
    txn: int
    version: int = 0
    packs: Packs = frozenset()
    artifact: str = ""


class GiveUp(Exception):
    """The state before the next slot forbids the record."""


class View:
    """A log as far as one process has read it."""

    def __init__(self, log: str) -> None:
        self.log = log
        self.records: list[Record] = []
        self.roots: dict[int, Packs] = {}
        """Every version that ever was -> what it needs, where it is now."""
        self.deleted: set[int] = set()
        self.best: int | None = None

    def take(self, record: Record) -> None:
        """Fold one more record in."""
        self.records.append(record)
        kind = record.kind
        if kind == "version":
            self.roots[record.txn] = record.packs
        elif kind == "repack":
            if record.version in self.roots:
                self.roots[record.version] = record.packs
        elif kind == "delete":
            self.deleted.add(record.version)
        elif kind == "undelete":
            self.deleted.discard(record.version)
        elif kind == "alias":
            self.best = record.version

    def live(self) -> list[int]:
        """Versions that are not deleted, oldest first."""
        return [version for version in self.roots if version not in self.deleted]

    def is_live(self, version: int, root: Packs) -> bool:
        """Whether a version is live, and where ``root`` says."""
        return version not in self.deleted and self.roots[version] == root

    def live_packs(self) -> set[int]:
        """What live versions need."""
        needed: set[int] = set()
        for version, packs in self.roots.items():
            if version not in self.deleted:
                needed |= packs
        return needed


Notice: TypeAlias = Callable[[Record, Record], Steps[Record]]
"""Given another's record that got our slot, and ours: what to append instead; raises `GiveUp`."""


def find(store: Store, folder: str, key: Any) -> Steps[Any]:
    """The object, asked for until there is an answer; None when nothing is there."""
    while True:
        yield 0
        try:
            return store.get(folder, key)
        except Missing:
            return None
        except Lost:
            pass


def keys(store: Store, folder: str) -> Steps[list[Any]]:
    """All keys, asked for until there is an answer."""
    while True:
        yield 0
        try:
            return store.list(folder)
        except Lost:
            pass


def put(store: Store, folder: str, key: Any, value: Any) -> Steps[None]:
    """Put, until it is acknowledged."""
    while True:
        yield 0
        try:
            return store.put(folder, key, value)
        except Lost:
            pass


def delete(store: Store, folder: str, key: Any) -> Steps[None]:
    """Delete, until it is acknowledged."""
    while True:
        yield 0
        try:
            return store.delete(folder, key)
        except Lost:
            pass


def read_on(store: Store, view: View) -> Steps[None]:
    """To the tail."""
    while True:
        yield 0
        try:
            found = store.after(view.log, len(view.records))
        except Lost:
            continue
        for record in found:
            view.take(record)
        return


def commit(store: Store, view: View, record: Record, notice: Notice | None = None) -> Steps[Record]:
    """Append once: the same slot with the same bytes until it is known to be taken; then, if not by us, the next."""
    while True:
        slot = len(view.records)
        yield 0
        try:
            store.create(view.log, slot, record)
        except (Lost, Taken):
            found = yield from find(store, view.log, slot)
            if found is None:
                continue
        else:
            found = record
        view.take(found)
        if found.txn == record.txn:
            return found
        if notice is not None:
            record = yield from notice(found, record)


def condemned(store: Store) -> Steps[set[int]]:
    """What stands in any list of a gc; a list that vanishes meanwhile counts as empty."""
    listed: set[int] = set()
    for epoch in (yield from keys(store, LISTS)):
        listed |= (yield from find(store, LISTS, epoch)) or frozenset()
    return listed


def gone(store: Store, packs: Collection[int]) -> Steps[set[int]]:
    """Those that are not there."""
    missing = set()
    for pack in packs:
        if (yield from find(store, PACKS, pack)) is None:
            missing.add(pack)
    return missing
