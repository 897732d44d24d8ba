"""The directory of a run: one run's and one user's, of a format that is known; and who is at work in it."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mandapa.errors import (
    ConflictError,
    FormatVersionError,
    InvalidInputError,
    NotFoundError,
    SecurityError,
    StorageError,
)
from mandapa.run import directory as module
from mandapa.run.directory import Lock, RunDirectory, read_json, write_json

STRANGER = 54_321
"""The id of a user that is not the tests'."""


class Other:
    """Another process, which takes locks when it is told to."""

    PROGRAM = """
import sys
from mandapa.run.directory import Lock
for line in sys.stdin:
    act, path = line.rstrip("\\n").split(" ", 1)
    print(getattr(Lock(path), act)(), flush=True)
"""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", self.PROGRAM], stdin=pipe, stdout=pipe, text=True)
        self.pid = self.process.pid

    def __call__(self, act: str, path: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{act} {path}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()


@pytest.fixture(scope="module")
def other() -> Iterator[Other]:
    process = Other()
    yield process
    process.kill()


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def mode(path: str | Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


# -- made and opened ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_nobody_else_may_look_into_it(tmp_path: Path, umask: int) -> None:
    """Whatever the umask is, and also when its folder was there already."""
    (tmp_path / "old").mkdir(mode=0o755)
    before = os.umask(umask)
    try:
        for folder in ("runs/new", "old"):
            found = RunDirectory(tmp_path / folder, "net")
            assert mode(found.path) == 0o700
            for path in Path(found.path).rglob("*"):
                assert not mode(path) & 0o077, path
    finally:
        os.umask(before)


def test_it_says_whose_it_is(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "net", "net")
    assert json.loads((tmp_path / "net/.run/format.json").read_bytes()) == {"format": 1, "run": "net"}
    assert RunDirectory(tmp_path / "net").name == "net"
    assert RunDirectory(tmp_path / "net", "net").name == "net"


def test_where_it_is_does_not_change_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = RunDirectory("net", "net")
    monkeypatch.chdir("/")
    assert found.path == str(tmp_path / "net")
    assert os.path.isdir(found.staged)


def test_paths_of_entries_move_with_it(tmp_path: Path) -> None:
    """Those inside are relative; a folder whose name begins alike is not inside."""
    found = RunDirectory(tmp_path / "net", "net")
    inside = os.path.join(found.staged, "1-0-1")
    assert found.relative(inside) == ".run/staged/1-0-1"
    assert found.source(found.relative(inside)) == inside
    for outside in (f"{found.path}-2/a", "/else/where"):
        assert found.relative(outside) == outside
        assert found.source(outside) == outside


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../net", "-net", "a b", "ü", "a\0", "n" * 129, 5, None])
def test_names_that_no_run_can_have(tmp_path: Path, name: Any) -> None:
    """Nothing is made."""
    with pytest.raises(InvalidInputError):
        RunDirectory(tmp_path / "net", name)
    assert entries(tmp_path) == set()


# -- not ours ----------------------------------------------------------------------------------------------------------


def test_the_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "net", "first")
    with pytest.raises(InvalidInputError, match="directory of the run 'first': use another dir="):
        RunDirectory(tmp_path / "net", "second")
    assert RunDirectory(tmp_path / "net").name == "first"


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "net/.run/format.json"
    RunDirectory(tmp_path / "net", "net")
    marker.write_text('{"format": 2, "run": "net", "more": []}')
    for name in (None, "net"):
        with pytest.raises(FormatVersionError, match="format 2; this mandapa reads format 1"):
            RunDirectory(tmp_path / "net", name)
    assert marker.read_text() == '{"format": 2, "run": "net", "more": []}'


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"{}", b'{"format": 1}', b'{"format": "1", "run": "net"}', b"\xff", b"[" * 5000,
     b'{"format": 1, "run": 5}', b'{"format": 1, "run": "../net"}', b'{"format": 1, "run": "net"} x'],
)  # fmt: skip
def test_a_marker_that_we_did_not_write_is_refused(tmp_path: Path, content: bytes) -> None:
    """And left as it is."""
    RunDirectory(tmp_path / "net", "net")
    marker = tmp_path / "net/.run/format.json"
    marker.write_bytes(content)
    for name in (None, "net"):
        with pytest.raises(InvalidInputError):
            RunDirectory(tmp_path / "net", name)
    assert marker.read_bytes() == content


def test_a_marker_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "net", "net")
    marker = tmp_path / "net/.run/format.json"
    marker.unlink()
    marker.mkdir()
    with pytest.raises(StorageError, match=r"format\.json cannot be read"):
        RunDirectory(tmp_path / "net", "net")


def test_a_folder_without_a_run_is_none(tmp_path: Path) -> None:
    """Looking makes nothing."""
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(InvalidInputError, match="is not the directory of a run"):
            RunDirectory(path)
    assert entries(tmp_path) == {"empty"}


@pytest.mark.parametrize("at", ["net", "net/.run", "net/.run/staged", "net/.run/commits", "parent"])
def test_a_file_in_the_way_is_named(tmp_path: Path, at: str) -> None:
    """And stays."""
    way = tmp_path / at
    way.parent.mkdir(parents=True, exist_ok=True)
    way.write_bytes(b"mine")
    path = tmp_path / ("parent/net" if at == "parent" else "net")
    with pytest.raises((StorageError, InvalidInputError), match="net"):
        RunDirectory(path, "net")
    assert way.read_bytes() == b"mine"


@pytest.mark.parametrize("at", ["net", "net/.run"])
def test_a_link_is_not_followed(tmp_path: Path, at: str) -> None:
    """Whoever made it could lead it elsewhere later."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / at).parent.mkdir(exist_ok=True)
    (tmp_path / at).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInputError, match="is not a folder: use another dir="):
        RunDirectory(tmp_path / "net", "net")
    assert entries(tmp_path / "elsewhere") == set()


def test_the_folder_of_all_runs_may_be_a_link(tmp_path: Path) -> None:
    """To a larger disk, say."""
    (tmp_path / "large").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "large")
    assert RunDirectory(tmp_path / "runs/net", "net").name == "net"
    assert (tmp_path / "large/net/.run/format.json").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")
@pytest.mark.parametrize("at", ["net", "net/.run"])
def test_the_directory_of_another_user_is_refused(tmp_path: Path, at: str) -> None:
    """He could read and change what the run writes. Nothing is made in it, and its mode stays."""
    RunDirectory(tmp_path / "net", "net")
    os.chown(tmp_path / at, STRANGER, -1)
    (tmp_path / at).chmod(0o755)
    before = entries(tmp_path)
    for name in (None, "net"):
        with pytest.raises(SecurityError, match=rf"belongs to another user \(uid {STRANGER}\)"):
            RunDirectory(tmp_path / "net", name)
    assert entries(tmp_path) == before
    assert mode(tmp_path / at) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")
def test_nothing_is_made_in_the_folder_of_another_user(tmp_path: Path) -> None:
    """An empty one, as in a shared /tmp."""
    (tmp_path / "net").mkdir()
    os.chown(tmp_path / "net", STRANGER, -1)
    with pytest.raises(SecurityError):
        RunDirectory(tmp_path / "net", "net")
    assert entries(tmp_path) == {"net"}


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG])
def test_what_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*given: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StorageError, match=os.strerror(code)):
        RunDirectory(tmp_path / "runs/net", "net")


def test_a_full_disk_makes_no_half_directory(tmp_path: Path) -> None:
    """When there is room again, the same call makes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, before[1]))
    try:
        with pytest.raises(StorageError, match="cannot be made"):
            RunDirectory(tmp_path / "net", "net")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert RunDirectory(tmp_path / "net", "net").name == "net"
    assert [path.name for path in (tmp_path / "net/.run").iterdir() if path.is_file()] == ["format.json"]


# -- found -------------------------------------------------------------------------------------------------------------


def test_runs_are_found(tmp_path: Path) -> None:
    """One by its folder, or all in a folder, by name; other things in it are no runs."""
    for name in ("b", "a", "c"):
        RunDirectory(tmp_path / "runs" / name, name)
    (tmp_path / "runs/other/.run").mkdir(parents=True)
    (tmp_path / "runs/file").write_bytes(b"")
    (tmp_path / "runs/dangling").symlink_to("nowhere")
    assert [run.name for run in RunDirectory.find(str(tmp_path / "runs"))] == ["a", "b", "c"]
    assert [run.name for run in RunDirectory.find(str(tmp_path / "runs/b"))] == ["b"]


def test_no_runs_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder/deep/net").mkdir(parents=True)
    for path in ("", "file", "folder", "missing", "missing/below"):
        with pytest.raises(NotFoundError, match="holds no run"):
            RunDirectory.find(str(tmp_path / path))


def test_a_run_that_cannot_be_looked_at_is_told_and_not_left_out(tmp_path: Path) -> None:
    """Whoever asks whether a machine may go must not hear of the others only."""
    for name in ("a", "b"):
        RunDirectory(tmp_path / name, name)
    (tmp_path / "a/.run/format.json").write_text('{"format": 2, "run": "a"}')
    with pytest.raises(FormatVersionError):
        RunDirectory.find(str(tmp_path))


def test_a_run_whose_disk_fails_is_told_and_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunDirectory(tmp_path / "a", "a")

    def fail(self: RunDirectory, name: str | None) -> str:
        raise StorageError("the marker cannot be read: Input/output error")

    monkeypatch.setattr(RunDirectory, "_check", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        RunDirectory.find(str(tmp_path))


def test_ranks_are_those_that_have_trained_here(tmp_path: Path) -> None:
    found = RunDirectory(tmp_path / "net", "net")
    assert found.ranks() == []
    for rank in (10, 0, 2):
        found.take_rank(rank).release()
    for stranger in ("rank.lock", "rankx.lock", "rank-1.lock", "rank1.lock.tmp", "rank12345678.lock", "xrank3.lock"):
        Path(found.inner, stranger).write_bytes(b"")
    assert found.ranks() == [0, 2, 10]


# -- locks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "rank0.lock")


def test_a_lock_has_one_holder(path: str, other: Other) -> None:
    """Of all processes, this one included; who asks does not take it away."""
    lock = Lock(path)
    assert not lock.held()
    assert lock.take()
    for _ in range(2):
        assert lock.held()
        assert Lock(path).held()
        assert not Lock(path).take()
        assert other("held", path) == "True"
        assert other("take", path) == "False"
        assert other("holder", path) == f"{os.getpid()} {os.uname().nodename}"
    lock.release()
    lock.release()
    assert other("held", path) == "False"
    assert other("take", path) == "True"
    assert lock.held()
    assert not lock.take()
    assert not lock.take(patience=0.05)
    assert lock.holder().split()[0] == str(other.pid)
    other("release", path)
    assert lock.take()
    lock.release()


def test_who_does_not_have_a_lock_cannot_give_it_up(path: str, other: Other) -> None:
    other("take", path)
    Lock(path).release()
    assert other("held", path) == "True"
    assert Lock(path).held()
    other("release", path)


def test_a_lock_ends_with_its_process(path: str) -> None:
    """However that ends."""
    other = Other()
    other("take", path)
    assert Lock(path).held()
    other.kill()
    assert not Lock(path).held()
    lock = Lock(path)
    assert lock.take()
    assert lock.holder().split()[0] == str(os.getpid())
    lock.release()


def test_a_child_does_not_inherit_a_lock(path: str, other: Other) -> None:
    """Started or forked, it neither keeps it nor gives it up when it ends."""
    lock = Lock(path)
    assert lock.take()
    program = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, close_fds=False) as child:
        subprocess.run(["true"], check=True, close_fds=False)
        assert other("held", path) == "True"
        lock.release()
        assert other("held", path) == "False"
        assert lock.take()
        child.communicate()
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert other("held", path) == "True"
    lock.release()


def test_a_lock_whose_folder_was_removed_is_lost(tmp_path: Path) -> None:
    lock = Lock(str(tmp_path / "a/lock"))
    (tmp_path / "a").mkdir()
    assert not lock.lost()
    assert lock.take()
    assert not lock.lost()
    (tmp_path / "a").rename(tmp_path / "b")
    assert lock.lost()
    (tmp_path / "a").mkdir()
    (tmp_path / "a/lock").write_bytes(b"")
    assert lock.lost()
    lock.release()
    assert not lock.lost()


def test_the_holder_may_be_unknown(path: str) -> None:
    assert Lock(path).holder() == ""
    Path(path).write_bytes(b"\xff junk " * 100)
    assert len(Lock(path).holder()) <= 200


def test_a_rank_has_one_trainer(tmp_path: Path, other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says who it is; another rank is free."""
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    found = RunDirectory(tmp_path / "net", "net")
    other("take", found.rank_lock(0).path)
    with pytest.raises(ConflictError, match=rf"'net' is being trained by another process \(pid, host: {other.pid} "):
        found.take_rank(0)
    found.take_rank(1).release()
    other("release", found.rank_lock(0).path)
    found.take_rank(0).release()


# -- small files -------------------------------------------------------------------------------------------------------


def test_small_files_are_replaced_whole(tmp_path: Path) -> None:
    """A full disk leaves the old one, and nothing beside it."""
    path = tmp_path / "status.json"
    write_json(str(path), {"a": "x" * 100})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1, 50, 4096):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            with pytest.raises(OSError):
                write_json(str(path), {"b": "y" * 5000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert read_json(str(path)) == {"a": "x" * 100}
        assert os.listdir(tmp_path) == ["status.json"]
    write_json(str(path), {"b": 1}, durable=True)
    assert read_json(str(path)) == {"b": 1}
    assert mode(path) == 0o600


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"5", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a": \xff}', b'{"a": 1} x']
)
def test_a_small_file_that_says_nothing_is_empty(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "status.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert read_json(str(path)) == {}
    assert read_json(str(tmp_path / "missing")) == {}
