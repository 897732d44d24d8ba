"""Large files whose download was interrupted: what was written is verified, and only the rest is fetched."""

from __future__ import annotations

import fcntl
import os
import random
import stat
import subprocess
import sys
import threading

import msgspec
import pytest
from restoring import FILES, MIB, Repo, noise, tree

from mandapa.content import download as download_module
from mandapa.content.fetch import pieces_of
from mandapa.content.folders import part_name
from mandapa.content.tree import Located, NodeReader
from mandapa.errors import StorageError
from mandapa.format.keys import container_key
from mandapa.object_store import LocalObjectStore, MemoryObjectStore

SIZE = 40 * MIB
DATA = noise(SIZE, 3)


class Breaking(MemoryObjectStore):
    """Memory that gives so many ranges, and then errors."""

    left = 1 << 30

    def get_ranges(self, key, ranges):
        self.left -= 1
        if self.left < 0:
            raise StorageError("the network is down", retryable=False)
        return super().get_ranges(key, ranges)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Files of 1 MiB leave a part, so that tests are fast."""
    monkeypatch.setattr(download_module, "_RESUMED", MIB)


@pytest.fixture
def store():
    return Breaking()


@pytest.fixture
def repo(store):
    return Repo(store)


@pytest.fixture
def rows(repo):
    return repo.put({"big": DATA}, codec="raw")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def interrupted(repo, store, rows, out, requests=4):
    """A download that breaks off after so many requests; the part that it leaves."""
    store.left = requests
    with pytest.raises(StorageError, match="network is down"):
        repo.get(rows, out, threads=1)
    store.left = 1 << 30
    repo.store.reset()
    [part] = out.rglob("*.part")
    return part


def there(repo, rows, part):
    """Bytes of the chunks that a part has; chunks of other containers may lack in between."""
    data, at, found = part.read_bytes(), 0, 0
    for piece in pieces_of(rows[0], NodeReader(repo.store).load):
        found += piece.raw * (data[at : at + piece.raw] == DATA[at : at + piece.raw])
        at += piece.raw
    repo.store.reset()
    return found


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_what_was_written_is_not_fetched_again(repo, store, rows, out, threads):
    """After an error a part stays, and the next download fetches the rest; progress and result say so."""
    part = interrupted(repo, store, rows, out)
    had = there(repo, rows, part)
    assert had >= 4 * MIB
    done = []
    result = repo.get(rows, out, threads=threads, progress=done.append)
    assert tree(out) == {"big": DATA}
    assert (result.files, result.bytes, result.resumed) == (1, SIZE, had)
    assert sum(done) == SIZE
    assert repo.store.bytes_read < SIZE - had + MIB
    assert not stat.S_IMODE(os.stat(out / "big").st_mode) & 0o111


def test_again_and_again(repo, store, rows, out):
    """Each attempt adds to the part, so a download that always breaks off comes to its end."""
    had = 0
    for _ in range(20):
        store.left = 2
        try:
            repo.get(rows, out, threads=1)
            break
        except StorageError:
            [part] = out.rglob("*.part")
            store.left = 1
            now = there(repo, rows, part)
            assert now > had
            had = now
    assert tree(out) == {"big": DATA}


def test_nothing_lacks_but_the_name(repo, store, rows, out):
    """A download that was killed just before the file got its name needs the list of chunks, and none of them."""
    part = interrupted(repo, store, rows, out)
    part.write_bytes(DATA)
    result = repo.get(rows, out)
    assert repo.store.requests == {"get_ranges": 1}
    assert repo.store.bytes_read < MIB // 10
    assert (result.files, result.resumed) == (1, SIZE)
    assert tree(out) == {"big": DATA}


def test_small_files_leave_nothing(repo, store, out):
    """A file below the limit is fetched again; an empty part is not kept."""
    rows = repo.put({"small": noise(MIB - 1, 1)}, codec="raw")
    store.left = 0
    with pytest.raises(StorageError):
        repo.get(rows, out)
    assert tree(out) == {}
    store.left = 1 << 30
    rows = repo.put({"big": DATA}, codec="raw")
    store.left = 0
    with pytest.raises(StorageError):
        repo.get(rows, out)
    assert tree(out) == {}


def test_killed(tmp_path, monkeypatch):
    """Kill -9 at two thirds of one file of 96 MiB: the next process fetches the last third."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from restoring import *
from mandapa.object_store import LocalObjectStore
repo = Repo(LocalObjectStore(sys.argv[2], fsync=False))
rows = repo.put({"big": noise(96 * MIB, 3)}, codec="raw")
done = 0
def progress(more):
    global done
    done += more
    if done >= 64 * MIB:
        os.kill(os.getpid(), 9)
repo.get(rows, sys.argv[3], threads=2, progress=progress)
"""
    folders = [os.path.dirname(__file__), str(tmp_path / "store"), str(tmp_path / "out")]
    assert subprocess.run([sys.executable, "-c", code, *folders], check=False).returncode == -9
    repo = Repo(LocalObjectStore(tmp_path / "store", fsync=False))
    rows = repo.put({"big": noise(96 * MIB, 3)}, codec="raw")
    monkeypatch.setattr(download_module, "_RESUMED", 64 * MIB)  # as shipped
    result = repo.get(rows, tmp_path / "out")
    assert result.resumed >= 64 * MIB
    assert repo.store.bytes_read <= 32 * MIB
    assert tree(tmp_path / "out") == {"big": noise(96 * MIB, 3)}


# Parts that are not what they seem


def test_a_damaged_part(repo, store, rows, out):
    """Bytes that a power cut, or anybody, changed are fetched again: torn, flipped, holes, garbage, too long."""
    good = interrupted(repo, store, rows, out).read_bytes()
    name = next(out.rglob("*.part")).name
    flipped = bytearray(good)
    for at in range(MIB, len(good), 5 * MIB):
        flipped[at] ^= 1
    for bad in (good[:-1], good[: 5 * MIB + 3], bytes(flipped), bytes(len(good)), noise(SIZE, 9), DATA + b"more"):
        (out / name).write_bytes(bad)
        repo.store.reset()
        repo.get(rows, out)
        assert tree(out) == {"big": DATA}
        (out / "big").unlink()
    (out / name).touch()
    os.truncate(out / name, 1 << 40)
    repo.get(rows, out)
    assert tree(out) == {"big": DATA}


@pytest.mark.parametrize("kind", ["link", "hard link", "folder", "pipe"])
def test_a_part_that_leads_elsewhere(repo, rows, tmp_path, out, kind):
    """A link, a second name of another file, a pipe, a folder where the part goes: nothing is written through it."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    out.mkdir()
    row = rows[0].row
    part = out / part_name("big", row.digest, row.mode)
    make = {
        "link": lambda: part.symlink_to(outside),
        "hard link": lambda: os.link(outside, part),
        "folder": part.mkdir,
        "pipe": lambda: os.mkfifo(part),
    }
    make[kind]()
    result = repo.get(rows, out)
    assert (out / "big").read_bytes() == DATA
    assert result.resumed == 0
    assert outside.read_bytes() == b"mine"


def test_a_part_of_somebody_else(repo, rows, out):
    """A file of another user may be changed under our hands: it is left alone."""
    if os.geteuid():
        pytest.skip("only root gives files away")
    out.mkdir()
    row = rows[0].row
    part = out / part_name("big", row.digest, row.mode)
    part.write_bytes(DATA)
    os.chown(part, 12345, -1)
    result = repo.get(rows, out)
    assert result.resumed == 0
    assert (out / "big").stat().st_uid == os.geteuid()


def test_another_download_is_at_it(repo, store, rows, out):
    """A part that is locked is another's: this download does without, and leaves it."""
    part = interrupted(repo, store, rows, out)
    with open(part, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert repo.get(rows, out).resumed == 0
    assert part.exists()
    assert (out / "big").read_bytes() == DATA


def test_many_at_once(repo, rows, out):
    """Several downloads of one file into one folder: all succeed, and nothing is left."""
    results = []
    threads = [threading.Thread(target=lambda: results.append(repo.get(rows, out, threads=2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert tree(out) == {"big": DATA}


# Which part belongs to what


def test_parts_of_no_use_are_removed(repo, store, rows, out):
    """A download that succeeds removes the parts of other files from the folders that it wrote to."""
    part = interrupted(repo, store, rows, out)
    (out / "sub").mkdir()
    other = out / "sub" / part.name
    part.rename(other)
    repo.get(repo.put({"a": b"1"}), out)
    assert other.exists()
    repo.get(repo.put({"sub/a": b"1"}), out)
    assert not other.exists()
    assert tree(out) == {"a": b"1", "sub/a": b"1"}


def test_a_failed_download_keeps_parts_of_others(repo, store, rows, out):
    """Whoever breaks off does not know yet what is of use."""
    part = interrupted(repo, store, rows, out)
    store.left = 0
    with pytest.raises(StorageError):
        repo.get(repo.put(FILES), out)
    assert part.exists()


def test_another_version_or_mode_has_another_part(repo, store, rows, out):
    """The same name with other bytes, or another x bit, begins anew."""
    part = interrupted(repo, store, rows, out)
    row = rows[0].row
    script = Located(msgspec.structs.replace(row, mode=1), rows[0].table)
    assert part.name != part_name("big", script.row.digest, 1)
    assert repo.get([script], out).resumed == 0
    assert os.stat(out / "big").st_mode & 0o100
    assert tree(out) == {"big": DATA}


def test_moved_while_it_is_read(repo, store, rows, out):
    """A container that goes away in the middle: what was written before is not fetched from the new place."""
    pieces = list(pieces_of(rows[0], NodeReader(repo.store).load))
    containers = list(dict.fromkeys(piece.container for piece in pieces))
    assert len(containers) > 1
    moved = repo.put({"big": DATA}, codec="raw")
    repo.store.delete([container_key(containers[-1])])
    gone = sum(piece.raw for piece in pieces if piece.container == containers[-1])
    result = repo.get(rows, out, threads=2, moved=lambda _: moved[0])
    assert tree(out) == {"big": DATA}
    assert result.resumed == SIZE - gone


def test_chunks_in_any_order(repo, store, rows, out):
    """Whichever chunks a part has, the others are fetched: holes in the middle, too."""
    pieces = list(pieces_of(rows[0], NodeReader(repo.store).load))
    part = interrupted(repo, store, rows, out)
    for seed in range(4):
        chosen = random.Random(seed).sample(range(len(pieces)), len(pieces) // 2)
        with open(part, "wb") as file:
            for i in chosen:
                offset = sum(piece.raw for piece in pieces[:i])
                file.seek(offset)
                file.write(DATA[offset : offset + pieces[i].raw])
        result = repo.get(rows, out)
        assert result.resumed == sum(pieces[i].raw for i in chosen)
        assert tree(out) == {"big": DATA}
        (out / "big").unlink()
