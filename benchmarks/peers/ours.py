"""mandapa, as a library and on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from tools import Tool, run_quietly

import mandapa
from mandapa.content.fetch import pieces_of
from mandapa.object_store import LocalObjectStore
from mandapa.object_store.base import ObjectStore
from mandapa.repository.repository import Repository

REQUESTS = ("get", "get_ranges", "head", "list", "put", "create", "delete")


class Counting:
    """An object store around another that counts calls: a request each, but for ranges, of which each is one."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.requests = 0

    def __getattr__(self, name: str) -> Any:
        if name in REQUESTS:
            self.requests += 1
        return getattr(self.store, name)

    def get_ranges(self, key: str, ranges: Any) -> Any:
        """Ranges of one object."""
        self.requests += len(ranges)
        return self.store.get_ranges(key, ranges)


class Mandapa(Tool):
    """In a process that is warm."""

    package = "mandapa"
    codec: ClassVar[Any] = "auto"

    def prepare(self) -> None:
        self.objects = Counting(LocalObjectStore(self.store))
        Repository.create(self.objects)
        self.objects.requests = 0
        self.repo = Repository(self.objects, codec=self.codec, cache_dir=self.home / "cache")
        # Imports are not what is measured.
        import pyfastcdc  # noqa: F401

        import mandapa.content.cutters  # noqa: F401

    def commit(self, number: int) -> None:
        with self.repo.artifact("bench").transaction() as txn:
            txn.add(self.source)
        self.requests = self.objects.requests

    def restore(self, dest: Path) -> None:
        reader = self._reader()
        reader["bench"].download(dest)
        self.requests = self.objects.requests

    def piece(self, file: str, start: int, stop: int) -> bytes:
        with self._reader()["bench"].open(file) as source:
            source.seek(start)
            found = source.read(stop - start)
        self.requests = self.objects.requests
        return found

    def _reader(self) -> Repository:
        """As another process would: with nothing in memory."""
        return Repository(self.objects, cache_dir=None)


class Raw(Mandapa):
    """Bytes as they are."""

    codec = "raw"


class Dense(Mandapa):
    """The smallest that is known."""

    codec = "dense"


class Repacked(Mandapa):
    """Stored as it comes, and made dense later; what counts is what its versions need then."""

    @classmethod
    def missing(cls) -> str:
        return "no command mandapa repack" if run_quietly("mandapa", "repack", "--help").returncode else ""

    def commit(self, number: int) -> None:
        super().commit(number)
        done = run_quietly("mandapa", "repack", "bench", "--yes", "--repo", str(self.store))
        if done.returncode:
            raise RuntimeError(f"mandapa repack: {done.stderr}")

    def stored(self) -> int:
        """Of all chunks that a version needs; what they were before may be there until it is collected."""
        reader = self._reader()
        pieces = {
            (piece.container, piece.offset): piece.stored
            for artifact in reader.artifacts()
            for version in artifact.versions()
            for row in version.rows()
            for whole in pieces_of(row, reader.reader.load)
            for piece in whole.chain()
        }
        return sum(pieces.values())


class CommandLine(Tool):
    """A process each time."""

    program = "mandapa"

    @classmethod
    def release(cls) -> str:
        return mandapa.__version__

    def prepare(self) -> None:
        os.environ |= {"MANDAPA_REPO": str(self.store)}
        self.run("init", self.store)

    def commit(self, number: int) -> None:
        self.run("add", "bench", self.source)

    def restore(self, dest: Path) -> None:
        self.run("get", "bench", dest)

    def piece(self, file: str, start: int, stop: int) -> bytes:
        return self.read_from(start, stop, "cat", f"bench/{file}")
