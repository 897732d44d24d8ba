"""A run's reads in a process of their own: the newest version that has a file, and where the newest checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mandapa
from mandapa.errors import NotFoundError
from mandapa.loggers import ObjectStoreLogger
from mandapa.run.backend import value_of
from mandapa.run.reader import fetch, newest_checkpoint


@pytest.fixture(scope="module")
def backend(shared_place: Path) -> dict[str, Any]:
    """Of a repository in which three checkpoints were saved, the second of which has the highest step."""
    repo = mandapa.open(shared_place / "repo", create=True)
    net = repo.artifact("net")
    for n, step in ((1, 10), (2, 30), (3, 20)):
        with net.transaction(f"step {step}", {"step": step, "checkpoint": f"ck/{n}.pt"}) as txn:
            txn.add_bytes(f"ck/{n}.pt", f"{n}".encode())
            txn.add_bytes("log", f"log {n}".encode())
            if n > 1:
                txn.remove(f"ck/{n - 1}.pt")
    with net.transaction("finished") as txn:
        txn.add_bytes("notes", b"n")
    with repo.artifact("plain").transaction("step 1", {"step": 1, "checkpoint": 0.5}) as txn:
        txn.add_bytes("checkpoint/state.pt", b"1")
    with repo.artifact("bare").transaction() as txn:
        txn.add_bytes("x", b"x")
    with repo.artifact("hostile").transaction("step 1", {"step": 1, "checkpoint": "../x"}) as txn:
        txn.add_bytes("x", b"x")
    return value_of(ObjectStoreLogger(shared_place / "repo").spec("net"))


@pytest.mark.parametrize(
    ("path", "number", "text"), [("ck/1.pt", 0, "1"), ("ck/3.pt", 2, "3"), ("log", 3, "log 3"), ("notes", 3, "n")]
)
def test_the_newest_version_that_has_a_file(
    backend: dict[str, Any], tmp_path: Path, path: str, number: int, text: str
) -> None:
    """It is alone in the folder, under the last part of its name."""
    found = fetch(backend, "net", str(tmp_path), folder=path, newest=True)
    assert (found["address"], found["files"]) == (f"net:v{number}", 1)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(path.rpartition("/")[2], text)]


@pytest.mark.parametrize(("artifact", "path"), [("net", "nope"), ("net", "ck"), ("nobody", "log")])
def test_a_file_that_no_version_has(backend: dict[str, Any], tmp_path: Path, artifact: str, path: str) -> None:
    with pytest.raises(NotFoundError, match=f"{artifact}"):
        fetch(backend, artifact, str(tmp_path / "x"), folder=path, newest=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("net", ("net:v1", "ck/2.pt")),  # by step
        ("net:latest", ("net:v3", "ck/3.pt")),  # the one that is in that version
        ("net:v3~2", ("net:v1", "ck/2.pt")),
        ("net:v0/whatever", ("net:v0", "ck/1.pt")),
        ("plain", ("plain:v0", "checkpoint")),
    ],
)
def test_where_the_newest_checkpoint_is(backend: dict[str, Any], address: str, expected: tuple[str, str]) -> None:
    assert newest_checkpoint(backend, address) == expected


@pytest.mark.parametrize("address", ["bare", "nobody", "net:v9", "bare:v0"])
def test_where_there_is_no_checkpoint(backend: dict[str, Any], address: str) -> None:
    with pytest.raises(NotFoundError):
        newest_checkpoint(backend, address)


def test_a_place_that_is_no_path_is_no_checkpoint(backend: dict[str, Any]) -> None:
    with pytest.raises(NotFoundError, match="has no checkpoint"):
        newest_checkpoint(backend, "hostile")
