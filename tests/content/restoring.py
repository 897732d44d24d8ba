"""What the tests of downloads share: a repository without history, and files to put into it."""

from __future__ import annotations

import random

from mandapa.content.download import download
from mandapa.content.index import Index
from mandapa.content.tree import Located, NodeReader
from mandapa.content.upload import Upload
from mandapa.format.manifest import FileRow
from mandapa.object_store import MemoryObjectStore
from mandapa.testing.faults import CountingObjectStore

MIB = 1 << 20


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)


FILES = {
    "README": b"hello\n",
    "a/b/deep": noise(5000, 1),
    "a/empty": b"",
    "a/large": noise(20 * MIB + 5, 2),
    "a.txt": b"text " * 5000,
    "run.sh": b"#!/bin/sh\n",
    "zeros": bytes(9 * MIB),
}


class Repo:
    def __init__(self, store=None):
        self.store = CountingObjectStore(store or MemoryObjectStore())

    def put(self, files, **options):
        with Upload(self.store, index=Index(), **options) as upload:
            rows = [upload.add_bytes(path, data) for path, data in sorted(files.items())]
            upload.flush()
        rows = [with_mode(located, path_ends=".sh") for located in rows]
        self.store.reset()
        return rows

    def get(self, rows, dest, **options):
        return download(rows, dest, store=self.store, load=NodeReader(self.store).load, **options)


def with_mode(located, path_ends):
    row = located.row
    if row.path.endswith(path_ends):
        row = FileRow(row.path, row.size, 1, row.digest, row.chunks)
    return Located(row, located.table)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
