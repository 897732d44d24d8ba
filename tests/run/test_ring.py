"""States in memory: their files are those of the libraries, bit for bit; slots are used again; damage is no crash."""

from __future__ import annotations

import collections
import errno
import io
import json
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import give_back

from mandapa.errors import CorruptionError, StorageError
from mandapa.run import capture as capturing
from mandapa.run import ring as memory
from mandapa.run import serial
from mandapa.run.capture import capture
from mandapa.run.checkpoints import load_state, save_state
from mandapa.run.directory import RunDirectory
from mandapa.run.journal import File
from mandapa.run.ring import HEAD, Ring, Slot, is_held, memory_of, remove_free, settle
from mandapa.run.serial import Outline


@pytest.fixture
def directory(disk: Path) -> Iterator[RunDirectory]:
    yield RunDirectory(disk / "net", "net")
    give_back(disk)


@pytest.fixture
def ring(directory: RunDirectory) -> Iterator[Ring]:
    made = Ring(directory, 0, set())
    yield made
    made.close()


def hand_over(directory: RunDirectory, ring: Ring, state: Any, format_: str = "torch", name: str = "state") -> File:
    """As a run does."""
    captured = capture(state, format_)
    assert captured is not None
    slot = ring.take(captured.memory)
    assert slot is not None
    held = captured.fill(slot, directory.relative(slot.path))
    return File(path="state", source=f"checkpoints/{name}", size=captured.size, memory=held)


def read(directory: RunDirectory, file: File) -> bytes:
    return Path(directory.source(file.source)).read_bytes()


# -- the bytes ---------------------------------------------------------------------------------------------------------


def trained() -> dict[str, Any]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(50, 50)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(3, 50)).sum().backward()
    optimizer.step()
    return {"model": layer.state_dict(), "optim": optimizer.state_dict(), "tied": layer.weight, "step": 1}


def views() -> dict[str, Any]:
    base = torch.randn(100, 30)
    wide = torch.ones(1).expand(1000)
    return {"base": base, "part": base[10:20], "turned": base.t(), "odd": base[:, ::2], "wide": wide}


TYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "uint16",
    "bool",
]

PLAIN = {
    "trained": trained,
    "views": views,
    "types": lambda: {name: torch.arange(77).to(getattr(torch, name)) for name in TYPES},
    "complex": lambda: {"a": torch.randn(5, dtype=torch.complex64)},
    "one": lambda: torch.tensor(3.5),
    "empty": lambda: {"e": torch.empty(0), "f": torch.empty(3, 0), "s": []},
    "nothing": dict,
    "parameter": lambda: {"p": torch.nn.Parameter(torch.ones(3)), "\N{SNOWMAN}.": torch.ones(2)},
    "large": lambda: {"big": torch.randn(3 << 20), "small": torch.ones(3), "next": torch.randn(3 << 20)},
}
ONLY_TORCH = {
    "numpy": lambda: {
        "a": np.arange(1000.0),
        "s": np.float32(3),
        "r": np.random.get_state(),
        "t": torch.get_rng_state(),
    },
    "nested": lambda: [1, 2.5, (3, "x", None), {"b": b"abc", "s": {1, 2}}, collections.OrderedDict(a=torch.ones(2))],
    "turned": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "sparse": lambda: torch.eye(5).to_sparse(),
    "storage": lambda: torch.ones(5).untyped_storage(),
    "complex128": lambda: torch.ones(3, dtype=torch.complex128),
}


@pytest.mark.parametrize("make", [*PLAIN.values(), *ONLY_TORCH.values()], ids=[*PLAIN, *ONLY_TORCH])
def test_a_file_of_torch(directory: RunDirectory, ring: Ring, make: Callable[[], Any]) -> None:
    """Every bit of it is what ``torch.save`` writes, its CRCs and its id too."""
    state = make()
    file = hand_over(directory, ring, state)
    assert settle(directory, file)
    save_state(state, str(directory.path) + "/expected", "torch")
    assert read(directory, file) == Path(directory.path, "expected").read_bytes()
    assert zipfile.ZipFile(io.BytesIO(read(directory, file))).testzip() is None


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_a_file_of_safetensors(directory: RunDirectory, ring: Ring, make: Callable[[], Any]) -> None:
    """What the library writes, which leaves the order of two members to chance."""
    state = make()
    file = hand_over(directory, ring, state, "safetensors")
    assert settle(directory, file)
    save_state(state, str(directory.path) + "/expected", "safetensors")
    found, expected = read(directory, file), Path(directory.path, "expected").read_bytes()
    length = 8 + int.from_bytes(expected[:8], "little")
    assert found[length:] == expected[length:]
    assert list(json.loads(found[8:length]).items()) == list(json.loads(expected[8:length]).items())


def test_arrays_of_numpy(directory: RunDirectory, ring: Ring) -> None:
    """In safetensors, also those that are in no plain order in memory."""
    base = np.arange(6000, dtype=np.float32).reshape(60, 100)
    state = {"a": base, "t": base.T, "odd": base[::3], "zero": np.array(7), "none": np.empty((0, 4)), "step": 3}
    file = hand_over(directory, ring, state, "safetensors")
    assert settle(directory, file)
    found = load_state(directory.source(file.source))
    assert found["step"] == 3
    for name in ("a", "t", "odd", "zero", "none"):
        np.testing.assert_array_equal(found[name], state[name])
        assert found[name].dtype == state[name].dtype


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_is_not_captured(tmp_path: Path) -> None:
    """Goes the way of the library, which has it, or has the words for it."""
    assert capture({"a": torch.ones(3, device="meta")}, "torch") is None
    assert capture(torch.quantize_per_tensor(torch.randn(10), 0.1, 0, torch.qint8), "torch") is None
    assert capture(torch.nn.Linear(2, 2), "torch") is None
    assert capture({"a": lambda: 1}, "torch") is None
    assert capture({"a": torch.randn(3, dtype=torch.complex64).conj()}, "safetensors") is None
    assert capture({"a": np.arange(3, dtype=">f4")}, "safetensors") is None
    assert capture({"a": np.arange(3), "b": torch.ones(3)}, "safetensors") is None
    assert capture({"a": object()}, "safetensors") is None


def test_an_archive_above_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wide fields are where torch has them: a file of torch with holes for tensors tells."""
    path = tmp_path / "archive.pt"
    large = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage((4 << 30) + 5))  # no page of it is touched
    with torch.serialization.skip_data():
        torch.save({"a": torch.ones(4), "b": large, "c": torch.ones(5), "e": torch.ones(0)}, path)
    records = [(info.filename.removeprefix("archive/"), info.file_size) for info in zipfile.ZipFile(path).infolist()]
    *records, (last, _) = records
    assert last == ".data/serialization_id"
    with path.open("rb") as file:
        offsets = [info.header_offset for info in zipfile.ZipFile(path).infolist()]
        assert offsets[-1] > 1 << 32

        def content(name: str) -> bytes:
            return torch._C.PyTorchFileReader(str(path)).get_record(name)

        data = dict(enumerate(b"" if name.startswith("data/") else content(name) for name, _ in records))
        zeros = memoryview(bytes(32 << 20))
        turn = iter(data.values())

        def parts(_: int, size: int) -> Iterator[memoryview]:
            known = next(turn)
            if known:
                yield memoryview(known)
            else:
                for start in range(0, size, len(zeros)):
                    yield zeros[: min(len(zeros), size - start)]

        # Torch does not know the CRC of what it has left out.
        real = serial.zlib.crc32
        monkeypatch.setattr(serial, "zlib", type("Z", (), {"crc32": lambda d, c: real(d, c) if any(d[:64]) else 0}))
        names = content(".data/serialization_id")[:20].decode()
        outline = Outline(kind="zip", records=records, names=names)
        assert serial.size_of_file(outline) == path.stat().st_size

        def compare(found: bytes | memoryview) -> None:
            if len(found) < len(zeros) // 2:
                assert file.read(len(found)) == found
            else:
                file.seek(len(found), os.SEEK_CUR)

        serial.write_file(outline, parts, 0, compare)
        assert file.read() == b""


def test_copies_from_elsewhere(directory: RunDirectory, ring: Ring) -> None:
    """What comes from a GPU takes another way into memory; here it comes from the CPU."""
    slot = ring.take(1 << 20)
    assert slot is not None
    target = slot.mapping()
    assert target is not None
    pieces = [(HEAD, torch.arange(100, dtype=torch.uint8)), (HEAD + 128, torch.full((7,), 9, dtype=torch.uint8))]
    capturing._fetch(slot, target, pieces)
    assert b"".join(slot.read(HEAD, 100)) == bytes(range(100))
    assert b"".join(slot.read(HEAD + 128, 7)) == bytes([9] * 7)


# -- slots -------------------------------------------------------------------------------------------------------------


def test_slots_are_used_again(directory: RunDirectory, ring: Ring) -> None:
    """One while the disk keeps up, two when it does not, and none when both are in use."""
    first = hand_over(directory, ring, trained(), name="1")
    assert is_held(directory, first)
    assert settle(directory, first)
    assert not is_held(directory, first)
    second = hand_over(directory, ring, trained(), name="2")
    third = hand_over(directory, ring, trained(), name="3")
    slots = [file.memory.slot for file in (first, second, third) if file.memory]
    assert slots[0] == slots[1] != slots[2]
    assert memory_of(directory, 0) == sum(os.stat(slot).st_size for slot in slots[1:])
    assert all(os.stat(slot).st_mode & 0o777 == 0o600 for slot in slots)
    assert ring.take(1000) is None
    assert settle(directory, third)
    assert settle(directory, second)
    assert read(directory, first) == read(directory, second) == read(directory, third)
    assert ring.take(1000) is not None


def test_a_slot_that_is_too_small(directory: RunDirectory, ring: Ring) -> None:
    """It is given back, and a larger one is taken."""
    small = hand_over(directory, ring, torch.ones(10), name="1")
    assert settle(directory, small)
    large = hand_over(directory, ring, torch.ones(2 << 20), name="2")
    assert small.memory is not None
    assert not os.path.exists(small.memory.slot)
    assert settle(directory, large)
    assert len(read(directory, large)) == large.size


def test_a_turn_that_is_over(directory: RunDirectory, ring: Ring) -> None:
    """A file that is gone does not come back with what is in the slot now."""
    first = hand_over(directory, ring, torch.ones(10), name="1")
    assert settle(directory, first)
    os.unlink(directory.source(first.source))
    assert not settle(directory, first)
    hand_over(directory, ring, torch.zeros(10), name="2")
    assert not settle(directory, first)
    assert not os.path.exists(directory.source(first.source))


def test_somebody_removes_the_memory(directory: RunDirectory, ring: Ring) -> None:
    """As a system may that tidies up behind a login: the next state takes new memory."""
    first = hand_over(directory, ring, torch.ones(10), name="1")
    assert first.memory is not None
    os.unlink(first.memory.slot)
    assert not settle(directory, first)
    second = hand_over(directory, ring, torch.ones(10), name="2")
    assert settle(directory, second)


def test_a_killed_trainer_and_its_slots(directory: RunDirectory, ring: Ring) -> None:
    """What it had handed over stays; what it was copying is given back, and used by the next one."""
    handed = hand_over(directory, ring, torch.ones(10), name="1")
    cut_off = hand_over(directory, ring, torch.ones(10), name="2")
    ring.close()
    assert handed.memory is not None
    assert cut_off.memory is not None
    unread = Ring(directory, 0, None)
    assert unread.take(1000) is None
    unread.close()
    again = Ring(directory, 0, {handed.memory.turn})
    slot = again.take(1000)
    assert slot is not None
    assert slot.path == cut_off.memory.slot
    assert again.take(1000) is None
    again.close()
    assert settle(directory, handed)
    assert not settle(directory, cut_off)
    remove_free(directory, 0)
    assert memory_of(directory, 0) == 0
    assert not os.path.exists(handed.memory.slot)
    assert not os.path.exists(slot.path)  # it was in a turn that no line speaks of


def test_no_shared_memory(directory: RunDirectory, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a slot is in the run's directory; it is never mapped, so a full disk is an error and no signal."""
    reserve = os.posix_fallocate
    tried = []

    def full(fd: int, offset: int, length: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.startswith(memory.SHARED):
            tried.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    file = hand_over(directory, ring, trained())
    assert file.memory is not None
    assert file.memory.slot.startswith(".run/mandapa-")
    assert tried
    assert not [path for path in tried if os.path.exists(path)]
    slot = Slot(directory.source(file.memory.slot))
    assert slot.mapping() is None
    slot.close()
    assert settle(directory, file)
    assert load_state(directory.source(file.source))["step"] == 1
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: full(*_) or (_ for _ in ()).throw(OSError(28, "full")))
    assert ring.take(1 << 30) is None


def test_memory_is_left_to_others(directory: RunDirectory, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than half of what is free is not taken."""
    assert 0 < memory.free_memory() < 1 << 50
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 20)
    slot = ring.take(1 << 20)
    assert slot is not None
    assert slot.path.startswith(directory.inner)


# -- settling ----------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full(directory: RunDirectory, ring: Ring) -> None:
    """The state stays in memory, nothing is left of the attempt, and the next one succeeds."""
    file = hand_over(directory, ring, torch.ones(1 << 20))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            settle(directory, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.path.exists(os.path.join(directory.inner, "settling.tmp"))
    assert is_held(directory, file)
    assert settle(directory, file)


def test_many_at_once(directory: RunDirectory, ring: Ring) -> None:
    """Processes and threads that need the same file get one, whole."""
    file = hand_over(directory, ring, torch.arange(1 << 20))
    assert file.memory is not None
    program = (
        "import sys, msgspec; from mandapa.run.ring import settle; from mandapa.run.directory import RunDirectory\n"
        "from mandapa.run.journal import File\n"
        "assert settle(RunDirectory(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=File))"
    )
    import msgspec

    words = [sys.executable, "-c", program, directory.path, msgspec.json.encode(file).decode()]
    others = [subprocess.Popen(words) for _ in range(3)]
    assert settle(directory, file)
    assert [other.wait(60) for other in others] == [0, 0, 0]
    assert torch.equal(load_state(directory.source(file.source)), torch.arange(1 << 20))


def spoil(path: str, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: spoil(path, 0, b"PK"),
        lambda path: spoil(path, 8, bytes(16)),  # of another start of the machine
        lambda path: spoil(path, HEAD + 5, b"???"),
        lambda path: os.truncate(path, HEAD),
        lambda path: os.truncate(path, HEAD + 3000),
        lambda path: (os.unlink(path), os.mkfifo(path)),
        lambda path: (os.rename(path, path + "2"), os.symlink(path + "2", path)),
        lambda path: (os.unlink(path), os.mkdir(path)),
    ],
)
def test_a_damaged_slot(directory: RunDirectory, ring: Ring, damage: Callable[[str], Any]) -> None:
    """The state is lost, which is said by False; nobody crashes, and nothing half is left."""
    file = hand_over(directory, ring, trained())
    assert file.memory is not None
    ring.close()
    damage(file.memory.slot)
    try:
        assert not settle(directory, file)
        assert not os.path.exists(directory.source(file.source))
        assert not os.path.exists(os.path.join(directory.inner, "settling.tmp"))
        Ring(directory, 0, set()).close()
    finally:
        for path in (file.memory.slot, file.memory.slot + "2"):
            if os.path.isdir(path):
                os.rmdir(path)
            elif os.path.lexists(path):
                os.unlink(path)


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"\xff",
        b'{"kind":"zip","records":[["a",-1]]}',
        b'{"kind":"zip","records":[["a",1e400]]}',
        b'{"kind":"tar","records":[]}',
        b'{"kind":"zip","records":[],"alignment":0}',
        b'{"kind":"zip","records":[],"names":"12"}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_outline(text: bytes) -> None:
    """Is refused by the error that callers know."""
    with pytest.raises(CorruptionError):
        serial.read_outline(text)
