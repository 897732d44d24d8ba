"""One of several processes that commit to one artifact at the same time: ``python worker.py <JSON>``.

It opens the repository, says so, and waits for a line on its standard input, so that all of them begin together. With
``together`` it does so once more in each transaction, between reading the log and committing. With ``commits`` of 0 it
cleans up until its standard input ends, and says how many objects it has deleted.
"""

from __future__ import annotations

import json
import select
import sys
import time

from mandapa.object_store import LocalObjectStore, ObjectStore, S3ObjectStore
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository


def content(process: int, commit: int) -> bytes:
    """The bytes of the file that one commit adds."""
    return f"process {process}, commit {commit}\n".encode() * (1 + 37 * commit)


PLACES = 5
"""Files of one process, used again and again, so that versions stay small."""


def path(process: int, commit: int) -> str:
    """Where it adds, or changes, them."""
    return f"p{process}/{commit % PLACES}.txt"


def message(process: int, commit: int) -> str:
    """What the version says."""
    return f"p{process}: commit {commit}"


def open_store(place: dict[str, str]) -> ObjectStore:
    """The object store that the command line names."""
    if "bucket" in place:
        return S3ObjectStore(**place)
    return LocalObjectStore(place["path"])


def clean_up(repo: Repository) -> None:
    """A clean-up with a grace of nothing, a short rest, the next one."""
    freed = 0
    while not select.select([sys.stdin], [], [], 0.2)[0]:
        freed += len(repo.gc(grace=0).freed)
    print(freed, flush=True)


def main() -> None:
    """Commit ``commits`` files, one a version.

    For each a line on standard output: its version, and the machine's nanoseconds before and after.
    """
    order = json.loads(sys.argv[1])
    process = order["process"]
    repo = Repository(open_store(order["place"]), threads=2, author=Author(f"process-{process}"))
    print("ready", flush=True)
    sys.stdin.readline()
    if not order["commits"]:
        clean_up(repo)
    for commit in range(order["commits"]):
        call = time.monotonic_ns()
        with repo.artifact("shared").transaction(message(process, commit)) as txn:
            txn.add_bytes(path(process, commit), content(process, commit))
            if order["together"]:
                print("ready", flush=True)
                sys.stdin.readline()
        assert txn.made
        print(txn.version.number, call, time.monotonic_ns(), flush=True)


if __name__ == "__main__":
    main()
