"""What this machine keeps of one repository beside the chunk index: rows of bytes that may be lost at any time."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

from mandapa.content.private import make_private
from mandapa.digest import digest, hexdigest

__all__ = ["Kept", "Shelf"]

_SCHEMA = 1
_SIZE_MAX = 1 << 30  # bytes of the file: what grows beyond is made anew
_STAMP = b""  # the key of the row that every write replaces
_DAMAGED = (sqlite3.Error, OverflowError, ValueError, TypeError)


class Kept(NamedTuple):
    """All rows of a shelf, and which state of it they are."""

    stamp: bytes
    rows: dict[bytes, bytes]


class Shelf:
    """Rows of bytes under keys of bytes, read all at once. Nothing fails because of it.

    Each row carries a hash of itself: a damaged one is not there. A file that cannot be read is done without, one that
    is no sound database is made anew. Safe for threads, forks and several processes: no connection is kept, and a write
    takes effect only if nobody wrote since the read that it rests on.

    Args:
        cache_dir: The folder of its file, made if missing (mode 0700); None keeps the rows in memory. One that is
            another user's, or that all may write to, is not used.
        name: What is kept.
        repository: The repository's id.
        url: Where the repository is, so that a copy of it with the same id has another file.
    """

    def __init__(self, cache_dir: str | os.PathLike[str] | None, name: str, *, repository: str, url: str) -> None:
        self._path: str | None = None
        if cache_dir is not None:
            file = f"{repository}-{hexdigest(url.encode())[:16]}.{name}.sqlite"
            self._path = os.path.join(os.path.abspath(os.fspath(cache_dir)), file)
        self._memory = Kept(b"", {})

    def read(self) -> Kept:
        """Every row that is sound."""
        if self._path is None:
            return Kept(self._memory.stamp, dict(self._memory.rows))
        if not os.path.exists(self._path):
            return Kept(b"", {})
        try:
            if not make_private(os.path.dirname(self._path)):
                return Kept(b"unreadable", {})
            with self._opened() as db:
                found = db.execute("SELECT key, value, seal FROM kept").fetchall()
        except sqlite3.OperationalError:  # locked, or not ours to read
            return Kept(b"unreadable", {})
        except (*_DAMAGED, OSError):
            self._remove()
            return Kept(b"", {})
        rows = {key: value for key, value, seal in found if _sound(key, value, seal)}
        return Kept(rows.pop(_STAMP, b""), rows)

    def write(self, before: Kept, put: Mapping[bytes, bytes], drop: Collection[bytes] = ()) -> None:
        """Replace the rows of ``put``, remove those of ``drop``; nothing if the shelf is not as ``before`` any more."""
        stamp = os.urandom(16)
        if self._path is None:
            if self._memory.stamp == before.stamp:
                rows = {key: value for key, value in self._memory.rows.items() if key not in drop}
                self._memory = Kept(stamp, {**rows, **put})
            return
        try:
            if not make_private(os.path.dirname(self._path)):
                return
            with self._opened() as db:
                db.execute("BEGIN IMMEDIATE")
                now = db.execute("SELECT value FROM kept WHERE key=?", (_STAMP,)).fetchone()
                if (now[0] if now else b"") == before.stamp:
                    db.executemany("DELETE FROM kept WHERE key=?", [(key,) for key in drop])
                    rows = {**put, _STAMP: stamp}
                    sealed = [(key, value, _seal(key, value)) for key, value in rows.items()]
                    db.executemany("INSERT OR REPLACE INTO kept VALUES(?,?,?)", sealed)
                db.execute("COMMIT")
            if os.path.getsize(self._path) > _SIZE_MAX:
                self._remove()
        except sqlite3.OperationalError:  # locked, read-only, full
            return
        except (*_DAMAGED, OSError):
            self._remove()

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        assert self._path is not None
        db = sqlite3.connect(self._path, timeout=0.2, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous=OFF")
            [version] = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                db.execute("CREATE TABLE IF NOT EXISTS kept(key BLOB PRIMARY KEY, value BLOB, seal BLOB)")
                db.execute(f"PRAGMA user_version={_SCHEMA}")
            elif version != _SCHEMA:
                raise sqlite3.DatabaseError("of another mandapa")
            yield db
        finally:
            db.close()

    def _remove(self) -> None:
        assert self._path is not None
        for suffix in ("", "-journal", "-wal", "-shm"):
            with suppress(OSError):
                os.unlink(self._path + suffix)


def _seal(key: bytes, value: bytes) -> bytes:
    return digest(len(key).to_bytes(4, "little") + key + digest(value))[:16]


def _sound(key: object, value: object, seal: object) -> bool:
    return isinstance(key, bytes) and isinstance(value, bytes) and seal == _seal(key, value)
