"""A local directory: durable, whole or not at all, and tidy."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mandapa.errors import AccessDeniedError, AlreadyExistsError, NotFoundError, StorageError
from mandapa.object_store import LocalObjectStore


@pytest.fixture
def store(tmp_path: Path) -> LocalObjectStore:
    return LocalObjectStore(tmp_path)


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def temp_files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".tmp").iterdir())


def test_an_object_is_a_file(store: LocalObjectStore, tmp_path: Path) -> None:
    """At the path that its key spells, with its bytes; nothing else stays."""
    store.put("packs/0a", b"bytes")
    assert (tmp_path / "packs/0a").read_bytes() == b"bytes"
    assert temp_files(tmp_path) == []


def test_url_and_repr(tmp_path: Path) -> None:
    assert LocalObjectStore(tmp_path / "a b").url == f"file://{tmp_path}/a%20b"
    assert repr(LocalObjectStore("/x", fsync=False)) == "LocalObjectStore('/x', fsync=False)"


def test_relative_path_is_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing the working directory later does not move the store."""
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    store = LocalObjectStore("root")
    monkeypatch.chdir(tmp_path)
    store.put("x", b"1")
    assert (tmp_path / "a/root/x").read_bytes() == b"1"


def test_missing_root(tmp_path: Path) -> None:
    """Reading from a directory that is not there finds nothing and makes nothing; the first write makes it."""
    root = tmp_path / "not/yet"
    store = LocalObjectStore(root)
    with pytest.raises(NotFoundError):
        store.get("a")
    assert list(store.list("")) == []
    store.delete(["a"])
    assert not root.exists()
    store.create("a", b"1")
    assert store.get("a") == b"1"


@pytest.mark.parametrize("verb", ["put", "create"])
def test_order_of_durability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """The bytes are fsynced before they get their name, the name before the call returns, new folders before both."""
    trace = []
    real_fsync, real_link, real_replace = os.fsync, os.link, os.replace

    def fsync(fd: int) -> None:
        trace.append(os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(tmp_path)).partition(".tmp/")[0] or "/")
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", lambda *a: (trace.append("named"), real_link(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (trace.append("named"), real_replace(*a)))
    store = LocalObjectStore(tmp_path / "store")
    getattr(store, verb)("log/a/0", b"1")
    file = "/store/"
    assert trace == [file, "/", "/store", "/store/log", "named", "/store/log/a"]
    trace.clear()
    getattr(store, verb)("log/a/1", b"1")
    assert trace == [file, "named", "/store/log/a"]
    trace.clear()
    store.delete(["log/a/0"])
    assert trace == ["/store/log/a"]
    trace.clear()
    getattr(LocalObjectStore(tmp_path / "store", fsync=False), verb)("log/a/2", b"1")
    assert trace == ["named"]


@pytest.mark.parametrize(
    ("number", "advice", "error"),
    [
        (errno.ENOSPC, "disk is full", StorageError),
        (errno.EDQUOT, "quota", StorageError),
        (errno.EIO, "disk reports a failure", StorageError),
        (errno.EROFS, "read-only", AccessDeniedError),
        (errno.EACCES, "permission denied", AccessDeniedError),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "open"])
def test_failed_write(
    store: LocalObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    advice: str,
    error: type[StorageError],
    call: str,
) -> None:
    """The message says what to do, the old object stands, and nothing is left in the way."""
    store.put("a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        with pytest.raises(error, match=advice) as caught:
            store.put("a", b"new")
        with pytest.raises(error, match=advice):
            store.create("b", b"new")
        assert not caught.value.retryable
    assert store.get("a") == b"old"
    assert [info.key for info in store.list("")] == ["a"]
    assert temp_files(tmp_path) == []


def test_passing_failure_is_retryable(store: LocalObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files, or a network file system that lost its server for a moment."""
    store.put("a", b"1")
    monkeypatch.setattr(os, "open", failing(errno.ESTALE))
    with pytest.raises(StorageError) as caught:
        store.get("a")
    assert caught.value.retryable


def test_no_hard_links(store: LocalObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without them cannot create-if-absent, and says so; put works."""
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    with pytest.raises(StorageError, match="no hard links"):
        store.create("a", b"1")
    store.put("a", b"1")


def test_short_writes_are_completed(store: LocalObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take fewer bytes than offered."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:1000]))
    data = os.urandom(10_001)
    store.put("a", data)
    assert store.get("a") == data


def test_short_reads_are_completed(store: LocalObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give fewer bytes than asked for."""
    data = os.urandom(10_001)
    store.put("a", data)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, 1000), offset))
    assert store.get("a") == data
    assert store.get_ranges("a", [(1, 5000)]) == [data[1:5001]]


@pytest.mark.parametrize("verb", ["put", "create"])
def test_interrupt_leaves_nothing(
    store: LocalObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Ctrl-C in the middle of a write."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            getattr(store, verb)("a", b"1")
    assert temp_files(tmp_path) == []
    getattr(store, verb)("a", b"1")


@pytest.mark.parametrize(("verb", "call"), [("put", "replace"), ("create", "link")])
def test_killed_writer_leaves_no_object(store: LocalObjectStore, tmp_path: Path, verb: str, call: str) -> None:
    """A kill -9 between the bytes and the name: no object; the leftover goes a day later, a younger one stays."""
    script = (
        "import os, signal, sys; from mandapa.object_store import LocalObjectStore\n"
        f"os.{call} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"LocalObjectStore(sys.argv[1]).{verb}('a/b', b'1')\n"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
        assert done.returncode == -signal.SIGKILL
    assert list(store.list("")) == []
    old, young = temp_files(tmp_path)
    two_days_ago = time.time() - 2 * 86_400
    os.utime(tmp_path / ".tmp" / old, (two_days_ago, two_days_ago))
    store.create("a/b", b"2")
    assert temp_files(tmp_path) == [young]


def test_temp_folder_may_go(store: LocalObjectStore, tmp_path: Path) -> None:
    """Somebody who tidies up does not break a running writer."""
    store.put("a", b"1")
    (tmp_path / ".tmp").rmdir()
    store.put("a", b"2")
    assert store.get("a") == b"2"


def test_root_may_go(tmp_path: Path) -> None:
    """A root that was removed is made again."""
    store = LocalObjectStore(tmp_path / "root")
    store.put("a/b", b"1")
    subprocess.run(["rm", "-r", str(tmp_path / "root")], check=True)
    store.create("a/b", b"2")
    assert store.get("a/b") == b"2"


def test_foreign_files_are_no_objects(store: LocalObjectStore, tmp_path: Path) -> None:
    """What systems and people drop into folders is not listed."""
    store.put("a/b", b"1")
    for name in (".DS_Store", "README.md", "lost+found", "a/.nfs0001", "a/~b"):
        (tmp_path / name).write_bytes(b"x")
    assert [info.key for info in store.list("")] == ["a/b"]


def test_links_are_no_objects(store: LocalObjectStore, tmp_path: Path) -> None:
    """Not read, not listed, not written through; a loop of them is harmless."""
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"untouched")
    store.put("a/b", b"1")
    (tmp_path / "link").symlink_to(outside / "file")
    (tmp_path / "folder").symlink_to(outside)
    (tmp_path / "a/loop").symlink_to(tmp_path)
    assert [info.key for info in store.list("")] == ["a/b"]
    for call in (store.get, store.head):
        with pytest.raises(NotFoundError):
            call("link")
    with pytest.raises(AlreadyExistsError):
        store.create("link", b"2")
    store.put("link", b"2")
    assert store.get("link") == b"2"
    assert (outside / "file").read_bytes() == b"untouched"


def test_pipes_are_no_objects(store: LocalObjectStore, tmp_path: Path) -> None:
    """A reader is told at once, and does not wait for somebody to write into one."""
    store.put("a/b", b"")
    os.mkfifo(tmp_path / "a/pipe")
    for read in (store.get, store.head, lambda key: store.get_ranges(key, [(0, 1)])):
        with pytest.raises(NotFoundError, match="no object"):
            read("a/pipe")


def test_no_key_is_the_folder_of_another(store: LocalObjectStore) -> None:
    """What a file system cannot hold is an error that says so, and not a retryable one."""
    store.put("a", b"1")
    store.put("b/c", b"1")
    for key in ("a/b", "b"):
        with pytest.raises(StorageError, match="no key is the folder of another") as caught:
            store.put(key, b"2")
        assert not caught.value.retryable
    assert store.get("a") == b"1"
    assert store.get("b/c") == b"1"


def test_root_is_a_file(tmp_path: Path) -> None:
    """An error that says so; there is nothing to read."""
    (tmp_path / "file").write_bytes(b"x")
    store = LocalObjectStore(tmp_path / "file")
    for call in (store.put, store.create):
        with pytest.raises(StorageError, match="a file stands where a directory is needed"):
            call("a", b"1")
    with pytest.raises(NotFoundError):
        store.get("a")
    assert list(store.list("")) == []


def test_vanishing_while_listed(store: LocalObjectStore) -> None:
    """An object or a folder that goes during a list is left out."""
    for key in ("a/0", "a/1", "a/2", "b/0", "c"):
        store.put(key, b"1")
    listing = store.list("")
    assert next(listing).key == "a/0"
    store.delete(["a/1", "b/0"])
    assert [info.key for info in listing] == ["a/2", "c"]


def test_skipped_objects_cost_no_stat(store: LocalObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that starts near the end looks only at the names of what is in front."""
    for number in range(50):
        store.put(f"log/{number:03}", b"1")
    stats = []

    class Entry:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self._entry = entry
            self.name = entry.name
            self.is_dir, self.is_symlink = entry.is_dir, entry.is_symlink

        def stat(self, *, follow_symlinks: bool) -> os.stat_result:
            stats.append(self.name)
            return self._entry.stat(follow_symlinks=follow_symlinks)

    class Scan:
        def __init__(self, path: str) -> None:
            self._entries = real(path)

        def __enter__(self) -> "Scan":
            return self

        def __exit__(self, *_: object) -> None:
            self._entries.close()

        def __iter__(self) -> Any:
            return map(Entry, self._entries)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", Scan)
    assert [info.key for info in store.list("log/", start_after="log/047")] == ["log/048", "log/049"]
    assert stats == ["048", "049"]


def test_delete_takes_emptied_folders_along(store: LocalObjectStore, tmp_path: Path) -> None:
    """But not the root, and not a folder that has other objects."""
    store.put("tx/a/0", b"1")
    store.put("tx/b/0", b"1")
    store.delete(["tx/a/0"])
    assert sorted(path.name for path in (tmp_path / "tx").iterdir()) == ["b"]
    store.delete(["tx/b/0"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp"]


def test_writes_race_with_deletes(store: LocalObjectStore) -> None:
    """A folder that is taken away under a writer is made again: nothing that was acknowledged is lost."""

    def work(number: int) -> None:
        for step in range(100):
            key = f"tx/{step % 3}/{number}"
            store.put(key, b"1")
            assert store.get(key) == b"1"
            store.delete([key])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert list(store.list("")) == []


_RACE = """
import os, sys
from mandapa.errors import AlreadyExistsError
from mandapa.object_store import LocalObjectStore
store = LocalObjectStore(sys.argv[1])
store.put("before/fork", b"1")
children = []
for racer in range(6):
    child = os.fork()
    if child == 0:
        won = 0
        for number in range(50):
            try:
                store.create(f"log/{number}", b"%d" % racer)
                store.put(f"won/{racer}/{number}", b"")
            except AlreadyExistsError:
                pass
        os._exit(0)
    children.append(child)
assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)
"""


def test_forked_processes_race(store: LocalObjectStore, tmp_path: Path) -> None:
    """Forked children of a process that used the store go on using it; each key is won exactly once, by its bytes."""
    subprocess.run([sys.executable, "-c", _RACE, str(tmp_path)], check=True, timeout=60)
    wins = [info.key.split("/")[1:] for info in store.list("won/")]
    assert sorted(int(number) for _, number in wins) == list(range(50))
    for racer, number in wins:
        assert store.get(f"log/{number}") == racer.encode()


def test_pickle(store: LocalObjectStore, tmp_path: Path) -> None:
    """A copy in another process is the same store."""
    store.put("a", b"1")
    copy = pickle.loads(pickle.dumps(LocalObjectStore(tmp_path, fsync=False)))
    assert copy.get("a") == b"1"
    assert repr(copy) == f"LocalObjectStore({str(tmp_path)!r}, fsync=False)"
