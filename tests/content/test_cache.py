"""The cache of chunks: what it gives is right, it stays below its limit, and nothing fails because of it."""

from __future__ import annotations

import os
import random
import resource
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from mandapa.content.cache import ChunkCache
from mandapa.digest import digest

KIB = 1 << 10
MIB = 1 << 20


def chunk(seed, size=100 * KIB):
    return random.Random(seed).randbytes(size)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fill(cache, seeds, size=100 * KIB):
    for seed in seeds:
        data = chunk(seed, size)
        cache.put(digest(data), data)


def total(folder):
    """Bytes of a folder that others write to."""
    found = 0
    for path in folder.rglob("*"):
        try:
            info = path.stat()
        except FileNotFoundError:
            continue
        found += info.st_size if stat.S_ISREG(info.st_mode) else 0
    return found


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "chunks"


@pytest.fixture
def cache(folder):
    return ChunkCache(folder, 64 * MIB)


def test_what_went_in_comes_out(cache, folder):
    """By hash, for other objects and processes too; whatever kind of buffer it was."""
    data = chunk(1)
    hash_ = digest(data)
    assert not cache.has(hash_, len(data))
    assert cache.get(hash_) is None
    cache.put(hash_, memoryview(bytearray(data)))
    assert cache.has(hash_, len(data))
    assert not cache.has(hash_, len(data) + 1)
    assert ChunkCache(folder, MIB).get(hash_) == data
    [path] = files(folder)
    assert path.parent.name + path.name == hash_.hex()


def test_nobody_else_may_read_it(cache, folder):
    """Folders are 0700, files 0600, whatever umask says."""
    old = os.umask(0)
    try:
        fill(cache, [1])
    finally:
        os.umask(old)
    [path] = files(folder)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_small_and_huge_chunks_are_not_kept(cache, folder):
    """Below 64 KiB a file costs more than it saves; above 1/32 of the limit it would throw out too much."""
    fill(cache, [1], 64 * KIB - 1)
    fill(cache, [2], 2 * MIB + 1)
    assert not folder.exists()
    fill(cache, [1], 64 * KIB)
    fill(cache, [2], 2 * MIB)
    assert len(files(folder)) == 2


def test_oldest_use_goes_first(folder):
    """Above 7/8 of the limit the longest unused files go, down to 3/4; a `get` counts as a use."""
    now = [1e9]
    cache = ChunkCache(folder, 8 * MIB, clock=lambda: now[0])
    for seed in range(200):
        fill(cache, [seed])
        for path in files(folder):
            if path.stat().st_mtime > now[0] + 1:
                os.utime(path, (now[0], now[0]))
        now[0] += 100
        assert cache.get(digest(chunk(0))) is not None
        assert total(folder) <= 7 * MIB + MIB // 4
    kept = [seed for seed in range(200) if cache.has(digest(chunk(seed)), 100 * KIB)]
    assert 55 < len(kept) <= 74
    assert kept == [0, *range(200 - len(kept) + 1, 200)]


def test_what_is_larger_passes_by(folder):
    """What was used within ten minutes stays: so of a restore larger than the cache the first part is kept."""
    cache = ChunkCache(folder, 8 * MIB)
    fill(cache, range(200))
    kept = [seed for seed in range(200) if cache.has(digest(chunk(seed)), 100 * KIB)]
    assert kept == list(range(len(kept)))
    assert 65 < len(kept) <= 74
    before = [path.stat().st_ino for path in files(folder)]
    fill(ChunkCache(folder, 8 * MIB), range(200))
    assert [path.stat().st_ino for path in files(folder)] == before


def test_leftovers_go_and_strangers_stay(folder):
    """What a killed process was writing is removed after an hour; what is none of the cache's is left alone."""
    old = time.time() - 7200
    (folder / "ab").mkdir(parents=True)
    for name in ("ab/0123.tmp", "ab/mine", "mine"):
        (folder / name).write_bytes(b"x" * MIB)
        os.utime(folder / name, (old, old))
    (folder / "ab/4567.tmp").write_bytes(b"x")
    fill(ChunkCache(folder, 4 * MIB), range(60))
    left = {str(path.relative_to(folder)) for path in files(folder) if len(path.name) != 62}
    assert left == {"ab/mine", "mine", "ab/4567.tmp"}


# Hostile and broken


@pytest.mark.parametrize(
    "hurt",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
        lambda path: path.write_bytes(bytes(100 * KIB)),
        lambda path: os.truncate(path, 1 << 40),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_damage_is_a_miss(cache, folder, hurt):
    """Torn, changed, huge, a pipe, a link, a folder: a miss at once, and repaired by a put, a folder apart."""
    data = chunk(1)
    cache.put(digest(data), data)
    [path] = files(folder)
    hurt(path)
    start = time.monotonic()
    assert cache.get(digest(data)) is None
    assert time.monotonic() - start < 0.5
    cache.put(digest(data), data)
    assert cache.get(digest(data)) == (None if path.is_dir() else data)


@pytest.mark.parametrize("name", ["", "ab", "chunks"])
def test_files_where_folders_go(tmp_path, name):
    """A file where a folder is needed: nothing is kept, nothing fails."""
    top = tmp_path / "chunks"
    if name == "chunks":
        top.write_bytes(b"")
    else:
        top.mkdir()
        for i in range(256):
            (top / f"{i:02x}").write_bytes(b"")
    cache = ChunkCache(top, 64 * MIB)
    fill(cache, [1])
    assert cache.get(digest(chunk(1))) is None
    assert not cache.has(digest(chunk(1)), 100 * KIB)


def test_no_room_in_the_file_system(folder):
    """A write that fails leaves nothing, raises nothing, and is not tried again for a minute (RLIMIT_FSIZE)."""
    now = [time.time()]
    cache = ChunkCache(folder, 64 * MIB, clock=lambda: now[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70 * KIB, hard))
    try:
        fill(cache, [1, 2])
        assert files(folder) == []
        fill(cache, [3], 64 * KIB)
        assert files(folder) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    now[0] += 61
    fill(cache, [1, 2])
    assert len(files(folder)) == 2


def test_a_small_disk(tmp_path):
    """On a disk of 8 MiB the cache takes less than half of it, however large it might be."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("needs the right to mount")
    try:
        cache = ChunkCache(disk / "chunks", 1 << 40)
        fill(cache, range(150))
        assert 2 * MIB < total(disk) < 4 * MIB
        with open(disk / "rest", "wb", buffering=0) as file, suppress(OSError):
            while file.write(b"x" * KIB):
                pass
        before = total(disk)
        fill(ChunkCache(disk / "chunks", 1 << 40), range(150, 160))
        assert total(disk) <= before
        assert cache.get(digest(chunk(0))) == chunk(0)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Many at once


PUT = """
import random, sys
sys.path.insert(0, sys.argv[1])
from test_cache import *
cache = ChunkCache(sys.argv[2], 8 * MIB)
rng = random.Random(int(sys.argv[3]))
for _ in range(400):
    seed = rng.randrange(150)
    data = chunk(seed)
    hash_ = digest(data)
    found = cache.get(hash_)
    assert found is None or found == data
    cache.put(hash_, data)
    if rng.random() < 0.3:  # as if it had not been used for long
        try:
            os.utime(cache._path(hash_), (rng.random() * 1e9, 1e9))
        except OSError:
            pass
"""


def test_processes_share_it_at_its_limit(folder):
    """Three processes that put and read at once: right bytes, never above the limit."""
    folder.mkdir()
    processes = [
        subprocess.Popen([sys.executable, "-c", PUT, os.path.dirname(__file__), str(folder), str(seed)])
        for seed in range(3)
    ]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, total(folder))
        time.sleep(0.02)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert 5 * MIB < most <= 8 * MIB


def test_threads_share_it(cache):
    """Threads that put and read the same chunks."""
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(100):
            data = chunk(rng.randrange(20))
            cache.put(digest(data), data)
            found = cache.get(digest(data))
            if found not in (None, data):
                wrong.append(data)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_killed_writer(folder):
    """Killed anywhere, a writer leaves nothing that is taken for a chunk."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from test_cache import *
cache = ChunkCache(sys.argv[2], 64 * MIB)
left, real = int(sys.argv[3]), os.write
def write(fd, view):
    global left
    left -= 1
    if not left:
        real(fd, view[:100])
        os.kill(os.getpid(), 9)
    return real(fd, view)
os.write = write
fill(cache, range(5))
"""
    for at in (1, 3):
        arguments = [os.path.dirname(__file__), str(folder), str(at)]
        assert subprocess.run([sys.executable, "-c", code, *arguments], check=False).returncode == -9
    cache = ChunkCache(folder, 64 * MIB)
    kept = [cache.get(digest(chunk(seed))) for seed in range(5)]
    assert kept == [chunk(0), chunk(1), None, None, None]
