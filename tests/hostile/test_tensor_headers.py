"""Tensor files that lie: a clear error, or no tensor file, within a second and 256 MB; and nothing is executed."""

from __future__ import annotations

import gc
import io
import json
import pickle
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mandapa.content.cutters import BytesSource
from mandapa.content.tensors import read_structure, tensors_of
from mandapa.errors import InvalidInputError

SECONDS = 1.0  # of this process, on a quiet machine
PATIENCE = 4  # how much slower a busy one may be
BYTES = 256 << 20


def with_header(header: object, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def tensor(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def zip_of(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)
    return file.getvalue()


PROTO = b"\x80\x02"


def torch_zip(program: bytes, storage: bytes = bytes(8), byteorder: bytes = b"little") -> bytes:
    return zip_of(("a/data.pkl", PROTO + program + b"."), ("a/byteorder", byteorder), ("a/data/0", storage))


def integer(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def view(
    *,
    storage: bytes = b"ctorch\nFloatStorage\n",
    key: str = "0",
    count: int = 2,
    offset: int = 0,
    shape: tuple[int, ...] = (2,),
    strides: tuple[int, ...] = (1,),
) -> bytes:
    """The program that makes one tensor."""
    id_ = b"(" + text("storage") + storage + text(key) + text("cpu") + integer(count) + b"tQ"
    sizes = [b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (shape, strides)]
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + id_ + integer(offset) + b"".join(sizes) + b"\x89" + hooks + b"tR"


def npy(header: bytes, payload: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + payload


def shape_header(shape: bytes, descr: bytes = b"<f4") -> bytes:
    return b"{'descr': '" + descr + b"', 'fortran_order': False, 'shape': (" + shape + b"), }\n"


def laughs() -> bytes:
    program = view() + b"q\x00"
    for _ in range(60):
        program += b"(h\x00h\x00tq\x00"
    return program


def long_names() -> bytes:
    program = view() + b"q\x00"
    for _ in range(60):
        program += b"}q\x01(" + text("k" * 1000) + b"h\x00uh\x01q\x00"
    return program


def colliding_keys() -> bytes:
    """Keys that all have one hash in Python."""
    return b"}(" + b"".join(integer(i * ((1 << 61) - 1)) + b"K\x01" for i in range(100_000)) + b"u"


REFUSED: dict[str, Callable[[], bytes]] = {
    # safetensors
    "bytes that dtype and shape do not give": lambda: with_header({"a": tensor("F32", [3], 0, 8)}, bytes(8)),
    "a shape whose product is right only modulo 2**64": lambda: with_header(
        {"a": tensor("U8", [1 << 32, 1 << 32, 8], 0, 0)}, b""
    ),
    "a negative shape": lambda: with_header({"a": tensor("F32", [-1, -2], 0, 8)}, bytes(8)),
    "a shape that is text": lambda: with_header({"a": tensor("F32", "2", 0, 8)}, bytes(8)),
    "a shape of fractions": lambda: with_header({"a": tensor("F32", [2.5], 0, 8)}, bytes(8)),
    "a thousand dimensions": lambda: with_header({"a": tensor("F32", [1] * 1000, 0, 4)}, bytes(4)),
    "a dimension of a thousand digits": lambda: with_header(
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,1]}}', b"x"
    ),
    "no dtype": lambda: with_header({"a": {"shape": [], "data_offsets": [0, 4], "dtype": None}}, bytes(4)),
    "overlap": lambda: with_header({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, bytes(12)),
    "a hole": lambda: with_header({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 8, 12)}, bytes(12)),
    "bytes behind the last tensor": lambda: with_header({"a": tensor("F32", [1], 0, 4)}, bytes(5)),
    "truncated": lambda: with_header({"a": tensor("F32", [2], 0, 8)}, bytes(7)),
    "one name twice": lambda: with_header(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        bytes(2),
    ),
    "half a surrogate": lambda: with_header(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "a million tensors": lambda: with_header(
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000)) + b"}",
        b"",
    ),
    # torch
    "big-endian": lambda: torch_zip(view(), byteorder=b"big"),
    "neither order of bytes": lambda: torch_zip(view(), byteorder=b"litte"),
    "an empty pickle": lambda: zip_of(("a/data.pkl", b"")),
    "a pickle without an end": lambda: zip_of(("a/data.pkl", PROTO + view())),
    "a stack that is empty": lambda: torch_zip(b"\x85"),
    "a mark that is missing": lambda: torch_zip(b"NNt"),
    "a memo that is empty": lambda: torch_zip(b"h\x00"),
    "a key without a value": lambda: torch_zip(b"}(Nu"),
    "a text that is longer than the file": lambda: torch_zip(b"X\xff\xff\xff\xffa"),
    "a text of 2**63 bytes": lambda: torch_zip(b"\x8d" + struct.pack("<Q", 1 << 63)),
    "a text that is not UTF-8": lambda: torch_zip(b"X\x01\x00\x00\x00\xff"),
    "an integer of 2**31 bytes": lambda: torch_zip(b"\x8b\xff\xff\xff\x7f"),
    "an integer in digits": lambda: torch_zip(b"I" + b"9" * 1_000_000 + b"\n"),
    "a name without an end": lambda: torch_zip(b"c" + b"a" * 5000),
    "an extension": lambda: torch_zip(b"\x82\x01"),
    "a list in itself": lambda: torch_zip(b"]q\x00h\x00a"),
    "a dict in itself": lambda: torch_zip(b"}q\x00" + text("a") + b"h\x00s"),
    "nested 60,000 deep": lambda: torch_zip(b"]" + b"]" * 60_000 + b"a" * 60_000),
    "tuples nested a million deep": lambda: torch_zip(b")" + b"\x85" * 1_000_000),
    "2**60 tensors": lambda: torch_zip(laughs()),
    "a list of a million times one tensor": lambda: torch_zip(b"(" + view() + b"q\x00" + b"h\x00" * 1_000_000 + b"l"),
    "names that grow": lambda: torch_zip(long_names()),
    "a name of 30 MB": lambda: torch_zip(b"}" + text("a" * 30_000_000) + view() + b"s"),
    "30 million empty lists": lambda: torch_zip(b"]" * 30_000_000),
    "two pickles": lambda: zip_of(("a/data.pkl", b"N."), ("b/data.pkl", b"N."), ("c.npy", b"")),
    "a pickle of 40 MB": lambda: torch_zip(text("a" * 40_000_000)),
    "a hundred thousand archives": lambda: zip_of(("a/data.pkl", PROTO + b"N.")) * 60_000,
    "a hundred archives of a million steps": lambda: torch_zip(b"N0" * 500_000 + view()) * 100,
    "a byteorder of 1 MB": lambda: torch_zip(view(), byteorder=b"little" * 200_000),
    "an archive of something else": lambda: zip_of(("word/document.xml", b"<xml/>")),
    # NumPy
    "an array of 4,000 digits": lambda: npy(shape_header(b"9" * 4000)),
    "an array of 1,000 dimensions": lambda: npy(shape_header(b"1," * 1000), bytes(4)),
    "an array that is cut off": lambda: npy(shape_header(b"3,"), bytes(11)),
    "an array without a header": lambda: zip_of(("a.npy", b"")),
    "an array of another version": lambda: zip_of(("a.npy", b"\x93NUMPY\x09\x00" + bytes(20))),
    "no magic at all": lambda: bytes(1000),
    "nothing": lambda: b"",
}


def bounded(work: Callable[[], object]) -> None:
    """Within a second, and 256 MB more than the process has."""
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, ((int(data.split()[1]) << 10) + BYTES, before[1]))
    gc.collect()
    gc.freeze()  # what other tests have left behind is not looked through each time that much is made
    try:
        began = time.process_time()
        work()
        assert time.process_time() - began < SECONDS * PATIENCE
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize("name", REFUSED)
def test_a_lying_file_is_refused(name: str) -> None:
    """As a whole, with a reason that names the file; who only wants a hint gets none."""
    source = BytesSource(REFUSED[name]())

    def work() -> None:
        with pytest.raises(InvalidInputError, match=r"odd/file cannot be read by tensors: [a-z]"):
            read_structure(source, "odd/file")
        assert tensors_of(source) is None

    bounded(work)


LOST: dict[str, Callable[[], bytes]] = {
    "beyond its storage": lambda: view(offset=1),
    "far beyond it": lambda: view(shape=(1 << 62,)),
    "strides beyond it": lambda: view(strides=(2,)),
    "an offset of 2**62": lambda: view(offset=1 << 62),
    "expanded": lambda: view(count=2, shape=(1 << 40,), strides=(0,)),
    "overlapping windows": lambda: view(shape=(2, 2), strides=(0, 1)),
    "a negative stride": lambda: view(strides=(-1,), offset=1),
    "a negative offset": lambda: view(offset=-1),
    "a negative size": lambda: view(shape=(-2,)),
    "sizes and strides of different length": lambda: view(shape=(2, 1)),
    "a thousand dimensions": lambda: view(shape=(1,) * 1000, strides=(1,) * 1000),
    "an integer of 2,000 bits": lambda: view(shape=(1 << 1999,)),
    "a storage that is not there": lambda: view(key="1"),
    "a storage above its folder": lambda: view(key="../byteorder"),
    "a storage of another size": lambda: view(count=3),
    "a storage of 2**62 elements": lambda: view(count=1 << 62),
    "a storage that torch lacks": lambda: view(storage=b"ctorch\nEvilStorage\n"),
    "a storage of another module": lambda: view(storage=b"cos\nFloatStorage\n"),
    "a storage that is a text": lambda: view(storage=text("FloatStorage")),
    "without arguments": lambda: b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    "with arguments of other types": lambda: b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR",
    "made by something else of torch": lambda: b"ctorch._utils\n_rebuild_sparse_tensor\n)R",
}


@pytest.mark.parametrize("name", LOST)
def test_a_lying_tensor_is_named(name: str) -> None:
    """It is not listed, the others are, and why is said."""
    data = torch_zip(b"}(" + text("bad") + LOST[name]() + text("good") + view() + b"u")

    def work() -> None:
        structure = read_structure(BytesSource(data), "file")
        assert [place.name for place in structure.tensors] == ["good"]
        assert structure.lost.keys() == {"bad"}
        assert len(structure.lost["bad"]) > 10

    bounded(work)


HARMLESS: dict[str, Callable[[], bytes]] = {
    "keys of one hash": colliding_keys,
    "names of everything": lambda: b"ca\nb\n" * 400_000,
    "a memo of a million": lambda: b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(1_000_000)),
    "persistent ids of nothing": lambda: b"N" + b"Q" * 1_000_000,
    "a million dicts": lambda: b"}" * 1_000_000,
    "a call of the system": lambda: b"cos\nsystem\n" + text("touch pwned") + b"\x85R",
    "a call by class": lambda: b"cbuiltins\nexec\n" + text("raise SystemExit") + b"\x85\x81",
    "a state for a class": lambda: b"cbuiltins\nexec\n)\x81}" + text("a") + view() + b"sb",
    "getattr": lambda: b"cbuiltins\ngetattr\n(cos\nsystem\n" + text("x") + b"tR" + text("y") + b"\x85R",
    "a torch function that is called": lambda: b"ctorch.hub\nload\n" + text("evil/repo") + b"\x85R",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_no_tensor_does_nothing(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a pickle asks for, nothing is imported, called or made; there are no tensors."""
    monkeypatch.chdir(tmp_path)
    data = torch_zip(HARMLESS[name]())
    bounded(lambda: read_structure(BytesSource(data), "file"))
    structure = read_structure(BytesSource(data), "file")
    assert (structure.tensors, structure.lost) == ([], {})
    assert list(tmp_path.iterdir()) == []


def test_large_and_honest_files() -> None:
    """190,000 tensors of safetensors, 40,000 of torch, 60,000 arrays: all listed, within the bounds."""
    count = 190_000
    header = b",".join(
        b'"layer.%d.weight":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}' % (i, 8 * i, 8 * i + 8)
        for i in range(count)
    )
    files = {count: with_header(b"{" + header + b"}", bytes(8 * count))}
    files[40_000] = torch_zip(b"}(" + b"".join(text(f"layer.{i}.weight") + view() for i in range(40_000)) + b"u")
    array = npy(shape_header(b"1,"), bytes(4))
    files[60_000] = zip_of(*[(f"{i}.npy", array) for i in range(60_000)])
    for expected, data in files.items():
        source = BytesSource(data)

        def work(source: BytesSource = source, expected: int = expected) -> None:
            assert len(read_structure(source, "file").tensors) == expected

        bounded(work)


# -- mutations -------------------------------------------------------------------------------------------------------


def bases() -> dict[str, bytes]:
    """One small file of each format, by real writers where there are any."""
    torch = pytest.importorskip("torch")
    from safetensors.numpy import save

    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(0), "c": np.asfortranarray(np.ones((2, 3)))}
    one, npz, zip_, flat = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(one, arrays["c"])
    np.savez(npz, **arrays)
    base = torch.arange(24.0)
    state = {"m": {"w": base[2:8], "t": base.view(4, 6).t()}, "l": [torch.ones(2).bfloat16(), 5], "p": 1e3, "n": None}
    torch.save(state, zip_)
    torch.save(state, zip_, pickle_protocol=4)
    torch.save(torch.ones(3), flat)
    return {
        "safetensors": save(arrays),
        "npy": one.getvalue(),
        "npz": npz.getvalue(),
        "torch": zip_.getvalue(),
        "bare": flat.getvalue(),
        "distcp": flat.getvalue() * 3,
        "by hand": torch_zip(b"}(" + text("a") + view() + text("b") + view(shape=(1, 2), strides=(2, 1)) + b"u"),
    }


def mutate(data: bytearray, rng: random.Random) -> None:
    """One small change."""
    at = rng.randrange(len(data))
    match rng.randrange(6):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            data[at] = rng.choice(b'\x00\xff{}[]()"09.-e,:PKtuRQbhqXcs\x85\x86\x89\x94\x93')
        case 2:
            width = rng.choice([1, 2, 4, 8])
            at = min(at, len(data) - width)
            value = rng.choice([0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), len(data), rng.getrandbits(64)])
            data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        case 3:
            del data[at : at + rng.randint(1, 20)]
        case 4:
            data[at:at] = rng.randbytes(rng.randint(1, 20))
        case 5:
            other = rng.randrange(len(data))
            data[at : at + 8] = data[other : other + 8]


def fuzz(seed: int, count: int) -> tuple[int, int]:
    """How many mutated files were refused, and how many read; anything but these two raises."""
    rng = random.Random(seed)
    refused = read = 0
    files = list(bases().values())
    for number in range(count):
        data = bytearray(files[number % len(files)])
        for _ in range(rng.randint(1, 4)):
            if data:
                mutate(data, rng)
        began = time.process_time()
        try:
            structure = read_structure(BytesSource(data), "file")
        except InvalidInputError:
            refused += 1
            assert tensors_of(BytesSource(data)) is None
        else:
            read += 1
            names = [place.name for place in structure.tensors]
            assert len(set(names)) == len(names)
            assert not structure.lost.keys() & set(names)
            for place in structure.tensors:
                assert 0 <= place.start <= place.end <= len(data)
                assert place.size <= place.end - place.start
        assert time.process_time() - began < SECONDS * PATIENCE
    return refused, read


def test_mutations() -> None:
    """7,000 damaged files of all formats: an error of ours, or tensors that lie within the file."""
    refused, read = fuzz(7, 7_000)
    assert min(refused, read) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_mutations(seed: int) -> None:
    """The same, 50,000 times from each of 20 seeds."""
    fuzz(1000 + seed, 50_000)
