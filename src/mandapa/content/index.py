"""What this machine remembers of one repository: where chunks are, and which files it has hashed."""

from __future__ import annotations

import os
import sqlite3
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

import msgspec

from mandapa.content.private import make_private
from mandapa.content.walk import Found
from mandapa.digest import digest, hexdigest
from mandapa.format.manifest import Chunk, FileRow, Leaf, Part

__all__ = ["Index", "Piece", "piece_of"]

_T = TypeVar("_T")

_SCHEMA = 1
_BATCH = 500  # names in one SELECT; SQLite's oldest limit is 999
_PENDING_NODES = 64
_PENDING_FILES = 65536
_SIZE_MAX = 512 << 20  # bytes: about 4 million chunks, or 2 million files
_FINE = 100_000_000
_COARSE = 2_000_000_000
_DAMAGED = (sqlite3.Error, OverflowError, ValueError, TypeError)  # names and texts that are none, too
_PLACE = struct.Struct("<17sIIIH")
_STAT = struct.Struct("<QQQqq")
_CHECK = struct.Struct("<I")
_TABLES = (
    "CREATE TABLE IF NOT EXISTS chunks(hash BLOB PRIMARY KEY, place BLOB) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS assets(digest BLOB PRIMARY KEY, chunks BLOB) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS files(path BLOB PRIMARY KEY, seen BLOB) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS leaves(hash BLOB PRIMARY KEY) WITHOUT ROWID",
)
_encode_part = msgspec.msgpack.Encoder().encode
_decode_part = msgspec.msgpack.Decoder(Part).decode


class Piece(NamedTuple):
    """A chunk and the container that it is in, free of any table."""

    container: bytes
    """17 bytes."""
    offset: int
    stored: int
    raw: int
    codec: int
    hash: bytes
    """BLAKE3 of the raw bytes."""
    base: Piece | None = None
    """The chunk that this is a delta to."""

    def chain(self) -> tuple[Piece, ...]:
        """The chunk, its base, and the base of that: all that decoding needs."""
        return (self,) if self.base is None else (self, *self.base.chain())


def piece_of(chunk: Chunk, hash_: bytes, table: Sequence[bytes]) -> Piece:
    """One chunk, free of its table."""
    base = None if chunk.base is None else piece_of(chunk.base, chunk.base.hash, table)
    return Piece(table[chunk.container], chunk.offset, chunk.stored, chunk.raw, chunk.codec, hash_, base)


class Index:
    """A best-effort memory of one repository on this machine; nothing fails because of it.

    Where chunks are is a hint: who uses it makes sure that the container is there, and readers verify every chunk. What
    is broken, locked, read-only or full is done without, and a file that is not a sound SQLite database is made anew.
    Every entry carries a checksum, so that a damaged one is a miss.

    **Which files are known** is relied on. An answer means: at this path there is the same inode of the same device, of
    the same size, mtime and ctime as when its bytes were hashed, and both times lay clearly before the hashing began.
    A write or a truncation sets ctime to the file system's clock, and no call of a user sets ctime back; so a
    file that was changed since has another ctime, unless the change fell into the same tick of that clock as the change
    before it - and that tick was over when the hashing began (see `remember_file`). What this leaves out, as
    every such cache does: a system clock that was set back, a file system whose clock is behind this machine's by more
    than the guard, bytes that a power cut took from under a kept inode, stores through a shared memory map
    (`numpy.memmap`, LMDB) that the kernel has not yet written back, and direct writes to the disk below.

    Safe for threads and for several processes; a forked child opens the file for itself.

    Args:
        cache_dir: Where the file is kept, made if missing (mode 0700); None keeps everything in this process's memory.
            One that is another user's, or that all may write to, is not used: what it says would be believed.
        repository: The repository's id.
        url: Where the repository is, so that a copy of it with the same id has another file.
    """

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None, *, repository: str = "", url: str = "") -> None:
        self._path = ":memory:"
        if cache_dir is not None:
            name = f"{repository or 'repository'}-{hexdigest(url.encode())[:16]}.sqlite"
            self._path = os.path.join(os.path.abspath(os.fspath(cache_dir)), name)
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._broken = False  # it could not be opened: do not try at every call
        self._nodes: list[Leaf | Part] = []
        self._files: list[tuple[bytes, bytes]] = []
        self._assets: list[tuple[bytes, Part]] = []

    def lookup(self, hashes: Sequence[bytes]) -> dict[bytes, Piece]:
        """Where the chunks with these hashes are, for those that are known: 1.5 us each, in batches."""
        rows = self._select("SELECT hash, place FROM chunks WHERE hash IN", hashes)
        found = {}
        for hash_, value in rows:
            place = _unseal(hash_, value)
            if place is not None and len(place) == _PLACE.size:
                found[hash_] = Piece._make((*_PLACE.unpack(place), hash_, None))
        return found

    def lookup_asset(self, digest_: bytes) -> tuple[Piece, ...] | None:
        """The chunks of a whole asset of more than one chunk, in order, when they are known."""
        for key, value in self._select("SELECT digest, chunks FROM assets WHERE digest IN", [digest_]):
            encoded = _unseal(key, value)
            if encoded is not None:
                with suppress(msgspec.DecodeError, IndexError):
                    part = _decode_part(encoded)
                    return tuple([piece_of(chunk, chunk.hash, part.containers) for chunk in part.rows])
        return None

    def feed(self, node: Leaf | Part) -> None:
        """Remember where the chunks of a leaf or part are; buffered, written in bulk, known ones skipped."""
        with self._guarded():
            self._nodes.append(node)
            if len(self._nodes) >= _PENDING_NODES:
                self._write()

    def remember_asset(self, digest_: bytes, chunks: Sequence[Chunk], table: Sequence[bytes]) -> None:
        """Remember the chunks of a whole asset of more than one chunk, which name containers by places in ``table``."""
        with self._guarded():
            self._assets.append((digest_, Part.of(chunks, table)))

    def known_file(self, path: str, stat: os.stat_result) -> bytes | None:
        """The digest of the file at the absolute ``path``, if it was hashed and has not changed since."""
        return self.known_files([Found("", path, stat)])[0]

    def known_files(self, found: Sequence[Found]) -> list[bytes | None]:
        """`known_file` for many: 2 us each."""
        paths = [os.fsencode(source) for _, source, _ in found]
        seen = dict(self._select("SELECT path, seen FROM files WHERE path IN", paths))
        if not seen:
            return [None] * len(found)
        answer: list[bytes | None] = []
        for path, (_, _, stat) in zip(paths, found, strict=True):
            value = seen.get(path)
            digest_ = None
            # Compare the stat first: the checksum matters only for what would be believed.
            if value is not None and value[:40] == _identity(stat):
                value = _unseal(path, value)
                if value is not None and len(value) == 72:
                    digest_ = value[40:]
            answer.append(digest_)
        return answer

    def remember_file(self, path: str, stat: os.stat_result, digest_: bytes, hashed_at_ns: int) -> None:
        """Remember what an absolute ``path`` held, where that is safe to believe later; buffered.

        Args:
            path: Absolute.
            stat: Of the file, equal before and after its bytes were read.
            digest_: Of the bytes that were read.
            hashed_at_ns: The wall clock when reading began. The file is remembered only if mtime and ctime lie before
                that by more than the file system's clock can blur: 100 ms where its times are finer than a
                millisecond, else 2 s. A file changed just now, or in the future, is hashed again next time.
        """
        changed = stat.st_ctime_ns
        blur = _FINE if changed % 1_000_000 else _COARSE
        if max(changed, stat.st_mtime_ns) >= hashed_at_ns - blur:
            return
        key = os.fsencode(path)
        value = _seal(key, _identity(stat) + digest_)
        with self._guarded():
            self._files.append((key, value))
            if len(self._files) >= _PENDING_FILES:
                self._write()

    def flush(self) -> None:
        """Write what is buffered."""
        with self._guarded():
            self._write()

    def close(self) -> None:
        """Write what is buffered and close the file; a later call opens it again."""
        with self._guarded():
            self._write()
            if self._db is not None and self._path != ":memory:":
                with suppress(sqlite3.Error):
                    self._db.close()
                self._db = None

    def _guarded(self) -> threading.Lock:
        if self._pid != os.getpid():
            _inherited.append(self._db)  # closing it here could drop the parent's locks
            self._reset()
        return self._lock

    def _select(self, head: str, keys: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
        rows: list[tuple[bytes, bytes]] = []
        with self._guarded():
            if not keys:
                return rows
            if self._nodes or self._files or self._assets:
                self._write()
            for start in range(0, len(keys), _BATCH):
                batch = keys[start : start + _BATCH]
                query = f"{head} ({_marks(batch)})"
                rows += self._attempt(lambda db, q=query, b=batch: db.execute(q, b).fetchall()) or []  # type: ignore[misc]
        return rows

    def _write(self) -> None:
        """With the lock held."""
        nodes, files, assets = self._nodes, self._files, self._assets
        if not (nodes or files or assets):
            return
        self._nodes, self._files, self._assets = [], [], []
        self._attempt(lambda db: _store(db, nodes, files, assets))

    def _attempt(self, work: Callable[[sqlite3.Connection], _T]) -> _T | None:
        """``work``'s result; None when the database cannot do it. With the lock held."""
        for _ in range(2):
            if self._db is None:
                self._db = self._open()
            if self._db is None:
                return None
            try:
                return work(self._db)
            except sqlite3.OperationalError:  # locked, read-only, full
                with suppress(sqlite3.Error):
                    self._db.rollback()
                return None
            except _DAMAGED:
                self._remove()
        return None

    def _open(self) -> sqlite3.Connection | None:
        if self._broken:
            return None
        for _ in range(2):
            try:
                if self._path != ":memory:" and not make_private(os.path.dirname(self._path)):
                    break
                db = sqlite3.connect(self._path, timeout=0.2, isolation_level=None, check_same_thread=False)
                try:
                    _prepare(db)
                except BaseException:
                    db.close()
                    raise
                weakref.finalize(self, _close, db, self._pid)
                return db
            except sqlite3.OperationalError:
                break
            except _DAMAGED:
                self._remove()
            except OSError:
                break
        self._broken = True
        return None

    def _remove(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        for suffix in ("", "-journal", "-wal", "-shm"):
            with suppress(OSError):
                os.unlink(self._path + suffix)


def _close(db: sqlite3.Connection, pid: int) -> None:
    """When nobody needs the index any more; in a forked child it is the parent's."""
    if pid == os.getpid():
        with suppress(sqlite3.Error):
            db.close()


_inherited: list[Any] = []  # connections of a parent process, never to be closed here


def _prepare(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA synchronous=OFF")
    db.execute("PRAGMA temp_store=MEMORY")
    [version] = db.execute("PRAGMA user_version").fetchone()
    if version not in (0, _SCHEMA):
        raise sqlite3.DatabaseError("another version of the index")
    if version == 0:
        db.execute("BEGIN IMMEDIATE")
        for statement in _TABLES:
            db.execute(statement)
        db.execute(f"PRAGMA user_version={_SCHEMA}")
        db.execute("COMMIT")
    pages = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")]
    if (pages[0] - pages[1]) * pages[2] > _SIZE_MAX:
        # Half of what is known goes, at random, which keys that are hashes make cheap; the rest keeps its use.
        db.execute("DELETE FROM chunks WHERE hash < x'80'")
        db.execute("DELETE FROM assets")
        db.execute("DELETE FROM files")
        db.execute("DELETE FROM leaves")


def _store(
    db: sqlite3.Connection, nodes: list[Leaf | Part], files: list[tuple[bytes, bytes]], assets: list[tuple[bytes, Part]]
) -> None:
    marks = {_node_mark(node): node for node in nodes}
    keys = list(marks)
    for start in range(0, len(keys), _BATCH):
        batch = keys[start : start + _BATCH]
        for (known,) in db.execute(f"SELECT hash FROM leaves WHERE hash IN ({_marks(batch)})", batch):  # noqa: S608
            del marks[known]
    chunks: list[tuple[bytes, bytes]] = []
    for node in marks.values():
        _collect(node, chunks, assets)
    # Sorted: neighbours in the tree are written together, which is twice as fast.
    chunks.sort()
    files.sort()
    rows = [(digest_, _seal(digest_, _encode_part(part))) for digest_, part in assets]
    db.execute("BEGIN IMMEDIATE")
    try:
        db.executemany("INSERT OR REPLACE INTO chunks VALUES(?,?)", chunks)
        db.executemany("INSERT OR REPLACE INTO assets VALUES(?,?)", rows)
        db.executemany("INSERT OR REPLACE INTO files VALUES(?,?)", files)
        db.executemany("INSERT OR REPLACE INTO leaves VALUES(?)", [(mark,) for mark in marks])
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _marks(batch: Sequence[bytes]) -> str:
    return ",".join("?" * len(batch))


def _node_mark(node: Leaf | Part) -> bytes:
    """Names what the index would learn from a node; cheaper than the node's own hash."""
    if isinstance(node, Part):
        inner = [chunk.hash for chunk in node.rows]
    else:
        inner = [row.digest for row in node.rows if isinstance(row, FileRow)]
    return digest(b"".join(node.containers) + b"".join(inner))


def _collect(node: Leaf | Part, chunks: list[tuple[bytes, bytes]], assets: list[tuple[bytes, Part]]) -> None:
    table = node.containers
    if isinstance(node, Part):
        for chunk in node.rows:
            _collect_chunk(chunk, chunk.hash, table, chunks)
        return
    for row in node.rows:
        if isinstance(row, FileRow):
            several = row.chunks
            if len(several) == 1:
                _collect_chunk(several[0], row.digest, table, chunks)
            elif several:
                for chunk in several:
                    _collect_chunk(chunk, chunk.hash, table, chunks)
                assets.append((row.digest, Part.of(several, table)))


def _collect_chunk(chunk: Chunk, hash_: bytes, table: Sequence[bytes], chunks: list[tuple[bytes, bytes]]) -> None:
    if chunk.base is None:  # a delta is no use without what it is a delta to
        place = _PLACE.pack(table[chunk.container], chunk.offset, chunk.stored, chunk.raw, chunk.codec)
        chunks.append((hash_, place + _CHECK.pack(crc32(place, crc32(hash_)))))


def _identity(stat: os.stat_result) -> bytes:
    return _STAT.pack(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _seal(key: bytes, value: bytes) -> bytes:
    return value + _CHECK.pack(crc32(value, crc32(key)))


def _unseal(key: bytes, value: Any) -> bytes | None:
    """What was sealed, or None when it is damaged."""
    if not isinstance(value, bytes) or len(value) < 4:
        return None
    body = value[:-4]
    return body if crc32(body, crc32(key)) == _CHECK.unpack(value[-4:])[0] else None
