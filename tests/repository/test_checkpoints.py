"""Real checkpoint files as training writes them: what did not change is not stored again, and every byte comes back."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

from mandapa.object_store import LocalObjectStore
from mandapa.repository.repository import Repository

TENSORS = 100
ELEMENTS = 1 << 18  # of float32: 1 MiB
MIB = 1 << 20


@pytest.fixture
def work(tmp_path):
    """A folder that does not outlive the test: these files are large."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def store(work):
    return LocalObjectStore(work / "repository", fsync=False)


@pytest.fixture
def repo(store):
    return Repository.create(store, codec="raw", threads=2)


def stored(store):
    """Bytes of all objects: containers, records, heads, everything."""
    return sum(info.size for info in store.list(""))


def commit(repo, *files, name="model", at=None):
    """One version with these files added."""
    with repo.artifact(name).transaction(f"{len(files)} files") as txn:
        for file in files:
            txn.add(file, at=at)
    assert txn.made
    return txn.version


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors(seed=0, count=TENSORS):
    rng = np.random.default_rng(seed)
    return {f"layers.{i:03}.weight": rng.standard_normal(ELEMENTS, dtype=np.float32) for i in range(count)}


def change(state, seed=1, count=10):
    """The same tensors but for every tenth."""
    rng = np.random.default_rng(seed)
    names = list(state)[3 :: len(state) // count][:count]
    assert len(names) == count
    return state | {name: rng.standard_normal(ELEMENTS, dtype=np.float32) for name in names}


def save_torch(state, path, **extra):
    """A checkpoint as torch.save writes it: a zip whose entries are named after the file."""
    torch.save({"model": {name: torch.from_numpy(value) for name, value in state.items()}, **extra}, path)


def check_second(repo, store, first, second, *, names=("a", "a")):
    """The second file adds a tenth of its bytes, all told, and both come back."""
    made = commit(repo, first, at=f"checkpoint/{names[0]}")
    before = stored(store)
    later = commit(repo, second, at=f"checkpoint/{names[1]}")
    added = stored(store) - before
    assert added <= 0.105 * second.stat().st_size, f"{added / second.stat().st_size:.4f}"
    # A reader that has seen nothing yet.
    fresh = Repository(store, threads=2)
    for version, file, name in ((made, first, names[0]), (later, second, names[1])):
        target = fresh[f"model:v{version.number}"].download(file.parent / f"out-{version.number}")
        assert sha(file) == sha(Path(target) / "checkpoint" / name)
    return added


def test_a_tenth_of_the_tensors_of_a_safetensors_file(repo, store, work):
    """Ten of a hundred tensors of 1 MiB are new, and the header is longer: at most 10.5% of the file is stored."""
    state = tensors()
    first, second = work / "step-1000.safetensors", work / "step-2000.safetensors"
    save_file(state, first)
    save_file(change(state), second, metadata={"step": "2000", "note": "longer " * 300})
    check_second(repo, store, first, second)


def test_a_safetensors_file_of_another_name(repo, store, work):
    """The same at another path, beside the old file: finding chunks again does not depend on names."""
    state = tensors()
    first, second = work / "step-1000.safetensors", work / "later.safetensors"
    save_file(state, first)
    save_file(change(state), second)
    check_second(repo, store, first, second, names=("step-1000.safetensors", "later.safetensors"))


def test_a_tensor_inserted_in_front(repo, store, work):
    """All tensors move in the file, by no round number of bytes: they are found again, only the new one is stored."""
    state = tensors()
    first, second = work / "a.safetensors", work / "b.safetensors"
    save_file(state, first)
    # safetensors sorts by size of dtype, then name: this one stands in front of all others.
    save_file({"0": np.arange(12_345, dtype=np.float32), **state}, second)
    added = check_second(repo, store, first, second)
    assert second.read_bytes().find(np.arange(12_345, dtype=np.float32).tobytes()) < 20_000
    assert added <= 12_345 * 4 + 200 * TENSORS + 20_000


def test_a_tenth_of_the_tensors_of_a_torch_file(repo, store, work):
    """torch.save with another file name (which stands in every entry) and a longer pickle: at most 10.5% is stored."""
    state = tensors()
    first, second = work / "step_1000.pt", work / "a-much-longer-name-of-step_2000.pt"
    save_torch(state, first, step=1000)
    save_torch(change(state), second, step=2000, history=list(range(500)))
    check_second(repo, store, first, second, names=("step_1000.pt", "step_2000.pt"))


def test_a_torch_file_with_a_tensor_in_front(repo, store, work):
    """Entries get other numbers and places when a tensor comes first: the old bytes are found again."""
    state = tensors()
    first, second = work / "a.pt", work / "b.pt"
    save_torch(state, first)
    save_torch({"first": np.arange(1000, dtype=np.float32), **state}, second)
    added = check_second(repo, store, first, second)
    assert added <= 4000 + 200 * TENSORS + 60_000


def test_the_default_codec_stores_no_more(store, work):
    """What holds for raw bytes holds for compressed ones: the second file adds at most 10.5%."""
    repo = Repository.create(store, threads=2)
    state = tensors(count=20)
    first, second = work / "a.safetensors", work / "b.safetensors"
    save_file(state, first)
    save_file(change(state, count=2), second, metadata={"step": "2"})
    check_second(repo, store, first, second)


def test_a_growing_log_adds_its_tail(repo, store, work):
    """A log grown from 3 to 5 MB adds 2 MB: what was there is not stored again, compressible or not."""
    log = work / "train.log"
    rng = np.random.default_rng(5)
    lines = rng.bytes(5_000_000).hex().encode()[:5_000_000]
    log.write_bytes(lines[:3_000_000])
    commit(repo, log)
    before = stored(store)
    log.write_bytes(lines)
    version = commit(repo, log)
    assert stored(store) - before <= 2_000_000 + 5_000
    with version.open("train.log") as file:
        assert file.read() == lines


def test_a_log_that_grows_by_little_each_time(repo, store, work):
    """Forty times 50 KB more: what is stored in all stays within twice the log, and each version reads as it was."""
    steps = 40
    log = work / "train.log"
    rng = np.random.default_rng(6)
    whole = rng.bytes(1_000_000 + 50_000 * steps)
    for step in range(steps + 1):
        log.write_bytes(whole[: 1_000_000 + 50_000 * step])
        commit(repo, log)
    assert stored(store) <= 2 * len(whole) + 30_000 * steps
    for version in repo.artifact("model").versions():
        with version.open("train.log") as file:
            assert file.read() == whole[: 1_000_000 + 50_000 * version.number]


def test_the_same_content_elsewhere_adds_only_metadata(repo, store, work):
    """Another path, another artifact, a copy on disk: no byte of content is stored a second time."""
    first, copy = work / "a.safetensors", work / "copy.bin"
    save_file(tensors(count=20), first)
    copy.write_bytes(first.read_bytes())
    commit(repo, first)
    for name, at in (("model", "again/a.safetensors"), ("other", "x.bin")):
        before = stored(store)
        version = commit(repo, copy, name=name, at=at)
        assert stored(store) - before <= 20_000
        assert version.assets[at].digest == repo["model:v0"].assets["a.safetensors"].digest
        with version.open(at) as file:
            assert file.read() == first.read_bytes()


def test_another_machine_finds_what_is_in_the_base(store, work):
    """A repository object without any memory of the first commit finds its chunks by the base version's manifest."""
    state = tensors(count=20)
    first, second = work / "a.safetensors", work / "b.safetensors"
    save_file(state, first)
    save_file(change(state, count=2), second, metadata={"step": "2000"})
    commit(Repository.create(store, codec="raw", threads=2), first, at="model.safetensors")
    for at in ("model.safetensors", "another-name.safetensors"):
        before = stored(store)
        commit(Repository(store, codec="raw", threads=2), second, at=at)
        assert stored(store) - before <= 0.105 * second.stat().st_size


def test_a_state_dict_is_loaded_straight_from_a_version(repo, work):
    """torch.load(weights_only=True) and safetensors read what they wrote from the file that a version opens."""
    state = tensors(count=8)
    save_torch(state, work / "model.pt", step=7)
    safetensors.torch.save_file({k: torch.from_numpy(v) for k, v in state.items()}, work / "model.safetensors")
    version = commit(repo, work / "model.pt", work / "model.safetensors")
    with version.open("model.pt") as file:
        loaded = torch.load(file, weights_only=True)
    assert loaded["step"] == 7
    with version.open("model.safetensors") as file:
        same = safetensors.torch.load(file.read())
    assert list(loaded["model"]) == sorted(same) == list(state)
    for name, value in state.items():
        assert np.array_equal(loaded["model"][name].numpy(), value)
        assert np.array_equal(same[name].numpy(), value)


def test_the_x_bit_is_kept_and_is_a_change(repo, store, work):
    """Executable or not is part of a version; changing it alone makes another digest, and stores no content."""
    script = work / "run.sh"
    script.write_bytes(b"#!/bin/sh\nexit 0\n" + os.urandom(200_000).hex().encode())
    script.chmod(0o644)
    plain = commit(repo, script)
    script.chmod(0o755)
    before = stored(store)
    executable = commit(repo, script)
    assert stored(store) - before <= 4_000
    assert not plain.assets["run.sh"].executable
    assert executable.assets["run.sh"].executable
    assert plain.digest != executable.digest
    assert plain.assets["run.sh"].digest == executable.assets["run.sh"].digest
    assert [asset.path for asset in plain.diff(executable).added] == []
    assert len(plain.diff(executable).changed) == 1
    for version, mode in ((plain, 0), (executable, 0o100)):
        target = work / f"out-{version.number}"
        version.download(target)
        assert (target / "run.sh").stat().st_mode & 0o100 == mode
    plain.download(work / "out-1")  # back again: the bytes are equal, the bit is not
    assert not os.access(work / "out-1" / "run.sh", os.X_OK)
