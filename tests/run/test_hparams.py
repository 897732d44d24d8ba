"""Hyperparameters of any kind become plain values, YAML that every reader understands, and lines of what differs."""

import argparse
import enum
import functools
import math
import pathlib
import subprocess
import sys
import time
import types
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass, field
from typing import ClassVar

import msgspec
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from mandapa.errors import InvalidInputError
from mandapa.run.hparams import diff, from_yaml, plain, to_yaml


class Color(enum.Enum):
    RED = "r"
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1


@dataclass
class Optimizer:
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    kind: ClassVar[str] = "not a field"


@dataclass(slots=True)
class Data:
    """The names of an array's attributes, but no array."""

    shape: tuple[int, ...] = (3, 224)
    dtype: str = "float32"


@dataclass
class Config:
    name: str = "gpt"
    optimizer: Optimizer = field(default_factory=Optimizer)
    data: Data = field(default_factory=Data)


class Pydantic2:
    def model_dump(self):
        return {"lr": 0.1, "inner": {"path": pathlib.PurePosixPath("/a")}}


class Pydantic1:
    __fields__ = ("lr",)

    def dict(self):
        return {"lr": 0.1}


@dataclass
class Arguments:
    """As of a trainer: a dataclass whose ``to_dict`` hides what is private."""

    lr: float = 0.1
    hub_token: str = "secret"

    def to_dict(self):
        return {"lr": self.lr, "hub_token": "<HUB_TOKEN>"}


class Failing:
    def to_dict(self):
        raise RuntimeError("no value for 'lr'")


class Array:
    """By shape only: no array library is needed to see one."""

    def __init__(self, values, shape):
        self.values = values
        self._shape = shape

    @property
    def shape(self):
        return self._shape

    @property
    def dtype(self):
        return "torch.bfloat16"

    def tolist(self):
        return self.values

    def item(self):
        return self.values


def function(x):
    return x


# -- plain -------------------------------------------------------------------------------------------------------------


def test_nothing_is_no_hyperparameters():
    assert plain(None) == {}
    assert plain({}) == {}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": 1, 2: "b", None: True, (1, 2): 0.5}, {"a": 1, "2": "b", "None": True, "(1, 2)": 0.5}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (UserDict(a=UserDict(b=1)), {"a": {"b": 1}}),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (argparse.Namespace(lr=0.1, sub=argparse.Namespace(x=None)), {"lr": 0.1, "sub": {"x": None}}),
        (types.SimpleNamespace(lr=0.1), {"lr": 0.1}),
        (namedtuple("Pair", "a b")(1, (2,)), {"a": 1, "b": [2]}),
        (Pydantic2(), {"lr": 0.1, "inner": {"path": "/a"}}),
        (Pydantic1(), {"lr": 0.1}),
        (Arguments(), {"lr": 0.1, "hub_token": "<HUB_TOKEN>"}),
        (
            Config(),
            {
                "name": "gpt",
                "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]},
                "data": {"shape": [3, 224], "dtype": "float32"},
            },
        ),
        (msgspec.defstruct("Point", [("x", int)])(x=1), {"x": 1}),
        ({Color.RED: Color.BLUE, "l": Level.LOW}, {"RED": "BLUE", "l": "LOW"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_configuration_becomes_a_mapping(value, expected):
    result = plain(value)
    assert result == expected
    assert list(result) == list(expected)
    assert type(result) is dict


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (pathlib.PurePosixPath("/data/x"), "/data/x"),
        ((1, [2, (3,)]), [1, [2, [3]]]),
        (deque([1, 2]), [1, 2]),
        ({3, 10, 2}, [2, 3, 10]),
        (frozenset("ba"), ["a", "b"]),
        ({"b", 1, None}, [None, 1, "b"]),
        ({"x": 1}.keys(), ["x"]),
        (b"123456789012", "<bytes 12>"),
        (bytearray(3), "<bytearray 3>"),
        (range(3), "range(0, 3)"),
        (1 << 70, 1 << 70),
        (1 << 5000, "<int 5001 bits>"),
        (math.inf, math.inf),
        (-0.0, -0.0),
        (complex(1, 2), "(1+2j)"),
        (function, f"{__name__}.function"),
        (lambda x: x, f"{__name__}.<lambda>"),
        ([].append, "list.append"),
        (Color, f"{__name__}.Color"),
        (len, "builtins.len"),
        (object(), "builtins.object"),
        (functools.partial(function), "functools.partial"),
        (iter([]), "builtins.list_iterator"),
        ((x for x in ()), "<genexpr>"),
        ("a\udcffb", "a\\udcffb"),
        (Array([1, 2], (2,)), [1, 2]),
        (Array(0.5, ()), 0.5),
        (Array(None, (1000, 10)), "<Array bfloat16 [1000, 10]>"),
        (Array([], (0, 5)), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_value_becomes_a_plain_one(value, expected):
    assert plain({"x": value}) == {"x": expected}


def test_nan_is_kept():
    assert math.isnan(plain({"x": math.nan})["x"])


def test_long_texts_of_objects_are_cut_and_strings_are_not():
    class Talker:
        def __str__(self):
            return "x" * 1000

    assert plain({"a": Talker(), "b": "y" * 1000}) == {"a": "x" * 197 + "...", "b": "y" * 1000}


def test_a_text_with_a_memory_address_becomes_the_name_of_the_type():
    class Model:
        def __str__(self):
            return f"Model(init=<function f at 0x{id(self):x}>)"

    assert plain({"a": Model()})["a"].endswith(".Model")


def test_subclasses_of_plain_types_become_plain():
    class Text(str):
        __slots__ = ()

        def __str__(self):
            return "other"

    class Number(float):
        pass

    result = plain({Text("k"): Text("v"), "n": Number(2), "i": type("I", (int,), {})(3)})
    assert result == {"k": "v", "n": 2.0, "i": 3}
    assert {type(value) for value in result.values()} == {str, float, int}


def test_omegaconf_is_found_where_it_was_imported(monkeypatch):
    """And is asked for resolved containers, at the top and below."""

    class DictConfig(UserDict):
        pass

    class OmegaConf:
        @staticmethod
        def is_config(value):
            return isinstance(value, DictConfig)

        @staticmethod
        def to_container(value, *, resolve):
            assert resolve
            return {key: f"resolved {item}" for key, item in value.items()}

    monkeypatch.setitem(sys.modules, "omegaconf", types.SimpleNamespace(OmegaConf=OmegaConf))
    assert plain(DictConfig(a=1)) == {"a": "resolved 1"}
    assert plain({"x": DictConfig(a=1)}) == {"x": {"a": "resolved 1"}}


def test_real_pydantic_and_attrs():
    pydantic = pytest.importorskip("pydantic")
    attrs = pytest.importorskip("attrs")

    class Inner(pydantic.BaseModel):
        rates: tuple[float, ...] = (0.1, 0.2)
        key: pydantic.SecretStr = pydantic.SecretStr("hunter2")

    Outer = attrs.make_class("Outer", {"inner": attrs.field(default=Inner()), "shape": attrs.field(default=(1,))})
    assert plain(Outer()) == {"inner": {"rates": [0.1, 0.2], "key": "**********"}, "shape": [1]}
    assert plain(Inner())["rates"] == [0.1, 0.2]


def test_numpy():
    np = pytest.importorskip("numpy")
    value = {
        "f": np.float32(0.5), "d": np.float64(0.1), "i": np.int64(3), "b": np.bool_(True), "z": np.array(7),
        "small": np.arange(4).reshape(2, 2), "large": np.zeros((1000, 10), np.float32), "dtype": np.dtype("int8"),
        "cls": np.float32, "s": np.str_("x"), "t": np.datetime64("2026-01-01"), "o": np.array([{"a": 1}], dtype=object),
    }  # fmt: skip
    result = plain(value)
    assert result == {
        "f": 0.5, "d": 0.1, "i": 3, "b": True, "z": 7, "small": [[0, 1], [2, 3]],
        "large": "<ndarray float32 [1000, 10]>", "dtype": "int8", "cls": "numpy.float32", "s": "x", "t": "2026-01-01",
        "o": [{"a": 1}],
    }  # fmt: skip
    assert [type(result[key]) for key in "fdibzs"] == [float, float, int, bool, int, str]


def test_torch():
    torch = pytest.importorskip("torch")
    value = {
        "scalar": torch.tensor(2.5), "one": torch.tensor([1]), "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "large": torch.zeros(200, dtype=torch.bfloat16), "dtype": torch.float16, "device": torch.device("cpu"),
        "size": torch.Size([2, 3]), "weight": torch.nn.Parameter(torch.ones(2)), "kind": torch.nn.Linear,
        "generator": torch.Generator(), "activation": torch.nn.functional.relu,
    }  # fmt: skip
    assert plain(value) == {
        "scalar": 2.5, "one": [1], "half": 0.5, "large": "<Tensor bfloat16 [200]>", "dtype": "torch.float16",
        "device": "cpu", "size": [2, 3], "weight": [1.0, 1.0], "kind": "torch.nn.modules.linear.Linear",
        "generator": "torch._C.Generator", "activation": "torch.nn.functional.relu",
    }  # fmt: skip


@pytest.mark.parametrize("value", [1, "lr=0.1", [1], [("a", 1)], Color, object(), {1}, 0, False, b"", function])
def test_what_is_no_mapping_is_refused_with_what_would_be_one(value):
    with pytest.raises(InvalidInputError, match="mapping, a dataclass"):
        plain(value)


def test_what_contains_itself_is_refused_by_its_path():
    ring = {"model": {"layers": [1, []]}}
    ring["model"]["layers"][1].append(ring["model"])
    with pytest.raises(InvalidInputError, match=r"^hparams\.model\.layers\[1\]\[0\]: contains itself"):
        plain(ring)
    space = types.SimpleNamespace()
    space.me = space
    with pytest.raises(InvalidInputError, match=r"^hparams\.me: contains itself"):
        plain(space)


def test_the_same_object_twice_is_no_ring():
    shared = [1]
    assert plain({"a": shared, "b": [shared, shared]}) == {"a": [1], "b": [[1], [1]]}


def test_depth_is_bounded():
    deep = "leaf"
    for _ in range(32):
        deep = {"k": deep}
    assert plain(deep)
    with pytest.raises(InvalidInputError, match=r"^hparams(\.k){33}: nested more than 32 deep"):
        plain({"k": {"k": deep}})

    class Endless:
        def to_dict(self):
            return {"k": Endless()}

    with pytest.raises(InvalidInputError, match="32 deep"):
        plain(Endless())


def test_the_number_of_values_is_bounded():
    """Also when few objects are named often."""
    bomb = [1] * 10
    for _ in range(20):
        bomb = [bomb, bomb]
    with pytest.raises(InvalidInputError, match="100,000"):
        plain({"bomb": bomb})


def test_an_object_that_fails_is_refused_by_its_path():
    with pytest.raises(
        InvalidInputError, match=r"^hparams\.a\[0\]: a Failing .* RuntimeError: no value for 'lr'"
    ) as told:
        plain({"a": [Failing()]})
    assert isinstance(told.value.__cause__, RuntimeError)
    unset = Config.__new__(Config)
    with pytest.raises(InvalidInputError, match=r"^hparams\.c: a Config"):
        plain({"c": unset})


def test_keys_that_cannot_be_told_apart_or_written_are_refused():
    with pytest.raises(InvalidInputError, match="two keys are called '1'"):
        plain({"x": {1: "a", "1": "b"}})
    with pytest.raises(InvalidInputError, match="longer than 1000"):
        plain({"k" * 1001: 1})


def test_no_library_is_imported():
    code = "import sys; from mandapa.run import hparams, secrets; hparams.plain({'a': [1]}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "omegaconf", "pydantic", "attrs", "yaml", "argparse"} & set(loaded)


# -- YAML --------------------------------------------------------------------------------------------------------------

STRANGE = [
    "yes", "Yes", "no", "on", "off", "y", "N", "true", "True", "null", "Null", "~", "", " ", "a ", " a", "1", "1_000",
    "1e3", "1e-05", "012", "0x1f", "0o7", "0b1", "12:30:00", "190:20:30", "2026-01-01", "2026-01-01 12:00:00",
    "=", "<<",
    ".nan", ".inf", "-.inf", "nan", "inf", "+1", "-1", "1.", ".5", "_1", "1,000", "-", "- a", "-a", "?", "? a",
    ":", "a:",
    ": a", "a: b", "a:b", "a #b", "#a", "a#b", "[a]", "{a}", "{}", "[]", "*a", "&a", "!a", "!!str a", "|", ">",
    "%a", "@a",
    "`a", "'a'", '"a"', '\\"', "\\", "a\\nb", "a\nb", "\n", "a\tb", "\ta", "\r", "\x00", "\x07\x1b[31m", "\x7f", "\x85",
    "\u2028", "\ufeff", "\ufffe", "é", "日本", "\U0001f600", "a  b", "---", "...", "--- a", "a,b", "a, b",
    "s3://bucket/x",
    "/data/x", "C:\\x", "torch.float32", "cuda:0", "a - b", "x" * 5000, "<ndarray float32 [1000, 10]>", "e1",
    "E+5", "a:1",
]  # fmt: skip

NUMBERS = [
    0, 1, -1, 8, 10**30, True, False, None, 0.0, -0.0, 1.0, 0.1, 1e-05, 1.5e-07, 1e16, 1e22, 1e300, 5e-324, -2.5e-10,
    123456789.123, math.inf, -math.inf, math.nan, 3e-4,
]  # fmt: skip


def same(one, other):
    """Equal, of the same types, the same order of keys and sign of zero; NaN is NaN."""
    return repr(one) == repr(other)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
    | st.sampled_from(STRANGE + NUMBERS)
)
short = [text for text in STRANGE if len(text) < 99]
keys = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(short)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)
hparams = st.dictionaries(keys, values, max_size=5)


@given(hparams)
@example({text: [text, {text: text}] for text in short})
@example({"numbers": NUMBERS, "a": [[[1, [2]], {"b": [{}]}], [], {}, [[]]]})
def test_another_reader_gives_back_the_same(value):
    """PyYAML reads YAML 1.1, the version with more traps."""
    text = to_yaml(value)
    assert same(yaml.safe_load(text), value)
    assert text.isascii()


@given(hparams)
@example({text: [text, {text: text}] for text in short})
@example({"numbers": NUMBERS, "a": [[[1, [2]], {"b": [{}]}], [], {}, [[]]]})
@example({"lone": "\ud800", "pair": "\ud83d\ude00"})
def test_it_is_read_back_the_same(value):
    assert same(from_yaml(to_yaml(value)), value)


@given(st.text(st.sampled_from('ab:- \n"\\u0{}[]1.e#'), max_size=40) | st.text(max_size=30))
def test_other_texts_are_not_read_or_mean_what_they_say(text):
    """Never an error; what is read is what another reader reads."""
    value = from_yaml(text)
    assert value is None or (to_yaml(value) == text and same(yaml.safe_load(text), value))


@given(hparams, st.data())
def test_a_changed_text_is_not_misread(value, data):
    text = to_yaml(value)
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.sampled_from(["", " ", "\n", ":", "-", '"', "a", "1"])) + text[at + 1 :]
    again = from_yaml(changed)
    assert again is None or to_yaml(again) == changed


def test_how_it_looks():
    value = {
        "name": "gpt-2 small",
        "lr": 1e-05,
        "betas": [0.9, 0.95],
        "resume": None,
        "model": {"layers": 12, "norm": {"eps": 1e-6}, "drop": {}, "hooks": []},
        "stages": [{"steps": 10, "data": ["a", "b"]}, [1, [2]]],
        "note": "two\nlines: \u00e9",
        "yes": "no",
    }
    assert (
        to_yaml(value)
        == r"""name: gpt-2 small
lr: 1.0e-05
betas:
  - 0.9
  - 0.95
resume: null
model:
  layers: 12
  norm:
    eps: 1.0e-06
  drop: {}
  hooks: []
stages:
  - steps: 10
    data:
      - a
      - b
  - - 1
    - - 2
note: "two\nlines: \u00e9"
"yes": "no"
"""
    )
    assert to_yaml({}) == "{}\n"


def test_depth_of_yaml_is_bounded():
    for wrap in (lambda inner: {"k": inner}, lambda inner: [inner]):
        deep = {"k": 1}
        for _ in range(99):
            deep = wrap(deep)
        assert same(from_yaml(to_yaml({"k": deep})), {"k": deep})
        with pytest.raises(InvalidInputError, match="100 deep"):
            to_yaml({"k": wrap(deep)})
    ring = []
    ring.append(ring)
    with pytest.raises(InvalidInputError, match="100 deep"):
        to_yaml({"k": ring})


@pytest.mark.parametrize(
    "value",
    [None, [1], "a", {1: 2}, {"a": (1,)}, {"a": b"x"}, {"a": {1}}, {"k" * 1001: 1}, {"\n" * 600: 1}, {"a": 10**5000}],
    ids=lambda value: str(type(value)),
)
def test_what_is_not_plain_is_not_written(value):
    with pytest.raises(InvalidInputError):
        to_yaml(value)


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "a: 1", "a: 1\n\n", "\na: 1\n", "a: 1 \n", "a:  1\n", "a: 1 # x\n", "# x\na: 1\n", "---\na: 1\n",
        "a: 'x'\n",
        "a: [1]\n", "a: {b: 1}\n", "a: |\n  x\n", "a: yes\n", "a: 1e3\n", "a: 1.0e5\n", "a: 012\n", "a: +1\n", "a: ~\n",
        "a:\n", "a:\n- 1\n", "a:\n    b: 1\n", "a: 1\na: 2\n", "a: &x 1\n", "b: *x\n", "<<: {}\n", "- 1\n", "1\n",
        "a: 1\r\n",
        "a: \"\\x41\"\n", 'a: "\n', 'a: "\\U00110000"\n', 'a: "\\Uffffffff"\n',
        "a: \u00e9\n", "a: 1.0e+999\n", "a: " + "1" * 5000 + "\n",
        "a:\n  - \n", "a:\n  -\n", "\ta: 1\n", "a: 1\n b: 2\n", "a:\n  b: 1\n c: 2\n",
        "a: !!python/object:os.system x\n",
        "- " * 5000 + "1\n", "a: " + "x" * (1 << 20) + "\n", None, b"a: 1\n", 5,
    ],
    ids=lambda text: repr(text)[:30],
)  # fmt: skip
def test_what_it_would_not_write_is_not_read(text):
    assert from_yaml(text) is None


@pytest.mark.parametrize(
    "piece", ["a: 1\n", "- ", "-\n", " ", "\n", "a:\n", '"', "\\", 'a: "', ":", ": ", "a:", "a: []\n", "x"]
)
def test_a_megabyte_is_read_or_refused_in_a_second(piece):
    text = "k: 1\n" + (piece * ((1 << 20) // len(piece)))[: (1 << 20) - 6] + "\n"
    began = time.process_time()
    from_yaml(text)
    assert time.process_time() - began < 2
    began = time.process_time()
    from_yaml("".join(f"k{at}:\n  - {at}\n" for at in range(60_000)))
    assert time.process_time() - began < 2


# -- diff --------------------------------------------------------------------------------------------------------------


def test_differences_are_lines_sorted_by_path():
    before = {
        "lr": 3e-4,
        "model": {"layers": 2, "old": True},
        "same": [1],
        "opt": "adam",
        "eps": 1e-8,
        "betas": [0.9, 0.95],
    }
    after = {
        "warmup": 100,
        "model": {"layers": 3},
        "lr": 1e-4,
        "same": [1],
        "opt": None,
        "eps": 1e-8,
        "betas": [0.9, 0.99],
    }
    assert diff(before, after) == [
        "betas: [0.9, 0.95] -> [0.9, 0.99]",
        "lr: 0.0003 -> 0.0001",
        "model.layers: 2 -> 3",
        "model.old: true -> (not there)",
        'opt: "adam" -> null',
        "warmup: (not there) -> 100",
    ]


def test_what_is_equal_is_no_difference():
    """NaN is what it is; a list is what a tuple was; but True is not 1."""
    assert (
        diff(
            {"a": math.nan, "b": (1, math.nan), "c": 1, "d": {}}, {"a": math.nan, "b": [1, math.nan], "c": 1.0, "d": {}}
        )
        == []
    )
    assert diff({"a": 1, "b": 0}, {"a": True, "b": False}) == ["a: 1 -> true", "b: 0 -> false"]
    assert diff({"a": {}}, {"a": []}) == ["a: {} -> []"]
    assert diff({"a": math.nan}, {"a": 1.5}) == ["a: NaN -> 1.5"]


def test_long_values_are_shortened_so_that_the_difference_shows():
    before = {"text": "x" * 100 + "old", "list": [*range(100)], "new": "a"}
    after = {"text": "x" * 100 + "new", "list": [*range(99), -1], "new": {"k": "v" * 100}}
    lines = diff(before, after)
    assert lines[0] == "list.99: 99 -> -1"
    assert lines[1].startswith('new: "a" -> {"k": "vvv')
    assert lines[2].startswith('text: "xxx') or lines[2].startswith("text: ...xxx")
    assert "old" in lines[2]
    assert "new" in lines[2]
    for line in lines:
        assert all(len(side) <= 60 for side in line.split(": ", 1)[1].split(" -> "))


def test_a_difference_holds_nothing_that_a_terminal_obeys():
    (line,) = diff({}, {"a\x1b[31m": "\x9b31m\u202e"})
    assert line.isprintable()


@given(hparams, hparams)
def test_a_difference_is_found_exactly_where_there_is_one(before, after):
    assert diff(before, before) == []
    lines = diff(before, after)
    assert lines == diff(dict(reversed(before.items())), dict(reversed(after.items())))
    assert all(line.isprintable() for line in lines)
    if not lines:
        assert before.keys() == after.keys()
