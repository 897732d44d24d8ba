"""One of several processes that commit to one artifact at the same time: ``python worker.py <JSON>``.

It opens the repository, says so, and waits for a line on its standard input, so that all of them begin together. With
``together`` it does so once more in each transaction, between reading the log and committing.
"""

from __future__ import annotations

import json
import sys

from mandapa.object_store import LocalObjectStore, ObjectStore, S3ObjectStore
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository


def content(process: int, commit: int) -> bytes:
    """The bytes of the file that one commit adds."""
    return f"process {process}, commit {commit}\n".encode() * (1 + 37 * commit)


def path(process: int, commit: int) -> str:
    """Where it adds them."""
    return f"p{process}/{commit:03}.txt"


def open_store(place: dict[str, str]) -> ObjectStore:
    """The object store that the command line names."""
    if "bucket" in place:
        return S3ObjectStore(**place)
    return LocalObjectStore(place["path"])


def main() -> None:
    """Commit ``commits`` files, one a version; the number of each version goes to standard output."""
    order = json.loads(sys.argv[1])
    process = order["process"]
    repo = Repository(open_store(order["place"]), threads=2, author=Author(f"process-{process}"))
    print("ready", flush=True)
    sys.stdin.readline()
    for commit in range(order["commits"]):
        with repo.artifact("shared").transaction(path(process, commit)) as txn:
            txn.add_bytes(path(process, commit), content(process, commit))
            if order["together"]:
                print("ready", flush=True)
                sys.stdin.readline()
        assert txn.made
        print(txn.version.number, flush=True)


if __name__ == "__main__":
    main()
