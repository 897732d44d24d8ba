"""Checkpoints: a state comes back as it was, or is refused by name when it is saved; and no file can make code run."""

from __future__ import annotations

import argparse
import collections
import enum
import errno
import json
import math
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from mandapa.errors import CorruptionError, InvalidInputError
from mandapa.run.checkpoints import Checkpoint, CheckpointSaver, Every, load_state, save_state

FORMATS = {"torch": "state.pt", "safetensors": "state.safetensors"}


@pytest.fixture(params=FORMATS)
def both(request: pytest.FixtureRequest) -> str:
    """Each format."""
    return str(request.param)


def again(state: Any, folder: Path, format_: str) -> Any:
    """The state after it was written and read."""
    path = str(folder / FORMATS[format_])
    assert save_state(state, path, format_) == os.stat(path).st_size
    return load_state(path)


def same(found: Any, expected: Any) -> None:
    """Equal to the last bit, and of the same kinds; NaN is NaN."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bytes_of(found) == bytes_of(expected)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert [type(key) for key in found] == [type(key) for key in expected]
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert type(found) is type(expected)
        assert found == expected or (found != found and expected != expected)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist()) if tensor.numel() else b""


# -- when --------------------------------------------------------------------------------------------------------------


def test_every_so_many_steps() -> None:
    """Also when steps are left out, and counted from where a run goes on."""
    due = Every(steps=10)
    assert [step for step in range(41) if due(step)] == [10, 20, 30, 40]
    due = Every(steps=10)
    assert [step for step in (3, 9, 14, 19, 35, 39, 40) if due(step)] == [14, 35, 40]
    due = Every(steps=10)
    due.start(25)
    assert [step for step in range(25, 45) if due(step)] == [30, 40]


def test_every_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that nobody sets."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.time", lambda: -1e9)
    due = Every(seconds=2.5)
    found = []
    for step in range(8):
        found.append(due(step))
        now[0] += 1
    assert found == [False, False, False, True, False, False, True, False]
    due.start(0)
    assert not due(9)


@pytest.mark.parametrize(
    "given",
    [
        {}, {"steps": 1, "seconds": 1}, {"steps": 0}, {"steps": -1}, {"steps": 1.5}, {"steps": "5"}, {"steps": True},
        {"seconds": 0}, {"seconds": -1.0}, {"seconds": math.nan}, {"seconds": math.inf}, {"seconds": "5"},
    ],
)  # fmt: skip
def test_every_refuses_what_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="Every"):
        Every(**given)


def test_every_says_what_it_is() -> None:
    assert repr(Every(steps=5)) == "Every(steps=5)"
    assert repr(Every(seconds=1.5)) == "Every(seconds=1.5)"


# -- names -------------------------------------------------------------------------------------------------------------


def name(saver: CheckpointSaver, **fields: Any) -> str:
    return saver.name(**{"run_name": "net", "rank": 3, "world_size": 1, "step": 20, "epoch": None, **fields})


def test_names_of_files() -> None:
    """The same place each time unless a pattern says otherwise; a file each where there are several ranks."""
    assert name(CheckpointSaver()) == "state.pt"
    assert name(CheckpointSaver(), world_size=8) == "state-rank3.pt"
    assert name(CheckpointSaver(format="safetensors")) == "state.safetensors"
    assert name(CheckpointSaver(format="safetensors"), world_size=8) == "state-rank3.safetensors"
    pattern = CheckpointSaver(filename="{run_name}/ep{epoch}-ba{step:06d}-rank{rank}.pt")
    assert name(pattern, epoch=2, world_size=2) == "net/ep2-ba000020-rank3.pt"
    assert name(pattern) == "net/ep0-ba000020-rank3.pt"
    assert name(CheckpointSaver(filename="{{x}}.pt")) == "{x}.pt"


@pytest.mark.parametrize(
    "filename",
    [
        "{loss}.pt", "{}.pt", "{0}.pt", "{step", "step}", "{step.x}", "{step[0]}", "{step!z}", "{step:%}%", "",
        "../state.pt", "/state.pt", "a//b.pt", "a\\b.pt", ".mandapa/state.pt", "a\0b", "a" * 300, 5, b"state.pt",
    ],
)  # fmt: skip
def test_names_that_cannot_be_are_refused_at_once(filename: Any) -> None:
    if filename == "{step:%}%":
        assert name(CheckpointSaver(filename=filename)) == "2000.000000%%"  # odd, and a name
        return
    if filename == "":
        return  # as if none was given
    with pytest.raises(InvalidInputError):
        CheckpointSaver(filename=filename)


def test_ranks_need_names_of_their_own() -> None:
    saver = CheckpointSaver(filename="step{step}.pt")
    assert name(saver) == "step20.pt"
    with pytest.raises(InvalidInputError, match=r"2 ranks, so it needs \{rank\}"):
        name(saver, world_size=2)
    assert name(CheckpointSaver(filename="{rank:02d}.pt"), world_size=2) == "03.pt"


@pytest.mark.parametrize(
    "given",
    [
        {"format": "pickle"}, {"format": None}, {"keep_local": 0}, {"keep_local": -1}, {"keep_local": 1.5},
        {"keep_local": True}, {"keep_local": None}, {"best": "loss"}, {"best": ("loss",)}, {"best": ("loss", "low")},
        {"best": (1, "min")}, {"best": ("loss", "min", 1)}, {"best": 5}, {"best": {"loss": "min"}},
    ],
)  # fmt: skip
def test_a_saver_refuses_what_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        CheckpointSaver(**given)


def test_a_pair_may_be_a_list() -> None:
    """As it comes from a configuration file."""
    assert CheckpointSaver(best=["loss", "min"]).best == ("loss", "min")  # type: ignore[arg-type]


# -- states come back --------------------------------------------------------------------------------------------------


def trained(make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, Any]:
    """The state of a model and an optimizer after two steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        schedule.step()
    return {"model": model.state_dict(), "optim": optimizer.state_dict(), "schedule": schedule.state_dict()}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_real_optimizers_go_on(tmp_path: Path, both: str, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """What was loaded equals what was saved, and another model and optimizer take it."""
    state = trained(make)
    found = again(state, tmp_path, both)
    same(found["model"], dict(state["model"]) if both == "safetensors" else state["model"])
    same(found["optim"], state["optim"])
    same(found["schedule"]["_last_lr"], state["schedule"]["_last_lr"])
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model.load_state_dict(found["model"])
    optimizer = make(model.parameters())
    optimizer.load_state_dict(found["optim"])
    torch.optim.lr_scheduler.StepLR(optimizer, 2).load_state_dict(found["schedule"])


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool, torch.complex64,
]  # fmt: skip


def test_tensors_of_all_kinds(tmp_path: Path, both: str) -> None:
    """Every dtype; empty, scalar, transposed, strided, expanded, and a parameter that wants a gradient."""
    state = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    base = torch.arange(24.0).reshape(2, 3, 4)
    state |= {
        "empty": torch.empty(0),
        "empty2": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "transposed": base.permute(2, 0, 1),
        "strided": base[:, ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "nan": torch.tensor([math.nan, -math.inf, -0.0, 5e-324], dtype=torch.float64),
    }
    same(again(state, tmp_path, both), state)
    found = again({"w": torch.nn.Parameter(base)}, tmp_path, both)
    assert torch.equal(found["w"], base)


def test_tied_weights_and_views_are_whole(tmp_path: Path, both: str) -> None:
    """Each name has its own values, whatever shares memory with it."""
    tied = torch.nn.Linear(3, 3)
    base = torch.arange(10.0)
    state = {
        "a": tied.state_dict(),
        "b": dict(tied.state_dict()),
        "v": [base, base[2:4], base[::3], base],
        "same": base,
    }
    found = again(state, tmp_path, both)
    same(found, {**state, "a": dict(state["a"]) if both == "safetensors" else state["a"]})
    found["v"][0][3] = -1
    if both == "safetensors":
        assert found["v"][1][1] == 3, "what was shared is not shared any more"


def test_plain_values(tmp_path: Path, both: str) -> None:
    """Kinds stay apart: 1, 1.0, True and "1"; tuples and lists; keys that are numbers; floats to the last bit."""
    state = {
        "none": None,
        "numbers": [1, 1.0, True, False, 0, -0.0, 1 << 200, -1, 5e-324, 1.7976931348623157e308, 0.1],
        "odd": [math.nan, math.inf, -math.inf],
        "texts": ["", "1", 'ü\n\t"\\', "\u2028 \U0001f600 \0"],
        "tuple": (1, (2, [3, ()])),
        "keys": {1: "int", "1": "str", -5: {"": {}}, "$tensor": 1, "$dict": [], "a.b": {}},
        "empty": [{}, [], ()],
        "tensors": {0: torch.ones(1), "0": torch.zeros(1), "": torch.ones(2)},
    }
    same(again(state, tmp_path, both), state)


@pytest.mark.parametrize("state", [torch.ones(2), [torch.ones(1)], (1, 2), {}, [], None, 5, 0.5, "text", {"a": {}}])
def test_a_state_need_not_be_a_dict(tmp_path: Path, both: str, state: Any) -> None:
    same(again(state, tmp_path, both), state)


def test_places_of_one_name_stay_apart(tmp_path: Path, both: str) -> None:
    """Keys with dots, numbers and their texts, and the one name that safetensors keeps for itself."""
    state = {
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2), "": torch.tensor(3)},
        "a.": torch.tensor(4),
        "n": {1: torch.tensor(5), "1": torch.tensor(6)},
        "l": [torch.tensor(7)],
        "l.0": torch.tensor(8),
        "__metadata__": torch.tensor(9),
        "a.b'": torch.tensor(10),
        "": torch.tensor(11),
        "state": torch.tensor(12),
    }
    same(again(state, tmp_path, both), state)


def test_numpy_arrays_and_scalars(tmp_path: Path, both: str) -> None:
    """Of any byte order and any strides; the states of random generators, which every training has."""
    state = {
        "c": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "transposed": np.arange(6, dtype="int16").reshape(2, 3).T,
        "strided": np.arange(10, dtype="uint8")[::-2],
        "scalar": np.array(5),
        "empty": np.zeros((2, 0)),
        "half": np.array([1.5, math.nan], dtype="float16"),
        "bool": np.array([True, False]),
        "complex": np.array([1j], dtype="complex64"),
        "random": np.random.default_rng(1).bit_generator.state,
        "legacy": np.random.RandomState(1).get_state(),
    }
    found = again(state, tmp_path, both)
    same(found, state)
    generator = np.random.RandomState()
    generator.set_state(found["legacy"])
    assert generator.rand() == np.random.RandomState(1).rand()
    big = again({"big": np.arange(3, dtype=">i4")}, tmp_path, both)["big"]
    assert big.tolist() == [0, 1, 2]
    numbers = [np.float64(0.5), np.float32(0.25), np.int8(-1), np.bool_(True), np.str_("x")]
    assert again(numbers, tmp_path, both) == [0.5, 0.25, -1, True, "x"]


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.builds(torch.full, st.lists(st.integers(0, 2), max_size=2), st.integers(-5, 5).map(float)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(TREES)
def test_any_state_comes_back(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    same(again(state, folder, "safetensors"), state)


def test_files_are_what_others_can_read(tmp_path: Path) -> None:
    """A checkpoint is no format of ours: torch and safetensors load it as they load theirs."""
    state = {"model": {"w": torch.ones(2)}, "step": 5}
    save_state(state, str(tmp_path / "state.pt"), "torch")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 5
    save_state(state, str(tmp_path / "state.safetensors"), "safetensors")
    assert list(safetensors.torch.load_file(tmp_path / "state.safetensors")) == ["model.w"]
    with safetensors.safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["mandapa.state"]) == {
        "$dict": [["model", {"$dict": [["w", {"$tensor": "model.w"}]]}], ["step", 5]]
    }


def test_files_of_others_are_read(tmp_path: Path) -> None:
    """A file that safetensors or torch wrote, under whatever name."""
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same(load_state(str(tmp_path / "model.safetensors")), {"w": torch.ones(2)})
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "other.safetensors")
    assert load_state(str(tmp_path / "other.safetensors"))["w"].tolist() == [1, 1]
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    same(load_state(str(tmp_path / "old.pt")), {"w": torch.ones(2)})


@pytest.mark.parametrize("file", ["state.safetensors", "state.pt", "state", "model.bin"])
def test_a_name_says_nothing_of_the_format(tmp_path: Path, both: str, file: str) -> None:
    """A saver whose filename ends as the other format's do still writes what can be loaded."""
    state = {"w": torch.ones(2), "n": [1]}
    save_state(state, str(tmp_path / file), both)
    same(load_state(str(tmp_path / file)), state)


def test_states_load_on_the_cpu_and_are_ones_own(tmp_path: Path, both: str) -> None:
    """What is changed after saving, or after loading, changes nothing else."""
    weight = torch.ones(2)
    path = str(tmp_path / FORMATS[both])
    save_state({"w": weight}, path, both)
    weight += 1
    found = load_state(path)["w"]
    found += 5
    assert str(found.device) == "cpu"
    assert load_state(path)["w"].tolist() == [1, 1]


def test_numpy_alone_is_enough(tmp_path: Path) -> None:
    """Where torch is not installed, arrays are saved and loaded; what needs torch says so."""
    program = """
import sys
sys.modules["torch"] = None
import numpy as np
from mandapa.errors import InvalidInputError
from mandapa.run.checkpoints import load_state, save_state
state = {"w": np.arange(3.0), "deep": [{"n": 1, "x": np.float32(0.5)}], "t": (1, None)}
save_state(state, "a.safetensors", "safetensors")
found = load_state("a.safetensors")
assert found["w"].tolist() == [0, 1, 2] and found["deep"] == [{"n": 1, "x": 0.5}] and found["t"] == (1, None), found
for call in (
    lambda: save_state({}, "b.pt", "torch"), lambda: load_state("b.pt"), lambda: load_state("t.safetensors")
):
    try:
        call()
    except InvalidInputError as error:
        assert "need torch" in str(error), error
    else:
        raise SystemExit("not refused")
"""
    save_state({"w": torch.ones(1)}, str(tmp_path / "b.pt"), "torch")
    save_state({"w": torch.ones(1)}, str(tmp_path / "t.safetensors"), "safetensors")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)


def test_what_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state({}, str(tmp_path / "a.safetensors"), "safetensors")
    for module in ("safetensors", "safetensors.torch", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidInputError, match="pip install safetensors"):
        save_state({}, str(tmp_path / "b.safetensors"), "safetensors")
    with pytest.raises(InvalidInputError, match="pip install safetensors"):
        load_state(str(tmp_path / "a.safetensors"))
    assert os.listdir(tmp_path) == ["a.safetensors"]


# -- what cannot be held -----------------------------------------------------------------------------------------------


class Color(enum.IntEnum):
    RED = 1


class Thing:
    pass


class Settings(dict[str, int]):
    pass


deep: list[Any] = []
for _ in range(100):
    deep = [deep]

BOTH = {
    "a function": (lambda: {"a": [0, {"f": lambda: 0}]}, r"the function at 'a\.1\.f'"),
    "an object": (lambda: {"c": {1: Thing()}}, r"the Thing at 'c\.1'"),
    "a namespace": (lambda: {"args": argparse.Namespace(a=1)}, "the Namespace at 'args'"),
    "an enum member": (lambda: {"e": (1, Color.RED)}, r"the Color at 'e\.1'"),
    "a path": (lambda: {"p": Path("a")}, "the PosixPath at 'p'"),
    "a frozen set": (lambda: [frozenset()], "the frozenset at '0'"),
    "a range": (lambda: range(3), "the range at the top"),
    "a module": (lambda: {"m": torch.nn.Linear(1, 1)}, "Linear"),
    "a generator": (lambda: {"g": torch.Generator()}, "Generator"),
    "a masked array": (lambda: {"m": np.ma.array([1], mask=[True])}, "MaskedArray"),
}
SAFETENSORS = {
    "bytes": (lambda: {"b": b"x"}, "the bytes at 'b'"),
    "a set": (lambda: {"s": {1}}, "the set at 's'"),
    "a complex number": (lambda: {"c": 1j}, "the complex at 'c'"),
    "a dtype": (lambda: {"d": torch.float32}, "the dtype at 'd'"),
    "a device": (lambda: {"d": torch.device("cpu")}, "the device at 'd'"),
    "rows of records": (lambda: {"m": np.rec.array([(1,)], dtype=[("a", "i4")])}, "the recarray at 'm'"),
    "a long double": (lambda: {"l": np.longdouble(1)}, "the longdouble at 'l'"),
    "a date": (lambda: {"d": np.datetime64("2026-01-01")}, "the datetime64 at 'd'"),
    "a storage": (lambda: {"s": torch.ones(1).untyped_storage()}, "the UntypedStorage at 's'"),
    "a sparse tensor": (lambda: {"a": torch.ones(1), "s": torch.eye(2).to_sparse()}, "float32 at 's'"),
    "a double complex": (lambda: {"a": torch.ones(1), "c": torch.ones(1, dtype=torch.complex128)}, "complex128 at 'c'"),
    "a tensor of nothing": (lambda: {"m": torch.ones(1, device="meta")}, "at 'm'"),
    "objects": (lambda: {"o": np.array([1, "a"], dtype=object)}, "of object at 'o'"),
    "texts": (lambda: {"o": np.array(["a"])}, "of <U1 at 'o'"),
    "rows": (lambda: {"o": np.zeros(1, dtype=[("a", "i4")])}, "at 'o'"),
    "a flag as a key": (lambda: {"k": {True: 1}}, "the key True at 'k'"),
    "a pair as a key": (lambda: {"k": {(1, 2): 1}}, r"the key \(1, 2\) at 'k'"),
    "no key": (lambda: {None: 1}, "the key None at the top"),
    "too deep": (lambda: {"d": deep}, "nested too deep at 'd.0.0"),
    "both kinds": (lambda: {"t": torch.ones(1), "n": np.ones(1)}, "all arrays of a state are torch's, or all are"),
}


@pytest.mark.parametrize(("make", "where"), BOTH.values(), ids=BOTH)
def test_what_no_format_holds_is_refused_when_it_is_saved(
    tmp_path: Path, both: str, make: Callable[[], Any], where: str
) -> None:
    """Not when a training that has died is to be resumed; the message says what, and where; nothing is left behind."""
    with pytest.raises(InvalidInputError, match=f"format='{both}' cannot hold .*{where}"):
        save_state(make(), str(tmp_path / FORMATS[both]), both)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("make", "where"), SAFETENSORS.values(), ids=SAFETENSORS)
def test_what_safetensors_does_not_hold_is_refused(tmp_path: Path, make: Callable[[], Any], where: str) -> None:
    with pytest.raises(InvalidInputError, match=where):
        save_state(make(), str(tmp_path / "state.safetensors"), "safetensors")
    assert os.listdir(tmp_path) == []


def test_what_contains_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(InvalidInputError, match="nested too deep") as found:
        save_state(state, str(tmp_path / "state.safetensors"), "safetensors")
    assert len(str(found.value)) < 400


def test_torch_holds_more(tmp_path: Path) -> None:
    """What it loads without running anything is taken."""
    state = {
        "b": b"x",
        "s": {1, 2},
        "c": 1j,
        "d": torch.float32,
        "o": collections.OrderedDict(a=1),
        "n": collections.Counter("aab"),
        "z": torch.Size([1, 2]),
        "k": {(1, 2): 1, True: 2, None: 3},
    }
    assert again(state, tmp_path, "torch") == state
    sparse = again({"s": torch.eye(2).to_sparse()}, tmp_path, "torch")["s"]
    assert sparse.to_dense().tolist() == [[1, 0], [0, 1]]


# -- nothing runs ------------------------------------------------------------------------------------------------------


class Canary:
    """Unpickled by anybody who does unpickle, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_a_pickle_with_code_is_never_run(tmp_path: Path) -> None:
    """Whatever it is wrapped in, and whatever it is called."""
    sung = tmp_path / "sung"
    with sung.open("w"):
        pass
    pickle.loads(pickle.dumps(Canary(sung))).close()
    sung.unlink()
    makers: list[Callable[[Path], Any]] = [
        lambda path: torch.save({"a": Canary(sung)}, path),
        lambda path: torch.save({"a": Canary(sung)}, path, _use_new_zipfile_serialization=False),
        lambda path: torch.save(Canary(sung), path),
        lambda path: torch.save({Canary(sung): torch.ones(1)}, path),
        lambda path: torch.save(np.array([Canary(sung)], dtype=object), path),
        lambda path: path.write_bytes(pickle.dumps(Canary(sung))),
        lambda path: path.write_bytes(pickle.dumps({"state": Canary(sung)}, protocol=0)),
        lambda path: safetensors.torch.save_file(
            {"w": torch.ones(1)}, path, metadata={"mandapa.state": pickle.dumps(Canary(sung), protocol=0).decode()}
        ),
    ]
    for file in ("state.pt", "state.safetensors", "state"):
        for make in makers:
            make(tmp_path / file)
            with pytest.raises(CorruptionError):
                load_state(str(tmp_path / file))
            with pytest.raises(CorruptionError):
                Checkpoint(step=1, file=file, fetch=lambda dest: str(tmp_path)).load()
            assert not sung.exists()


def test_the_error_names_the_code(tmp_path: Path) -> None:
    """In one line without the advice to load it all the same."""
    torch.save({"a": Canary(tmp_path / "sung")}, tmp_path / "state.pt")
    with pytest.raises(
        CorruptionError, match=r"state\.pt cannot be loaded without unpickling: it needs \S*open$"
    ) as found:
        load_state(str(tmp_path / "state.pt"))
    assert found.value.key == str(tmp_path / "state.pt")


def test_what_cannot_be_saved_is_not_run_to_find_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="the Canary at 'a'"):
        save_state({"a": Canary(tmp_path / "sung")}, str(tmp_path / "state.pt"), "torch")
    assert os.listdir(tmp_path) == []


# -- damage ------------------------------------------------------------------------------------------------------------


def test_damaged_files_are_told(tmp_path: Path, both: str) -> None:
    """Cut anywhere, with zeros, with junk, empty: `CorruptionError` and no other error."""
    state = {"w": torch.arange(100.0), "n": [1, {"x": 0.5}]}
    path = tmp_path / FORMATS[both]
    save_state(state, str(path), both)
    whole = path.read_bytes()
    step = max(len(whole) // 15, 1)
    damaged = [whole[:cut] for cut in range(0, len(whole), step)]
    damaged += [whole[:at] + bytes(8) + whole[at + 8 :] for at in range(0, 64, 8)]
    damaged += [b"", b"x", b"\0" * 200, b"\xff" * 200, b"PK\3\4" + b"\0" * 100, b"\x08" + b"\0" * 7 + b"{" * 8]
    told = []
    for data in damaged:
        path.write_bytes(data)
        try:
            load_state(str(path))
        except CorruptionError as error:
            told.append(str(error))
    assert len(told) > len(damaged) * 2 // 3
    assert all(str(path) in message and "\x1b" not in message for message in told)


SKELETONS = [
    "", "{", "[]]", "5 5", '{"$tensor": "none"}', '{"$tensor": []}', '{"$tensor": null}', '{"$float": 5}', "{}",
    '{"$float": "x"}', '{"$float": "0x1p99999"}', '{"$dict": 5}', '{"$dict": [5]}', '{"$dict": [[1]]}', '{"$x": 1}',
    '{"$dict": [[[], 1]]}', '{"$dict": [["a", 1, 2]]}', '{"$tuple": null}', '{"$tuple": 5}', '{"a": 1, "b": 2}',
    "[" * 5000 + "]" * 5000, '{"$tuple": [' * 3000 + "]}" * 3000, '{"$dict": "ab"}', '{"$dict": null}',
]  # fmt: skip


@pytest.mark.parametrize("skeleton", SKELETONS, ids=range(len(SKELETONS)))
def test_a_hostile_structure_is_told(tmp_path: Path, skeleton: str) -> None:
    path = str(tmp_path / "state.safetensors")
    safetensors.torch.save_file({"w": torch.ones(1)}, path, metadata={"mandapa.state": skeleton, "format": "pt"})
    with pytest.raises(CorruptionError, match="is not a checkpoint that mandapa wrote"):
        load_state(path)


def test_no_file_of_that_name_is_told(tmp_path: Path) -> None:
    for file in ("state-rank7.pt", "state.safetensors", ""):
        with pytest.raises(InvalidInputError, match="saved with other ranks"):
            Checkpoint(step=1, file=file, fetch=lambda dest: str(tmp_path)).load()


def test_one_file_is_for_every_rank(tmp_path: Path) -> None:
    """Where one rank saved for all; of several files each rank needs its own."""
    save_state({"step": 5}, str(tmp_path / "state-rank0.pt"), "torch")
    checkpoint = Checkpoint(step=5, file="state-rank1.pt", fetch=lambda dest: str(tmp_path))
    assert checkpoint.load() == {"step": 5}
    save_state({"step": 6}, str(tmp_path / "state-rank2.pt"), "torch")
    with pytest.raises(InvalidInputError, match="saved with other ranks"):
        checkpoint.load()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 100, 3000, 39_000])
def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path, both: str, room: int) -> None:
    """No matter what the libraries call it; the checkpoint before stays, and nothing is left behind."""
    path = str(tmp_path / FORMATS[both])
    save_state({"step": 1}, path, both)
    with largest_file(room), pytest.raises(OSError) as found:
        save_state({"w": torch.zeros(10_000)}, path, both)
    assert found.value.errno in (errno.EFBIG, errno.EIO)
    assert load_state(path) == {"step": 1}
    assert os.listdir(tmp_path) == [FORMATS[both]]


def test_a_folder_that_is_not_there_is_an_error_of_the_disk(tmp_path: Path, both: str) -> None:
    with pytest.raises(OSError):
        save_state({"a": 1}, str(tmp_path / "no/where.pt"), both)


def test_equal_states_have_equal_bytes(tmp_path: Path) -> None:
    """The name of the file is not in them, nor that of the file that it was for a while: nothing is stored twice."""
    for name in ("one", "another"):
        save_state({"a": torch.arange(1000), "b": [1, 2.5]}, str(tmp_path / name), "torch")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "another").read_bytes()


def test_only_the_user_may_read_a_checkpoint(tmp_path: Path, both: str) -> None:
    """Whatever the umask is, and whoever wrote the file."""
    save_state({"a": torch.arange(10)}, str(tmp_path / "state"), both)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600
