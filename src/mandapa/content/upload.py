"""Assets taken apart: every chunk found, or stored once, in the containers of one transaction."""

from __future__ import annotations

import os
import stat as stat_
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import msgspec

from mandapa.content.cache import ChunkCache
from mandapa.content.codecs import required
from mandapa.content.copies import Copy, cuts_for_copies
from mandapa.content.cutters import BytesSource, Cutter, FileSource, Source, StartSource, structured_cuts
from mandapa.content.cutters.source import read_some
from mandapa.content.cutters.structured import STRUCTURED_MIN
from mandapa.content.encoding import counterparts, with_room
from mandapa.content.fetch import pieces_of, read_pieces
from mandapa.content.growth import Growth, growth_since
from mandapa.content.index import Index, Piece
from mandapa.content.link import Link, Mode
from mandapa.content.packing import Packer, Placer
from mandapa.content.rows import RowMaker, bare
from mandapa.content.tree import Located, NodeReader
from mandapa.content.walk import Found, check_unchanged, explain, explained, file_mode, is_still, read_small
from mandapa.digest import Hasher, digest
from mandapa.errors import (
    AccessDeniedError,
    ClosedError,
    ConflictError,
    CorruptionError,
    InvalidInputError,
    NotFoundError,
)
from mandapa.format.manifest import Chunk, FileRow, LargeFileRow, Leaf, NodeAddress, Part, UrlRow
from mandapa.object_store.base import Buffer, ObjectStore

__all__ = ["Upload"]

_EMPTY = digest(b"")
_GROUP = 2048  # files of which the rows are made together
_SMALL_BYTES = 4 << 20  # of small files that are held until their chunks are looked up together
_KEEP = 64 << 20  # of bytes that were given, not read from files, and may have to be stored again
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


class _Start(NamedTuple):
    """The first bytes of a file that may grow."""

    file: str
    length: int


class _Small(NamedTuple):
    """A small file that was read, and where its row belongs."""

    position: int
    at: str
    mode: int
    data: bytes
    digest: bytes


def _new_id() -> bytes:
    return os.urandom(16)


class Upload:
    """Takes assets apart and puts their chunks into containers of one transaction.

    A chunk is stored only if it is not in this upload yet, not reached from a node given to `seed`, not in the asset's
    base row, and not known to the index. The bytes that are hashed are the bytes that are uploaded. Rows may be used
    once `flush` has returned. Memory: about (``threads`` + 2) * 20 MiB, and what the rows take.

    For one thread, and for the process that made it: elsewhere `ClosedError`. What it stores is a function of what was
    added in what order, not of ``threads``.

    Args:
        store: Where containers go.
        index: What this machine remembers of the repository.
        codec: ``raw``, ``auto`` or ``dense``.
        threads: Puts under way at once, and threads that hash and compress; 0 does all in the caller's thread.
        new_id: Makes 16 random bytes, for the names of containers.
        clock: Nanoseconds since the epoch, as file times are.
        nodes: Reads the parts of large base rows; by default one of its own.
        link: What was measured of the way to the store; by default it counts as near, and is learnt anew.
        cache: Chunks of far stores that are at hand.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        index: Index,
        codec: Mode = "auto",
        threads: int = 2,
        new_id: Callable[[], bytes] = _new_id,
        clock: Callable[[], int] = time.time_ns,
        nodes: NodeReader | None = None,
        link: Link | None = None,
        cache: ChunkCache | None = None,
    ) -> None:
        link = link or Link(near=True)
        self._store = store
        self._index = index
        self._clock = clock
        self._pid = os.getpid()
        self._closed = False
        self._packer = Packer(store, link=link, threads=threads, new_id=new_id)
        self._placer = Placer(store, self._packer, index, mode=codec, link=link, cache=cache, threads=threads)
        self._nodes = nodes or NodeReader(store, keep=256, on_leaf=index.feed)
        self._rows = RowMaker(self._packer, index, self._nodes)
        self._cutter = Cutter()
        self._sources: dict[str, str | _Start | bytes] = {}
        self._kept = 0

    @property
    def table(self) -> list[bytes]:
        """Every container that rows made here refer to; grows only."""
        return self._packer.table

    @property
    def hits(self) -> set[bytes]:
        """Containers named because a chunk was found in them, which are not reached from the base."""
        return self._placer.hits

    @property
    def fresh(self) -> set[bytes]:
        """Containers that this upload has put, is putting, or has begun to fill."""
        return self._packer.fresh

    @property
    def requires(self) -> set[str]:
        """Features of the format that rows made here need."""
        return required(self._placer.codecs)

    @property
    def added(self) -> int:
        """Bytes handed to the store so far."""
        return self._packer.added

    @property
    def before_first_put(self) -> Callable[[], None] | None:
        """Called once, in the calling thread, before the first put."""
        return self._packer.before_first_put

    @before_first_put.setter
    def before_first_put(self, call: Callable[[], None] | None) -> None:
        self._packer.before_first_put = call

    @property
    def progress(self) -> Callable[[int], None] | None:
        """Called with the bytes of each container that was put, from the thread that put it."""
        return self._packer.progress

    @progress.setter
    def progress(self, call: Callable[[int], None] | None) -> None:
        self._packer.progress = call

    # Assets

    def add_file(
        self,
        source: str,
        at: str,
        stat: os.stat_result | None = None,
        *,
        base: Located | None = None,
        length: int | None = None,
    ) -> Located:
        """The row of a file, its bytes on their way into the store.

        Args:
            source: Where the file is.
            at: Its path in the version, already checked.
            stat: Of the file, if at hand: where the index knows that it has not changed since it was hashed, and its
                bytes are in the base row or in the repository, it is not read.
            base: The row at that path in the version that this one is made from.
            length: Take exactly so many of its first bytes; then it may be appended to meanwhile.

        Raises:
            NotFoundError: The file is gone.
            AccessDeniedError: It may not be read.
            InvalidInputError: Not a file; or it changed while it was added, or has fewer bytes than ``length``, and
                nothing of it is kept.
            StorageError: A put failed, or the disk did.
        """
        self._check()
        source = os.path.abspath(source)
        located = None
        if stat is not None and length in (None, stat.st_size):
            known = self._index.known_file(source, stat)
            if known is not None:
                located = self._reuse(at, stat.st_size, file_mode(stat), known, base, self._placer.find([known]))
        if located is None:
            located = self._read_file(source, at, base, length)
        self._sources[at] = source if length is None else _Start(source, length)
        return located

    def add_files(
        self, found: Sequence[tuple[str, Found]], base_of: Callable[[str], Located | None]
    ) -> Iterator[Located]:
        """`add_file` of many, in order; the index is asked in batches, the rows come in groups.

        Args:
            found: Paths in the version, and the files as `walk` found them.
            base_of: Gives the base row of a path; called once a path, in order.
        """
        self._check()
        for start in range(0, len(found), _GROUP):
            yield from self._add_group(found[start : start + _GROUP], base_of)

    def add_bytes(self, at: str, data: Buffer, *, base: Located | None = None) -> Located:
        """The row of an asset whose bytes are at hand; ``data`` may change after the call. Raises `StorageError`."""
        self._check()
        source = BytesSource(data)
        if source.size < STRUCTURED_MIN:
            content = bytes(data)
            located = self._place_small([_Small(0, at, 0, content, digest(content))], [base])[0]
        else:
            located = self._take(source, at, 0, base)
        found = not self.fresh.issuperset([piece.container for piece in pieces_of(located, self._nodes.load)])
        if found or self._kept + source.size <= _KEEP:
            # If the container turns out to be condemned, only these bytes are sure to be left. Those that were stored,
            # not found, can be read back from it until a gc without any grace has passed: large ones rely on that.
            self._sources[at] = bytes(data)
            self._kept += source.size
        return located

    def add_stored(self, located: Located, source: Source, base: Located | None) -> Located:
        """The row of a stored file, its chunks encoded anew where they were not placed or seeded.

        Args:
            located: Its row.
            source: Its bytes; may be read by several threads.
            base: The row at that path in the version before.

        Raises:
            As `add_bytes`, and what ``source`` raises.
        """
        self._check()
        row = located.row
        assert not isinstance(row, UrlRow)
        if base is not None and not isinstance(base.row, UrlRow) and base.row.digest == row.digest:
            same = self._relabel(base, row.path, row.mode)
            if same is not None:
                return same
        cuts = list(accumulate([piece.raw for piece in pieces_of(located, self._nodes.load)]))
        return self._take(source, row.path, row.mode, base, cuts=cuts)

    def seed(self, node: Leaf | Part) -> None:
        """Chunks of a node that is reached from the base version: found from now on, and not counted as hits."""
        self._placer.seed(node)

    def put_node(self, hash_: bytes, stored: bytes, raw_size: int) -> NodeAddress:
        """Put a manifest node into the current meta container."""
        self._check()
        return self._packer.add_node(hash_, stored, raw_size)

    def flush(self) -> None:
        """Close the open containers and wait until every put is acknowledged; raises the first error of any."""
        self._check()
        self._packer.flush()

    def restore_row(self, located: Located, bad: Collection[bytes]) -> Located:
        """The row with each chunk that lies in a ``bad`` container stored again, in a new one.

        Bytes are taken from the old container while it is there, verified, else from where they were added from, if
        that still has the same bytes.

        Args:
            located: A row; of this upload or of any version.
            bad: Containers that are condemned or missing; none is used again by this upload.

        Raises:
            ConflictError: The bytes are in neither place: run the transaction again.
        """
        self._check()
        self._placer.forget(bad)
        row = located.row
        if isinstance(row, UrlRow):
            return located
        try:
            pieces = list(pieces_of(located, self._nodes.load))
            chunks = self._store_again(pieces, row.path)
        except (NotFoundError, CorruptionError):
            return self._from_source(located)
        if chunks is None and not (
            isinstance(row, LargeFileRow)
            and self._placer.bad.intersection([located.table[p.container] for p in row.parts])
        ):
            return located
        if chunks is None:
            chunks = self._adopt_all(pieces)
        return self._rows.make(row.path, row.size, row.mode, row.digest, chunks, None)

    def close(self) -> None:
        """Drop what is not flushed, wait for puts under way, release threads and memory. Any number of times."""
        if self._closed:
            return
        self._closed = True
        if self._pid != os.getpid():
            return
        self._placer.close()
        self._packer.close()
        self._sources.clear()

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Whole files

    def _reuse(
        self, at: str, size: int, mode: int, digest_: bytes, base: Located | None, found: dict[bytes, Piece]
    ) -> Located | None:
        """The row of an asset whose digest is known, without its bytes; None when they are needed."""
        if base is not None and not isinstance(base.row, UrlRow) and base.row.digest == digest_:
            return self._relabel(base, at, mode)
        if size == 0:
            return Located(FileRow(at, 0, mode, _EMPTY, ()), self.table)
        pieces: Sequence[Piece] | None
        placed = self._placer.placed.get(digest_)
        if placed is not None and placed.raw == size:
            return Located(FileRow(at, size, mode, digest_, (bare(placed),)), self.table)
        piece = found.get(digest_)
        if piece is not None and piece.raw == size:
            pieces = (piece,)
        else:
            pieces = self._index.lookup_asset(digest_)
            if (
                pieces is None
                or sum([p.raw for p in pieces]) != size
                or not self._placer.bad.isdisjoint([p[0] for p in pieces])
            ):
                return None
        return self._rows.make(at, size, mode, digest_, self._adopt_all(pieces), None)

    def _relabel(self, base: Located, at: str, mode: int) -> Located | None:
        row = base.row
        assert not isinstance(row, UrlRow)
        if self._placer.bad and not self._placer.bad.isdisjoint([base.table[n] for n in _numbers(row)]):
            return None
        if row.mode == mode and row.path == at:
            return base
        return Located(msgspec.structs.replace(row, path=at, mode=mode), base.table)

    def _read_file(self, source: str, at: str, base: Located | None, length: int | None = None) -> Located:
        with explained(source):
            started = self._clock()
            fd = os.open(source, _OPEN)
            try:
                before = os.fstat(fd)
                if not stat_.S_ISREG(before.st_mode):
                    raise InvalidInputError(f"{source} is not a file")
                content = FileSource(fd, size=before.st_size) if length is None else StartSource(fd, length, source)
                if content.size < STRUCTURED_MIN:
                    small = read_small(fd, content.size, source) if length is None else read_some(content, 0, length)
                    data = bytes(small)
                    located = self._place_small([_Small(0, at, file_mode(before), data, digest(data))], [base])[0]
                else:
                    located = self._take(content, at, file_mode(before), base)
                assert isinstance(located.row, (FileRow, LargeFileRow))
                if length is None:
                    known = check_unchanged(fd, before, located.row.digest, source)
                else:  # more may have come; what was hashed is the whole file only if nothing has
                    known = length == before.st_size and is_still(before, os.fstat(fd))
                if known:
                    self._index.remember_file(source, before, located.row.digest, started)
            finally:
                os.close(fd)
        return located

    def _add_group(self, group: Sequence[tuple[str, Found]], base_of: Callable[[str], Located | None]) -> list[Located]:
        digests = self._index.known_files([found for _, found in group])
        bases = [base_of(at) for at, _ in group]
        rows: list[Located | None] = [None] * len(group)
        hints = self._placer.find(
            [hash_ for hash_, base in zip(digests, bases, strict=True) if hash_ and _differs(hash_, base)]
        )
        sources = self._sources
        small: list[_Small] = []
        size = 0
        for i, (at, found) in enumerate(group):
            known = digests[i]
            base = bases[i]
            source = found.source
            sources[at] = source
            if known is not None:
                if base is not None and not self._placer.bad:
                    row = base.row
                    same = isinstance(row, FileRow) and row.digest == known and row.path == at
                    if same and row.mode == file_mode(found.stat):  # type: ignore[union-attr]
                        rows[i] = base
                        continue
                rows[i] = self._reuse(at, found.stat.st_size, file_mode(found.stat), known, base, hints)
                if rows[i] is not None:
                    continue
            if found.stat.st_size < STRUCTURED_MIN:
                taken = self._read_for_later(i, at, source)
                if taken is not None:
                    small.append(taken)
                    size += len(taken.data)
                    if size >= _SMALL_BYTES:
                        self._place_all(small, bases, rows)
                        small, size = [], 0
                    continue
            self._place_all(small, bases, rows)
            small, size = [], 0
            rows[i] = self._read_file(source, at, base)
        self._place_all(small, bases, rows)
        return [row for row in rows if row is not None]

    def _read_for_later(self, position: int, at: str, source: str) -> _Small | None:
        """The bytes of a small file; None when it is not small any more."""
        started = self._clock()
        try:
            fd = os.open(source, _OPEN)
            try:
                before = os.fstat(fd)
                size = before.st_size
                if size >= STRUCTURED_MIN or not stat_.S_ISREG(before.st_mode):
                    return None
                data = read_small(fd, size, source)
                hash_ = digest(data)
                if check_unchanged(fd, before, hash_, source):
                    self._index.remember_file(source, before, hash_, started)
            finally:
                os.close(fd)
        except OSError as error:
            raise explain(error, source) from error
        return _Small(position, at, 1 if before.st_mode & 0o100 else 0, data, hash_)

    def _place_all(self, small: list[_Small], bases: Sequence[Located | None], rows: list[Located | None]) -> None:
        if small:
            placed = self._place_small(small, [bases[s.position] for s in small])
            for one, located in zip(small, placed, strict=True):
                rows[one.position] = located

    def _place_small(self, small: Sequence[_Small], bases: Sequence[Located | None]) -> list[Located]:
        """Rows of files of one chunk; the index is asked once for all of them."""
        rows: list[Located] = []
        placer = self._placer
        placed, table = placer.placed, self.table
        wanted = [
            one.digest
            for one, base in zip(small, bases, strict=True)
            if one.digest not in placed and _differs(one.digest, base)
        ]
        found = self._placer.find(wanted) if wanted else {}
        for (_, at, mode, data, hash_), base in zip(small, bases, strict=True):
            if base is not None and not isinstance(base.row, UrlRow) and base.row.digest == hash_:
                located = self._relabel(base, at, mode)
                if located is not None:
                    rows.append(located)
                    continue
            if not data:
                rows.append(Located(FileRow(at, 0, mode, _EMPTY, ()), table))
                continue
            chunk = placed.get(hash_)
            if chunk is None:
                known = found.get(hash_)
                chunk = placer.adopt(known) if known is not None else placer.encode(data, hash_)
            if chunk.hash:
                chunk = bare(chunk)
            rows.append(Located(FileRow(at, len(data), mode, hash_, (chunk,)), table))
        return rows

    # Files of several chunks

    def _take(
        self, source: Source, at: str, mode: int, base: Located | None, *, cuts: list[int] | None = None
    ) -> Located:
        """The row of a source that may have several chunks; ``cuts`` are the ends of these, if it is known."""
        row = None if base is None or isinstance(base.row, UrlRow) else base.row
        old = [] if row is None else self._pieces_of_base(base)
        known = {piece.hash: piece for piece in old}
        growth = None if row is None or cuts else growth_since(source, row, old, self._placer.submit)
        if growth is None:
            growth = Growth(cuts or structured_cuts(source), [], 0, Hasher())
        cuts, kept, start, asset = growth
        if cuts is not None:  # then the threads that hash can read as well
            copies: dict[int, Copy] = {}
            if start == 0 and not self._placer.leaves_floats:
                cuts, copies = cuts_for_copies(source, cuts)
            pairs = counterparts(cuts, old)
            masters = {copy.master for copy in copies.values()}
            for i, (begin, piece) in enumerate(zip([0, *cuts], pairs, strict=False)):
                if begin in masters and piece is not None:
                    pairs[i] = with_room(piece)
            batches = self._placer.from_cuts(source, at, cuts, start, pairs, copies)
        else:
            batches = self._placer.from_views(self._cutter.cut(source, at))
        chunks = self._adopt_all(kept) + self._placer.place_all(batches, known, asset)
        digest_ = asset.digest()
        if base is not None and row is not None and row.digest == digest_:
            located = self._relabel(base, at, mode)
            if located is not None:
                return located
        return self._rows.make(at, source.size, mode, digest_, chunks, base if old and not self._placer.bad else None)

    def _pieces_of_base(self, base: Located | None) -> list[Piece]:
        """The chunks of the base row; none where it cannot be used."""
        if base is None:
            return []
        try:
            pieces = list(pieces_of(base, self._nodes.load))
        except (NotFoundError, CorruptionError):  # a reader of the base will say so
            return []
        containers = {one.container for piece in pieces for one in piece.chain()}
        if not self._placer.bad.isdisjoint(containers):
            return []
        self._placer.inherit(containers)
        return pieces

    def _adopt_all(self, pieces: Sequence[Piece]) -> list[tuple[bytes, Chunk]]:
        return [(piece.hash, self._placer.adopt(piece)) for piece in pieces]

    # Storing again

    def _store_again(self, pieces: Sequence[Piece], path: str) -> list[tuple[bytes, Chunk]] | None:
        """The chunks, those in bad containers read from there and stored anew; None when there are none."""
        placer = self._placer
        bad = [p for p in pieces if not placer.bad.isdisjoint([one.container for one in p.chain()])]
        if not bad:
            return None
        elsewhere = placer.find([piece.hash for piece in bad])
        missing = [p for p in bad if p.hash not in placer.placed and p.hash not in elsewhere]
        for piece, data in read_pieces(self._store, missing, threads=0, path=path):
            if piece.hash not in placer.placed:
                placer.encode(data, piece.hash)
        found = []
        lost = set(bad)
        for piece in pieces:
            chunk = placer.placed.get(piece.hash) if piece in lost else None
            found.append((piece.hash, chunk or placer.adopt(elsewhere[piece.hash] if piece in lost else piece)))
        return found

    def _from_source(self, located: Located) -> Located:
        row = located.row
        assert isinstance(row, (FileRow, LargeFileRow))
        source = self._sources.get(row.path)
        try:
            if isinstance(source, bytes):
                again = self.add_bytes(row.path, source)
            elif isinstance(source, _Start):
                again = self._read_file(source.file, row.path, None, source.length)
            elif source is not None:
                again = self._read_file(source, row.path, None)
            else:
                again = None
        except (NotFoundError, InvalidInputError, AccessDeniedError):
            again = None
        if again is None or isinstance(again.row, UrlRow) or again.row.digest != row.digest:
            raise ConflictError(
                f"bytes of {row.path!r} that the repository held were deleted meanwhile, and "
                f"{_name(source)} does not have them any more: run the transaction again",
                paths=(row.path,),
            )
        if again.row.mode == row.mode:
            return again
        return Located(msgspec.structs.replace(again.row, mode=row.mode), again.table)

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("this upload is closed")
        if self._pid != os.getpid():
            raise ClosedError("this upload belongs to the process that forked this one: make one here")


def _name(source: str | _Start | bytes | None) -> str:
    if isinstance(source, _Start):
        return source.file
    return source if isinstance(source, str) else "their source"


def _differs(digest_: bytes, base: Located | None) -> bool:
    return base is None or isinstance(base.row, UrlRow) or base.row.digest != digest_


def _numbers(row: FileRow | LargeFileRow) -> list[int]:
    if isinstance(row, LargeFileRow):
        return [part.container for part in row.parts]
    return [number for chunk in row.chunks for number in chunk.numbers()]
