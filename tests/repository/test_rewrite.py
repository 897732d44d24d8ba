"""Rewriting: what little is needed of half-dead packs is stored again, and nothing else changes for anyone."""

from __future__ import annotations

from random import Random

import pytest

from mandapa.content.fetch import pieces_of
from mandapa.content.index import Piece
from mandapa.errors import InvalidInputError
from mandapa.format.keys import container_key
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository
from mandapa.repository.rewrite import Rewritten, rewrite

MIB = 1 << 20


def make(store: object | None = None, *, threads: int = 2) -> Repository:
    return Repository.create(store or MemoryObjectStore(), codec="raw", threads=threads)


def noise(seed: int, size: int) -> bytes:
    return Random(seed).randbytes(size)


def add(repo: Repository, name: str, files: dict[str, bytes]) -> None:
    with repo.artifact(name).transaction(base=None) as txn:
        for path, data in files.items():
            txn.add_bytes(path, data)


def content(repo: Repository) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Address -> digest and bytes of every live version, as someone sees them who comes now."""
    repo = Repository(repo.place)
    return {
        version.address: (version.digest, {path: version.open(path).read() for path in version.assets})
        for artifact in repo.artifacts()
        for version in artifact.versions()
    }


def pieces(repo: Repository) -> set[Piece]:
    """Every chunk that a live version needs, bases included."""
    return {
        one
        for artifact in repo.artifacts()
        for version in artifact.versions()
        for located in version.rows()
        for piece in pieces_of(located, repo.reader.load)
        for one in piece.chain()
    }


def packs(repo: Repository) -> dict[str, int]:
    return {info.key: info.size for info in repo.store.list("packs/")}


def needed(repo: Repository) -> set[str]:
    return {container_key(piece.container) for piece in pieces(repo)}


def sweep(repo: Repository) -> set[str]:
    """The end of a clean-up: packs that no live version needs are deleted."""
    dead = set(packs(repo)) - needed(repo)
    repo.store.delete(dead)
    return dead


def done(repo: Repository, keys: set[str]) -> list[Rewritten]:
    return list(rewrite(repo, keys))


@pytest.fixture
def half_dead() -> Repository:
    """One pack of which two artifacts need one file of three."""
    repo = make()
    add(repo, "a", {"kept": noise(1, 300_000), "gone": noise(2, 400_000), "gone too": noise(3, 400_000)})
    add(repo, "a", {"kept": noise(1, 300_000), "new": noise(4, 100_000)})
    add(repo, "b", {"elsewhere": noise(1, 300_000), "small": b"x"})
    repo.artifact("a").delete(0)
    return repo


def old_pack(repo: Repository) -> str:
    """The key of the largest."""
    found = packs(repo)
    return max(found, key=lambda key: found[key])


def test_what_is_needed_is_stored_once_more_and_the_old_pack_goes(half_dead):
    """Content and digests stay, chunks are stored once for all versions, and a gc frees the old pack."""
    repo, before = half_dead, content(half_dead)
    old = old_pack(repo)
    sizes = packs(repo)
    result = done(repo, {old})
    assert [(one.address, one.skipped) for one in result] == [("a:v1", ""), ("b:v0", "")]
    assert content(repo) == before
    assert old not in needed(repo)
    new = {key: size for key, size in packs(repo).items() if key not in sizes}
    assert sum(new.values()) == 300_000 + 16 + 48 + 48
    assert sum(one.put for one in result) < 305_000
    assert old in sweep(repo)
    assert content(repo) == before
    assert fsck(repo, deep=True).findings == []


def test_nothing_to_do_writes_nothing(half_dead):
    """Packs that nothing reaches, or none: nothing is put and nothing committed."""
    repo = half_dead
    done(repo, {old_pack(repo)})
    old = old_pack(repo)
    before = {info.key for info in repo.store.list("")}
    assert done(repo, {old}) == []
    assert done(repo, set()) == []
    assert done(repo, {"packs/" + "0" * 32}) == []
    assert {info.key for info in repo.store.list("")} == before


@pytest.mark.parametrize("key", ["", "packs/", "log/" + "0" * 32, "packs/" + "A" * 32, "packs/" + "0" * 32 + "\n"])
def test_only_containers_are_emptied(half_dead, key):
    """A key of something else is refused before anything is read."""
    with pytest.raises(InvalidInputError, match="no key of a container"):
        done(half_dead, {key})
