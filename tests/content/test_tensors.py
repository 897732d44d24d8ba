"""Where the tensors of real files are, as the libraries that wrote them say."""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict

import numpy as np
import pytest

from mandapa.content.cutters import BytesSource
from mandapa.content.tensors import read_structure, tensors_of

torch = pytest.importorskip("torch")
from safetensors.torch import save as save_safetensors  # noqa: E402 - it needs torch

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


def torch_bytes(state, **options):
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def random_tensor(dtype, *shape):
    count = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
    data = np.random.default_rng(count).integers(0, 2 if dtype is torch.bool else 256, count, dtype=np.uint8)
    return torch.frombuffer(bytearray(data.tobytes()), dtype=dtype).reshape(shape)


def raw(tensor):
    """The bytes of a tensor's elements in C order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def found(data, place):
    """The bytes in C order that a place describes."""
    item = place.size // max(int(np.prod(place.shape)), 1)
    span = np.frombuffer(data, dtype=f"V{item}", offset=place.start, count=(place.end - place.start) // item)
    if place.strides is None:
        return span.tobytes()
    steps = [stride * item for stride in place.strides]
    return np.lib.stride_tricks.as_strided(span, place.shape, steps).tobytes()


def check(data, expected, kind):
    """A structure holds exactly the expected tensors: names, dtypes, shapes and bytes."""
    structure = read_structure(BytesSource(data), "file")
    assert structure.kind == kind
    assert [place[3:5] for place in structure.tensors] == sorted(place[3:5] for place in structure.tensors)
    places = {place.name: place for place in structure.tensors}
    assert places.keys() == expected.keys()
    for name, tensor in expected.items():
        place = places[name]
        assert f"torch.{place.dtype}" == str(tensor.dtype)
        assert place.shape == tuple(tensor.shape)
        assert place.size == tensor.numel() * tensor.element_size()
        assert not place.size or found(data, place) == raw(tensor), name
    assert tensors_of(BytesSource(data)) == structure.tensors
    return structure


def all_dtypes():
    return {str(dtype): random_tensor(dtype, 3, 5) for dtype in DTYPES}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_dtypes(protocol):
    """Every dtype, in every protocol of pickles that torch writes."""
    state = all_dtypes()
    check(torch_bytes(state, pickle_protocol=protocol), state, "torch")


def test_safetensors_dtypes():
    """Every dtype that safetensors has; scalars and empty tensors."""
    state = {name: value for name, value in all_dtypes().items() if value.dtype != torch.complex128}
    state |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "also empty": torch.zeros(2, 0)}
    check(save_safetensors(state), state, "safetensors")


def test_nested_state_has_dotted_names():
    """Modules, optimizers, lists, tuples and numbers as keys; what is no tensor is not there."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optim": optimizer.state_dict(),
        "list": [torch.ones(2), {"deep": (torch.zeros(1), 5)}],
        "step": 7,
        "args": {"lr": 0.1, "big": 10**30, "none": None, "array": np.arange(3), "names": {"a", "b"}},
        "size": torch.Size([1, 2]),
        "rng": torch.get_rng_state(),
        "ordered": OrderedDict(a=torch.ones(1)),
    }
    expected = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        expected |= {f"optim.state.{number}.{name}": value for name, value in slots.items()}
    expected |= {
        "list.0": state["list"][0],
        "list.1.deep.0": state["list"][1]["deep"][0],
        "rng": state["rng"],
        "ordered.a": state["ordered"]["a"],
    }
    for protocol in (2, 4):
        check(torch_bytes(state, pickle_protocol=protocol), expected, "torch")


def test_a_bare_tensor_is_called_zero():
    """A file of one tensor without a name."""
    tensor = torch.arange(4)
    check(torch_bytes(tensor), {"0": tensor}, "torch")


def test_views_of_one_storage():
    """Offsets, strides, transposes, tied weights, parameters, tensors with attributes."""
    base = torch.arange(24, dtype=torch.float32)
    tagged = torch.ones(3)
    tagged.tag = "kept"
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.tag = "kept"
    state = {
        "all": base,
        "same": base,
        "middle": base[5:9],
        "stepped": base[2:20:3],
        "transposed": base.view(4, 6).t(),
        "block": base.view(4, 6)[1:3, 2:5],
        "permuted": base.view(2, 3, 4).permute(2, 0, 1),
        "one": base[3],
        "nothing": base[7:7],
        "broadcast": base[:6].view(1, 6).expand(1, 6),
        "parameter": torch.nn.Parameter(base[:4]),
        "tagged": tagged,
        "tagged parameter": parameter,
    }
    structure = check(torch_bytes(state), state, "torch")
    strided = {place.name for place in structure.tensors if place.strides is not None}
    assert strided == {"stepped", "transposed", "block", "permuted"}


def test_what_has_no_bytes_of_its_own_is_named():
    """Expanded, sparse, conjugated, negated and meta tensors are refused, each with a reason; the others are there."""
    state = {
        "plain": torch.ones(2),
        "expanded": torch.ones(1).expand(1000),
        "sparse": torch.eye(2).to_sparse(),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "negated": torch.ones(2)._neg_view(),
        "meta": torch.ones(2, device="meta"),
        "a.b": torch.ones(1),
        "a": {"b": torch.ones(1)},
    }
    structure = read_structure(BytesSource(torch_bytes(state)), "file")
    assert [place.name for place in structure.tensors] == ["plain"]
    assert structure.lost.keys() == state.keys() - {"plain", "a"}
    assert all(structure.lost.values())


def test_distributed_checkpoints(tmp_path):
    """Each archive of a .distcp file is one tensor, called by its place; objects are skipped."""
    import torch.distributed.checkpoint as dcp

    state = {"model": {"a": torch.ones(30, 40), "b": torch.arange(12)[3:7]}, "step": 4, "t": torch.ones(2, 3).t()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    data = (tmp_path / "__0_0.distcp").read_bytes()
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    order = sorted(metadata.storage_data.items(), key=lambda item: item[1].offset)
    values = {"model.a": state["model"]["a"], "model.b": state["model"]["b"], "t": state["t"]}
    expected = {str(i): values[index.fqn] for i, (index, _) in enumerate(order) if index.fqn in values}
    check(data, expected, "distcp")


def numpy_bytes(save, *args, **kwargs):
    file = io.BytesIO()
    save(file, *args, **kwargs)
    return file.getvalue()


def test_numpy_files():
    """Arrays of a .npz and the one of a .npy; Fortran order, scalars, empty ones; objects and texts are refused."""
    arrays = {
        "c": np.arange(12.0).reshape(3, 4),
        "fortran": np.asfortranarray(np.arange(12, dtype=np.int16).reshape(3, 4)),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 3), dtype=np.uint8),
        "bool": np.array([True, False]),
        "complex": np.array([1 + 2j]),
        "päth/name": np.arange(3),
    }
    expected = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    check(numpy_bytes(np.savez, **arrays), expected, "npz")
    for array in arrays.values():
        check(numpy_bytes(np.save, array), {"0": torch.from_numpy(np.array(array))}, "npy")
    odd = {"big": np.arange(3, dtype=">f4"), "text": np.array(["a"]), "record": np.zeros(2, dtype="i4,f8")}
    structure = read_structure(BytesSource(numpy_bytes(np.savez, plain=np.ones(1), **odd)), "file")
    assert [place.name for place in structure.tensors] == ["plain"]
    assert structure.lost.keys() == odd.keys()
    assert tensors_of(BytesSource(numpy_bytes(np.savez_compressed, a=np.ones(5)))) is None


def test_big_endian_is_refused(monkeypatch):
    """A torch file from a machine of the other byte order is refused as that, not misread."""
    monkeypatch.setattr("sys.byteorder", "big")
    data = torch_bytes({"a": torch.ones(2)})
    assert b"big" in data
    with pytest.raises(ValueError, match="big-endian"):
        read_structure(BytesSource(data), "file")
