"""One file changed in an artifact of a million: bytes besides the file, and requests, worst of 200 random ones.

``make bench`` runs it. Requests are counted, so the store is in memory and nothing here is a time.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

from mandapa.object_store import MemoryObjectStore
from mandapa.object_store.base import Buffer
from mandapa.repository.repository import Repository
from mandapa.testing.faults import CountingObjectStore

FILE = 5_000
READS = ("get", "get_ranges", "head", "list")


class Sizes(MemoryObjectStore):
    """Counts the bytes that are written until a commit is acknowledged; the head of the log comes after that."""

    written = 0

    def put(self, key: str, data: Buffer) -> None:
        """Store and count."""
        self.written += 0 if key.startswith("head/") else len(data)
        super().put(key, data)

    def create(self, key: str, data: Buffer) -> None:
        """Store and count."""
        self.written += len(data)
        super().create(key, data)


def change(repo: Repository, path: str, content: bytes) -> None:
    """One commit of one file."""
    with repo.artifact("big").transaction() as txn:
        txn.add_bytes(path, content)


def main() -> None:
    """Make the artifact, change random files with a cold client, print the worst."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--changes", type=int, default=200)
    options = parser.parse_args()
    rng = random.Random(0)
    paths = [f"data/{i // 1000:04}/sample-{rng.getrandbits(40):010x}.bin" for i in range(options.files)]
    store = Sizes()
    repo = Repository.create(store, threads=0)
    with repo.artifact("big").transaction() as txn:
        for number, path in enumerate(paths):
            txn.add_bytes(path, number.to_bytes(8, "little"))
    print(f"{options.files:,} files, {store.written / options.files:.0f} bytes a file in the first version")
    for name in ("cold", "warm"):
        worst: Counter[str] = Counter()
        counting = CountingObjectStore(store)
        repo = Repository(counting, threads=0)
        if name == "warm":
            change(repo, paths[0], b"")  # has read the log and the root
        for _ in range(options.changes):
            if name == "cold":
                repo = Repository(counting, threads=0)
            before, asked = store.written, Counter(counting.requests)
            change(repo, rng.choice(paths), rng.randbytes(FILE))
            used = Counter(counting.requests) - asked
            worst |= Counter(
                {
                    "bytes besides the file": store.written - before - FILE,
                    "writes with the head": used["put"] + used["create"],
                    "reads": sum(used[verb] for verb in READS),
                }
            )
        print(f"{name}, worst of {options.changes}: " + ", ".join(f"{what} {n:,}" for what, n in worst.items()))


if __name__ == "__main__":
    main()
