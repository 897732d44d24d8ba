"""Tensors of versions: which there are, their values by ranges, and what became of them; on files of real writers."""

from __future__ import annotations

import io
import math
import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from safetensors.torch import save

import mandapa
from mandapa.content.tensors.stats import as_floats
from mandapa.errors import InvalidInputError, NotFoundError
from mandapa.object_store import MemoryObjectStore
from mandapa.object_store.base import Buffer
from mandapa.repository.repository import Repository
from mandapa.testing.faults import CountingObjectStore

MIB = 1 << 20


def state(shift: float = 0.0) -> dict[str, object]:
    """A nested state with tied weights, views, and types that NumPy lacks."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1000, 700, generator=generator)
    tied = torch.randn(40, 30, generator=generator)
    return {
        "model": OrderedDict(
            weight=first + shift,
            half=torch.randn(3000, generator=generator).bfloat16(),
            tied=tied,
            turned=tied.t(),
            part=tied[2:4],
            fp8=torch.randn(64, generator=generator).to(torch.float8_e4m3fn),
        ),
        "optim": {"state": {0: {"exp_avg": torch.randn(700, 1000, generator=generator), "step": torch.tensor(3.0)}}},
        "empty": torch.empty(0, 3),
        "step": 7,
    }


def flat(value: object, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    found = {}
    if isinstance(value, dict):
        for key, item in value.items():
            found.update(flat(item, f"{name}.{key}" if name else str(key)))
    return found


def torch_zip(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def commit(repo: Repository, **files: bytes) -> mandapa.Version:
    with repo.artifact("m").transaction() as txn:
        for name, data in files.items():
            txn.add_bytes(name, data)
    assert txn.version is not None
    return txn.version


@pytest.fixture(params=["raw", "dense"])
def repo(request: pytest.FixtureRequest) -> Repository:
    return Repository.create(MemoryObjectStore(), codec=request.param)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal type, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = [x.contiguous().reshape(-1).view(torch.uint8) if x.numel() else x.reshape(-1) for x in (a, b)]
    return torch.equal(*bits)


def test_all_tensors_of_a_torch_file(repo: Repository) -> None:
    """Names, types, shapes and every bit are as `torch.load` gives them, strides included."""
    expected = flat(state())
    version = commit(repo, state=torch_zip(state()))
    listed = version.tensors("state")
    assert {name: (t.dtype, t.shape) for name, t in listed.items()} == {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in expected.items()
    }
    loaded = version.load_tensors("state", framework="torch")
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(loaded[name], tensor), name
    assert np.array_equal(version.load_tensors("state", "model.weight")["model.weight"], expected["model.weight"])


def test_safetensors_and_numpy_files(repo: Repository) -> None:
    """The same for safetensors, npz and npy; arrays that are given are filled."""
    weights = {"a": torch.randn(300, 500), "s": torch.tensor(1.5), "b": torch.randn(9).half()}
    archive, one = io.BytesIO(), io.BytesIO()
    np.savez(archive, x=np.arange(100_000), y=np.float32(2))
    np.save(one, np.eye(300))
    version = commit(repo, w=save(weights), z=archive.getvalue(), n=one.getvalue())
    loaded = version.load_tensors("w", framework="torch")
    assert all(same(loaded[name], tensor) for name, tensor in weights.items())
    arrays = version.load_tensors("z")
    assert np.array_equal(arrays["x"], np.arange(100_000))
    assert arrays["y"] == 2
    assert np.array_equal(version.load_tensors("n")["0"], np.eye(300))
    out = np.empty((300, 500), np.float32)
    assert version.load_tensors("w", ["a"], into={"a": out})["a"] is out
    assert np.array_equal(out, weights["a"].numpy())
    with pytest.raises(InvalidInputError, match="into"):
        version.load_tensors("w", ["a"], into={"a": np.empty((2, 2), np.float32)})


def test_digests_are_those_of_the_bytes(repo: Repository) -> None:
    """Of a tensor of one chunk without a request, of one of several by reading it."""
    big = torch.randn(3 * MIB // 4 * 2)  # 6 MiB: two chunks
    weights = {"big": big, "mid": torch.randn(100_000), "small": torch.randn(3)}
    version = commit(repo, w=save(weights))
    for name, tensor in version.tensors("w").items():
        assert tensor.digest == mandapa.digest.hexdigest(weights[name].numpy().tobytes()), name


def test_what_is_no_tensor_file_and_what_is_not_there(repo: Repository) -> None:
    """Clear errors: no tensor file, no such tensor (with the nearest names), no such asset, an unknown framework."""
    version = commit(repo, t=b"no tensors here" * 100, w=save({"weight": torch.ones(3)}))
    with pytest.raises(InvalidInputError, match="cannot be read by tensors"):
        version.tensors("t")
    with pytest.raises(NotFoundError, match="there is 'weight'"):
        version.load_tensors("w", "wieght")
    with pytest.raises(NotFoundError, match="no asset"):
        version.tensors("x")
    with pytest.raises(InvalidInputError, match="framework"):
        version.load_tensors("w", framework="jax")  # type: ignore[arg-type]


class FarObjectStore(MemoryObjectStore):
    """Every answer takes a while, so that it shows which requests wait for others."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self, latency: float = 0.0) -> None:
        self.latency = latency
        self.bytes = 0
        self._rounds: list[tuple[int, float]] = []

    @property
    def rounds(self) -> int:
        """The most requests that were made one after the other."""
        return max([number for number, _ in self._rounds], default=0)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        began = time.monotonic()
        number = 1 + max([number for number, ended in list(self._rounds) if ended <= began], default=0)
        time.sleep(self.latency)
        self.bytes += sum(length for _, length in ranges)
        found = super().get_ranges(key, ranges)
        self._rounds.append((number, time.monotonic()))
        return found


@pytest.mark.parametrize("codec", ["raw", "auto"])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize(("count", "size"), [(12, MIB), (300, 32 << 10)])
def test_one_tensor_takes_few_round_trips_and_bytes(count: int, size: int, kind: str, codec: str) -> None:
    """Three round trips from a version whose manifest is not known, and at most 256 KiB besides the tensor."""
    weights = {f"layer.{i}.weight": torch.randn(size) for i in range(count)}
    store = FarObjectStore()
    commit(Repository.create(store, codec=codec), w=torch_zip(weights) if kind == "torch" else save(weights))
    version = Repository(store)["m"]
    name = f"layer.{count * 2 // 3}.weight"
    store.reset(latency=0.05)
    loaded = version.load_tensors("w", name, framework="torch")
    assert torch.equal(loaded[name], weights[name])
    assert store.rounds <= 3
    assert store.bytes <= 4 * size + 256 * 1024
    store.reset(latency=0.05)
    version.load_tensors("w", name, framework="torch")
    assert store.rounds <= 2


def test_many_tensors_take_as_many_requests_as_their_bytes() -> None:
    """Not one a tensor: neighbours come together, by several requests at once."""
    weights = {f"layer.{i}.weight": torch.randn(32 << 10) for i in range(300)}  # 38 MB
    store = CountingObjectStore(MemoryObjectStore())
    version = commit(Repository.create(store, codec="raw"), w=torch_zip(weights))
    store.reset()
    loaded = version.load_tensors("w", framework="torch")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert store.requests.total() <= 16
    assert store.bytes_read <= 1.01 * 300 * 4 * (32 << 10)


def test_which_tensors_changed(repo: Repository) -> None:
    """Added, removed, of another type or shape, and changed in value; with figures that NumPy gives too."""
    old = {"same": torch.randn(100_000), "moved": torch.randn(200_000), "gone": torch.ones(3), "t": torch.ones(4)}
    new = {**old, "moved": old["moved"] + 0.25, "new": torch.ones(2), "t": torch.ones(4).half()}
    del new["gone"]
    first, second = commit(repo, w=save(old)), commit(repo, w=save(new))
    changes = {change.name: change for change in first.diff_tensors(second, "w", stat=True)}
    assert {name: change.kind for name, change in changes.items()} == {
        "moved": "values",
        "gone": "removed",
        "new": "added",
        "t": "dtype",
    }
    a, b = old["moved"].double().numpy(), new["moved"].double().numpy()
    stat = changes["moved"].stat
    assert stat is not None
    assert stat.l2 == pytest.approx(np.linalg.norm(b - a))
    assert stat.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
    assert stat.max == pytest.approx(np.abs(b - a).max())
    assert stat.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert (stat.changed, stat.nan, stat.inf) == (200_000, (0, 0), (0, 0))
    assert first.diff_tensors(first, "w") == []


def test_nan_and_infinities_are_counted(repo: Repository) -> None:
    """They are left out of the norms; a NaN of other bits is a change."""
    old = torch.tensor([1.0, math.nan, math.inf, 0.0] * 1000)
    new = old.clone()
    new[0] = math.nan
    first, second = commit(repo, w=save({"a": old})), commit(repo, w=save({"a": new}))
    [change] = first.diff_tensors(second, "w", stat=True)
    assert change.stat is not None
    assert (change.stat.nan, change.stat.inf, change.stat.changed) == ((1000, 1001), (1000, 1000), 1)
    assert change.stat.l2 == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.int8, torch.bool, torch.complex64])
def test_all_types_are_measured(repo: Repository, dtype: torch.dtype) -> None:
    """As torch converts them to float64."""
    old, new = (torch.randn(5000).mul(3).relu().to(dtype) for _ in range(2))
    first, second = commit(repo, w=save({"a": old})), commit(repo, w=save({"a": new}))
    [change] = first.diff_tensors(second, "w", stat=True)
    wide = [torch.view_as_real(x).double() if dtype.is_complex else x.double() for x in (old, new)]
    assert change.stat is not None
    assert change.stat.l2 == pytest.approx(float((wide[1] - wide[0]).norm()))


@pytest.mark.parametrize(
    "dtype",
    ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "bfloat16", "float16"],
)
def test_values_of_small_floats(dtype: str) -> None:
    """All of them as torch has them."""
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16 if "16" in dtype else torch.uint8)
    expected = codes.view(getattr(torch, dtype)).double().numpy()
    assert np.array_equal(as_floats(codes.numpy().tobytes(), dtype), expected, equal_nan=True)
