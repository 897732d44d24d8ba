"""What breaks around a repository: the disk is full, the process forks, the bucket is not there or not ours."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mandapa
from mandapa.errors import AccessDeniedError, InvalidInputError, MandapaError, NotFoundError, StorageError
from mandapa.object_store.local import LocalObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository
from mandapa.testing.server import Server, serve


def read(version):
    found = {}
    for path in version.assets:
        with version.open(path) as file:
            found[path] = file.read()
    return found


# -- disk -------------------------------------------------------------------------------------------------------------


class Disk:
    """``os.write`` on a disk with so much space left."""

    def __init__(self, left):
        self.left = left
        self.write = os.write

    def __call__(self, fd, data):
        if self.left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = self.write(fd, memoryview(data)[: self.left])
        self.left -= done
        return done


@pytest.mark.parametrize("left", [0, 1, 100, 50_000, 100_000, 100_400, 100_700])
def test_the_disk_is_full(tmp_path, monkeypatch, left):
    """Wherever it happens: an error that says so, no version, no litter; and once there is space it goes on."""
    store = LocalObjectStore(tmp_path / "repo", fsync=False)
    repo = Repository.create(store, threads=0, codec="raw")
    with repo.artifact("a").transaction("first") as txn:
        txn.add_bytes("x", b"1")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    data = os.urandom(100_000)

    def commit():
        with repo.artifact("a").transaction("second") as txn:
            txn.add_bytes("y", data)
        return txn.version

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", Disk(left))
        with pytest.raises(StorageError, match="the disk is full") as caught:
            commit()
    assert not caught.value.retryable
    again = Repository(store, threads=0)
    assert fsck(again, deep=True).findings == []
    assert [version.message for version in again.artifact("a").versions()] == ["first"]
    assert read(again["a"]) == {"x": b"1"}
    left_over = [path for path in tmp_path.rglob("*") if path.is_file() and path not in before]
    assert all(path.parent.name in ("packs", "meta") for path in left_over), "only what gc removes"
    assert read(commit()) == {"x": b"1", "y": data}


def test_the_disk_is_full_after_the_record(tmp_path, monkeypatch):
    """A head that cannot be written costs nothing but the next reader's time: the commit stands."""
    store = LocalObjectStore(tmp_path / "repo", fsync=False)
    repo = Repository.create(store, threads=0)
    with repo.artifact("a").transaction("first") as txn:
        txn.add_bytes("x", b"1")
    link = os.link

    def link_then_full(*arguments):
        link(*arguments)
        monkeypatch.setattr(os, "write", Disk(0))

    monkeypatch.setattr(os, "link", link_then_full)
    repo.artifact("a").alias("best", 0)
    monkeypatch.undo()
    assert Repository(store, threads=0)["a:best"].number == 0


def test_a_repository_that_may_only_be_read(tmp_path):
    """Is read; a commit is refused, and says that it is a matter of permissions."""
    if os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    repo = mandapa.open(tmp_path / "repo", create=True)
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes("x", b"1")
    for folder in [tmp_path / "repo", *(p for p in (tmp_path / "repo").rglob("*") if p.is_dir())]:
        folder.chmod(0o555)
    try:
        again = mandapa.open(tmp_path / "repo")
        assert read(again["a"]) == {"x": b"1"}
        with pytest.raises(AccessDeniedError):
            again.artifact("a").alias("best", 0)
    finally:
        for folder in [tmp_path / "repo", *(p for p in (tmp_path / "repo").rglob("*") if p.is_dir())]:
            folder.chmod(0o755)


# -- fork -------------------------------------------------------------------------------------------------------------

FORKS = r"""
import os, sys, threading, traceback
import mandapa
from mandapa.errors import ClosedError

repo = mandapa.open(sys.argv[1], create=True)
with repo.artifact("a").transaction("parent") as txn:
    txn.add_bytes("x", b"1" * 3_000_000)
opened = repo["a"].open("x")
opened.read(10)
started = repo.artifact("a").transaction("begun before the fork")
started.__enter__()

# Locks that other threads hold at the moment of the fork are held for ever in the child.
held = threading.Barrier(4)
def hold(log):
    with log._held():
        held.wait(30)
        threading.Event().wait()
for lock in (repo.catalog, repo.artifact("a").open_log()):
    threading.Thread(target=hold, args=(lock,), daemon=True).start()
def hold_index():
    with repo.index._guarded():
        held.wait(30)
        threading.Event().wait()
threading.Thread(target=hold_index, daemon=True).start()
held.wait(30)

child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status))
try:
    assert repo["a"].number == 0
    for work in (lambda: started.add_bytes("y", b"1"), lambda: opened.read(1_000_000)):
        try:
            work()
        except ClosedError:
            continue
        raise AssertionError("an object of the parent works in the child")
    with repo.artifact("a").transaction("child") as txn:
        txn.add_bytes("y", b"2")
        txn.copy("a:v0", "x", at="z")
    assert txn.version.number == 1, txn.version
    repo.artifact("a").alias("best", 1)
    with repo["a:best"].open("y") as file:
        assert file.read() == b"2"
    repo["a:best"].download(sys.argv[2])
    repo.artifact("a").rename("c")
except BaseException:
    traceback.print_exc()
    os._exit(1)
os._exit(0)
"""


def test_a_forked_child(tmp_path: Path) -> None:
    """It may use its parent's repository as its own, whatever the parent's threads were at, and nothing hangs.

    Its parent's transaction and open files it may not use, and is told so.
    """
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, tmp_path / "repo", tmp_path / "got"],
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    repo = mandapa.open(tmp_path / "repo")
    assert [version.message for version in repo.artifact("c").versions()] == ["parent", "child"]
    assert fsck(repo, deep=True).findings == []


# -- the place --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize(
    ("bucket", "error", "says"),
    [("missing-one", MandapaError, "does not exist"), ("forbidden-one", AccessDeniedError, "s3:")],
)
def test_a_bucket_that_is_not_there_or_not_ours(server, bucket, error, says, create):
    """No "there is no repository": what is missing is the bucket, or the permission, which is named."""
    options = {"endpoint_url": server.url, "region": "us-east-1", "access_key_id": "t", "secret_access_key": "t"}
    with pytest.raises(error, match=says):
        mandapa.open(f"s3://{bucket}/runs", create=create, **options)


def test_places_that_are_none(tmp_path):
    """No repository there; something else there; no URL."""
    with pytest.raises(NotFoundError, match="there is no repository"):
        mandapa.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="holds other things"):
        mandapa.open(tmp_path / "full", create=True)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    for url in ("ftp://x/y", "", "s3://"):
        with pytest.raises(InvalidInputError):
            mandapa.open(url)


def test_many_make_one_repository(tmp_path):
    """Processes that make it at the same time: all of them have the same one."""
    code = "import sys, mandapa; print(mandapa.open(sys.argv[1], create=True).id)"
    makers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / "repo"], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = {maker.communicate(timeout=60)[0] for maker in makers}
    assert len(answers) == 1
    assert len(mandapa.open(tmp_path / "repo").id) == 32
