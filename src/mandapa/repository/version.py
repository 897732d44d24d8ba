"""A version: one immutable state of an artifact, read lazily and verified."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from mandapa.content.download import DownloadResult, download
from mandapa.content.ranges import RangeReader
from mandapa.content.reader import AssetFile
from mandapa.content.tree import Located, Tree
from mandapa.errors import CorruptionError, InvalidInputError, NotFoundError, SecurityError
from mandapa.format.keys import MARKER, container_key
from mandapa.format.manifest import NodeAddress, UrlRow
from mandapa.format.records import Root
from mandapa.format.strict import RESERVED
from mandapa.repository.log import Log
from mandapa.repository.state import ArtifactState, VersionState, parse_time

if TYPE_CHECKING:
    from mandapa.content.tensors.arrays import Frameworks
    from mandapa.repository.artifact import Artifact
    from mandapa.repository.tensors import TensorChange, Tensors

__all__ = ["Asset", "Diff", "Version", "address_of", "relabel", "root_of"]

_T = TypeVar("_T")

_BEFORE_ROOT = 96 << 10
"""Bytes that are read with a root node: the lists of about 1,000 chunks stand there, and small chunks."""


def root_of(root: Root) -> NodeAddress:
    """The address of a version's root node from its record."""
    try:
        kind, _, id_ = root.object.partition("/")
        container = {"packs": b"p", "meta": b"m"}[kind] + bytes.fromhex(id_)
        hash_ = bytes.fromhex(root.hash)
    except (KeyError, ValueError):
        raise CorruptionError(f"{root.object!r} is no container", key=root.object) from None
    if len(container) != 17 or len(hash_) != 32 or root.offset < 16 or root.length < 1:
        raise CorruptionError(f"{root.object!r} is no container", key=root.object)
    return NodeAddress(container, root.offset, root.length, hash_)


def address_of(node: NodeAddress) -> Root:
    """The address of a root node as a record names it."""
    return Root(container_key(node.container), node.offset, node.stored, node.hash.hex())


def relabel(located: Located, path: str) -> Located:
    """The same asset under another path."""
    return Located(msgspec.structs.replace(located.row, path=path), located.table)


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, or one URL, in a version."""

    path: str
    kind: str
    """``file`` or ``url``."""
    size: int | None
    """Bytes; None for a URL whose size is not known."""
    digest: str
    """BLAKE3 of the content, hex; empty for a URL."""
    executable: bool = False
    url: str = ""
    checksum: str = ""
    """Of a URL, as its owner reports it: ``scheme:value``."""

    @classmethod
    def from_row(cls, located: Located) -> Asset:
        """The asset that a manifest row describes."""
        row = located.row
        if isinstance(row, UrlRow):
            return cls(row.path, "url", row.size, "", url=row.url, checksum=row.checksum)
        return cls(row.path, "file", row.size, row.digest.hex(), executable=row.mode == 1)


@dataclass(frozen=True, slots=True)
class Diff:
    """What turns one version into another."""

    added: tuple[Asset, ...]
    removed: tuple[Asset, ...]
    changed: tuple[tuple[Asset, Asset], ...]
    """(before, after) of assets at one path."""
    metadata: Mapping[str, tuple[Any, Any]]
    """Key -> (before, after) where they differ; None where the key is missing."""

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.added or self.removed or self.changed or self.metadata)


class Assets(Mapping[str, Asset]):
    """Path -> asset, sorted by path; reads the manifest as far as it is asked for."""

    def __init__(self, version: Version) -> None:
        self._version = version

    def __getitem__(self, path: str) -> Asset:
        """The asset at ``path``; raises `KeyError`. As many requests as the manifest has levels, less those cached."""
        located = self._version.reading(lambda tree: tree.get(path))
        if located is None:
            raise KeyError(path)
        return Asset.from_row(located)

    def __iter__(self) -> Iterator[str]:
        """Paths in byte order of their UTF-8."""
        return (located.row.path for located in self._version.rows())

    def __len__(self) -> int:
        """The number of assets, from the record: no request."""
        return self._version.asset_count

    def values(self) -> Any:
        """Assets in order of path; one pass over the manifest."""
        return [Asset.from_row(located) for located in self._version.rows()]

    def items(self) -> Any:
        """(path, asset) in order of path; one pass over the manifest."""
        return [(asset.path, asset) for asset in self.values()]


class Version:
    """One immutable state of an artifact. Pinned: it never turns into another version.

    Nothing is held in the store for a reader: when its bytes are gone because the version was deleted, reading raises
    `NotFoundError` that says so; when they were moved by a repack, reading goes on there.
    """

    def __init__(self, artifact: Artifact, log: Log[ArtifactState], state: VersionState, path: str = "") -> None:
        self._artifact = artifact
        self._log = log
        self._repo = artifact.repository
        self._state = state
        self.path = path
        """What the address named inside the version; empty: all of it."""

    def __repr__(self) -> str:
        """The address, digest and size, for people."""
        return f"<Version {self.address} {self.digest[:12]} {self.asset_count} assets, {self.size:,} bytes>"

    def __eq__(self, other: object) -> bool:
        """Equal when they are the same version of the same artifact of the same repository."""
        if not isinstance(other, Version):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        """Fits `__eq__`."""
        return hash(self._key())

    def _key(self) -> tuple[str, str, int]:
        return self._repo.id, self._state.record.txn, self.number

    def is_in(self, state: ArtifactState) -> bool:
        """Whether it is one of the versions of ``state``, deleted or not: for the layers of this package."""
        found = state.versions.get(self.number)
        return found is not None and found.record.txn == self._state.record.txn

    @property
    def artifact(self) -> Artifact:
        """The artifact that this is a version of."""
        return self._artifact

    @property
    def number(self) -> int:
        """12 for ``v12``."""
        return self._state.op.number

    @property
    def address(self) -> str:
        """``name:v12``."""
        return f"{self._artifact.name}:v{self.number}"

    @property
    def message(self) -> str:
        """What its maker said."""
        return self._state.op.message

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What its maker attached, as JSON values."""
        return dict(self._state.op.metadata)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was noted about the version after it was made."""
        return dict(self._state.facts)

    @property
    def digest(self) -> str:
        """What the version is: 64 hex digits, equal for equal content however it came about or is stored."""
        return self._state.op.digest

    @property
    def created(self) -> datetime:
        """Aware, UTC, by the clock of the machine that made it."""
        return parse_time(self._state.record.at)

    @property
    def created_by(self) -> str:
        """Who made it, as that machine said."""
        return self._state.record.by

    @property
    def run(self) -> str:
        """The run that made it, or empty."""
        return self._state.record.run

    @property
    def used(self) -> tuple[str, ...]:
        """Addresses of the versions that went into it."""
        return self._state.record.used

    @property
    def requires(self) -> tuple[str, ...]:
        """Features of the format that a reader of it must have."""
        return self._state.requires

    @property
    def parent(self) -> int | None:
        """The number of the version it was made from, or None."""
        return self._state.op.parent

    @property
    def asset_count(self) -> int:
        """How many assets it holds; no request."""
        return self._state.op.assets

    @property
    def size(self) -> int:
        """Bytes of all its assets together, URLs of known size included; no request."""
        return self._state.op.bytes

    @property
    def added(self) -> int:
        """Bytes that its commit put into the store; no request."""
        return self._state.op.added

    @property
    def names(self) -> tuple[str, ...]:
        """Aliases and tags that name it, as of the last look at the log, ``latest`` included; no request."""
        state = self._log.state
        latest = state.latest()
        first = ("latest",) if latest is not None and latest.op.number == self.number else ()
        return (*first, *state.names_of(self.number))

    @property
    def assets(self) -> Mapping[str, Asset]:
        """Its assets by path, sorted, read lazily."""
        return Assets(self)

    @property
    def tree(self) -> Tree:
        """The manifest, for those who walk it.

        Raises:
            FormatVersionError: The version needs a feature that this mandapa lacks.
            CorruptionError: The manifest is not the one of the version's digest.
        """
        self._repo.check_features(self._state.requires, self.address)
        tree = Tree(self._repo.reader, root_of(self._state.root))
        if self._repo.reader.digest(tree.root).hex() != self.digest:
            raise CorruptionError(f"{self.address}: its manifest holds something else than its record says")
        return tree

    def rows(self, prefix: str = "") -> Iterator[Located]:
        """Manifest rows in order of path, going on where a repack moved them."""
        last = ""
        while True:
            seen = last
            try:
                for located in self.tree.rows(prefix):
                    path = located.row.path
                    if path <= seen:
                        continue
                    if path <= last:
                        raise CorruptionError(f"{self.address}: its manifest lists {path!r} after {last!r}")
                    last = path
                    yield located
                return
            except NotFoundError as error:
                self.follow(error)

    def reading(self, look: Callable[[Tree], _T]) -> _T:
        """What ``look`` finds in the manifest, after following a repack if need be."""
        while True:
            try:
                return look(self.tree)
            except NotFoundError as error:
                self.follow(error)

    def follow(self, error: NotFoundError) -> None:
        """An object of this version is not there: find out why. Source: docs/format.md, "Readers".

        Raises:
            NotFoundError: The version was deleted, or its artifact removed.
            CorruptionError: The log says that the object should be there.
        """
        log = self._log.refresh()
        state = log.versions[self.number]
        if log.closed:
            raise NotFoundError(
                f"the artifact {self._artifact.name!r} was removed, and {self.address} with it"
            ) from error
        if state.deleted is not None:
            raise NotFoundError(f"{self.address} was deleted ({state.deleted.at}, by {state.deleted.by})") from error
        if state.root == self._state.root:
            raise CorruptionError(f"{self.address}: {error}; run 'mandapa fsck'") from error
        self._state = state

    def _follow_either(self, other: Version, error: NotFoundError) -> None:
        """An object of one of two versions is not there: go on where one of them has moved."""
        failures: list[NotFoundError | CorruptionError] = []
        for version in (self, other):
            try:
                return version.follow(error)
            except (NotFoundError, CorruptionError) as failure:
                failures.append(failure)
        raise next((failure for failure in failures if isinstance(failure, NotFoundError)), failures[0])

    def open(self, path: str) -> io.BufferedReader:
        """A seekable, read-only binary file over one asset; it fetches, and verifies, only what is read.

        Raises:
            NotFoundError: No such asset, or the version was deleted.
            InvalidInputError: The asset is a URL.
            CorruptionError: While reading: stored bytes are not what was written.
        """
        located = self._file(path)
        seen = self._state.root

        def moved() -> Located:
            nonlocal seen
            if self._state.root == seen:
                self.follow(NotFoundError(f"bytes of {path!r} are not there"))
            seen = self._state.root
            return self._file(path)

        raw = AssetFile(
            located,
            store=self._repo.store,
            load=self._repo.reader.load,
            moved=moved,
            cache=self._repo.cache,
            threads=self._repo.threads,
        )
        return io.BufferedReader(raw, 128 << 10)

    def tensors(self, path: str) -> Tensors:
        """The tensors of a file by name, in the order of their bytes; only its structure is read, nothing unpickled.

        Safetensors, torch zips (``torch.save``), ``.distcp`` files, ``.npz`` and ``.npy``; a file's bytes say what it
        is, not its name. Two round trips; of a ``.npz`` the first chunk of each array is read.

        Raises:
            NotFoundError: No such asset, or the version was deleted.
            InvalidInputError: The file cannot be read by tensors; says why.
            CorruptionError: Stored bytes are not what was written.
        """
        from mandapa.repository.tensors import Tensors

        return Tensors(self, path)

    def load_tensors(
        self,
        path: str,
        names: str | Sequence[str] | None = None,
        *,
        framework: Frameworks = "numpy",
        into: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Tensors of a file, to the bit, by range reads; nothing is unpickled.

        All new arrays share one allocation, which stays as long as any of them does. One tensor of a large file costs
        three round trips, and its own bytes and less than 256 KiB; more for one that shares its chunk with others, and
        where a list of more than about 1,000 chunks has to be found first.

        Args:
            path: Of the file.
            names: Which; None: all, or those of ``into``.
            framework: ``numpy`` (bf16 and fp8 need ml_dtypes) or ``torch`` (on the CPU).
            into: Arrays to fill instead of new ones, by name: in C order, of the tensor's dtype and shape.

        Raises:
            NotFoundError: No such asset or tensor, or the version was deleted.
            InvalidInputError: The file, or a tensor, cannot be read so; the framework is not installed or lacks a
                dtype; something in ``into`` does not fit.
            CorruptionError: Stored bytes are not what was written.
        """
        from mandapa.repository.tensors import load_tensors

        return load_tensors(self, path, names, framework, into)

    def diff_tensors(self, other: Version, path: str, *, stat: bool = False) -> list[TensorChange]:
        """Which tensors of a file, or of what it is in ``other``, differ there; sorted by name.

        Where the hashes of chunks tell, nothing is read but structure; small tensors that share a chunk are compared.
        With ``stat`` those that changed are read, a million elements at a time (a strided view as a whole).

        Args:
            other: A version of the same repository.
            path: Of the file in both versions.
            stat: Whether to say by how much.

        Raises:
            NotFoundError: No such asset in one of them, or it was deleted.
            InvalidInputError: One of the files cannot be read by tensors; says why.
            CorruptionError: Stored bytes are not what was written.
        """
        from mandapa.repository.tensors import compare_tensors

        return compare_tensors(self, other, path, stat=stat)

    def ranges(self, path: str) -> RangeReader:
        """A file for reads at many places, a few round trips for all; for the layers of this package.

        Raises:
            NotFoundError: No such asset, or the version was deleted.
            InvalidInputError: The asset is a URL, or a folder.
        """
        repo = self._repo
        while True:
            try:
                store = repo.reader.approach(root_of(self._state.root), _BEFORE_ROOT)
                break
            except NotFoundError as error:
                self.follow(error)
        return RangeReader(
            self._file(path),
            store=store,
            load=partial(repo.reader.load_from, store),
            cache=repo.cache,
            threads=repo.threads,
        )

    def _file(self, path: str) -> Located:
        located = self.reading(lambda tree: tree.get(path))
        if located is None:
            if next(iter(self.rows(f"{path}/" if path else "")), None) is not None:
                raise InvalidInputError(f"{self.address}/{path} is a folder: download it, or name a file in it")
            raise NotFoundError(f"{self.address} has no asset {path!r}")
        if isinstance(located.row, UrlRow):
            raise InvalidInputError(f"{self.address}/{path} is a URL, which mandapa does not fetch: {located.row.url}")
        return located

    def download(
        self,
        dest: str | os.PathLike[str],
        only: str | Sequence[str] | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> DownloadResult:
        """Write the version's files below ``dest``, byte for byte, each one atomically.

        Files that are there and equal stay; different ones are replaced; others are left alone, so an interrupted
        download goes on where it was. ``only``: a pattern, or several, over the whole path (`fnmatch`, case matters).
        URLs are not fetched; the result lists them. ``os.fspath(result)`` is ``dest``. ``progress`` is called, from any
        thread, with the bytes that were written since the last call.

        Raises:
            NotFoundError: The version was deleted.
            SecurityError: A symlink below ``dest`` stands in the way of a folder; or a file would go between the
                objects of a repository that is in ``dest``, or below.
            InvalidInputError: Two paths are one on this file system; nothing was written.
            CorruptionError: Stored bytes are not what was written; the file they belong to was not touched.
            StorageError: The store failed, or the disk is full.
        """
        patterns = None if only is None else [only] if isinstance(only, str) else list(only)
        keep = None if patterns is None else lambda path: any(fnmatchcase(path, pattern) for pattern in patterns)
        return self.restore(dest, keep=keep, progress=progress)

    def restore(
        self,
        dest: str | os.PathLike[str],
        *,
        keep: Callable[[str], bool] | None = None,
        rename: Callable[[str], str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> DownloadResult:
        """`download` for callers that choose by function, and may put files elsewhere below ``dest``."""
        self._spare_repository(os.path.join(dest, RESERVED), keep, rename)
        originals: dict[str, str] = {}
        roots: dict[str, Root] = {}
        first = self._state.root

        def rows() -> Iterator[Located]:
            for located in self.rows():
                path = located.row.path
                if keep is not None and not keep(path):
                    continue
                if rename is None:
                    yield located
                else:
                    originals[rename(path)] = path
                    yield relabel(located, rename(path))

        def moved(target: str) -> Located:
            """Where the row for ``target`` is now; another thread may have followed the move already."""
            path = originals.get(target, target)
            if roots.get(path, first) == self._state.root:
                self.follow(NotFoundError(f"bytes of {path!r} are not there"))
            roots[path] = self._state.root
            return relabel(self._file(path), target)

        return download(
            rows(),
            dest,
            store=self._repo.store,
            load=self._repo.reader.load,
            index=self._repo.index,
            cache=self._repo.cache,
            moved=moved,
            threads=self._repo.threads,
            progress=progress,
        )

    def _spare_repository(
        self, place: str, keep: Callable[[str], bool] | None, rename: Callable[[str], str] | None
    ) -> None:
        """What a version has in ``.mandapa/`` must not end up between the objects of a repository that is there."""
        if rename is None and os.path.exists(os.path.join(place, MARKER)):
            for path in self.reading(lambda tree: [located.row.path for located in tree.under(RESERVED)]):
                if keep is None or keep(path):
                    raise SecurityError(
                        f"{place} is a repository, and {self.address} has {path!r}: get it into another folder, or "
                        "only what you need"
                    )

    def diff(self, other: Version) -> Diff:
        """What turns this version into ``other``. Parts of the manifests that are equal are not read."""
        if other.artifact.repository.id != self._repo.id:
            raise InvalidInputError("both versions of a diff belong to one repository")
        while True:
            try:
                pairs = list(self.tree.diff(other.tree))
                break
            except NotFoundError as error:
                self._follow_either(other, error)
        before = [(a and Asset.from_row(a), b and Asset.from_row(b)) for a, b in pairs]
        mine, theirs = self.metadata, other.metadata
        return Diff(
            added=tuple(b for a, b in before if b is not None and a is None),
            removed=tuple(a for a, b in before if a is not None and b is None),
            changed=tuple((a, b) for a, b in before if a is not None and b is not None),
            metadata={
                key: (mine.get(key), theirs.get(key))
                for key in sorted({*mine, *theirs})
                if mine.get(key) != theirs.get(key) or (key in mine) != (key in theirs)
            },
        )
