"""The check of a repository: exactly the invariants of docs/format.md, one after the other; nothing is changed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from mandapa.content.fetch import pieces_of, read_pieces
from mandapa.content.index import Piece
from mandapa.content.parallel import in_order
from mandapa.content.tree import Located, NodeReader, child_address
from mandapa.digest import Hasher
from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError, NotFoundError
from mandapa.format.keys import CATALOG, GC, MARKER, container_key, head_key, log_prefix, parse_seq
from mandapa.format.manifest import Branch, FileRow, LargeFileRow, Leaf, NodeAddress, UrlRow
from mandapa.format.pack import TRAILER_SIZE
from mandapa.format.records import (
    GC_LIST_BYTES,
    HEAD_MAX,
    MARKER_MAX,
    decode_gc_list,
    decode_head,
    decode_marker,
)
from mandapa.format.strict import is_id
from mandapa.object_store.base import ObjectInfo, ObjectStore
from mandapa.object_store.retry import RetryingObjectStore
from mandapa.repository.inspection import Inspection
from mandapa.repository.log import Log
from mandapa.repository.losses import Damage, Loss, Losses, content_of
from mandapa.repository.repository import Repository
from mandapa.repository.scrub import Flaw, Named, Sample, Sampled, container_of, examine
from mandapa.repository.state import ArtifactState, CatalogState, VersionState
from mandapa.repository.version import root_of

__all__ = ["Finding", "FsckReport", "Loss", "Sampled", "fsck"]

_State = TypeVar("_State", CatalogState, ArtifactState)

_LARGE = 64 << 20  # bytes of a file that several threads read
_AHEAD = 64  # versions whose roots are read at a time


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
    """Each broken thing once, however many versions need it."""
    checked: Counter[str] = field(default_factory=Counter)
    """How many ``artifacts``, ``versions``, ``assets``, ``nodes``, ``containers``, ``bytes`` were looked at."""
    losses: list[Loss] = field(default_factory=list)
    """Live versions that cannot be read in full, and what of them can."""
    unreadable: list[str] = field(default_factory=list)
    """Artifacts that cannot be opened, because of their logs; by name, or by id where no name is known."""
    sampled: Sampled | None = None
    """Which bytes were read, of a check of a sample."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def hurt(self) -> list[str]:
        """Addresses of the live versions that cannot be read in full."""
        return [loss.address for loss in self.losses]


def fsck(
    repository: Repository | ObjectStore,
    *,
    deep: bool = False,
    sample: float | None = None,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> FsckReport:
    """Check every invariant of the format over the whole repository; with ``deep`` every stored byte too.

    A reader like any other: it holds nothing and blames no version that was deleted meanwhile. Whatever is broken, it
    goes on with the rest, and says of each version that is hurt what can still be read. Requests: one for each record,
    for each manifest node, and one for each 1,000 objects, several at once; ``deep`` reads each container twice,
    ``sample`` those that it chooses once. Memory: about 500 bytes a manifest node and 200 a container; with ``deep``
    100 more a chunk.

    Args:
        repository: A repository, or the store of one that cannot be opened.
        deep: Whether every byte is read, and every file compared with its digest.
        sample: Instead of that, the share of the stored bytes to read, above 0 and up to 1: of containers chosen by
            chance every chunk is decoded and compared with its hash.
        seed: Chooses them.
        progress: Gets what is being counted and the count so far.

    Raises:
        InvalidInputError: No such share, or a share of a check that is deep.
        StorageError: The store failed, so there is no verdict.
    """
    if sample is not None and (deep or not 0 < sample <= 1):
        raise InvalidInputError(f"sample={sample!r}: a share above 0 and up to 1, and not of a deep check")
    check = _Check(repository, progress)
    check.run(deep, sample, seed)
    return check.report


class _Live(NamedTuple):
    """A version to be looked at."""

    name: str
    log: Log[ArtifactState]
    version: VersionState

    @property
    def address(self) -> str:
        return f"{self.name}:v{self.version.op.number}"

    def still_wanted(self) -> bool:
        """Whether, after another look, the log still says that the version is live and stored there."""
        with suppress(CorruptionError, FormatVersionError):  # found by I3
            self.log.refresh()
        state = self.log.state
        return not state.closed and state.is_live(self.version.op.number, self.version.root)


class _Check:
    def __init__(self, repository: Repository | ObjectStore, progress: Callable[[str, int], None] | None) -> None:
        self.report = FsckReport()
        self._store: ObjectStore
        if isinstance(repository, Repository):
            self._store, self._threads = repository.store, repository.threads
        else:
            self._store, self._threads = RetryingObjectStore(repository), 4
        self._progress = progress
        self._reader = NodeReader(self._store)
        self._damage = Damage()
        self._lost: dict[str, str] = {}

    def run(self, deep: bool, sample: float | None, seed: int) -> None:
        if not self._marker():
            return
        chosen = None if sample is None else Sample(self._listed(), sample, seed)
        named = None
        if deep or chosen is not None:
            named = Named((lambda _: True) if chosen is None else chosen.has, deltas=not deep)
        live = list(self._histories())
        inspection = self._manifests(live, named)
        self._damage.nodes, self._damage.suspects = inspection.nodes, inspection.suspects
        self._containers(inspection.extent, named, chosen)
        self._lists()
        if deep:
            self._contents(live)
        if inspection.trouble or self._lost or self._damage.containers() or self._damage.files:
            self._losses(live)

    # -- what was found -----------------------------------------------------------------------------------------------

    def _found(self, invariant: str, where: str, problem: object) -> None:
        self.report.findings.append(Finding(invariant, where, str(problem)))

    def _count(self, what: str, more: int = 1) -> None:
        self.report.checked[what] += more
        if self._progress is not None:
            self._progress(what, self.report.checked[what])

    # -- marker and logs ----------------------------------------------------------------------------------------------

    def _marker(self) -> bool:
        """Whether the rest can be looked at: not if all of it is of a newer format."""
        try:
            decode_marker(self._store.get(MARKER, limit=MARKER_MAX), key=MARKER)
        except (NotFoundError, CorruptionError) as error:
            self._found("I1", MARKER, error)
        except FormatVersionError as error:
            self._found("I1", MARKER, error)
            return False
        return True

    def _histories(self) -> Iterator[_Live]:
        """The live versions of all artifacts, as far as logs can be read."""
        catalog = self._read(CATALOG, CatalogState, "I2", "catalog")
        lost = bool(self.report.unreadable)
        known = {id_: name for name, id_ in catalog.state.names.items()} | catalog.state.removed
        strangers = self._strangers(set(known), whole=not lost)
        if lost:  # nobody can open anything
            self.report.unreadable = [*sorted(catalog.state.names), *strangers]
        for id_, name in [*sorted(known.items(), key=lambda item: item[1]), *((id_, id_) for id_ in strangers)]:
            log = self._read(id_, ArtifactState, "I3", name)
            self._count("artifacts")
            if not log.state.closed:
                if id_ in catalog.state.removed:
                    self._found("I3", name, f"the artifact {name!r} was removed, but its log was not closed")
                yield from (_Live(name, log, log.state.versions[number]) for number in log.state.live())

    def _strangers(self, known: set[str], *, whole: bool) -> list[str]:
        """No log is of an artifact that was never registered; where the catalog is broken, gives those it may have."""
        logs = {info.key.split("/")[1] for info in self._store.list("log/")} - known
        if logs and whole:  # registered since the catalog was read, perhaps
            catalog = Log(self._store, CATALOG, CatalogState, threads=self._threads)
            with suppress(CorruptionError, FormatVersionError):  # found by I2
                catalog.refresh()
            logs -= {*catalog.state.names.values(), *catalog.state.removed}
        if not whole:
            return sorted(log for log in logs if is_id(log))
        for log in sorted(logs):
            self._found("I3", f"log/{log}", f"log/{log} is the log of no artifact that was ever registered")
        return []

    def _read(self, id_: str, state: Callable[[], _State], invariant: str, where: str) -> Log[_State]:
        """Records without gaps, sealed, chained, each op fitting the state before it; and the head says the same."""
        log = Log(self._store, id_, state, threads=self._threads, heads=False)
        try:
            log.refresh()
        except (CorruptionError, FormatVersionError) as error:
            self._found(invariant, where, error)
            log = self._as_readers_do(log, state, where)
        twice = [txn for txn, times in Counter(record.txn for record in log.records).items() if times > 1]
        if twice:
            self._found(invariant, where, f"the transaction {twice[0]} is in the log twice")
        try:
            lines = decode_head(self._store.get(head_key(id_), limit=HEAD_MAX), key=head_key(id_))
        except NotFoundError:
            return log
        except CorruptionError as error:
            self._found("I9", head_key(id_), error)
            return log
        # One whose last line is not the log's does not count, and is no fault.
        if lines and lines[-1:] == log.lines[len(lines) - 1 : len(lines)] and lines != log.lines[: len(lines)]:
            self._found("I9", head_key(id_), "does not hold the log's records")
        return log

    def _as_readers_do(self, log: Log[_State], state: Callable[[], _State], where: str) -> Log[_State]:
        """A damaged log as its head has it, if that counts; else as far as it can be read, which no reader does."""
        by_head = Log(self._store, log.id, state, threads=self._threads)
        try:
            by_head.refresh()
        except (CorruptionError, FormatVersionError):
            if where not in self.report.unreadable:
                self.report.unreadable.append(where)
        else:
            return by_head
        listed = [parse_seq(info.key) for info in self._store.list(log_prefix(log.id))]
        whole = next((at for at, seq in enumerate(listed) if seq != at), len(listed))
        with suppress(CorruptionError, FormatVersionError):
            log.read_to(whole, threads=self._threads)
        return log

    # -- manifests ----------------------------------------------------------------------------------------------------

    def _manifests(self, live: list[_Live], named: Named | None) -> Inspection:
        """I4 to I6 of every live version, each node once."""
        told: set[tuple[str, str, str]] = set()

        def found(invariant: str, problem: object) -> None:
            fact = (invariant, str(problem), one.name)
            if fact not in told:
                told.add(fact)
                self._found(invariant, one.address, problem)

        inspection = Inspection(self._reader, found=found, count=self._count, ranges=named, threads=self._threads)
        for start in range(0, len(live), _AHEAD):
            some = live[start : start + _AHEAD]
            inspection.preload(address for address in (_root(one) for one in some) if address is not None)
            for one in some:
                self._version(one, inspection, found)
        return inspection

    def _version(self, one: _Live, inspection: Inspection, found: Callable[[str, object], None]) -> None:
        self._count("versions")
        op = one.version.op
        try:
            Repository.check_features(one.version.requires, one.address)
            root = root_of(one.version.root)
        except (CorruptionError, FormatVersionError) as error:
            found("I4", error)
            self._lost[one.address] = str(error)
            return
        summary = inspection.tree(root)
        if summary is None:
            return
        if summary.digest.hex() != op.digest:
            problem = "its content has another digest than its record says"
            found("I6", f"{one.address}: {problem}")
            self._lost[one.address] = problem
        if (summary.assets, summary.size) != (op.assets, op.bytes):
            held = f"holds {summary.assets} assets, {summary.size} bytes; its record says otherwise"
            found("I6", f"{one.address} {held}")

    # -- containers ---------------------------------------------------------------------------------------------------

    def _listed(self) -> Iterator[ObjectInfo]:
        for prefix in ("packs/", "meta/"):
            yield from self._store.list(prefix)

    def _containers(self, extent: dict[bytes, int], named: Named | None, chosen: Sample | None) -> None:
        """Every container that is named is there, and long enough for it; those that are to be read are as written."""
        stored = Counter[str]()
        missing = dict(extent)

        def readable() -> Iterator[tuple[bytes, int]]:
            for info in self._listed():
                container = container_of(info.key)
                if container is None:
                    continue
                stored["containers"] += 1
                stored["bytes"] += info.size
                end = missing.pop(container, None)
                if end is not None:
                    self._count("containers")
                    if info.size >= end + TRAILER_SIZE:
                        self._count("bytes", info.size)
                    else:
                        self._damage.gone[container] = info.size
                        self._found("I7", info.key, f"{info.key} is cut: {info.size} bytes")
                if named is not None and (chosen is None or chosen.has(container)):
                    yield container, info.size

        def look(one: tuple[bytes, int]) -> tuple[bytes, int, list[Flaw]]:
            assert named is not None
            return (*one, examine(self._store, one[0], named))

        read = Counter[str]()
        for container, size, flaws in in_order(look, readable(), threads=self._threads):
            read["containers"] += 1
            read["bytes"] += size
            self._count("bytes read", size)
            for flaw in flaws:
                self._found("I8", container_key(container), flaw.problem)
                if flaw.offset is not None:
                    self._damage.chunks[container, flaw.offset] = flaw.problem
        for container in missing:  # told when a version is found that still needs it
            self._count("containers")
            self._damage.gone[container] = None
        if chosen is not None:
            self.report.sampled = Sampled(
                share=chosen.share,
                seed=chosen.seed,
                containers=read["containers"],
                bytes=read["bytes"],
                of_containers=stored["containers"],
                of_bytes=stored["bytes"],
            )

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

    # -- whole files --------------------------------------------------------------------------------------------------

    def _contents(self, live: list[_Live]) -> None:
        """Every file's chunks make its digest; each way to make a file is read once, however many versions have it."""
        wrong = in_order(self._content, self._files(live), threads=self._threads)
        for one, path, content, problem, key in wrong:
            if not problem:
                continue
            self._damage.files[content] = problem
            if not any(found.where == key for found in self.report.findings):
                self._found("I8", f"{one.address}/{path}", problem)

    def _files(self, live: list[_Live]) -> Iterator[tuple[_Live, Located, tuple[Piece, ...], int]]:
        """Every file that can be read as far as is known, with the first version that has it."""
        nodes: set[bytes] = set()
        contents: set[int] = set()
        gone = self._damage.gone
        for one in live:
            root = _root(one)
            for leaf in () if root is None else self._leaves(root, nodes):
                for row in leaf.rows:
                    if isinstance(row, UrlRow):
                        continue
                    located = Located(row, leaf.containers)
                    with suppress(NotFoundError, CorruptionError, FormatVersionError):  # told where it was met first
                        pieces = tuple(pieces_of(located, self._reader.load))
                        content = content_of(row, pieces)
                        if content not in contents:
                            contents.add(content)
                            if not any(part.container in gone for piece in pieces for part in piece.chain()):
                                yield one, located, pieces, content

    def _leaves(self, address: NodeAddress, seen: set[bytes]) -> Iterator[Leaf]:
        """Leaves that were not met before."""
        if address.hash in seen:
            return
        seen.add(address.hash)
        try:
            node = self._reader.load(address)
        except (NotFoundError, CorruptionError, FormatVersionError):
            return  # told where it was met first
        if isinstance(node, Leaf):
            yield node
        elif isinstance(node, Branch):
            for row in node.rows:
                yield from self._leaves(child_address(row, node.containers), seen)

    def _content(self, file: tuple[_Live, Located, tuple[Piece, ...], int]) -> tuple[_Live, str, int, str, str]:
        """What is wrong with a file, and the key of the object that is to blame, if it is one."""
        one, located, pieces, content = file
        row = located.row
        assert isinstance(row, FileRow | LargeFileRow)
        hasher = Hasher()
        try:
            threads = self._threads if row.size > _LARGE else 0
            for _, data in read_pieces(self._store, pieces, path=row.path, threads=threads):
                hasher.update(data)
        except NotFoundError:
            return one, row.path, content, "", ""  # taken by a gc since it was looked for
        except CorruptionError as error:
            return one, row.path, content, str(error), error.key
        except FormatVersionError:
            return one, row.path, content, "", ""  # its codec is not known: told before
        if hasher.digest() != row.digest:
            problem = f"{row.path}: the chunks are whole, but do not make the asset's digest"
            return one, row.path, content, problem, ""
        return one, row.path, content, "", ""

    # -- what it costs ------------------------------------------------------------------------------------------------

    def _losses(self, live: list[_Live]) -> None:
        """Which live versions are hurt, what of them can be read, and which whole ones are next to them."""
        missed: set[tuple[str, str]] = set()

        def missing(invariant: str, where: str, problem: object) -> None:
            if (invariant, str(problem)) not in missed:
                missed.add((invariant, str(problem)))
                self._found(invariant, where, problem)

        losses = Losses(self._reader, self._damage, missing)
        hurt: defaultdict[str, dict[int, Loss]] = defaultdict(dict)
        for one in live:
            root = _root(one)
            known = self._lost.get(one.address)
            if (known is None and (root is None or not losses.touches(root))) or not one.still_wanted():
                continue
            op = one.version.op
            loss = losses.of(root, one.address) if known is None and root is not None else None
            if known is not None:
                loss = Loss(one.address, known, 0, (), op.assets)
            if loss is not None:
                if loss.unnamed == 0 and not loss.lost:
                    loss = replace(loss, unnamed=op.assets)  # not even the root can be read
                hurt[one.name][op.number] = loss
            self._count("versions hurt")
        for name, found in hurt.items():
            whole = [one.version.op.number for one in live if one.name == name and one.version.op.number not in found]
            for number, loss in found.items():
                older = max((n for n in whole if n < number), default=None)
                newer = min((n for n in whole if n > number), default=None)
                self.report.losses.append(
                    replace(
                        loss,
                        older="" if older is None else f"{name}:v{older}",
                        newer="" if newer is None else f"{name}:v{newer}",
                    )
                )


def _root(one: _Live) -> NodeAddress | None:
    with suppress(CorruptionError):  # told where the version was looked at
        return root_of(one.version.root)
    return None
