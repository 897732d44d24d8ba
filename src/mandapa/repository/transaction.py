"""A transaction: changes gathered into one new version, or nothing. Source: docs/format.md, "Commit"."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from mandapa.content.edit import TreeRoot, edit_tree
from mandapa.content.tree import Located, NodeReader, Tree, differences, same_asset
from mandapa.content.upload import Upload
from mandapa.content.walk import walk
from mandapa.errors import ClosedError, ConflictError, InvalidInputError, NotFoundError
from mandapa.format.manifest import Branch, Leaf, Node, NodeAddress, UrlRow
from mandapa.format.records import AliasOp, FenceOp, Op, Record, VersionOp
from mandapa.format.strict import check_label, check_path, check_prefix
from mandapa.object_store.base import Buffer
from mandapa.repository.log import Log
from mandapa.repository.metadata import clean_message, clean_metadata
from mandapa.repository.packs import condemned_or_missing, containers_of
from mandapa.repository.paths import above, folders_of
from mandapa.repository.state import ArtifactState, VersionState
from mandapa.repository.urls import check_url, url_facts
from mandapa.repository.version import Version, address_of, relabel, root_of

if TYPE_CHECKING:
    from mandapa.repository.artifact import Artifact

__all__ = ["Transaction"]

SEED_LEAVES = 64
"""Leaves of the base version that are read for chunks to share, at most."""


class _NothingToDoError(Exception):
    """Another commit made the version that this transaction would make."""


class _Nodes(NodeReader):
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


class Transaction:
    """Gathers changes to one artifact and, when the ``with`` block ends, makes one version of them, atomically.

    Bytes go to the store while they are added; they become visible all together with the record, or never. If the block
    raises, or the process dies, no version is made, and gc removes what was put. Not safe to share between threads.

    Example:
        >>> import mandapa
        >>> repo = mandapa.open("memory://example", create=True)
        >>> with repo.artifact("notes").transaction(message="first") as txn:
        ...     txn.add_bytes("a.txt", b"hello")
        >>> txn.version.number
        0
    """

    def __init__(
        self,
        artifact: Artifact,
        message: str,
        metadata: Mapping[str, Any] | None,
        *,
        base: Literal["latest"] | None,
        on_conflict: Literal["raise", "ours"],
        txn_id: str,
    ) -> None:
        if base not in ("latest", None):
            raise InvalidInputError(f"base={base!r}: a transaction starts from 'latest' or, with None, from nothing")
        if on_conflict not in ("raise", "ours"):
            raise InvalidInputError(f"on_conflict={on_conflict!r}: use 'raise' or 'ours'")
        self.id = txn_id
        """The transaction's id; whoever gives the same one again gets the same version, never a second."""
        self.version: Version | None = None
        """After the block: the version that was made, or the base when nothing changed. None when there is neither."""
        self.progress: Callable[[int], None] | None = None
        """Set inside the block: called, from any thread, with the bytes that were put since the last call."""
        self.made = False
        """After the block: whether ``version`` is this transaction's own, and not its base."""
        self._artifact = artifact
        self._repo = artifact.repository
        self._nodes = _Nodes(self._repo.reader, artifact.name)
        self._log: Log[ArtifactState] | None = None
        self._message = clean_message(message)
        self._metadata = clean_metadata(metadata)
        self._follow = base == "latest"
        self._ours = on_conflict == "ours"
        self._aliases: list[str] = []
        self._used: list[str] = []
        self._requires: set[str] = set()
        self._puts: dict[str, Located] = {}
        self._claims: dict[str, bool] = {}  # path -> whether it claims all below it too
        self._base: VersionState | None = None
        self._bases: list[VersionState] = []
        self._base_rows: dict[str, Located] = {}
        self._overrides: set[str] = set()
        self._since = 0
        self._fenced = False
        self._root: TreeRoot | None = None
        self._upload: Upload | None = None
        self._seeded = False
        self._done = False  # the version is known, before or after the block
        self._over = False

    # -- the block ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Transaction:
        """Read the log to its tail: the base is fixed from here on, and what is put now is put after that."""
        if self._upload is not None or self._over:
            raise ClosedError("a transaction is used once")
        log = self._log = self._artifact.find_log()
        if log is not None:
            state = log.refresh()
            self._since = len(log.records)
            record = log.find(self.id)
            if record is not None:
                self._finish(log, record)
            if state.closed:
                raise NotFoundError(f"the artifact {self._artifact.name!r} was removed")
            if self._follow:
                self._take_base(state.latest())
        self._upload = Upload(
            self._repo.store,
            index=self._repo.index,
            codec=self._repo.codec,
            threads=self._repo.threads,
            new_id=self._repo.author.new_id,
            nodes=self._repo.reader,
        )
        self._upload.before_first_put = self._register
        self._upload.progress = self._report
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit, unless the block raised.

        Raises:
            ConflictError: Another commit changed what this one claims, or its base is gone; nothing was made.
            NotFoundError: The artifact was removed meanwhile.
            StorageError: The store failed. The version may or may not be there: the same ``txn_id`` tells.
        """
        upload = self._open()
        try:
            if kind is None and not self._done:
                self._commit(upload)
        finally:
            self._over = True
            upload.close()
            self._repo.index.flush()

    # -- changes ------------------------------------------------------------------------------------------------------

    def add(self, path: str | os.PathLike[str], at: str | None = None, *, skip_special: bool = False) -> None:
        """Put a file at ``at`` (default: its name), or a folder's contents under ``at`` (default: the root).

        A folder takes the whole prefix: what the base has there and the folder has not is dropped, so that getting the
        version gives the folder back. What this transaction added before stays. Symlinks to files are read as files, to
        folders followed. Files that did not change since they were last added are not read again.

        Raises:
            NotFoundError: Nothing is at ``path``, or it vanished meanwhile.
            InvalidInputError: A path that no version can hold, a dangling link, a socket, a device (``skip_special``
                leaves these out), a cycle of links, or a file that changed while it was read.
            StorageError: The store failed.
        """
        upload = self._open()
        if self._done:
            return
        source = os.fspath(path)
        if not os.path.exists(source):
            raise NotFoundError(f"there is no file or folder {source!r}")
        if not os.path.isdir(source):
            target = check_path(os.path.basename(os.path.abspath(source)) if at is None else at)
            self._seed()
            self._put(target, upload.add_file(source, target, os.stat(source), base=self._base_row(target)))
            return
        prefix = check_prefix(at or "")
        if prefix:
            check_path(prefix)
        found = walk(source, skip_special=skip_special)
        self._seed()
        if (tree := self._tree()) is not None:
            self._base_rows.update((located.row.path, located) for located in tree.under(prefix))
        below = f"{prefix}/" if prefix else ""
        targets = [(below + item.path, item) for item in found]
        for (target, _), located in zip(targets, upload.add_files(targets, self._base_rows.get), strict=True):
            self._puts[target] = located
        self._claims[prefix] = True

    def add_bytes(self, at: str, data: Buffer) -> None:
        """Put ``data`` at ``at``.

        Raises:
            InvalidInputError: A path that no version can hold.
            StorageError: The store failed.
        """
        upload = self._open()
        check_path(at)
        if not isinstance(data, bytes | bytearray | memoryview):
            raise InvalidInputError(f"add_bytes takes bytes, not {type(data).__name__}")
        if not self._done:
            self._seed()
            self._put(at, upload.add_bytes(at, data, base=self._base_row(at)))

    def add_url(self, at: str, url: str, *, size: int | None = None, checksum: str = "") -> None:
        """Record a URL at ``at``; its bytes stay where they are and are not read.

        Size and checksum are what the caller knows (``checksum="sha256:..."``, ``"etag:..."``). What is not given is
        looked up where that needs no more than asking: the size of a ``file://``, and with one request size and etag of
        an object of the cloud service that the repository is in.

        Raises:
            InvalidInputError: A scheme that is not allowed, or a URL that carries a secret.
        """
        self._open()
        check_path(at)
        check_url(url)
        size, checksum = url_facts(url, size, checksum, self._repo.place)
        if not self._done:
            self._put(at, Located(UrlRow(at, url, size, checksum), ()))

    def copy(self, address: str, path: str = "", at: str | None = None) -> None:
        """Put assets of another version of this repository here; no bytes are moved.

        ``path`` is an asset, which goes to ``at`` (default: the same path), or a folder, whose contents go under ``at``
        (default: the same folder) and take that prefix.

        Raises:
            NotFoundError: No such version or path.
            InvalidInputError: A path that no version can hold.
        """
        upload = self._open()
        if self._done:
            return
        version = self._repo[address]
        if version.path:
            path = f"{version.path}/{path}" if path else version.path
        target = path if at is None else at
        one = version.reading(lambda tree: tree.get(path)) if path else None
        prefix = f"{check_prefix(path)}/" if path else ""
        rows = [one] if one is not None else list(version.rows(prefix))
        if not rows:
            raise NotFoundError(f"{version.address} has nothing at {path!r}")
        for located in rows:
            rest = located.row.path[len(prefix) :]
            place = target if one is not None else f"{target}/{rest}" if target else rest
            if place != located.row.path:
                check_path(place)
            moved = relabel(located, place)
            upload.hits.update(containers_of(self._repo.reader, moved))
            self._puts[place] = moved
        self._claims[target] = one is None or self._claims.get(target, False)
        self._requires.update(version.requires)
        if version.address not in self._used:
            self._used.append(version.address)

    def remove(self, at: str) -> None:
        """Drop an asset, or a folder with all below it.

        Raises:
            NotFoundError: Nothing is there, in the base or added by this transaction.
        """
        self._open()
        check_prefix(at)
        if self._done:
            return
        below = f"{at}/" if at else ""
        mine = [path for path in self._puts if path == at or path.startswith(below)]
        base = self._tree()
        file = base is not None and at and base.get(at) is not None
        folder = base is not None and next(base.under(at), None) is not None
        if not (mine or file or folder):
            raise NotFoundError(f"nothing is at {at!r}")
        for path in mine:
            del self._puts[path]
        self._claims[at] = folder or any(path != at for path in mine) or self._claims.get(at, False)

    def alias(self, name: str) -> None:
        """Let an alias name the new version, in the same record: version and alias move together.

        Raises:
            InvalidInputError: Not a possible alias.
        """
        self._open()
        self._aliases.append(check_label(name))

    # -- gathering ----------------------------------------------------------------------------------------------------

    def _open(self) -> Upload:
        if self._upload is None or self._over:
            raise ClosedError("use a transaction in a 'with' block, and once")
        return self._upload

    def _put(self, path: str, located: Located) -> None:
        """Put one asset, and claim its path."""
        self._puts[path] = located
        self._claims.setdefault(path, False)

    def _report(self, put: int) -> None:
        if self.progress is not None:
            self.progress(put)

    def _take_base(self, base: VersionState | None) -> None:
        self._base = base
        self._base_rows = {}
        if base is not None:
            self._repo.check_features(base.requires, f"{self._artifact.name}:v{base.op.number}")
            self._bases.append(base)

    def _tree(self) -> Tree | None:
        return None if self._base is None else Tree(self._nodes, root_of(self._base.root))

    def _base_row(self, path: str) -> Located | None:
        found = self._base_rows.get(path)
        if found is None and (tree := self._tree()) is not None:
            found = tree.get(path)
        return found

    def _seed(self) -> None:
        """Offer the base's chunks for sharing, as far as few requests reach."""
        tree = self._tree()
        if self._seeded or tree is None or self._upload is None:
            return
        self._seeded = True
        top = self._nodes.load(tree.root)
        if isinstance(top, Leaf):
            self._upload.seed(top)
        elif isinstance(top, Branch) and top.level == 1 and len(top.rows) <= SEED_LEAVES:
            for at in range(len(top.rows)):
                node = tree.child(top, at)
                assert isinstance(node, Leaf)
                self._upload.seed(node)

    def _register(self) -> None:
        """Rule 0: the artifact is in the catalog before anything of it is in the store."""
        if self._log is None:
            self._log = self._artifact.register()

    # -- the version --------------------------------------------------------------------------------------------------

    def _edits(self) -> dict[str, Located | None]:
        """What this transaction changes in its base: path -> row, or None where it is dropped."""
        tree = self._tree()
        if tree is None:
            return dict(self._puts)
        edits: dict[str, Located | None] = {}
        for path, located in self._puts.items():
            old = self._base_row(path)
            if old is not located and not same_asset(old, located):
                edits[path] = located
        for claim, prefix in self._claims.items():
            if not prefix:
                if claim not in self._puts and tree.get(claim) is not None:
                    edits[claim] = None
                continue
            for located in tree.under(claim):
                if located.row.path not in self._puts:
                    edits[located.row.path] = None
            if claim and claim not in self._puts and tree.get(claim) is not None:
                edits[claim] = None
        for path in self._overrides:
            if path not in self._puts and tree.get(path) is not None:
                edits[path] = None
        return edits

    def _check_shapes(self, edits: Mapping[str, Located | None]) -> None:
        """Refuse a file where the version would also have a folder."""
        for path in folders_of(self._puts) & self._puts.keys():
            raise InvalidInputError(f"{path!r} cannot be a file and a folder in one version")
        tree = self._tree()
        if tree is None:
            return
        # Where the base has a file, it has no folder of that name, and no file above.
        new = [path for path, located in edits.items() if located is not None and self._base_row(path) is None]
        for path in folders_of(new):
            if tree.get(path) is not None and edits.get(path, path) is not None:
                raise InvalidInputError(f"{path!r} is a file in the base: remove it before something is added below it")
        for path in new:
            below = next((item for item in tree.under(path) if edits.get(item.row.path, item) is not None), None)
            if below is not None:
                raise InvalidInputError(f"{path!r} is a folder in the base: remove it before a file takes its place")

    def _commit(self, upload: Upload) -> None:
        edits = self._edits()
        self._check_shapes(edits)
        if not (edits or self._message or self._metadata or self._aliases):
            self.version = self._of(self._base)
            return
        self._register()
        if upload.hits and self._secure(lambda: self._named() & upload.hits):
            edits = self._edits()
        self._build(edits)
        assert self._log is not None
        try:
            record = self._log.append(
                self.id,
                self._ops,
                self._repo.author,
                since=self._since,
                on_record=self._notice,
                run=self._artifact.run,
                used=tuple(self._used),
            )
        except _NothingToDoError:
            return
        self._finish(self._log, record)

    def _of(self, state: VersionState | None) -> Version | None:
        return None if state is None or self._log is None else Version(self._artifact, self._log, state)

    def _finish(self, log: Log[ArtifactState], record: Record) -> None:
        """The record that holds this transaction is known: name the version it made."""
        self._done = self.made = True
        op = record.find(VersionOp)
        if op is None:
            raise InvalidInputError(f"the transaction id {self.id} belongs to another command")
        self.version = Version(self._artifact, log, log.state.versions[op.number])

    def _notice(self, record: Record) -> None:
        """A record that came in since the log was read: a fence asks for another look at the packs."""
        if record.find(FenceOp) is not None:
            self._fenced = True

    def _ops(self, state: ArtifactState) -> Iterable[Op]:
        """The ops for the slot after ``state``: rebased on its newest live version, packs checked after each fence."""
        if state.closed:
            raise NotFoundError(f"the artifact {self._artifact.name!r} was removed meanwhile; nothing was made")
        if self._follow:
            tip = state.latest()
            if (tip and (tip.op.number, tip.root)) != (self._base and (self._base.op.number, self._base.root)):
                self._rebase(tip)
        if self._fenced:
            self._fenced = False
            if self._secure(lambda: self._doubtful(state)):
                self._build(self._edits())
        root, base = self._root, self._base
        assert root is not None
        assert self._upload is not None
        yield VersionOp(
            number=state.next_number,
            parent=None if base is None else base.op.number,
            root=address_of(root.address),
            digest=root.digest.hex(),
            assets=root.assets,
            bytes=root.size,
            added=self._upload.added,
            message=self._message,
            metadata=self._metadata,
            requires=sorted(self._requires.union(() if base is None else base.requires)),
        )
        for name in self._aliases:
            yield AliasOp(name, state.next_number)

    def _build(self, edits: Mapping[str, Located | None]) -> None:
        """Write the manifest; everything it names is acknowledged when this returns."""
        assert self._upload is not None
        base = self._base
        if base is not None and not edits:
            op = base.op
            self._root = TreeRoot(root_of(base.root), bytes.fromhex(op.digest), op.assets, op.bytes)
            return
        root = None if base is None else root_of(base.root)
        self._root = edit_tree(self._nodes, self._upload, root, edits)
        self._upload.flush()

    def _rebase(self, tip: VersionState | None) -> None:
        """Take the newest live version as the base, if what came in between leaves our claims alone."""
        clash = self._clashes(self._tree(), tip)
        if clash and not self._ours:
            named = ", ".join(clash[:5]) + (f" and {len(clash) - 5} more" if len(clash) > 5 else "")
            what = "another commit" if tip is None else f"v{tip.op.number}"
            raise ConflictError(
                f"{self._artifact.name}: {what} changed {named} meanwhile; nothing was made: look at it and run again",
                paths=tuple(clash),
            )
        self._take_base(tip)
        edits = self._edits()
        if not (edits or self._message or self._metadata or self._aliases):
            self.version = self._of(tip)
            raise _NothingToDoError
        self._build(edits)

    def _clashes(self, old: Tree | None, tip: VersionState | None) -> list[str]:
        """Paths where what came in between and our claims do not go together; ours are noted to win."""
        new = None if tip is None else Tree(self._nodes, root_of(tip.root))
        folders = folders_of(self._puts)
        clash = []
        for before, after in differences(old, new):
            located = after or before
            assert located is not None
            path = located.row.path
            if self._claimed(path):
                if not same_asset(self._puts.get(path), after):
                    clash.append(path)
            elif after is not None and (path in folders or any(folder in self._puts for folder in above(path))):
                clash.append(path)
                self._overrides.add(path)
        return clash

    def _claimed(self, path: str) -> bool:
        return path in self._claims or any(self._claims.get(folder, False) for folder in above(path))

    # -- packs that may be on their way out ---------------------------------------------------------------------------

    def _named(self) -> set[bytes]:
        """Every container that the rows put by this transaction need."""
        named: set[bytes] = set()
        for located in self._puts.values():
            named.update(containers_of(self._repo.reader, located))
        return named

    def _doubtful(self, state: ArtifactState) -> set[bytes]:
        """What to look at again after a fence: all that is named, but for what is inherited."""
        assert self._upload is not None
        named = self._named()
        if self._bases_stand(state):
            named &= self._upload.hits
        return named | self._upload.fresh

    def _bases_stand(self, state: ArtifactState) -> bool:
        """Whether every version that something was inherited from is still live, and where it was."""
        return all(state.is_live(base.op.number, base.root) for base in self._bases)

    def _secure(self, doubtful: Callable[[], set[bytes]]) -> bool:
        """Store again what is named in bad containers; whether there are any. Then all that is named may be named."""
        assert self._upload is not None
        before = set(self._upload.fresh)
        looked: set[bytes] = set()
        stored = False
        # What is stored again may be found elsewhere, where nobody has looked yet; what is put from now on is sound.
        while rest := doubtful() - looked - (self._upload.fresh - before):
            looked |= rest
            bad = self._bad(rest)
            if not bad:
                break
            self._restore(bad)
            stored = True
        return stored

    def _bad(self, containers: Collection[bytes]) -> set[bytes]:
        return condemned_or_missing(self._repo.store, containers, threads=self._repo.threads)

    def _restore(self, bad: set[bytes]) -> None:
        """Store what lies in bad containers again, in new ones."""
        assert self._upload is not None
        for path, located in self._puts.items():
            if not bad.isdisjoint(containers_of(self._repo.reader, located)):
                self._puts[path] = self._upload.restore_row(located, bad)
