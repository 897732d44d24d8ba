"""A transaction: changes gathered into one new version, or nothing. Source: docs/format.md, "Commit"."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from mandapa.address import parse_address
from mandapa.content.edit import TreeRoot, edit_tree
from mandapa.content.tree import Located
from mandapa.content.upload import Upload
from mandapa.content.walk import walk
from mandapa.errors import ClosedError, ConflictError, InvalidInputError, NotFoundError
from mandapa.format.manifest import UrlRow
from mandapa.format.records import AliasOp, FenceOp, Op, Record, VersionOp
from mandapa.format.strict import RESERVED, check_label, check_path, check_prefix, check_reserved
from mandapa.object_store.base import Buffer
from mandapa.repository.base import Base
from mandapa.repository.best import Contest, Mode
from mandapa.repository.changes import Changes
from mandapa.repository.log import Log
from mandapa.repository.metadata import clean_message, clean_metadata
from mandapa.repository.packs import condemned_or_missing, containers_of
from mandapa.repository.state import ArtifactState, VersionState
from mandapa.repository.urls import check_url, url_facts
from mandapa.repository.version import Version, address_of, relabel

if TYPE_CHECKING:
    from mandapa.repository.artifact import Artifact

__all__ = ["Transaction"]


class _NothingToDoError(Exception):
    """Another commit made the version that this transaction would make."""


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
        base: Literal["latest"] | int | Version | None,
        on_conflict: Literal["raise", "ours"],
        txn_id: str,
    ) -> None:
        if isinstance(base, bool) or not (base is None or base == "latest" or isinstance(base, int | Version)):
            raise InvalidInputError(
                f"base={base!r}: a transaction starts from 'latest', from a version that a number or a Version names, "
                "or, with None, from nothing"
            )
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
        self._log: Log[ArtifactState] | None = None
        self._message = clean_message(message)
        self._metadata = clean_metadata(metadata)
        self._start = base
        self._ours = on_conflict == "ours"
        self._aliases: dict[str, Contest | None] = {}
        self._used: dict[str, None] = {}  # in the order in which they came
        self._requires: set[str] = set()
        self._changes = Changes()
        self._base = Base(None, self._repo.reader, artifact.name)
        self._bases: list[VersionState] = []
        self._since = 0
        self._fenced = False
        self._root: TreeRoot | None = None
        self._upload: Upload | None = None
        self._seeded = False
        self._done = False  # the version is known, before or after the block
        self._over = False

    # -- the block ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Transaction:
        """Read the log to its tail: the base is fixed from here on, and what is put now is put after that.

        Raises:
            NotFoundError: The artifact was removed; or the version to start from is not there, or was deleted.
            InvalidInputError: The version to start from is of another artifact.
        """
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
            if not self._done:
                self._take_base(self._first_base(state))
        elif isinstance(self._start, int | Version):
            raise self._repo.no_artifact(self._artifact.name)
        self._upload = Upload(
            self._repo.store,
            index=self._repo.index,
            codec=self._repo.codec,
            threads=self._repo.threads,
            new_id=self._repo.author.new_id,
            nodes=self._repo.reader,
            link=self._repo.link,
            cache=self._repo.cache,
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

    def add(
        self,
        path: str | os.PathLike[str],
        at: str | None = None,
        *,
        skip_special: bool = False,
        length: int | None = None,
    ) -> None:
        """Put a file at ``at`` (default: its name), or a folder's contents under ``at`` (default: the root).

        A folder takes the whole prefix: what the base has there and the folder has not is dropped, so that getting the
        version gives the folder back. What this transaction added before stays. Symlinks to files are read as files, to
        folders followed. Files that did not change since they were last added are not read again. A folder ``.mandapa``
        directly in the folder is left out, and what the base has of that name stays.

        With ``length`` exactly so many of a file's first bytes are put, and the file may be appended to meanwhile.

        Raises:
            NotFoundError: Nothing is at ``path``, or it vanished meanwhile.
            InvalidInputError: A path that no version can hold, a dangling link, a socket, a device (``skip_special``
                leaves these out), a cycle of links, a file that changed while it was read, or one of fewer bytes than
                ``length``; a ``length`` that is none, or that is given for a folder.
            StorageError: The store failed.
        """
        upload = self._open()
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 0):
            raise InvalidInputError(f"length={length!r}: a number of bytes, 0 or more")
        if self._done:
            return
        source = os.fspath(path)
        if not os.path.exists(source):
            raise NotFoundError(f"there is no file or folder {source!r}")
        if not os.path.isdir(source):
            target = check_path(os.path.basename(os.path.abspath(source)) if at is None else at)
            self._seed()
            stat, row = os.stat(source), self._base.row(target)
            self._changes.put(target, upload.add_file(source, target, stat, base=row, length=length))
            return
        if length is not None:
            raise InvalidInputError(f"{source!r} is a folder: a length goes with a file")
        prefix = check_prefix(at or "")
        if prefix:
            check_path(prefix)
        found = walk(source, skip_special=skip_special)
        self._seed()
        base, changes = self._base, self._changes
        base.read(prefix)
        if not prefix:
            changes.keep(base.under(RESERVED))
        below = f"{prefix}/" if prefix else ""
        targets = [(below + item.path, item) for item in found]
        for (target, _), located in zip(targets, upload.add_files(targets, base.known_row), strict=True):
            changes.puts[target] = located
        changes.claim(prefix, below=True)

    def add_bytes(self, at: str, data: Buffer, *, reserved: bool = False) -> None:
        """Put ``data`` at ``at``.

        With ``reserved`` it goes into the folder ``.mandapa/``, where only the format, and features of it, put assets.

        Raises:
            InvalidInputError: A path that no version can hold; or one that is reserved, or not, unlike ``reserved``.
            StorageError: The store failed.
        """
        upload = self._open()
        if reserved:
            check_reserved(at)
        else:
            check_path(at)
        if not isinstance(data, bytes | bytearray | memoryview):
            raise InvalidInputError(f"add_bytes takes bytes, not {type(data).__name__}")
        if not self._done:
            self._seed()
            self._changes.put(at, upload.add_bytes(at, data, base=self._base.row(at)))

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
            self._changes.put(at, Located(UrlRow(at, url, size, checksum), ()))

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
            self._changes.puts[place] = moved
        self._changes.claim(target, below=one is None)
        self._requires.update(version.requires)
        self._used[version.address] = None

    def remove(self, at: str) -> None:
        """Drop an asset, or a folder with all below it.

        Raises:
            NotFoundError: Nothing is there, in the base or added by this transaction.
        """
        self._open()
        check_prefix(at)
        if not self._done:
            self._changes.remove(at, self._base)

    def alias(self, name: str, *, if_best: tuple[str, Mode] | None = None) -> None:
        """Let an alias name the new version, in the same record: version and alias move together.

        With ``if_best=(metric, "min")``, or ``"max"``, only if the new version's ``metadata[metric]`` is a finite
        number, and better than that of the version which the alias names by then. Equal is not better; no version, or
        one without such a number, is no rival.

        Raises:
            InvalidInputError: Not a possible alias, metric or mode.
        """
        self._open()
        contest = None
        if if_best is not None:
            if not isinstance(if_best, tuple) or len(if_best) != 2:
                raise InvalidInputError(f"if_best={if_best!r}: give a metric and 'min' or 'max', as in ('loss', 'min')")
            contest = Contest.of(*if_best)
        self._aliases[check_label(name)] = contest

    def uses(self, address: str) -> None:
        """Record that the new version was made from that one; no request. A version's number says for ever which.

        Raises:
            InvalidInputError: Not an address.
        """
        self._open()
        parse_address(address)
        self._used[address] = None

    # -- gathering ----------------------------------------------------------------------------------------------------

    def _open(self) -> Upload:
        if self._upload is None or self._over:
            raise ClosedError("use a transaction in a 'with' block, and once")
        return self._upload

    def _report(self, put: int) -> None:
        if self.progress is not None:
            self.progress(put)

    def _first_base(self, state: ArtifactState) -> VersionState | None:
        if self._start == "latest":
            return state.latest()
        return None if self._start is None else self._artifact.look_up(state, self._start)

    def _as_base(self, state: VersionState | None) -> Base:
        return Base(state, self._repo.reader, self._artifact.name)

    def _take_base(self, state: VersionState | None) -> None:
        self._base = self._as_base(state)
        if state is not None:
            self._repo.check_features(state.requires, f"{self._artifact.name}:v{state.op.number}")
            self._bases.append(state)

    def _seed(self) -> None:
        """Offer the base's chunks for sharing."""
        if not self._seeded and self._upload is not None:
            self._seeded = True
            for leaf in self._base.leaves():
                self._upload.seed(leaf)

    def _register(self) -> None:
        """Rule 0: the artifact is in the catalog before anything of it is in the store."""
        if self._log is None:
            self._log = self._artifact.register()

    # -- the version --------------------------------------------------------------------------------------------------

    def _edits(self) -> dict[str, Located | None]:
        return self._changes.upon(self._base)

    def _is_new(self, edits: Mapping[str, Located | None]) -> bool:
        """Whether there is anything to make a version of."""
        return bool(edits or self._message or self._metadata or self._aliases)

    def _commit(self, upload: Upload) -> None:
        edits = self._edits()
        self._changes.check(self._base, edits)
        if not self._is_new(edits):
            self.version = self._of(self._base.state)
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
        """The ops for the slot after ``state``: upon the base that is right there, packs checked after each fence."""
        if state.closed:
            raise NotFoundError(f"the artifact {self._artifact.name!r} was removed meanwhile; nothing was made")
        if self._start == "latest":
            self._follow(state.latest())
        elif self._base.state is not None:
            self._stay(self._base.state, state)
        if self._fenced:
            self._fenced = False
            if self._secure(lambda: self._doubtful(state)):
                self._build(self._edits())
        root, base = self._root, self._base.state
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
            requires=sorted(self._requires.union(self._upload.requires, *[one.requires for one in self._bases])),
        )
        for name, contest in self._aliases.items():
            rival = state.versions.get(state.aliases.get(name, -1))
            if contest is None or contest.wins(self._metadata, rival):
                yield AliasOp(name, state.next_number)

    def _build(self, edits: Mapping[str, Located | None]) -> None:
        """Write the manifest; everything it names is acknowledged when this returns."""
        assert self._upload is not None
        base = self._base
        root = None if base.tree is None else base.tree.root
        if root is not None and base.state is not None and not edits:
            op = base.state.op
            self._root = TreeRoot(root, bytes.fromhex(op.digest), op.assets, op.bytes)
            return
        self._root = edit_tree(base.reader, self._upload, root, edits)
        self._upload.flush()

    def _follow(self, tip: VersionState | None) -> None:
        """Take the newest live version as the base, if what came in between leaves our claims alone."""
        new = self._as_base(tip)
        if new.place == self._base.place:
            return
        clash = self._changes.clashes(self._base, new)
        if clash and not self._ours:
            named = ", ".join(clash[:5]) + (f" and {len(clash) - 5} more" if len(clash) > 5 else "")
            what = "another commit" if tip is None else f"v{tip.op.number}"
            raise ConflictError(
                f"{self._artifact.name}: {what} changed {named} meanwhile; nothing was made: look at it and run again",
                paths=tuple(clash),
            )
        self._take_base(tip)
        edits = self._edits()
        if not self._is_new(edits):
            self.version = self._of(self._base.state)
            raise _NothingToDoError
        self._build(edits)

    def _stay(self, base: VersionState, state: ArtifactState) -> None:
        """Keep to the version that was asked for, which must be live, and is read where it is by now."""
        now = state.versions[base.op.number]
        if now.deleted is not None:
            raise ConflictError(
                f"{self._artifact.name}:v{base.op.number}, the version that this transaction starts from, was deleted "
                f"meanwhile ({now.deleted.at}, by {now.deleted.by}); nothing was made: run it again"
            )
        if now.root != base.root:
            self._take_base(now)
            self._build(self._edits())

    # -- packs that may be on their way out ---------------------------------------------------------------------------

    def _named(self) -> set[bytes]:
        """Every container that the rows put by this transaction need."""
        named: set[bytes] = set()
        for located in self._changes.puts.values():
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
        for path, located in self._changes.puts.items():
            if not bad.isdisjoint(containers_of(self._repo.reader, located)):
                self._changes.puts[path] = self._upload.restore_row(located, bad)
