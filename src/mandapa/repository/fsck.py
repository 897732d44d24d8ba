"""The check of a repository: exactly the invariants of docs/format.md, one after the other; nothing is changed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from mandapa.content.codecs import CODECS, ZSTD, decode
from mandapa.content.fetch import pieces_of, read_pieces
from mandapa.content.index import Piece
from mandapa.content.parallel import in_order
from mandapa.content.tree import Located, NodeReader, Tree, child_address
from mandapa.digest import Hasher, digest
from mandapa.errors import CorruptionError, FormatVersionError, NotFoundError
from mandapa.format.keys import CATALOG, GC, MARKER, container_key, head_key
from mandapa.format.manifest import (
    Branch,
    ChildRow,
    FileRow,
    LargeFileRow,
    Leaf,
    Node,
    NodeAddress,
    NodeCutter,
    Part,
    UrlRow,
    decode_node,
    node_digest,
)
from mandapa.format.pack import KIND_CHUNK, TRAILER_SIZE, read_pack_table
from mandapa.format.records import GC_LIST_BYTES, HEAD_MAX, MARKER_MAX, decode_gc_list, decode_head, decode_marker
from mandapa.format.strict import CONTAINER_MAX
from mandapa.object_store.base import ObjectStore
from mandapa.repository.log import Log
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState, CatalogState, VersionState
from mandapa.repository.version import root_of

__all__ = ["Finding", "FsckReport", "fsck"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where the repository is not as it should be."""

    invariant: str
    """Its number in docs/format.md: ``I1``, ``I2``..."""
    where: str
    """An address, or the key of an object."""
    problem: str


@dataclass(slots=True)
class FsckReport:
    """What a check found."""

    findings: list[Finding] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    """How many ``artifacts``, ``versions``, ``assets``, ``nodes``, ``containers``, ``bytes`` were looked at."""
    hurt: list[str] = field(default_factory=list)
    """Addresses of live versions that cannot be read in full."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def fsck(
    repository: Repository, *, deep: bool = False, progress: Callable[[str, int], None] | None = None
) -> FsckReport:
    """Check every invariant of the format over the whole repository; with ``deep`` every stored byte too.

    A reader like any other: it holds nothing and blames no version that was deleted meanwhile. Requests: one for each
    record, for each manifest node, and one for each 1,000 objects; ``deep`` reads each container twice.
    ``progress`` gets what is being counted and the count so far.

    Raises:
        StorageError: The store failed, so there is no verdict.
    """
    check = _Check(repository, progress)
    check.run(deep)
    return check.report


class _Summary(NamedTuple):
    """What is below a node."""

    digest: bytes
    assets: int
    size: int
    level: int


class _FlawError(CorruptionError):
    """A manifest that cannot be what a version holds, by another invariant than I4."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(message)
        self.invariant = invariant


class _Check:
    def __init__(self, repository: Repository, progress: Callable[[str, int], None] | None) -> None:
        self.report = FsckReport()
        self._repo = repository
        self._store: ObjectStore = repository.store
        self._progress = progress
        self._reader = NodeReader(self._store)
        self._summaries: dict[tuple[NodeAddress, bool], _Summary] = {}
        self._reached: dict[NodeAddress, set[bytes]] = {}
        self._extent: dict[bytes, int] = {}
        self._users: defaultdict[bytes, set[str]] = defaultdict(set)
        self._ordered: set[NodeAddress] = set()
        self._ranges: defaultdict[bytes, set[tuple[int, int, int, bytes]]] = defaultdict(set)
        self._files: dict[tuple[bytes, int], Located] = {}
        self._sizes: dict[str, int] = {}

    def run(self, deep: bool) -> None:
        self._marker()
        catalog = Log(self._store, CATALOG, CatalogState, threads=self._repo.threads, heads=False)
        self._read(catalog, "I2", "catalog")
        known = {id_: name for name, id_ in catalog.state.names.items()} | catalog.state.removed
        live: list[tuple[str, Log[ArtifactState], VersionState]] = []
        for id_, name in sorted(known.items(), key=lambda item: item[1]):
            log = Log(self._store, id_, ArtifactState, threads=self._repo.threads, heads=False)
            self._read(log, "I3", name)
            self._count("artifacts")
            if not log.state.closed:
                if id_ in catalog.state.removed:
                    self._found("I3", name, "the artifact was removed, but its log was not closed")
                live += [(name, log, log.state.versions[number]) for number in log.state.live()]
        self._strangers(set(known))
        for name, log, version in live:
            self._version(name, log, version)
        self._containers(live)
        self._lists()
        if deep:
            self._deep()
            self._contents(live)

    def _marker(self) -> None:
        try:
            decode_marker(self._store.get(MARKER, limit=MARKER_MAX), key=MARKER)
        except (NotFoundError, CorruptionError, FormatVersionError) as error:
            self._found("I1", MARKER, error)

    def _strangers(self, known: set[str]) -> None:
        """No log is of an artifact that was never registered."""
        logs = {info.key.split("/")[1] for info in self._store.list("log/")} - known
        if logs:  # registered since the catalog was read, perhaps
            with suppress(CorruptionError, FormatVersionError):  # found by I2
                self._repo.catalog.refresh()
            catalog = self._repo.catalog.state
            logs -= {*catalog.names.values(), *catalog.removed}
        for log in sorted(logs):
            self._found("I3", f"log/{log}", "is the log of no artifact that was ever registered")

    def _found(self, invariant: str, where: str, problem: object) -> None:
        self.report.findings.append(Finding(invariant, where, str(problem)))

    def _count(self, what: str, more: int = 1) -> None:
        self.report.checked[what] += more
        if self._progress is not None:
            self._progress(what, self.report.checked[what])

    def _read(self, log: Log[CatalogState] | Log[ArtifactState], invariant: str, where: str) -> None:
        """Records without gaps, sealed, chained, each op fitting the state before it; and the head says the same."""
        try:
            log.refresh()
        except (CorruptionError, FormatVersionError) as error:
            self._found(invariant, where, error)
        twice = [txn for txn, times in Counter(record.txn for record in log.records).items() if times > 1]
        if twice:
            self._found(invariant, where, f"the transaction {twice[0]} is in the log twice")
        try:
            lines = decode_head(self._store.get(head_key(log.id), limit=HEAD_MAX), key=head_key(log.id))
        except NotFoundError:
            return
        except CorruptionError as error:
            self._found("I9", head_key(log.id), error)
            return
        # One whose last line is not the log's does not count, and is no fault.
        if lines and lines[-1:] == log.lines[len(lines) - 1 : len(lines)] and lines != log.lines[: len(lines)]:
            self._found("I9", head_key(log.id), "does not hold the log's records")

    def _version(self, name: str, log: Log[ArtifactState], version: VersionState) -> None:
        where = f"{name}:v{version.op.number}"
        try:
            self._repo.check_features(version.requires, where)
            root = root_of(version.root)
            summary = self._node(root, last=True)
            self._use(root, where)
        except NotFoundError as error:
            if self._still_wanted(log, version):
                self._hurt("I4", where, error)
            return
        except _FlawError as error:
            self._hurt(error.invariant, where, error)
            return
        except (CorruptionError, FormatVersionError) as error:
            self._hurt("I4", where, error)
            return
        self._count("versions")
        top = self._reader.load(root)
        if isinstance(top, Branch) and len(top.rows) == 1:
            self._found("I5", where, "the root of its manifest has one child alone")
        self._paths(root, where)
        op = version.op
        if summary.digest.hex() != op.digest:
            self._hurt("I6", where, "its content has another digest than its record says")
        if (summary.assets, summary.size) != (op.assets, op.bytes):
            self._found("I6", where, f"holds {summary.assets} assets, {summary.size} bytes; its record says otherwise")

    def _paths(self, root: NodeAddress, where: str) -> None:
        """Paths ascend over the whole tree, and none is both a file and a folder."""
        if root in self._ordered:
            return
        self._ordered.add(root)
        last = ""
        open_files: list[str] = []  # files whose names the current path starts with
        for located in Tree(self._reader, root).rows():
            path = located.row.path
            if path <= last:
                self._hurt("I5", where, f"{path!r} does not come after {last!r}")
            last = path
            while open_files and not path.startswith(open_files[-1]):
                open_files.pop()
            for file in open_files:
                if path.startswith(f"{file}/"):
                    self._found("I5", where, f"{file!r} is a file and a folder")
            open_files.append(path)

    def _hurt(self, invariant: str, where: str, problem: object) -> None:
        self._found(invariant, where, problem)
        if where not in self.report.hurt:
            self.report.hurt.append(where)

    @staticmethod
    def _still_wanted(log: Log[ArtifactState], version: VersionState) -> bool:
        """Whether, after another look, the log still says that the version is live and stored there."""
        with suppress(CorruptionError, FormatVersionError):  # found by I3
            log.refresh()
        state = log.state
        return not state.closed and state.is_live(version.op.number, version.root)

    # -- manifests ----------------------------------------------------------------------------------------------------

    def _node(self, address: NodeAddress, *, last: bool) -> _Summary:
        """Check a node and all below it, once however many versions share it; ``last``: none follows on its level."""
        known = self._summaries.get((address, last))
        if known is None:
            known = self._summaries[address, last] = self._check_node(address, last)
        return known

    def _check_node(self, address: NodeAddress, last: bool) -> _Summary:
        node = self._reader.load(address)
        key = container_key(address.container)
        if isinstance(node, Part):
            raise CorruptionError(f"{key}: a list of chunks where a node of assets should be", key=key)
        self._count("nodes")
        reached = self._reached[address] = {address.container}
        self._extend(address.container, address.offset + address.stored)
        self._ranges[address.container].add((address.offset, address.stored, ZSTD, address.hash))
        level = node.level if isinstance(node, Branch) else 0
        needed: set[int] = set()
        if isinstance(node, Leaf):
            for row in node.rows:
                needed |= self._row(Located(row, node.containers), reached)
            self._count("assets", len(node.rows))
            assets, size = len(node.rows), sum([row.size or 0 for row in node.rows])
        else:
            for at, child in enumerate(node.rows):
                self._child(node, child, key, reached, last=last and at == len(node.rows) - 1)
                needed.add(child.container)
            assets, size = sum([row.assets for row in node.rows]), sum([row.size for row in node.rows])
        if needed != set(range(len(node.containers))) or len(set(node.containers)) != len(node.containers):
            self._found("I5", key, "a manifest node's table names a container twice, or one that no row needs")
        cutter = NodeCutter(level)
        ends = [cutter.ends_after(row.path) for row in node.rows]
        if any(ends[:-1]) or not (last or ends[-1]):
            self._found("I5", key, "a manifest node does not end where the format says")
        return _Summary(node_digest(node), assets, size, level)

    def _child(self, branch: Branch, row: ChildRow, key: str, reached: set[bytes], *, last: bool) -> None:
        address = child_address(row, branch.containers)
        below = self._node(address, last=last)
        node = self._reader.load(address)
        if isinstance(node, Part) or below.level != branch.level - 1 or [r.path for r in node.rows[:1]] != [row.path]:
            raise _FlawError("I5", f"{key}: the node at {row.path!r} starts elsewhere, or is of another level")
        if (below.digest, below.assets, below.size) != (row.digest, row.assets, row.size):
            raise _FlawError("I6", f"{key}: the node at {row.path!r} does not hold what its parent says")
        reached |= self._reached[address]

    def _row(self, located: Located, reached: set[bytes]) -> set[int]:
        """Note what a row needs; gives the container numbers that it uses."""
        row, table = located
        if isinstance(row, UrlRow):
            return set()
        pieces = self._pieces(located)
        self._files.setdefault(_content(row, pieces), located)
        for piece in pieces:
            for one in piece.chain():
                self._chunk(one, row.path)
                reached.add(one.container)
        if isinstance(row, LargeFileRow):
            for part in row.parts:
                self._part(self._reader.load(child_address(part, table)), row.path)
                self._extend(table[part.container], part.offset + part.stored)
                self._ranges[table[part.container]].add((part.offset, part.stored, ZSTD, part.hash))
                reached.add(table[part.container])
            return {part.container for part in row.parts}
        return {number for chunk in row.chunks for number in chunk.numbers()}

    def _pieces(self, located: Located) -> list[Piece]:
        row, table = located
        if isinstance(row, LargeFileRow):
            for address in row.parts:
                part = self._reader.load(child_address(address, table))
                if not isinstance(part, Part) or sum([chunk.raw for chunk in part.rows]) != address.raw:
                    raise _FlawError("I5", f"a part of {row.path!r} does not hold the bytes that its row says")
        return list(pieces_of(located, self._reader.load))

    def _part(self, part: Node, path: str) -> None:
        if isinstance(part, Part):
            needed = {number for chunk in part.rows for number in chunk.numbers()}
            if needed != set(range(len(part.containers))) or len(set(part.containers)) != len(part.containers):
                self._found("I5", path, "a part's table names a container twice, or one that no chunk needs")

    def _chunk(self, piece: Piece, path: str) -> None:
        self._extend(piece.container, piece.offset + piece.stored)
        self._ranges[piece.container].add((piece.offset, piece.stored, piece.codec, piece.hash))
        codec = CODECS.get(piece.codec)
        if codec is None:
            raise _FlawError("I6", f"{path!r} uses the codec {piece.codec}, which this mandapa does not have")
        if codec.needs_base != (piece.base is not None):
            self._found("I6", path, f"a chunk of codec {codec.feature} has a base, or lacks one")

    def _extend(self, container: bytes, end: int) -> None:
        if end > self._extent.get(container, 0):
            self._extent[container] = end

    def _use(self, root: NodeAddress, where: str) -> None:
        for container in self._reached[root]:
            self._users[container].add(where)

    # -- objects ------------------------------------------------------------------------------------------------------

    def _containers(self, live: list[tuple[str, Log[ArtifactState], VersionState]]) -> None:
        """Every container that is named is there, and long enough for what is named in it."""
        for prefix in ("packs/", "meta/"):
            self._sizes.update((info.key, info.size) for info in self._store.list(prefix))
        by_address = {f"{name}:v{version.op.number}": (log, version) for name, log, version in live}
        for container, end in sorted(self._extent.items()):
            key = container_key(container)
            size = self._sizes.get(key)
            self._count("containers")
            if size is not None and size >= end + TRAILER_SIZE:
                self._count("bytes", size)
                continue
            problem = f"{key} is missing" if size is None else f"{key} is cut: {size} bytes"
            for where in sorted(self._users[container]):
                if self._still_wanted(*by_address[where]):
                    self._hurt("I7", where, problem)

    def _lists(self) -> None:
        for info in self._store.list(GC):
            try:
                data = self._store.get(info.key, limit=GC_LIST_BYTES)
                if decode_gc_list(data, key=info.key).epoch != info.key.removeprefix(GC):
                    self._found("I10", info.key, "holds the list of another epoch")
            except NotFoundError:
                continue
            except (CorruptionError, FormatVersionError) as error:
                self._found("I10", info.key, error)

    def _deep(self) -> None:
        """Every container verifies, and every chunk in it decodes to its hash."""
        named = {container_key(container): container for container in self._extent}

        def container(key: str) -> list[str]:
            try:
                data = self._store.get(key, limit=CONTAINER_MAX)
            except NotFoundError:
                return []  # a gc took it meanwhile; a named one was looked for before
            except CorruptionError as error:
                return [str(error)]
            return list(_broken(memoryview(data), key, self._ranges.get(named.get(key, b""), set())))

        for key, problems in zip(
            list(self._sizes), in_order(container, list(self._sizes), threads=self._repo.threads), strict=True
        ):
            for problem in problems:
                users = sorted(self._users.get(named.get(key, b""), ()))
                for where in users:
                    self._hurt("I8", where, problem)
                if not users:
                    self._found("I8", key, problem)
            self._count("bytes read", self._sizes[key])

    def _contents(self, live: list[tuple[str, Log[ArtifactState], VersionState]]) -> None:
        """Every file's chunks make its digest; each way to make a file is read once, however many versions have it."""
        problems: dict[tuple[bytes, int], str] = {}
        for content, located in self._files.items():
            row = located.row
            assert isinstance(row, FileRow | LargeFileRow)
            try:
                hasher = Hasher()
                pieces = pieces_of(located, self._reader.load)
                for _, data in read_pieces(self._store, pieces, path=row.path, threads=self._repo.threads):
                    hasher.update(data)
                if hasher.digest() != row.digest:
                    problems[content] = "the chunks are whole, but do not make the asset's digest"
            except (NotFoundError, CorruptionError, FormatVersionError) as error:
                problems[content] = str(error)
        for name, log, version in live if problems else ():
            where = f"{name}:v{version.op.number}"
            if where not in self.report.hurt and self._still_wanted(log, version):
                self._blame(where, version, problems)

    def _blame(self, where: str, version: VersionState, problems: dict[tuple[bytes, int], str]) -> None:
        """Name a version by the files of which something is wrong."""
        for located in Tree(self._reader, root_of(version.root)).rows():
            row = located.row
            if isinstance(row, UrlRow):
                continue
            problem = problems.get(_content(row, self._pieces(located)))
            if problem is not None:
                self._hurt("I8", where, f"{row.path}: {problem}")


def _content(row: FileRow | LargeFileRow, pieces: list[Piece]) -> tuple[bytes, int]:
    """Equal for files of one digest made of the same chunks."""
    return row.digest, hash(tuple(pieces))


def _broken(data: memoryview, key: str, named: set[tuple[int, int, int, bytes]]) -> Iterator[str]:
    """What is wrong with a whole container, in which manifests name these ranges."""
    found = set()
    try:
        for entry in read_pack_table(data, key=key):
            found.add((entry.offset, entry.stored, entry.codec, entry.hash))
            stored = data[entry.offset : entry.offset + entry.stored]
            try:
                if entry.kind != KIND_CHUNK:
                    decode_node(stored, entry.hash, key=key)
                elif entry.codec in CODECS and CODECS[entry.codec].needs_base:
                    continue  # the table does not say of which base: whoever reads the files sees whether it decodes
                elif digest(decode(entry.codec, stored, entry.raw)) != entry.hash:
                    yield f"{key}: the chunk at {entry.offset} is not what was stored"
            except (CorruptionError, FormatVersionError) as error:
                yield f"{key}: the chunk at {entry.offset}: {error}"
    except (CorruptionError, FormatVersionError) as error:
        yield str(error)
        return
    for offset, *_ in sorted(named - found):
        yield f"{key}: a manifest names a chunk at {offset} that its table does not have"
