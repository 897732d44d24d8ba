"""Repack: what a version holds stays, its bytes become fewer, and nothing that comes in between is hurt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save

from mandapa.content.codecs import DELTA, required
from mandapa.content.fetch import pieces_of
from mandapa.errors import InvalidInputError, NotFoundError
from mandapa.format.records import FenceOp
from mandapa.object_store import MemoryObjectStore
from mandapa.repository import move as move_module
from mandapa.repository import repack as repack_module
from mandapa.repository.fsck import fsck
from mandapa.repository.repack import RepackPlan
from mandapa.repository.repository import Repository


def series(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=300_000).astype(np.float32)
    found = []
    for _ in range(count):
        weights = weights * (1 + 1e-6 * rng.normal(size=len(weights)).astype(np.float32))
        found.append(save({"w": torch.from_numpy(weights), "frozen": torch.zeros(100_000)}))
    return found


@pytest.fixture
def repo() -> Repository:
    """Three versions of a checkpoint beside text and a URL, stored raw."""
    repo = Repository.create(MemoryObjectStore(), codec="raw")
    for number, data in enumerate(series(3)):
        with repo.artifact("m").transaction() as txn:
            txn.add_bytes("checkpoint/w", data)
            txn.add_bytes("log.txt", b"step\n" * number)
            txn.add_url("data", "s3://elsewhere/x", size=5, checksum="etag:1")
    return repo


def content(repo: Repository) -> list[tuple[str, bytes, bytes]]:
    return [(v.digest, v.open("checkpoint/w").read(), v.open("log.txt").read()) for v in repo.artifact("m").versions()]


def test_fewer_bytes_and_the_same_content(repo):
    """Numbers, digests and content stay; the plan told about how many bytes; a second one finds nothing to do."""
    before = content(repo)
    held = repo["m:v1"].open("checkpoint/w")
    plan = repo.artifact("m").plan_repack()
    assert [step.version for step in plan.steps] == [0, 1, 2]
    done = repo.artifact("m").repack(RepackPlan.from_json(plan.to_json()))
    assert [one.skipped for one in done] == ["", "", ""]
    for one, step in zip(done, plan.steps, strict=True):
        assert one.before == step.stored
        assert one.after == pytest.approx(step.expected, rel=0.1)
        assert one.after < 0.9 * one.before
    assert content(repo) == content(Repository(repo.place)) == before
    assert held.read() == before[1][1]
    assert fsck(repo, deep=True).findings == []
    second = repo["m:v1"]
    assert "delta" in second.requires
    located = second.tree.get("checkpoint/w")
    assert DELTA in {piece.codec for piece in pieces_of(located, repo.reader.load)}
    assert second.assets["data"].url == "s3://elsewhere/x"
    assert repo.artifact("m").plan_repack().steps == ()
    assert repo.artifact("m").repack() == []


def test_a_version_made_after_it_shares_what_was_repacked(repo):
    """The next version takes what did not change from where it is now."""
    repo.artifact("m").repack()
    with repo.artifact("m").transaction() as txn:
        txn.add_bytes("more", b"x")
    assert txn.version is not None
    assert txn.version.added < 3000
    assert fsck(repo, deep=True).findings == []


def test_what_a_version_shares_with_the_one_before_is_required_too(repo):
    """A file that did not change is named where the version before has it now, with the features that this takes."""
    with repo.artifact("m").transaction() as txn:
        txn.add_bytes("other", series(1)[0])
    repo.artifact("m").repack()
    for version in repo.artifact("m").versions():
        used = {
            one.codec
            for located in version.rows()
            for piece in pieces_of(located, repo.reader.load)
            for one in piece.chain()
        }
        assert required(used) <= set(version.requires), version


def test_what_changed_since_the_plan_is_left_alone(repo):
    """A version that was deleted, or moved, is skipped and named; a plan of something else is refused."""
    artifact = repo.artifact("m")
    plan = artifact.plan_repack()
    artifact.delete(1)
    artifact.repack(RepackPlan("m", repo.id, plan.steps[:1]))
    done = artifact.repack(plan)
    assert {one.version: one.skipped for one in done} == {
        0: "it was stored otherwise since the plan was made",
        2: "",
        1: "it was deleted since the plan was made",
    }
    with pytest.raises(InvalidInputError, match="is for 'm'"):
        repo.artifact("other").repack(plan)
    with pytest.raises(NotFoundError):
        repo.artifact("other").plan_repack()
    for bad in (b"", b"[]", b'{"artifact":1}', b'{"artifact":"m","repository":"x","steps":[],"kind":"gc"}', b"\xff"):
        with pytest.raises(InvalidInputError):
            RepackPlan.from_json(bad)


@pytest.mark.parametrize("what", ["deleted", "condemned", "fenced"])
def test_what_comes_in_between(repo, monkeypatch, what):
    """Deleted while it is stored: skipped. A gc that listed its packs: skipped. One that did not: done."""
    before = content(repo)
    real = repack_module.edit_tree
    other = Repository(repo.place)
    fresh: list[set[bytes]] = []

    def between(reader, writer, root, rows):
        made = real(reader, writer, root, rows)
        writer.flush()
        fresh.append(set(writer.fresh))
        if len(fresh) > 1:
            return made
        log = other.artifact("m").open_log()
        if what == "deleted":
            other.artifact("m").delete(0)
        else:
            log.append(other.author.new_id().hex(), lambda state: [FenceOp("e1")], other.author)
        return made

    monkeypatch.setattr(repack_module, "edit_tree", between)
    monkeypatch.setattr(
        move_module,
        "condemned_or_missing",
        lambda store, containers, threads: (set(containers) & fresh[0]) if what == "condemned" else set(),
    )
    done = {one.version: one.skipped for one in repo.artifact("m").repack()}
    assert bool(done[0]) == (what != "fenced")
    assert (done[1], done[2]) == ("", "")
    assert [version.number for version in repo.artifact("m").versions()] == ([1, 2] if what == "deleted" else [0, 1, 2])
    assert content(repo) == before[what == "deleted" :]
    assert fsck(repo, deep=True).findings == []


def test_a_version_that_cannot_be_read_is_skipped(repo):
    """A damaged chunk: its versions are skipped, the others done; nothing is made of wrong bytes."""
    store = repo.place
    located = repo["m:v2"].tree.get("checkpoint/w")
    piece = max(pieces_of(located, repo.reader.load), key=lambda one: one.stored)
    plan = repo.artifact("m").plan_repack()
    key = f"packs/{piece.container[1:].hex()}"
    hurt = bytearray(store.get(key))
    hurt[piece.offset + 5] ^= 1
    store.put(key, bytes(hurt))
    done = repo.artifact("m").repack(plan)
    assert [bool(one.skipped) for one in done] == [False, False, True]
    assert "cannot be read" in done[2].skipped
