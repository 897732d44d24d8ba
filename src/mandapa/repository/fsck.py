"""The check of a repository: exactly the invariants of docs/format.md, one after the other; nothing is changed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mandapa.content.fetch import Wave, chain_size, pieces_of, read_pieces
from mandapa.content.index import Piece
from mandapa.content.parallel import in_order
from mandapa.content.tree import Located, NodeReader, child_address
from mandapa.digest import Hasher
from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError, NotFoundError
from mandapa.format.keys import GC, MARKER, container_key
from mandapa.format.manifest import Branch, Leaf, NodeAddress, UrlRow
from mandapa.format.pack import TRAILER_SIZE
from mandapa.format.records import (
    GC_LIST_BYTES,
    MARKER_MAX,
    decode_gc_list,
    decode_marker,
)
from mandapa.object_store.base import Buffer, ObjectInfo, ObjectStore
from mandapa.object_store.retry import RetryingObjectStore
from mandapa.repository.histories import Histories, Live
from mandapa.repository.inspection import AHEAD, Inspection
from mandapa.repository.losses import Damage, Loss, Losses, content_of
from mandapa.repository.repository import Repository
from mandapa.repository.scrub import Flaw, Named, Sample, Sampled, container_of, examine
from mandapa.repository.version import root_of

__all__ = ["Finding", "FsckReport", "Loss", "Sampled", "fsck"]

_LARGE = 64 << 20  # bytes of a file that several threads read
_AHEAD = 64  # versions whose manifests are read at a time
_TOGETHER = 8 << 20  # bytes of small files that are read together
_PIECES = 4096


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


class _Check:
    def __init__(self, repository: Repository | ObjectStore, progress: Callable[[str, int], None] | None) -> None:
        self.report = FsckReport()
        self._store: ObjectStore
        if isinstance(repository, Repository):
            self._store, self._threads = repository.store, repository.threads
        else:
            self._store, self._threads = RetryingObjectStore(repository), 4
        self._progress = progress
        self._reader = NodeReader(self._store, keep=4 * AHEAD)
        self._histories = Histories(self._store, self._threads, self._found)
        self._damage = Damage()
        self._lost: dict[str, str] = {}

    def run(self, deep: bool, sample: float | None, seed: int) -> None:
        if not self._marker():
            return
        chosen = None if sample is None else Sample(self._listed(), sample, seed)
        named = None
        if deep or chosen is not None:
            named = Named((lambda _: True) if chosen is None else chosen.has, deltas=not deep)
        live = list(self._histories.live(self._count))
        self.report.unreadable = self._histories.unreadable
        inspection = self._manifests(live, named)
        self._damage.nodes, self._damage.suspects = inspection.nodes, inspection.suspects
        self._containers(inspection.extent, named, chosen)
        self._lists()
        if deep:
            self._contents(live)
        if inspection.trouble or self._lost or self._damage.containers() or self._damage.files:
            self._losses(live)

    # -- what was found ------------------------------------------------------------------------------------------------

    def _found(self, invariant: str, where: str, problem: object) -> None:
        self.report.findings.append(Finding(invariant, where, str(problem)))

    def _count(self, what: str, more: int = 1) -> None:
        self.report.checked[what] += more
        if self._progress is not None:
            self._progress(what, self.report.checked[what])

    # -- marker --------------------------------------------------------------------------------------------------------

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

    # -- manifests -----------------------------------------------------------------------------------------------------

    def _manifests(self, live: list[Live], named: Named | None) -> Inspection:
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
            inspection.preload([root for root in (one.node for one in some) if root is not None])
            for one in some:
                self._version(one, inspection, found)
        return inspection

    def _version(self, one: Live, inspection: Inspection, found: Callable[[str, object], None]) -> None:
        self._count("versions")
        try:
            Repository.check_features(one.requires, one.address)
            root = root_of(one.root)
        except (CorruptionError, FormatVersionError) as error:
            found("I4", error)
            self._lost[one.address] = str(error)
            return
        summary = inspection.tree(root)
        if summary is None:
            return
        if summary.digest.hex() != one.digest:
            problem = "its content has another digest than its record says"
            found("I6", f"{one.address}: {problem}")
            self._lost[one.address] = problem
        if (summary.assets, summary.size) != (one.assets, one.bytes):
            held = f"holds {summary.assets} assets, {summary.size} bytes; its record says otherwise"
            found("I6", f"{one.address} {held}")

    # -- containers ----------------------------------------------------------------------------------------------------

    def _listed(self) -> Iterator[ObjectInfo]:
        for prefix in ("packs/", "meta/"):
            yield from self._store.list(prefix)

    def _containers(self, extent: dict[bytes, int], named: Named | None, chosen: Sample | None) -> None:
        """Every container that is named is there, and long enough for it; those that are to be read are as written."""
        stored = Counter[str]()
        missing = extent  # less what is met

        def readable() -> Iterator[tuple[bytes, int]]:
            for info in self._listed():
                container = container_of(info.key)
                end = None if container is None else missing.pop(container, None)
                if container is None or end is None:
                    continue  # nothing live needs it
                stored["containers"] += 1
                stored["bytes"] += info.size
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

    # -- whole files ---------------------------------------------------------------------------------------------------

    def _contents(self, live: list[Live]) -> None:
        """Every file's chunks make its digest; each way to make a file is read once, however many versions have it."""
        told = {found.where for found in self.report.findings}
        for batch in in_order(self._read_files, _batches(self._files(live)), threads=self._threads):
            for file, problem, key in batch:
                self._damage.files[file.content] = problem
                if key not in told:
                    self._found("I8", f"{file.version.address}/{file.located.row.path}", problem)

    def _files(self, live: list[Live]) -> Iterator[_File]:
        """Every file that can be read as far as is known, with the first version that has it."""
        nodes: set[bytes] = set()
        contents: set[int] = set()
        gone = self._damage.gone
        for one in live:
            for leaf in () if one.node is None else self._leaves(one.node, nodes):
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
                                yield _File(one, located, pieces, content)

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

    def _read_files(self, files: list[_File]) -> list[tuple[_File, str, str]]:
        """Those of some files of which something is wrong: what, and the key of the object that is to blame, if any."""
        if len(files) > 1:
            pieces = [piece for file in files for piece in file.pieces]
            try:
                values = iter(Wave(self._store, pieces, lambda _: "").all(threads=0))
                if all(_makes(file, [next(values) for _ in file.pieces]) for file in files):
                    return []
            except (NotFoundError, CorruptionError, FormatVersionError):
                pass  # of which file, shows when each is read alone
        return [(file, *problem) for file in files if (problem := self._read_file(file)) is not None]

    def _read_file(self, file: _File) -> tuple[str, str] | None:
        path = file.located.row.path
        threads = self._threads if file.size > _LARGE else 0
        try:
            data = (value for _, value in read_pieces(self._store, file.pieces, path=path, threads=threads))
            if not _makes(file, data):
                return f"{path}: the chunks are whole, but do not make the asset's digest", ""
        except CorruptionError as error:
            return str(error), error.key
        except (NotFoundError, FormatVersionError):
            pass  # taken by a gc since it was looked for; or of an unknown codec, which was told
        return None

    # -- what it costs -------------------------------------------------------------------------------------------------

    def _losses(self, live: list[Live]) -> None:
        """Which live versions are hurt, what of them can be read, and which whole ones are next to them."""
        missed: set[tuple[str, str]] = set()

        def missing(invariant: str, where: str, problem: object) -> None:
            if (invariant, str(problem)) not in missed:
                missed.add((invariant, str(problem)))
                self._found(invariant, where, problem)

        losses = Losses(self._reader, self._damage, missing)
        hurt: defaultdict[str, dict[int, Loss]] = defaultdict(dict)
        for one in live:
            known, root = self._lost.get(one.address), one.node
            if known is None and (root is None or not losses.touches(root)):
                continue
            if not self._histories.still_wanted(one):
                continue
            loss = losses.of(root, one.address) if known is None and root is not None else None
            if known is not None:
                loss = Loss(one.address, known, 0, (), one.assets)
            if loss is not None:
                if not (loss.unnamed or loss.lost or loss.more):
                    loss = replace(loss, unnamed=one.assets)  # not even the root can be read
                hurt[one.name][one.number] = loss
        whole: defaultdict[str, list[int]] = defaultdict(list)
        for one in live:
            if one.number not in hurt[one.name]:
                whole[one.name].append(one.number)
        for name, found in hurt.items():
            for number, loss in found.items():
                older = max((n for n in whole[name] if n < number), default=None)
                newer = min((n for n in whole[name] if n > number), default=None)
                self.report.losses.append(
                    replace(
                        loss,
                        older="" if older is None else f"{name}:v{older}",
                        newer="" if newer is None else f"{name}:v{newer}",
                    )
                )


class _File(NamedTuple):
    """A file, and what it is made of."""

    version: Live
    located: Located
    pieces: tuple[Piece, ...]
    content: int
    """What `content_of` gives."""

    @property
    def size(self) -> int:
        return sum([piece.raw for piece in self.pieces])


def _batches(files: Iterable[_File]) -> Iterator[list[_File]]:
    """Small files together, as many as one window of chunks would hold; large ones alone."""
    batch: list[_File] = []
    size = count = 0
    for file in files:
        more = sum([chain_size(piece) for piece in file.pieces])
        if batch and (size + more > _TOGETHER or count + len(file.pieces) > _PIECES):
            yield batch
            batch, size, count = [], 0, 0
        batch.append(file)
        size += more
        count += len(file.pieces)
    if batch:
        yield batch


def _makes(file: _File, data: Iterable[Buffer]) -> bool:
    """Whether these bytes are the file's."""
    hasher = Hasher()
    for value in data:
        hasher.update(value)
    row = file.located.row
    return not isinstance(row, UrlRow) and hasher.digest() == row.digest
