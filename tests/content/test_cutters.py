"""Cutters: every byte exactly once, equal tensors in equal chunks wherever they stand, and tails that stay few."""

from __future__ import annotations

import io
import itertools
import math
import os
import random
import struct
import tempfile
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from pyfastcdc import FastCDC

from mandapa.content.cutters import BytesSource, Cutter, FileSource, growing_cuts, structured_cuts
from mandapa.content.cutters.layout import Member, layout_cuts
from mandapa.digest import digest
from mandapa.errors import InvalidInputError

KIB = 1 << 10
MIB = 1 << 20


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def cut(data: bytes) -> list[bytes]:
    chunks = [bytes(chunk) for chunk in Cutter().cut(BytesSource(data), "file")]
    assert b"".join(chunks) == data
    assert all(chunks)
    return chunks


def added(old: bytes, new: bytes) -> int:
    """Bytes of the chunks of ``new`` that ``old`` does not have."""
    had = {digest(chunk) for chunk in cut(old)}
    return sum(len(chunk) for chunk in cut(new) if digest(chunk) not in had)


def save_safetensors(tensors: dict[str, np.ndarray], **metadata: str) -> bytes:
    return safetensors.numpy.save(tensors, metadata=metadata or None)


def save_npz(tensors: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **tensors)
    return file.getvalue()


def save_torch(tensors: dict[str, np.ndarray], stem: str = "model") -> bytes:
    torch = pytest.importorskip("torch")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{stem}.pt")
        torch.save({name: torch.from_numpy(value.copy()) for name, value in tensors.items()}, path)
        with open(path, "rb") as file:
            return file.read()


def save_dcp(tensors: dict[str, np.ndarray]) -> bytes:
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    state = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()} | {"step": {"count": 3}}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        with open(os.path.join(folder, "__0_0.distcp"), "rb") as file:
            return file.read()


SAVERS = {"safetensors": save_safetensors, "npz": save_npz, "torch": save_torch, "dcp": save_dcp}


def model(sizes: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"layer.{i}.weight": rng.standard_normal(size // 4, dtype=np.float32) for i, size in enumerate(sizes)}


@pytest.fixture(scope="module")
def hundred() -> dict[str, np.ndarray]:
    return model([MIB] * 100)


# -- structured files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_ten_of_a_hundred_tensors_changed(save: Any, hundred: dict[str, np.ndarray]) -> None:
    """What is stored again is what changed, within half a percent and 200 bytes a tensor."""
    changed = dict(hundred)
    for name in list(hundred)[::10]:
        changed[name] = hundred[name] + 1
    assert added(save(hundred), save(changed)) <= 1.005 * 10 * MIB + 200 * 100


def test_a_renamed_torch_file_costs_its_headers(hundred: dict[str, np.ndarray]) -> None:
    """Each local header of a torch file has the file's stem; a new stem must not cost a tensor."""
    old, new = save_torch(hundred, "step-100"), save_torch(hundred, "epoch=3-step=20000-last")
    assert 0 < added(old, new) <= 320 * 100


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_a_tensor_in_front_moves_all_and_costs_nothing_more(save: Any, hundred: dict[str, np.ndarray]) -> None:
    """Headers grow and every tensor moves; only headers and the new tensor are stored."""
    first = {"a.new": np.arange(5000, dtype=np.float32)}
    old, new = save(hundred), save(first | hundred)
    assert added(old, new) <= 20_000 + 320 * 100


def test_a_header_that_changes_costs_the_header(hundred: dict[str, np.ndarray]) -> None:
    """A step number in the metadata does not cost the tensor that follows it."""
    old, new = save_safetensors(hundred, step="9"), save_safetensors(hundred, step="1000")
    header = 8 + int.from_bytes(new[:8], "little")
    assert added(old, new) == header


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_equal_tensors_are_cut_equally_in_all_formats(save: Any) -> None:
    """A tensor of 9 MiB is 4 + 4 + 1 MiB from its own start, between other tensors of any length."""
    tensors = model([70 * KIB, 9 * MIB, 100, 3 * MIB + 20, 640 * KIB])
    chunks = set(cut(save(tensors)))
    raw = tensors["layer.1.weight"].tobytes()
    if save is not save_npz:  # there the .npy header of 128 bytes is a part of the member
        assert {raw[: 4 * MIB], raw[4 * MIB : 8 * MIB], raw[8 * MIB :]} <= chunks
        assert {tensors[f"layer.{i}.weight"].tobytes() for i in (0, 3, 4)} <= chunks
    assert max(map(len, chunks)) <= 4 * MIB


@pytest.mark.parametrize("save", [save_safetensors, save_torch], ids=["safetensors", "torch"])
def test_small_frozen_tensors_are_not_stored_again(save: Any) -> None:
    """Biases and norms of a layer that did not change cost nothing, even between those of layers that did."""
    rng = np.random.default_rng(1)
    shapes = {"attn": 256 * 768, "attn.bias": 768, "mlp": 256 * 1024, "mlp.bias": 1024, "norm": 256, "norm.bias": 256}
    old = {
        f"{part}.h.{layer}.{name}": rng.standard_normal(count, dtype=np.float32)
        for part in ("model", "exp_avg", "exp_avg_sq")
        for layer in range(8)
        for name, count in shapes.items()
    }
    new = {name: value + 1 if ".h.7." in name else value for name, value in old.items()}
    changed = sum(new[name].nbytes for name in new if ".h.7." in name)
    assert added(save(old), save(new)) <= 1.005 * changed + 200 * len(new)


def test_many_small_tensors_are_grouped() -> None:
    """3,000 tensors of 6 KB are a few hundred chunks; one that is new costs its group and the header."""
    rng = np.random.default_rng(2)
    old = {f"p{i}": rng.standard_normal(int(rng.integers(100, 3000)), dtype=np.float32) for i in range(3000)}
    new = {**old, "p1000x": np.zeros(5, np.float32)}
    before, after = save_safetensors(old), save_safetensors(new)
    header = 8 + int.from_bytes(after[:8], "little")
    sizes = [len(chunk) for chunk in cut(after)]
    assert len(sizes) < 600
    assert max(sizes) <= 256 * KIB
    assert added(before, after) <= header + 512 * KIB


def test_ten_thousand_scalars_in_an_archive() -> None:
    """Members of a few bytes make groups, not chunks."""
    sizes = [len(chunk) for chunk in cut(save_npz({f"s{i}": np.float32(i) for i in range(5000)}))]
    assert len(sizes) < 60


def test_empty_and_zero_sized_tensors() -> None:
    """Tensors without bytes, scalars and files without tensors are files like all others."""
    tensors = {"none": np.zeros(0, np.float32), "one": np.array(1, np.float32), "big": np.ones(100_000, np.float32)}
    for save in SAVERS.values():
        assert cut(save(tensors))
        assert cut(save({"none": tensors["none"]}))
    assert cut(save_safetensors({}))


def test_safetensors_from_literal_bytes() -> None:
    """The cuts of a file that is written down here: header, three tensors, pieces of 4 MiB."""
    header = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"U8","shape":[5242880],"data_offsets":[65536,5308416]},'
        b'"b":{"dtype":"U8","shape":[65536],"data_offsets":[0,65536]},'
        b'"c":{"dtype":"U8","shape":[65600],"data_offsets":[5308416,5374016]}}'
    )
    start = 8 + len(header)
    data = struct.pack("<Q", len(header)) + header + bytes(5_374_016)
    ends = [0, 65_536, 65_536 + 4 * MIB, 5_308_416, 5_374_016]
    assert structured_cuts(BytesSource(data)) == [start + end for end in ends]


def test_archive_from_the_standard_library() -> None:
    """Stored members are cut off with and without data descriptors and zip64 fields; sizes come from the directory."""
    parts = [noise(size, seed) for seed, size in enumerate([300 * KIB, 10, 5 * MIB, 64 * KIB])]

    class Unseekable(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: Any) -> int:
            raise io.UnsupportedOperation

        def tell(self) -> int:
            raise io.UnsupportedOperation

    for kind, zip64 in itertools.product((io.BytesIO, Unseekable), (False, True)):
        file = kind()
        with zipfile.ZipFile(file, "w") as archive:
            for i, part in enumerate(parts):
                with archive.open(f"x/{i}", "w", force_zip64=zip64) as member:
                    member.write(part)
        chunks = cut(file.getvalue())
        assert {parts[0], parts[2][: 4 * MIB], parts[2][4 * MIB :], parts[3]} <= set(chunks)


def test_archives_back_to_back() -> None:
    """Each of several archives in one file is cut as if it were alone."""
    parts = [noise(200 * KIB, seed) for seed in range(5)]
    data = b"".join(save_npz({"a": np.frombuffer(part, np.uint8)}) for part in parts)
    assert sum(chunk[-len(parts[0]) :] in parts for chunk in cut(data)) == 5


def test_small_files_are_whole() -> None:
    """Below 256 KiB no format is looked at; up to 1 MiB without a format nothing is cut."""
    assert len(cut(save_safetensors(model([100 * KIB] * 2)))) == 1
    assert len(cut(save_safetensors(model([100 * KIB] * 3)))) == 4
    assert len(cut(noise(MIB))) == 1
    assert len(cut(noise(MIB + 1))) > 1
    assert len(cut(b"x")) == 1
    assert cut(b"") == []


@given(st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 3000)), max_size=60), st.integers(0, 2**32))
def test_layout_covers_everything(shape: list[tuple[int, int]], seed: int) -> None:
    """Whatever the members, the cuts ascend to the end, keep to 4 MiB, and no large member shares a chunk."""
    rng = random.Random(seed)
    members, at = [], rng.randrange(100)
    start = at
    for length, gap in shape:
        at += gap
        members.append(Member(at, at + gap // 2, at + gap // 2 + length, rng.getrandbits(32)))
        at = members[-1].end
    size = at + rng.randrange(3000)
    cuts = layout_cuts(members, start, size)
    assert cuts is not None
    assert all(a < b <= a + 4 * MIB for a, b in itertools.pairwise([start, *cuts]))
    assert (cuts[-1] if cuts else start) == size
    ends = {start, *cuts}
    assert all({m.start, m.end} <= ends for m in members if m.end - m.start >= 64 * KIB)


# -- opaque files ----------------------------------------------------------------------------------------------------


def mixed(size: int) -> bytes:
    """Noise, text, zeros and repeats, so that all ways to end a chunk occur."""
    rng = random.Random(3)
    parts: list[bytes] = []
    while sum(map(len, parts)) < size:
        length = rng.randrange(10_000, 3 * MIB)
        parts.append(
            rng.choice([rng.randbytes(length), bytes(length), (b"step %d\n" % rng.randrange(99)) * (length // 8)])
        )
    return b"".join(parts)[:size]


@pytest.mark.parametrize("window", [2 * MIB + 1, 3 * MIB, 4 * MIB, 7 * MIB + 13, 64 * MIB])
def test_content_cuts_do_not_depend_on_the_window(window: int) -> None:
    """A file is cut as FastCDC cuts it whole, however much of it is in memory at a time."""
    data = mixed(24 * MIB)
    cdc = FastCDC(256 * KIB, min_size=64 * KIB, max_size=2 * MIB, normalized_chunking=2)
    cutter = Cutter()
    cutter._buffer = memoryview(bytearray(window))
    for size in (len(data), 4 * MIB, 4 * MIB + 1, MIB + 1):
        lengths = [len(chunk) for chunk in cutter.cut(BytesSource(data[:size]), "file")]
        assert lengths == [chunk.length for chunk in cdc.cut_buf(data[:size])]


def test_content_cuts_from_literal_numbers() -> None:
    """Cuts of known bytes stay as they are: another release of the library must not cost everybody's dedup."""
    data = b"".join(digest(b"%d" % i) for i in range(3 * MIB // 32))
    first = [166446, 439402, 793277, 1101111, 1402079, 1751393]
    then = [1986543, 2139455, 2283422, 2562787, 2999293, 3145728]
    assert list(itertools.accumulate(map(len, cut(data)))) == first + then


def test_bytes_in_front_cost_one_or_two_chunks() -> None:
    """An insertion into an opaque file costs what is around it."""
    data = noise(20 * MIB)
    assert added(data, data[:1000] + b"inserted" + data[1000:]) <= 2 * MIB


# -- reading ---------------------------------------------------------------------------------------------------------


class Counting(BytesSource):
    """Counts reads and bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: list[tuple[int, int]] = []

    def readinto(self, offset: int, buffer: memoryview, /) -> int:
        self.reads.append((offset, len(buffer)))
        return super().readinto(offset, buffer)


def test_a_file_is_read_once() -> None:
    """Besides headers every byte is read once, many chunks with one read."""
    for data in (save_safetensors(model([MIB] * 20 + [5000] * 500 + [5 * MIB])), noise(20 * MIB)):
        source = Counting(data)
        for _ in Cutter().cut(source, "file"):
            pass
        assert sum(length for _, length in source.reads) <= len(data) + 200_000
        assert len(source.reads) <= 24


@pytest.mark.parametrize("data", [noise(3 * MIB), save_safetensors(model([MIB] * 3)), noise(5000)])
def test_a_file_that_shrinks_is_refused(data: bytes) -> None:
    """A source with fewer bytes than it said is an error that names the file, never short content."""
    shorter = data[: len(data) * 2 // 3]

    class Shrunk(BytesSource):
        @property
        def size(self) -> int:
            return len(data)

    with pytest.raises(InvalidInputError, match=r"runs/model\.bin changed while it was read"):
        for _ in Cutter().cut(Shrunk(shorter), "runs/model.bin"):
            pass


def test_files(tmp_path: Any) -> None:
    """A file gives the chunks of its bytes, keeps its position, and what is appended later is not looked at."""
    data = save_safetensors(model([MIB] * 5))
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with open(path, "r+b") as file:
        source = FileSource(file.fileno())
        file.seek(0, os.SEEK_END)
        file.write(b"more")
        file.flush()
        chunks = [bytes(chunk) for chunk in Cutter().cut(source, "model.safetensors")]
        assert file.tell() == len(data) + 4
        assert FileSource(file.fileno()).size == len(data) + 4
        assert FileSource(file.fileno(), size=100).size == 100
        assert source.readinto(len(data), memoryview(bytearray(10))) == 4
    assert chunks == cut(data)


def test_one_cutter_for_many_sources() -> None:
    """A cutter can be used again, also after a source that was given up half-way."""
    cutter = Cutter()
    sources = [noise(3 * MIB, 1), b"", b"small", save_npz(model([MIB] * 2)), noise(9 * MIB, 2)]
    for data in sources + sources[::-1]:
        next(cutter.cut(BytesSource(data), "file"), None)
        assert b"".join(map(bytes, cutter.cut(BytesSource(data), "file"))) == data


def test_given_cuts() -> None:
    """Cuts that are given are used, from any one of them on, up to 16 MiB a chunk."""
    data = noise(20 * MIB)
    cuts = [1, 500, 16 * MIB + 500, 20 * MIB]
    chunks = list(map(bytes, Cutter().cut(BytesSource(data), "file", cuts=cuts)))
    assert list(itertools.accumulate(map(len, chunks))) == cuts
    assert b"".join(chunks) == data
    assert b"".join(map(bytes, Cutter().cut(BytesSource(data), "file", cuts=cuts, start=500))) == data[500:]
    assert list(Cutter().cut(BytesSource(data), "file", cuts=cuts, start=len(data))) == []
    assert list(Cutter().cut(BytesSource(b""), "file", cuts=[])) == []


@pytest.mark.parametrize(
    ("cuts", "start"),
    [([5], 0), ([], 0), ([3, 3, 10], 0), ([7, 3, 10], 0), ([0, 10], 0), ([-1, 10], 0), ([4, 10], 5), ([4, 11], 0)],
)
def test_wrong_cuts_are_refused(cuts: list[int], start: int) -> None:
    """Cuts that would lose or repeat bytes are refused before the first chunk."""
    with pytest.raises(InvalidInputError):
        Cutter().cut(BytesSource(b"0123456789"), "file", cuts=cuts, start=start)
    with pytest.raises(InvalidInputError):
        Cutter().cut(BytesSource(b"0123456789"), "file", start=4)
    with pytest.raises(InvalidInputError):
        Cutter().cut(BytesSource(bytes(17 * MIB)), "file", cuts=[17 * MIB])


# -- growing files ---------------------------------------------------------------------------------------------------


def small_at_the_end(cuts: list[int]) -> int:
    sizes = [b - a for a, b in itertools.pairwise([0, *cuts])]
    return sum(1 for _ in itertools.takewhile(lambda size: size < MIB, reversed(sizes)))


lengths = st.integers(1, 100) | st.integers(100, 100_000) | st.integers(100_000, 10 * MIB)


@settings(max_examples=200)
@given(st.lists(lengths, min_size=1, max_size=120))
def test_growing(appended: list[int]) -> None:
    """Version after version: ascending to the end, large pieces kept, at most 16 small ones in a row at the end."""
    cuts: list[int] = []
    size = 0
    for length in appended:
        size += length
        new = growing_cuts(size, cuts)
        assert new[-1] == size
        assert all(a < b <= a + 4 * MIB for a, b in itertools.pairwise([0, *new]))
        assert small_at_the_end(new) <= 16
        pieces = set(itertools.pairwise([0, *new]))
        gone = [(a, b) for a, b in itertools.pairwise([0, *cuts]) if (a, b) not in pieces]
        assert all(b - a < MIB for a, b in gone)
        assert sum(b - a for a, b in gone) < 16 * MIB
        cuts = new


@pytest.mark.parametrize("length", [64, 1000, 4096, 50_000, 300_000, 900_000, 2 * MIB])
def test_growing_stores_each_byte_few_times(length: int) -> None:
    """All that is ever stored again is at most 2 + log2(1 MiB / n) times what was written."""
    cuts: list[int] = []
    again = size = 0
    for _ in range(min(20_000, 100 * MIB // length)):
        size += length
        new = growing_cuts(size, cuts)
        # Only the last 17 pieces can change.
        gone = set(itertools.pairwise([0, *cuts][-20:])) - set(itertools.pairwise([0, *new][-40:]))
        again += sum(end - start for start, end in gone)
        cuts = new
    assert again <= size * (2 + max(0, math.log2(MIB / length)))


def test_growing_from_other_cuts() -> None:
    """A file that FastCDC cut first keeps its chunks; only the last 16 may be joined, once."""
    old = list(range(256 * KIB, 64 * MIB + 1, 256 * KIB))
    new = growing_cuts(64 * MIB + 100, old)
    assert new[:240] == old[:240]
    assert small_at_the_end(new) == 0
    large = growing_cuts(264 * MIB, old)
    assert large[:256] == old
    assert len(large) == 306


def test_growing_by_nothing_changes_nothing() -> None:
    """Equal sizes have equal cuts, whatever they are."""
    cuts = list(range(1, 100))
    assert growing_cuts(99, cuts) == cuts
    assert growing_cuts(0, []) == []
    assert growing_cuts(5, []) == [5]
    assert growing_cuts(9 * MIB, []) == [3 * MIB, 6 * MIB, 9 * MIB]


@pytest.mark.parametrize(("size", "cuts"), [(5, [6]), (10, [3, 3]), (10, [4, 2]), (10, [0, 5]), (10, [-3, 5])])
def test_growing_refuses_what_cannot_be(size: int, cuts: list[int]) -> None:
    """Cuts that do not ascend, or end behind the file."""
    with pytest.raises(InvalidInputError):
        growing_cuts(size, cuts)
