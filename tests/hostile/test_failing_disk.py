"""The disk is full, or fails, at each call in turn: what was acknowledged is there, and what is there is whole."""

from __future__ import annotations

import errno
import importlib
import os
import random
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing_disk import FailingDisk

import mandapa
from mandapa import CheckpointSaver, Run
from mandapa.content.cache import ChunkCache
from mandapa.content.index import Index
from mandapa.digest import digest
from mandapa.errors import AccessDeniedError, StorageError
from mandapa.loggers import FileLogger, ObjectStoreLogger, TensorboardLogger
from mandapa.object_store import LocalObjectStore
from mandapa.repository.shelf import Shelf
from mandapa.run.directory import RunDirectory, read_json, write_json
from mandapa.run.journal import ENTRIES, CommitEntry, Journal, JournalReader
from mandapa.run.staging import Staging

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="paths of descriptors are read from /proc")

CODES = [errno.ENOSPC, errno.EIO]
FILES = {"a": b"1" * 5000, "b/c": b"", "b/d": bytes(range(256)) * 50, "b/run.sh": b"#!/bin/sh\n"}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def each_call(place: Path, act: Callable[[], object], code: int, **options: Any) -> Iterator[tuple[FailingDisk, Any]]:
    """Do something once for each call that it makes below ``place``, that one failing; gives the error, or None.

    What is checked of it, and cleaned up, is the caller's business, before it asks for the next.
    """
    at = 0
    while True:
        error: BaseException | None = None
        with FailingDisk(str(place), at=at, code=code, **options) as disk:
            try:
                act()
            except Exception as found:
                error = found
        if not disk.failed:
            assert error is None
            assert at > 0, "it makes no call at all"
            return
        yield disk, error
        at += 1
        assert at < 500


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> mandapa.Version:
    repo = mandapa.open("memory://failing-disk", create=True)
    with repo.artifact("net").transaction() as txn:
        for path, data in FILES.items():
            txn.add_bytes(path, data)
    return repo["net"]


@pytest.mark.parametrize("code", CODES)
def test_a_restore_leaves_whole_files_only(version: mandapa.Version, place: Path, code: int) -> None:
    """And says that the disk fails; the next one completes it, and leaves nothing else behind."""
    out = place / "out"
    failures = 0
    for disk, error in each_call(out, lambda: version.download(out), code, all_threads=True):
        # Whether names are told apart is tried with a file of its own, and places in time are only hints.
        if error is None:
            assert disk.calls[disk.at].endswith("A\u00e9.tmp")
        else:
            failures += 1
            assert isinstance(error, StorageError | AccessDeniedError), (disk.calls[disk.at], error)
            assert os.strerror(code) in str(error)
        found = tree(out) if out.exists() else {}
        assert {path: FILES.get(path) for path in found} == found
        version.download(out)
        assert tree(out) == FILES
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        out.rmdir()
    assert failures > 8


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("verb", ["put", "create"])
def test_a_store_in_a_folder_has_whole_objects_only(place: Path, code: int, verb: str) -> None:
    """After an error the object is whole or absent, and nothing else is left; what was acknowledged is there."""
    folder = place / "store"
    data = os.urandom(5000)

    def write() -> None:
        getattr(LocalObjectStore(folder), verb)("packs/0a", data)

    for disk, error in each_call(folder, write, code):
        assert isinstance(error, StorageError), (disk.calls[disk.at], error)
        store = LocalObjectStore(folder)
        found = [info.key for info in store.list("")]
        assert found in ([], ["packs/0a"])
        assert not found or store.get("packs/0a") == data
        assert not (folder / ".tmp").exists() or os.listdir(folder / ".tmp") == []
        store.delete(["packs/0a"])


@pytest.mark.parametrize("code", CODES)
def test_a_cache_never_fails_and_never_lies(place: Path, code: int) -> None:
    """A chunk is there, right, or it is not; and when there is room, it is."""
    folder = place / "chunks"
    rng = random.Random(3)
    chunks: list[bytes] = []
    now = [1e9]

    def put() -> None:
        now[0] += 1000  # the pause after a failure is over
        chunks.append(rng.randbytes(70_000))
        ChunkCache(folder, 1 << 30, clock=lambda: now[0]).put(digest(chunks[-1]), chunks[-1])

    for _, error in each_call(folder, put, code):
        assert error is None
        cache = ChunkCache(folder, 1 << 30)
        assert cache.get(digest(chunks[-1])) in (None, chunks[-1])
        assert list(folder.rglob("*.tmp")) == []
    assert ChunkCache(folder, 1 << 30).get(digest(chunks[-1])) == chunks[-1]


@pytest.mark.parametrize("code", CODES)
def test_the_directory_of_a_run_is_made_or_not(place: Path, code: int) -> None:
    """An error that names the disk, and the next start makes it."""
    for disk, error in each_call(place / "net", lambda: RunDirectory(str(place / "net"), "net"), code):
        assert isinstance(error, StorageError), (disk.calls[disk.at], error)
        assert RunDirectory(str(place / "net"), "net").name == "net"
        for path in sorted((place / "net").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (place / "net").rmdir()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("way", ["copy", "move", "link", "bytes", "folder", "folder move", "grow"])
def test_what_cannot_be_owned_is_left_as_it_was(place: Path, code: int, way: str) -> None:
    """Nothing is staged, and nothing is taken away from where it was; or it is staged, whole."""
    directory = RunDirectory(str(place / "net"), "net")
    staging = Staging(directory, 0, 1)
    source = place / "source"
    (source / "b").mkdir(parents=True)

    wanted = FILES.values() if way.startswith("folder") else [FILES["a"]]

    def make() -> None:
        for path, data in FILES.items():
            (source / path).write_bytes(data)

    def take() -> tuple[str, int]:
        make()
        match way:
            case "bytes":
                return staging.take_bytes(FILES["a"])
            case "grow":
                return staging.grow(str(source / "a"))
            case "folder" | "folder move":
                return staging.take_folder(str(source), "move" if way.endswith("move") else "copy")
        return staging.take(str(source / "a"), way)  # type: ignore[arg-type]

    for disk, error in each_call(Path(directory.staged), take, code):
        if error is None:  # it was copied where there was no link, written where nothing was sent, or is on its own
            assert disk.calls[disk.at].split()[0] in ("link", "sendfile"), disk.calls
            staged = tree(Path(directory.staged)).items()
            assert sorted(data for _, data in staged) == ([] if way == "grow" else sorted(wanted))
            shutil.rmtree(directory.staged)
            os.mkdir(directory.staged)
            continue
        assert isinstance(error, StorageError), (disk.calls[disk.at], error)
        assert error.retryable == (code == errno.ENOSPC)
        assert os.listdir(directory.staged) == []
        assert tree(source) == FILES


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("durable", [False, True])
def test_a_journal_keeps_what_it_acknowledged(place: Path, code: int, lasting: bool, durable: bool) -> None:
    """With a failure at each call: lines that were acknowledged are read back, each once, whatever failed."""
    path = place / "rank0.journal"
    journal = Journal(str(path), ENTRIES)
    acknowledged: list[int] = []
    failures = 0

    def append() -> None:
        entry = CommitEntry(n=journal.last + 1, time="now", attempt=1)
        journal.append(entry, durable=durable)
        acknowledged.append(entry.n)

    for _ in range(3):
        append()
        for _, error in each_call(path, append, code, lasting=lasting):
            assert isinstance(error, StorageError)
            failures += 1
            append()
    journal.close()
    assert failures >= 3
    reader = JournalReader(str(path), ENTRIES)
    read = [entry.n for entry in reader.new()]
    assert set(acknowledged) <= set(read)
    assert read == sorted(set(read))
    assert Journal(str(path), ENTRIES).last >= max(acknowledged)


@pytest.mark.parametrize("code", CODES)
def test_small_files_are_the_old_or_the_new(place: Path, code: int) -> None:
    """Never half, and nothing beside them."""
    path = place / "status.json"
    write_json(str(path), {"n": 0})
    count = [0]

    def write() -> None:
        count[0] += 1
        write_json(str(path), {"n": count[0], "more": "x" * 5000}, durable=True)

    for _, error in each_call(path, write, code):
        assert isinstance(error, OSError)
        assert read_json(str(path))["n"] in (0, *range(count[0] + 1))
        assert os.listdir(place) == ["status.json"]


class Script:
    """What a training does in one step; notes what was taken over."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        self.folder = folder
        self.held: dict[str, bytes] = {}
        self.saved: list[int] = []
        self.told = 0

    def step(self, n: int) -> None:
        data = f"step {n}\n".encode() * 200
        source = self.folder / f"source-{n}"
        (source / "in").mkdir(parents=True)
        (source / "in" / "x").write_bytes(data)
        (source / "moved").write_bytes(data)
        self._take(f"{n}/bytes", data, lambda: self.run.log_bytes(f"{n}/bytes", data))
        self._take(f"{n}/copy", data, lambda: self.run.log_asset(source / "in" / "x", at=f"{n}/copy"))
        self._take(f"{n}/folder/x", data, lambda: self.run.log_asset(source / "in", at=f"{n}/folder"))
        self._take(f"{n}/moved", data, lambda: self.run.log_asset(source / "moved", at=f"{n}/moved", take="move"))
        # Nobody else has what was moved: it is where it was, or among what is staged.
        kept = [source / "moved", *Path(self.run.dir, ".run", "staged").glob("*.moved")]
        assert f"{n}/moved" in self.held or data in [path.read_bytes() for path in kept if path.exists()]
        self._do(lambda: self.run.log_metrics({"loss": float(n)}, step=n))
        self._do(lambda: self.run.log_hparams({"count": n}))
        saved = self._do(lambda: self.run.save_checkpoint({"w": np.full(10, n)}, step=n))
        if saved is not None and saved.state != "skipped":
            self.saved.append(n)
        self._do(lambda: self.run.flush(0))

    def _take(self, path: str, data: bytes, call: Callable[[], Any]) -> None:
        handle = self._do(call)
        if handle is not None and handle.state != "skipped":
            self.held[path] = data

    def _do(self, call: Callable[[], Any]) -> Any:
        """What a call gives. A disk that fails is told by the call, as documented; one that is full only warns."""
        try:
            return call()
        except StorageError as error:
            if os.strerror(errno.EIO) not in str(error):
                raise
            self.told += 1
            return None


@pytest.mark.parametrize("code", CODES)
def test_a_training_goes_on_and_all_that_it_handed_over_arrives(place: Path, tmp_path: Path, code: int) -> None:
    """At each call that the trainer makes in the run's directory: what was held is in the version, and no other."""
    loggers = [
        CheckpointSaver(format="safetensors"),
        FileLogger(capture_stdout=False, capture_stderr=False),
        TensorboardLogger(),
        ObjectStoreLogger(place / "repo"),
    ]
    run = Run("net", {"lr": 1}, loggers=loggers, dir=place)
    script = Script(run, tmp_path)
    n = 0

    def step() -> None:
        nonlocal n
        n += 1
        script.step(n)

    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for disk, error in each_call(Path(run.dir), step, code):
            assert error is None, disk.calls[disk.at]
            calls = len(disk.calls)
    assert calls > 20
    assert len(caught) + script.told > 5  # each is said once
    assert (script.told > 0) == (code == errno.EIO)
    step()
    assert {f"{n}/{name}" for name in ("bytes", "copy", "folder/x", "moved")} <= script.held.keys()
    assert script.saved[-1] == n  # there is room again
    assert run.flush(60)
    run.close()
    artifact = mandapa.open(place / "repo").artifact("net")
    version = artifact.versions()[-1]
    found = {path: version.open(path).read() for path in script.held if path in version.assets}
    assert found == script.held
    assert {one.metadata["step"] for one in artifact.versions() if "step" in one.metadata} == set(script.saved)
    assert b"count: %d" % n in version.open("hparams.yaml").read()


UPLOADER = """
import os, sys
sys.path.insert(0, {here!r})
from failing_disk import FailingDisk
from mandapa.object_store import LocalObjectStore


class FailingObjectStore(LocalObjectStore):
    pass


if sys.argv[0].endswith("uploader.py") and not os.path.exists({healed!r}):
    FailingDisk({inner!r}, at={at}, code={code}, all_threads=True, mark={mark!r}).__enter__()
"""


@pytest.mark.parametrize(("at", "code"), [(at, CODES[at % 2]) for at in (0, 1, 4, 7, 10)])
def test_an_uploader_whose_disk_fails_once_loses_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, code: int
) -> None:
    """At one of its own calls in the run's directory: all is committed, by it, or by the next one."""
    module = f"failing_stores_{at}_{code}_{os.getpid()}"
    here, inner, healed = str(Path(__file__).parent), str(place / "net" / ".run"), str(tmp_path / "healed")
    mark = str(tmp_path / "failed")
    (tmp_path / f"{module}.py").write_text(
        UPLOADER.format(here=here, inner=inner, healed=healed, at=at, code=int(code), mark=mark)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    store = importlib.import_module(module).FailingObjectStore

    def start() -> Run:
        logger = ObjectStoreLogger(object_store_cls=store, object_store_kwargs={"path": str(place / "repo")})
        return Run("net", loggers=[logger, CheckpointSaver(format="safetensors")], dir=place)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = start()
        script = Script(run, tmp_path)
        script.step(1)
        script.step(2)
        committed = run.flush(20)
        run.close(20)
        assert os.path.exists(mark)
        if not committed:
            Path(healed).touch()
            with start() as run:
                assert run.flush(60)
    version = mandapa.open(place / "repo")["net"]
    assert len(script.held) == 8
    assert {path: version.open(path).read() for path in script.held} == script.held


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 2 MB in memory."""
    disk = place / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True, timeout=20)


def test_what_is_kept_on_a_full_disk_is_right_or_not_there(small_disk: Path, tmp_path: Path) -> None:
    """Databases of SQLite, which no call of ours writes: full in the middle, they answer right or not at all."""
    file = tmp_path / "file"
    file.write_bytes(b"x")
    found = file.stat()
    rng = random.Random(5)
    index, shelf = Index(small_disk, repository="r", url="u"), Shelf(small_disk, "nodes", repository="r", url="u")
    index.remember_file(str(file), found, digest(b"first"), found.st_ctime_ns + 10**12)
    index.flush()
    shelf.write(shelf.read(), {b"first": b"1" * 1000})
    rows: dict[bytes, bytes] = {b"first": b"1" * 1000}
    for n in range(60):
        more = {rng.randbytes(16): rng.randbytes(100_000) for _ in range(2)}
        rows |= more
        shelf.write(shelf.read(), more)
        for at in range(1000):
            index.remember_file(f"/{n}/{at}/{'x' * 50}", found, digest(b"more"), found.st_ctime_ns + 10**12)
        index.flush()
        kept = shelf.read().rows
        assert {key: rows[key] for key in kept} == kept
        assert index.known_file(str(file), found) in (None, digest(b"first"))
    assert os.statvfs(small_disk).f_bavail < 500  # of 4 KiB: it is full
    index.close()
    for path in small_disk.iterdir():
        path.unlink()
    index = Index(small_disk, repository="r", url="u")
    index.remember_file(str(file), found, digest(b"again"), found.st_ctime_ns + 10**12)
    index.close()
    assert Index(small_disk, repository="r", url="u").known_file(str(file), found) == digest(b"again")


def test_a_chunk_on_a_full_disk_is_not_kept(small_disk: Path) -> None:
    """Not half of it either; and when there is room, it is."""
    now = [1e9]
    (small_disk / "filler").write_bytes(bytes(1 << 20))
    cache = ChunkCache(small_disk / "chunks", 1 << 30, clock=lambda: now[0])
    chunk = os.urandom(600_000)
    for _ in range(3):
        cache.put(digest(chunk), chunk)
        assert cache.get(digest(chunk)) in (None, chunk)
        now[0] += 1000
    (small_disk / "filler").unlink()
    small = os.urandom(70_000)
    ChunkCache(small_disk / "other", 1 << 23, clock=lambda: now[0]).put(digest(small), small)
    assert list((small_disk / "chunks").rglob("*.tmp")) == []
