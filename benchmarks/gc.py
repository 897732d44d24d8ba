"""What a clean-up takes in a repository of 1,000 artifacts with 20 versions each, of which one has changed.

The repository lies in a folder. One version of one artifact is deleted, and one is made, before a clean-up, which has
no grace. *First* is a machine that knows nothing of the repository; *again* is the same machine later, in a new
process; *nothing to free* is what most clean-ups of a quiet repository are. Requests are those of an object store: a
list counts for each 1,000 objects, a delete for each 1,000 keys.
Run: ``python benchmarks/gc.py [--artifacts 1000] [--folder DIR]``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from mandapa.object_store import LocalObjectStore
from mandapa.repository.repository import Repository
from mandapa.testing.faults import CountingObjectStore

VERSIONS = 20
VERBS = ("create", "put", "get", "get_ranges", "list", "delete")


def make(folder: Path, artifacts: int) -> None:
    """A repository of that shape; without fsync, which costs time and says nothing here."""
    repo = Repository.create(LocalObjectStore(folder, fsync=False), threads=0)
    for number in range(artifacts):
        artifact = repo.artifact(f"run-{number:05}")
        for version in range(VERSIONS):
            with artifact.transaction(f"step {version}") as txn:
                txn.add_bytes("checkpoint/model.bin", os.urandom(500))


def change(folder: Path) -> None:
    """One artifact moves: its oldest version goes, a new one comes."""
    artifact = Repository(LocalObjectStore(folder, fsync=False)).artifact("run-00000")
    artifact.delete(artifact.versions()[0])
    with artifact.transaction("one more") as txn:
        txn.add_bytes("checkpoint/model.bin", os.urandom(500))


def measure(folder: Path, cache: Path) -> tuple[float, CountingObjectStore, int]:
    """Seconds, requests and freed objects of a clean-up, opening included."""
    store = CountingObjectStore(LocalObjectStore(folder))
    start = time.perf_counter()
    done = Repository(store, cache_dir=cache).gc(grace=0)
    return time.perf_counter() - start, store, len(done.freed)


def bench(place: Path, scratch: Path, artifacts: int) -> None:
    """Measure, and print a table."""
    if not place.exists():
        start = time.perf_counter()
        make(place, artifacts)
        print(f"# made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(f"{artifacts:,} artifacts, {artifacts * VERSIONS:,} versions\n")
    print(f"| clean-up | seconds | freed | {' | '.join(VERBS)} |")
    print("|---|--:|--:|" + "--:|" * len(VERBS))
    for name, changed in (("first", True), ("again", True), ("nothing to free", False)):
        if changed:
            change(place)
        seconds, store, freed = measure(place, scratch / "cache")
        counts = " | ".join(f"{store.requests[verb]:,}" for verb in VERBS)
        print(f"| {name} | {seconds:.2f} | {freed} | {counts} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="Keep the repository there, and use it again.")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        bench(options.folder or scratch / "repo", scratch, options.artifacts)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
