"""Downloads: the same bytes, whole files or none, and never a byte outside the folder."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from restoring import FILES, Repo, noise, tree

from mandapa.content import download as download_module
from mandapa.content import folders as folders_module
from mandapa.content.fetch import pieces_of
from mandapa.content.index import Index
from mandapa.content.tree import Located
from mandapa.digest import digest
from mandapa.errors import CorruptionError, InvalidInputError, NotFoundError, SecurityError, StorageError
from mandapa.format.keys import container_key
from mandapa.format.manifest import FileRow, UrlRow


@pytest.fixture
def repo():
    return Repo()


@pytest.fixture
def rows(repo):
    return repo.put(FILES)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("fsync", [False, True])
def test_what_went_in_comes_out(repo, rows, out, threads, fsync):
    """Bytes, empty files, folders and x bits; nothing else is there."""
    result = repo.get(rows, out, threads=threads, fsync=fsync)
    assert tree(out) == FILES
    assert (result.files, result.bytes, result.skipped) == (len(FILES), sum(map(len, FILES.values())), 0)
    assert {path for path in FILES if os.stat(out / path).st_mode & 0o111} == {"run.sh"}


def test_umask_is_kept(repo, rows, out):
    """New files have the mode that umask gives."""
    old = os.umask(0o027)
    try:
        repo.get(rows, out)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(out / "README").st_mode) == 0o640
    assert stat.S_IMODE(os.stat(out / "run.sh").st_mode) == 0o750


def test_equal_files_stay(repo, rows, out):
    """A second download reads nothing from the store, and touches no file."""
    repo.get(rows, out)
    before = {path: os.stat(out / path).st_ctime_ns for path in FILES}
    inodes = {path: os.stat(out / path).st_ino for path in FILES}
    repo.store.reset()
    result = repo.get(rows, out)
    assert (result.files, result.skipped) == (0, len(FILES))
    assert not repo.store.requests
    assert {path: os.stat(out / path).st_ctime_ns for path in FILES} == before
    assert {path: os.stat(out / path).st_ino for path in FILES} == inodes


def test_index_spares_the_hash(repo, rows, out, monkeypatch):
    """Files that the index knows are not read to see that they are equal."""
    index = Index()
    repo.get(rows, out)
    for path in FILES:
        os.utime(out / path, ns=(10**18, 10**18))
    monkeypatch.setattr(download_module.time, "time_ns", lambda: 4 * 10**18)
    assert repo.get(rows, out, index=index).skipped == len(FILES)
    monkeypatch.setattr(download_module, "Hasher", lambda: pytest.fail("a file was hashed"))
    assert repo.get(rows, out, index=index).skipped == len(FILES)


def test_different_files_are_replaced_and_others_left(repo, rows, out):
    """Same size or not, a different file is replaced by a new one; what no row names stays."""
    repo.get(rows, out)
    (out / "README").write_bytes(b"jello\n")
    (out / "a/large").write_bytes(b"short")
    (out / "mine").write_bytes(b"mine")
    (out / "a/mine").write_bytes(b"mine")
    held = open(out / "README", "rb")  # noqa: SIM115 - a reader of the old file keeps the old file
    with held:
        result = repo.get(rows, out)
        assert held.read() == b"jello\n"
    assert result.files == 2
    assert tree(out) == FILES | {"mine": b"mine", "a/mine": b"mine"}


def test_x_bit_is_set_right_without_a_fetch(repo, rows, out):
    """Only the mode differs: only the mode changes."""
    repo.get(rows, out)
    os.chmod(out / "run.sh", 0o640)
    os.chmod(out / "README", 0o755)
    repo.store.reset()
    assert repo.get(rows, out).files == 0
    assert stat.S_IMODE(os.stat(out / "run.sh").st_mode) == 0o750
    assert stat.S_IMODE(os.stat(out / "README").st_mode) == 0o644
    assert not repo.store.requests


def test_few_requests(repo, tmp_path):
    """Thousands of small files are a handful of requests."""
    rows = repo.put({f"d{i % 10}/f{i:05}": noise(3000, i) for i in range(3000)})
    assert repo.get(rows, tmp_path / "out").files == 3000
    assert repo.store.requests["get_ranges"] <= 6


def test_many_folders(repo, tmp_path):
    """More folders than may be open at once."""
    files = {f"d{i:04}/e/f": b"%d" % i for i in range(1200)}
    repo.get(repo.put(files), tmp_path / "out", threads=2)
    assert tree(tmp_path / "out") == files
    assert len(os.listdir("/proc/self/fd")) < 60


def test_urls_are_listed(repo, rows, out):
    """A URL is not fetched; its path is in the result."""
    result = repo.get([Located(UrlRow("data", "s3://x/y", 3, ""), ()), *rows], out)
    assert result.urls == ["data"]
    assert not (out / "data").exists()


def test_progress(repo, rows, out):
    """Progress counts every byte that was written."""
    done = []
    result = repo.get(rows, out, progress=done.append)
    assert sum(done) == result.bytes


# Interrupted


def test_what_is_there_is_not_fetched_again(repo, rows, out):
    """A download that died goes on: whole files stay, leftovers go, locked ones do not."""
    repo.get(rows[:4], out)
    leftover = out / f".mandapa-{'0' * 16}-7.tmp"
    leftover.write_bytes(b"half")
    live = out / f".mandapa-{'1' * 16}-7.tmp"
    live.write_bytes(b"half")
    other = out / ".mandapa-mine.tmp"
    other.write_bytes(b"mine")
    with open(live, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = repo.get(rows, out)
    assert result.skipped == 4
    assert not leftover.exists()
    assert live.exists()
    assert other.exists()


def test_a_failed_download_leaves_whole_files(repo, rows, out):
    """After an error there is no half file and no leftover."""
    [key] = {container_key(piece.container) for piece in pieces_of(rows[-1], None)}
    data = bytearray(repo.store.get(key))
    data[next(iter(pieces_of(rows[-1], None))).offset] ^= 1
    repo.store.put(key, bytes(data))
    with pytest.raises(CorruptionError) as error:
        repo.get(rows, out)
    assert error.value.key == key
    assert "zeros" in str(error.value)
    assert all(FILES[path] == data for path, data in tree(out).items())


def test_killed(tmp_path):
    """A killed process leaves whole files; the next one ends its work and tidies up."""
    code = """
import os, sys, threading
sys.path.insert(0, sys.argv[2])
from restoring import FILES, Repo
class Slow:
    def __init__(self, store): self.store = store
    def __getattr__(self, name): return getattr(self.store, name)
repo = Repo()
rows = repo.put(FILES)
def progress(done):
    if done > 1 << 20:
        os.kill(os.getpid(), 9)
repo.get(rows, sys.argv[1], threads=1, progress=progress)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out"), os.path.dirname(__file__)], check=False)
    assert done.returncode == -9
    there = tree(tmp_path / "out")
    assert any(name.endswith(".tmp") for name in there)
    assert all(FILES[path] == data for path, data in there.items() if not path.endswith(".tmp"))
    repo = Repo()
    repo.get(repo.put(FILES), tmp_path / "out")
    assert tree(tmp_path / "out") == FILES


# Attacks


def test_folder_swapped_between_any_two_opens(repo, tmp_path, monkeypatch):
    """Whenever a folder becomes a symlink, what is written goes into the folder that was checked, or nowhere."""
    rows = repo.put({"a/b/c/f": b"data", "a/b/g": b"data", "a/h": b"data"})
    real = os.open
    for folder in ("a", "a/b", "a/b/c"):
        for at in range(9):
            out, outside = tmp_path / f"out-{folder.replace('/', '')}{at}", tmp_path / "outside"
            (outside / "b/c").mkdir(parents=True, exist_ok=True)
            (outside / "c").mkdir(exist_ok=True)
            (out / "a/b/c").mkdir(parents=True)
            left = at

            def swapping(path, *rest, **options):
                nonlocal left
                if "dir_fd" in options:
                    left -= 1
                    if left == -1:
                        os.rename(out / folder, out / "moved")  # noqa: B023
                        os.symlink(outside, out / folder)  # noqa: B023
                return real(path, *rest, **options)

            with monkeypatch.context() as patch, suppress(SecurityError):
                patch.setattr(os, "open", swapping)
                repo.get(rows, out, threads=0)
            assert left < 0 or at > 6  # there are seven
            assert tree(outside) == {}


@pytest.mark.parametrize(
    "path", ["../evil", "/evil", "a/../../evil", "a//b", "./a", "", "a/\0", "a\\b", "a/", "x" * 300]
)
def test_bad_paths(repo, tmp_path, out, path):
    """A path that could lead elsewhere is refused; nothing is written for it."""
    [good] = repo.put({"x": b"evil"})
    row = good.row
    bad = Located(FileRow(path, row.size, 0, row.digest, row.chunks), good.table)
    with pytest.raises(InvalidInputError):
        repo.get([bad], out)
    assert tree(tmp_path) == {}


def test_reserved_folder_comes_back(repo, out):
    """`.mandapa/` in a version is restored like any folder: only adding to it is refused."""
    repo.get(repo.put({".mandapa/tensors.json": b"{}"}), out)
    assert tree(out) == {".mandapa/tensors.json": b"{}"}


@pytest.mark.parametrize("link", ["a", "a/b"])
@pytest.mark.parametrize("inside", [False, True])
def test_symlink_in_the_way(repo, rows, tmp_path, out, link, inside):
    """A symlink where a folder is needed is refused and named, even one that stays inside; nothing goes through it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    target = out / "elsewhere" if inside else outside
    (out / "elsewhere").mkdir(parents=True)
    (out / link).parent.mkdir(exist_ok=True)
    (out / link).symlink_to(target)
    with pytest.raises(SecurityError, match=f"out/{link} is a symbolic link"):
        repo.get(rows, out)
    assert tree(outside) == {}
    assert tree(out / "elsewhere") == {}


def test_symlink_as_a_file_is_replaced(repo, rows, tmp_path, out):
    """A symlink where a file goes is replaced itself; what it points to is not touched, even if it is equal."""
    outside = tmp_path / "outside"
    outside.write_bytes(FILES["README"])
    out.mkdir()
    (out / "README").symlink_to(outside)
    (out / "run.sh").symlink_to(tmp_path / "nowhere")
    repo.get(rows, out)
    assert not (out / "README").is_symlink()
    assert tree(out) == FILES
    assert outside.read_bytes() == FILES["README"]
    assert not (tmp_path / "nowhere").exists()


def test_folder_swapped_for_a_symlink_meanwhile(repo, tmp_path, out):
    """Swapping a folder for a symlink again and again never lets a byte out."""
    rows = repo.put({f"a/b/f{i:04}": noise(300, i) for i in range(400)})
    outside = tmp_path / "outside"
    (outside / "b").mkdir(parents=True)
    (out / "a" / "b").mkdir(parents=True)
    stop = threading.Event()

    def swap():
        rounds = 0
        while not stop.is_set():
            with suppress(OSError):
                os.rename(out / "a", out / f"real{rounds}")
            with suppress(OSError):
                os.symlink(outside, out / "a")
            with suppress(OSError):
                os.unlink(out / "a")
            rounds += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(30):
            with suppress(SecurityError, OSError):
                repo.get(rows, out, threads=2)
    finally:
        stop.set()
        thread.join()
    assert tree(outside) == {}


@pytest.mark.parametrize("times", [1, 100])
def test_folder_that_was_another_thing_for_a_moment(repo, out, monkeypatch, times):
    """It is tried again, and never called a file; when that does not end, what happens is said."""
    rows = repo.put({"a/f": b"x"})
    (out / "a").mkdir(parents=True)
    left, real = [errno.ENOTDIR] * times, os.open

    def swapped(path, *arguments, **options):
        if path == "a" and left:
            raise OSError(left.pop(), "Not a directory")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", swapped)
    if times == 1:
        repo.get(rows, out)
        assert tree(out) == {"a/f": b"x"}
    else:
        with pytest.raises(StorageError, match="removes or replaces"):
            repo.get(rows, out)


def test_dest_may_be_a_symlink(repo, rows, tmp_path):
    """Where to restore is the user's choice."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    repo.get(rows, tmp_path / "link")
    assert tree(tmp_path / "real") == FILES


def test_file_and_folder_in_the_way(repo, rows, tmp_path):
    """A file where a folder is needed, a folder where a file is, and a file as the destination: each is named."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1/a").write_bytes(b"mine")
    with pytest.raises(InvalidInputError, match="1/a is a file"):
        repo.get(rows, tmp_path / "1")
    (tmp_path / "2/README").mkdir(parents=True)
    with pytest.raises(InvalidInputError, match="2/README is a folder"):
        repo.get(rows, tmp_path / "2")
    with pytest.raises(InvalidInputError, match="is a file"):
        repo.get(rows, tmp_path / "1/a")
    assert (tmp_path / "1/a").read_bytes() == b"mine"
    assert not [name for name in os.listdir(tmp_path / "2") if name.endswith(".tmp")]


def test_fifo_in_the_way(repo, rows, out):
    """A pipe where a file goes is replaced, and never waited for."""
    out.mkdir()
    os.mkfifo(out / "README")
    repo.get(rows, out)
    assert tree(out) == FILES


# Names that are one name


@pytest.mark.parametrize(
    ("paths", "clash"),
    [
        (["a", "A"], True),
        (["a/x", "A/y"], True),
        (["a", "b"], False),
        (["caf\u00e9", "cafe\u0301"], True),
        (["stra\u00dfe", "STRASSE"], True),
        (["a/x", "a/y", "a.x"], False),
    ],
)
def test_collisions_where_case_does_not_count(repo, out, monkeypatch, paths, clash):
    """Both names are named before anything is written; where all is well, all is restored."""
    monkeypatch.setattr(folders_module, "_exists", lambda *_: True)
    rows = repo.put({path: path.encode() for path in paths})
    if clash:
        with pytest.raises(InvalidInputError) as error:
            repo.get(rows, out)
        assert all(path.split("/")[0] in str(error.value) for path in paths)
        assert tree(out) == {}
    else:
        assert repo.get(rows, out).files == len(paths)


def test_twins_are_fine_where_case_counts(repo, out):
    """On this file system they are different names."""
    files = {"a": b"1", "A": b"2", "caf\u00e9": b"3", "cafe\u0301": b"4"}
    repo.get(repo.put(files), out)
    if len(os.listdir(out)) != len(files):
        pytest.skip("the file system does not tell them apart")
    assert tree(out) == files


# Stored bytes


def test_every_region_of_a_container(tmp_path):
    """A flipped byte in any chunk is found and named; header, table and trailer are not needed for a read."""
    repo = Repo()
    rows = repo.put({"a": noise(700, 1), "b": b"text " * 3000})
    [key] = [info.key for info in repo.store.list("")]
    good = bytes(repo.store.get(key))
    pieces = {located.row.path: next(iter(pieces_of(located, None))) for located in rows}
    for at in range(0, len(good), 23):
        bad = bytearray(good)
        bad[at] ^= 0x40
        repo.store.put(key, bytes(bad))
        hurt = [path for path, piece in pieces.items() if piece.offset <= at < piece.offset + piece.stored]
        if hurt:
            with pytest.raises(CorruptionError, match=f"{hurt[0]}: {key}"):
                repo.get(rows, tmp_path / f"out{at}")
        else:
            assert repo.get(rows, tmp_path / f"out{at}").files == 2


def test_truncated_container(repo, rows, out):
    """A container that ends too early is corrupt."""
    for info in list(repo.store.list("packs/")):
        repo.store.put(info.key, bytes(repo.store.get(info.key))[:1000])
    with pytest.raises(CorruptionError):
        repo.get(rows, out)


def test_missing_container(repo, rows, out):
    """Without a hook, a missing container is `NotFoundError`."""
    repo.store.delete([info.key for info in list(repo.store.list("packs/"))])
    with pytest.raises(NotFoundError):
        repo.get(rows, out)
    assert all(FILES[path] == data for path, data in tree(out).items())


@pytest.mark.parametrize("threads", [0, 2])
def test_moved_rows(repo, rows, out, threads):
    """With a hook, a row whose containers are gone is asked for again, once, and restored from where it is now."""
    old = [info.key for info in repo.store.list("")]
    moved = {located.row.path: located for located in repo.put(FILES)}
    repo.store.delete(old)
    asked = []
    result = repo.get(rows, out, threads=threads, moved=lambda path: asked.append(path) or moved[path])
    assert tree(out) == FILES
    assert result.files == len(FILES)
    assert sorted(asked) == sorted(path for path, data in FILES.items() if data)


def test_moved_to_nowhere(repo, rows, out):
    """Where the hook's row is missing too, the store is corrupt; what the hook raises is raised."""
    repo.store.delete([info.key for info in list(repo.store.list(""))])
    with pytest.raises(CorruptionError, match="fsck"):
        repo.get(rows, out, moved=lambda path: next(one for one in rows if one.row.path == path))

    def deleted(path):
        raise NotFoundError("the version was deleted")

    with pytest.raises(NotFoundError, match="was deleted"):
        repo.get(rows, out, moved=deleted)


def test_memory_is_bounded(tmp_path):
    """Restoring 600 MB takes far less than that."""
    code = """
import os, resource, sys
from mandapa.content.download import download
from mandapa.content.index import Index
from mandapa.content.tree import NodeReader
from mandapa.content.upload import Upload
from mandapa.object_store import LocalObjectStore
store = LocalObjectStore(sys.argv[1] + "/store", fsync=False)
block = os.urandom(1 << 20)
with open(sys.argv[1] + "/f", "wb") as file:
    for i in range(600):
        file.write(i.to_bytes(4, "big") + block[4:])
with Upload(store, index=Index(), threads=0, codec="raw") as upload:
    row = upload.add_file(sys.argv[1] + "/f", "f")
    upload.flush()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
download([row], sys.argv[1] + "/out", store=store, load=NodeReader(store).load, threads=2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 100
    with open(tmp_path / "f", "rb") as a, open(tmp_path / "out/f", "rb") as b:
        assert digest(a.read()) == digest(b.read())
