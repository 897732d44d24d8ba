"""The content of one version in another repository: put there, and not committed yet. Source: docs/format.md §10.10."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from mandapa.content.edit import TreeRoot, edit_tree
from mandapa.content.transfer import Origin, Transfer
from mandapa.content.tree import Located, Tree, differences
from mandapa.errors import CorruptionError, NotFoundError
from mandapa.format.strict import shown
from mandapa.repository.base import Base
from mandapa.repository.changes import folders_of
from mandapa.repository.packs import condemned_or_missing
from mandapa.repository.replay import Content
from mandapa.repository.state import ArtifactState, VersionState
from mandapa.repository.version import address_of, root_of

if TYPE_CHECKING:
    from mandapa.repository.repository import Repository

__all__ = ["Replica"]


class Replica:
    """A version of one repository on its way into another one.

    Args:
        source: Where it is.
        destination: Where it goes.
        name: Of its artifact, for messages.
        version: The version, live in the source.
        here: The state of its mirror; what is put from now on is put after that was read.
        progress: Called with the bytes of each object that was put.

    Attributes:
        base: A live version of the destination, from which content is inherited.
        content: What a record may say of it once `run` has returned.
        added: Bytes that were put, as far as it came.
    """

    def __init__(
        self,
        source: Repository,
        destination: Repository,
        name: str,
        version: VersionState,
        here: ArtifactState,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._from = source
        self._to = destination
        self._name = name
        self._version = version
        self._progress = progress
        self.base = _nearest(version, here)
        self._twin = self._before(here.versions.get(version.op.number))
        """The version itself, as it was before it was deleted."""
        self.added = 0
        self._named: set[bytes] = set()

    def _before(self, version: VersionState | None) -> Tree | None:
        tree = None if version is None else Tree(self._to.reader, root_of(version.root))
        with suppress(NotFoundError):
            if tree is not None:
                self._to.reader.load(tree.root)
                return tree
        return None  # a gc has passed, or it was never copied

    def run(self, journal: bytes) -> None:
        """Copy what the destination lacks; all of it is acknowledged when this returns.

        Raises:
            NotFoundError: An object of the source is missing.
            ConflictError: One of the base is.
            CorruptionError: The source does not hold what its record says.
        """
        version, to = self._version, self._to
        address = f"{self._name}:v{version.op.number}"
        self._from.check_features(version.requires, address)
        tree = Tree(self._from.reader, root_of(version.root))
        if self._from.reader.digest(tree.root).hex() != version.op.digest:
            raise CorruptionError(f"{address}: its manifest holds something else than its record says")
        origin = Origin(self._from.store, self._from.reader, self._from.cache, self._from.threads)
        transfer = Transfer(
            origin,
            to.store,
            index=to.index,
            nodes=to.reader,
            link=to.link,
            threads=to.threads,
            new_id=to.author.new_id,
            journal=journal,
            progress=self._progress,
        )
        try:
            with transfer:
                root = self._sound(tree, transfer)
        finally:
            self.added = transfer.added
        if root.digest.hex() != version.op.digest:
            raise CorruptionError(
                f"{address}: its manifest is not the one of its digest: run 'mandapa fsck' on the source"
            )
        self._named = transfer.fresh | transfer.hits
        requires = transfer.requires.union(version.requires, () if self.base is None else self.base.requires)
        self.content = Content(address_of(root.address), tuple(sorted(requires)), transfer.added)

    def stands(self, state: ArtifactState, *, fenced: bool) -> bool:
        """Whether it may be named after ``state``; ``fenced``: a gc came since it was made, and all is looked at."""
        base = self.base
        if base is not None and not state.is_live(base.op.number, base.root):
            return False
        return not (fenced and condemned_or_missing(self._to.store, self._named, threads=self._to.threads))

    def _sound(self, tree: Tree, transfer: Transfer) -> TreeRoot:
        """The manifest, made again as long as it names containers that may be on their way out."""
        looked: set[bytes] = set()
        while True:
            root = self._build(tree, transfer)
            transfer.flush()
            doubtful = transfer.hits - looked
            bad = condemned_or_missing(self._to.store, doubtful, threads=self._to.threads)
            if not bad:
                return root
            looked |= doubtful
            transfer.forget(bad)

    def _build(self, tree: Tree, transfer: Transfer) -> TreeRoot:
        base = Base(self.base, self._to.reader, self._name)
        old, twin = base.tree, self._twin
        for leaf in base.leaves():
            transfer.seed(leaf)
        edits: dict[str, Located | None] = {}
        before: dict[str, Located] = {}
        new: list[str] = []

        def changed() -> Iterator[Located]:
            for was, now in differences(old, tree):
                if now is None:
                    assert was is not None
                    edits[was.row.path] = None
                    continue
                if was is None:
                    new.append(now.row.path)
                else:
                    before[was.row.path] = was
                yield now

        def earlier(path: str) -> Located | None:
            with suppress(NotFoundError):
                return before.pop(path, None) if twin is None else twin.get(path)
            return None

        for located in transfer.add(changed(), earlier, inherited=twin is None):
            edits[located.row.path] = located
        self._check_paths(tree, new, alone=old is None)
        if old is not None and self.base is not None and not edits:
            op = self.base.op
            return TreeRoot(old.root, bytes.fromhex(op.digest), op.assets, op.bytes)
        return edit_tree(base.reader, transfer, None if old is None else old.root, edits)

    def _check_paths(self, tree: Tree, new: Sequence[str], *, alone: bool) -> None:
        """Refuse what no version may hold; with ``alone`` these are all paths that there are."""
        folders = folders_of(new)
        twice = folders.intersection(new)
        if not alone:
            twice.update([path for path in folders if tree.get(path) is not None])
            twice.update([path for path in new if any(True for _ in tree.under(path))])
        if twice:
            raise CorruptionError(
                f"{self._name}:v{self._version.op.number}: {shown(min(twice))} is a file and a folder: "
                "run 'mandapa fsck' on the source"
            )


def _nearest(version: VersionState, here: ArtifactState) -> VersionState | None:
    """The live version of the destination that is likely to share most with one of the source."""
    parent = here.versions.get(-1 if version.op.parent is None else version.op.parent)
    if parent is not None and parent.deleted is None:
        return parent
    return here.latest()
