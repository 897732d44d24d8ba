"""Versions of real checkpoints, stored dense: deltas, bf16 copies, what they need, and that every bit comes back."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import save

from mandapa.content.codecs import BF16, DELTA, FEATURES, PCO
from mandapa.content.fetch import pieces_of
from mandapa.content.index import Piece
from mandapa.errors import CorruptionError, FormatVersionError
from mandapa.format.keys import container_key
from mandapa.object_store import MemoryObjectStore
from mandapa.object_store.base import Buffer
from mandapa.repository import repository as repository_module
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository
from mandapa.repository.version import Version

SMALL = 200_000


def states(count: int) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
    """A small model in training: weights, momentum, and the bf16 copy of the weights, before and after them."""
    torch.manual_seed(0)
    model = torch.nn.Linear(500, SMALL // 500)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    target = torch.randn(64, SMALL // 500)
    x = torch.randn(64, 500)
    for _ in range(count):
        for _ in range(5):
            optimizer.zero_grad()
            ((model(x) - target) ** 2).mean().backward()
            optimizer.step()
        master = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        yield {
            "model": {name: tensor.bfloat16() for name, tensor in master.items()},
            "master": master,
            "momentum": {"weight": optimizer.state[model.weight]["exp_avg"].clone()},
        }


def as_torch(state: dict[str, dict[str, torch.Tensor]]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def as_safetensors(state: dict[str, dict[str, torch.Tensor]]) -> bytes:
    return save({f"{a}.{b}": tensor for a, tensors in state.items() for b, tensor in tensors.items()})


def commit(repo: Repository, data: Buffer, at: str = "checkpoint/state") -> Version:
    with repo.artifact("m").transaction() as txn:
        txn.add_bytes(at, data)
    assert txn.version is not None
    return txn.version


def pieces(version: Version, path: str = "checkpoint/state") -> list[Piece]:
    located = version.tree.get(path)
    assert located is not None
    return list(pieces_of(located, version.artifact.repository.reader.load))


@pytest.mark.parametrize("form", [as_torch, as_safetensors])
def test_a_series_comes_back(form, tmp_path):
    """Each version is smaller than the first, stands on two others at most, and is what was saved, by every way."""
    repo = Repository.create(MemoryObjectStore(), codec="dense")
    saved = [form(state) for state in states(6)]
    versions = [commit(repo, data) for data in saved]
    assert all(version.added < 0.85 * versions[0].added for version in versions[1:])
    fresh = Repository(repo.place, codec="raw")
    for version, data in zip(versions, saved, strict=True):
        found = fresh[f"m:v{version.number}"]
        assert found.open("checkpoint/state").read() == data
        found.download(tmp_path / str(version.number))
        assert (tmp_path / str(version.number) / "checkpoint/state").read_bytes() == data
        assert max(len(piece.chain()) for piece in pieces(found)) <= 3
    codecs = {piece.codec for version in versions for piece in pieces(version)}
    assert {PCO, DELTA, BF16} <= codecs
    assert fsck(repo, deep=True).findings == []


def test_a_bf16_copy_that_equals_its_master_costs_nothing():
    """Before or after the master in the file; and what does not equal it is stored, and comes back."""
    state = next(iter(states(1)))
    repo = Repository.create(MemoryObjectStore(), codec="dense")
    with_copy = commit(repo, as_safetensors(state), "a")
    del state["model"]
    repo = Repository.create(MemoryObjectStore(), codec="dense")
    without = commit(repo, as_safetensors(state), "a")
    assert with_copy.added - without.added < 1000
    state["model"] = {"weight": (state["master"]["weight"] * 1.5).bfloat16()}
    other = commit(repo, data := as_safetensors(state), "b")
    assert other.open("b").read() == data
    assert BF16 not in {piece.codec for piece in pieces(other, "b")}
    # Alike where it is probed, and different elsewhere.
    copy = state["master"]["weight"].bfloat16()
    copy.view(-1)[SMALL // 3] = 3
    state["model"] = {"weight": copy}
    other = commit(repo, data := as_safetensors(state), "c")
    assert other.open("c").read() == data


def test_versions_name_what_they_need(monkeypatch):
    """An older mandapa reads what it can, and refuses the rest by name."""
    repo = Repository.create(MemoryObjectStore(), codec="raw")
    saved = [as_torch(state) for state in states(2)]
    assert commit(repo, saved[0]).requires == ()
    dense = Repository(repo.place, codec="dense")
    second = commit(dense, saved[1])
    assert {"delta", "bf16"} <= set(second.requires)
    monkeypatch.setattr(repository_module, "FEATURES", {codec: FEATURES[codec] for codec in (0, 1)})
    assert repo["m:v0"].open("checkpoint/state").read() == saved[0]
    with pytest.raises(FormatVersionError, match="delta"):
        repo["m:v1"].open("checkpoint/state").read()
    with pytest.raises(FormatVersionError, match="delta"):
        commit(repo, b"x", "other")


def test_a_damaged_base_is_named():
    """The version that stands on damaged bytes cannot be read, and the message says which bytes those are."""
    store = MemoryObjectStore()
    repo = Repository.create(store, codec="dense")
    first, second = (commit(repo, as_torch(state)) for state in states(2))
    delta = next(piece for piece in pieces(second) if piece.codec == DELTA)
    base = delta.base
    assert base is not None
    key = container_key(base.container)
    hurt = bytearray(store.get(key))
    hurt[base.offset + base.stored // 2] ^= 1
    store.put(key, bytes(hurt))
    for version in (first, second):
        with pytest.raises(CorruptionError, match=f"bytes {base.offset}"):
            Repository(store)[f"m:v{version.number}"].open("checkpoint/state").read()
    assert {f"m:v{version.number}" for version in (first, second)} <= set(fsck(Repository(store), deep=True).hurt)


class _SlowStore(MemoryObjectStore):
    """A store somewhere else, with a link of so many bytes a second, shared by all puts."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._rate = rate

    @property
    def url(self) -> str:
        return "s3://far/away"

    def put(self, key: str, data: Buffer) -> None:
        time.sleep(len(data) / self._rate)
        super().put(key, data)


def test_auto_uses_a_slow_link_well(tmp_path):
    """On 100 Mbit/s it comes to store what dense stores, with bases from the cache; nothing is fetched for it."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=1_000_000).astype(np.float32)
    repo = Repository.create(_SlowStore(12.5e6), cache_dir=tmp_path, cache_size=1 << 30)
    added = []
    for _ in range(3):
        weights = weights * (1 + 1e-6 * rng.normal(size=len(weights)).astype(np.float32))
        version = commit(repo, save({"w": torch.from_numpy(weights)}))
        added.append(version.added / version.size)
    assert added[0] < 0.9
    assert added[2] < 0.7
    assert DELTA in {piece.codec for piece in pieces(version)}
