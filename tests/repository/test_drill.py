"""Restore drills: what is restorable is proven so, whatever is not is named, and nothing stays behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from mandapa.errors import (
    AccessDeniedError,
    CorruptionError,
    FormatVersionError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from mandapa.format.keys import container_key, head_key, log_key
from mandapa.format.manifest import Leaf, NodeAddress, encode_node, node_digest
from mandapa.format.pack import HEADER, KIND_NODE, PackEntry, pack_footer, read_pack_table
from mandapa.object_store import LocalObjectStore, MemoryObjectStore
from mandapa.repository.drill import RESTORED, drill, drill_all
from mandapa.repository.log import Author
from mandapa.repository.rehearsal import Rehearsal, logical_digest
from mandapa.repository.repository import Repository
from mandapa.repository.version import address_of
from mandapa.testing.server import Knobs, serve


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    """A folder, and a server that speaks S3."""
    if request.param == "local":
        return LocalObjectStore(tmp_path / "repo", fsync=False)
    return request.getfixturevalue("server").s3(prefix=tmp_path.name.replace("_", "-"))


@pytest.fixture
def folder(tmp_path):
    """Where drills make their folders; whatever happens, it is empty at the end."""
    (tmp_path / "room").mkdir()
    yield tmp_path / "room"
    assert os.listdir(tmp_path / "room") == []


def noise(seed, size):
    return random.Random(seed).randbytes(size)


def weights(path, seed):
    rng = np.random.default_rng(seed)
    np.savez(path, first=rng.random((300, 200), np.float32), second=np.arange(7))
    return path


def filled(store, tmp_path, codec="raw"):
    """A repository with two versions of ``net``, files in packs of their own, and one of ``other``."""
    repo = Repository.create(store, codec=codec, threads=2, author=Author("ana@hall-1"))
    for step in range(2):
        with repo.artifact("net").transaction(f"step {step}") as txn:
            txn.add(weights(tmp_path / "model.npz", step))
            txn.add_bytes("big.bin", noise(step, 300_000))
            txn.add_bytes("notes/a.txt", b"a note\n")
            txn.add_url("data.csv", "https://example.org/data.csv", size=1 << 50)
    with repo.artifact("other").transaction() as txn:
        txn.add_bytes("x.bin", noise(9, 100_000))
    return repo


def chunk_of(repo, address, path):
    """Key of the container, offset and length of a file's first chunk."""
    located = repo[address].tree.get(path)
    chunk = located.row.chunks[0]
    return container_key(located.table[chunk.container]), chunk.offset, chunk.stored


def replaced(store, key, data):
    store.delete([key])
    store.put(key, data)


def test_a_whole_version_is_proven_and_recorded(store, tmp_path, folder):
    """Every file is counted, tensors are loaded, a URL is not fetched, and the facts say when and by whom."""
    version = filled(store, tmp_path)["net"]
    seen = []
    done = drill(version, folder=folder, progress=seen.append)
    assert (done.ok, done.problems, done.unloaded) == (True, (), ())
    assert (done.files, done.urls, done.tensors) == (3, 1, 2)
    assert done.bytes == sum(asset.size for asset in version.assets.values() if asset.kind == "file")
    assert done.tensor_bytes == 300 * 200 * 4 + 7 * 8
    assert 0 < done.seconds < 60
    assert sum(seen) <= done.bytes
    assert done.recorded
    facts = version.artifact.version(1).facts
    assert facts == {"mandapa/restored": {"at": done.at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), "by": "ana@hall-1"}}
    assert version.artifact.version(0).facts == {}


def test_a_drill_may_leave_no_trace(store, tmp_path, folder):
    """With record=False nothing is written to the store."""
    version = filled(store, tmp_path)["net"]
    before = [(info.key, info.last_modified) for info in store.list("")]
    done = drill(version, record=False, folder=folder)
    assert (done.ok, done.recorded, done.unrecorded) == (True, False, None)
    assert [(info.key, info.last_modified) for info in store.list("")] == before


@pytest.mark.parametrize("codec", ["auto", "dense"])
def test_deltas_are_restored(tmp_path, folder, codec):
    """Chunks that stand on chunks of other versions come back, too."""
    repo = filled(LocalObjectStore(tmp_path / "repo", fsync=False), tmp_path, codec)
    assert drill(repo["net"], record=False, folder=folder).ok


def lose_the_pack(store, repo):
    store.delete([chunk_of(repo, "net", "big.bin")[0]])


def cut_the_pack(store, repo):
    key, offset, stored = chunk_of(repo, "net", "big.bin")
    replaced(store, key, bytes(store.get(key))[: offset + stored // 2])


def flip_a_bit(store, repo):
    key, offset, stored = chunk_of(repo, "net", "big.bin")
    data = bytearray(store.get(key))
    data[offset + stored // 2] ^= 1
    replaced(store, key, bytes(data))


def swap_the_packs(store, repo):
    keys = [chunk_of(repo, address, "big.bin")[0] for address in ("net:v0", "net:v1")]
    contents = [bytes(store.get(key)) for key in keys]
    for key, data in zip(keys, reversed(contents), strict=True):
        replaced(store, key, data)


def put_another_chunk(store, repo):
    """A container that is sound in itself, with other bytes in the chunk's place."""
    key, offset, stored = chunk_of(repo, "net", "big.bin")
    data = bytearray(store.get(key))
    entries = list(read_pack_table(data, key=key))
    at = next(i for i, entry in enumerate(entries) if entry.offset == offset)
    data[offset : offset + stored] = other = noise(77, stored)
    from mandapa.digest import digest

    entries[at] = entries[at]._replace(hash=digest(other))
    end = entries[-1].offset + entries[-1].stored
    replaced(store, key, bytes(data[:end]) + pack_footer(entries, end))


@pytest.mark.parametrize("damage", [lose_the_pack, cut_the_pack, flip_a_bit, swap_the_packs, put_another_chunk])
def test_damaged_bytes_are_named(store, tmp_path, folder, damage):
    """The file that they belong to is a problem, the other files are whole, and nothing is recorded."""
    repo = filled(store, tmp_path)
    damage(store, repo)
    found = drill(Repository(store)["net"], folder=folder)
    assert not found.ok
    paths = [path for path, _ in found.problems]
    assert "big.bin" in paths
    assert set(paths) <= {"big.bin", "model.npz"}  # which stand in one pack
    assert found.files == 3 - len(paths)
    assert "notes/a.txt" not in paths
    assert not found.recorded
    assert found.unrecorded is None
    assert Repository(store)["net"].facts == {}


def test_exchanged_logs_are_no_restore(store, tmp_path, folder):
    """A log in the place of another is corruption, not another content."""
    repo = filled(store, tmp_path)
    version = repo["net"]
    first, second = (repo.catalog.state.names[name] for name in ("net", "other"))
    store.delete([head_key(first), head_key(second)])
    keys = [log_key(first, 0), log_key(second, 0)]
    contents = [bytes(store.get(key)) for key in keys]
    for key, data in zip(keys, reversed(contents), strict=True):
        replaced(store, key, data)
    with pytest.raises(CorruptionError):
        drill(version, folder=folder)
    results = dict(drill_all(Repository(store), folder=folder))
    assert {name: type(one) for name, one in results.items()} == {"net": CorruptionError, "other": CorruptionError}


def append(repo, name, op):
    log = repo.artifact(name).open_log()
    log.append(
        repo.author.new_id().hex(), lambda state: [msgspec.structs.replace(op, number=state.next_number)], repo.author
    )


def put_node(store, repo, node):
    raw, stored = encode_node(node)
    from mandapa.digest import digest

    entry = PackEntry(len(HEADER), len(stored), len(raw), 1, KIND_NODE, digest(raw))
    id_ = repo.author.new_id()
    data = HEADER + stored
    store.put(f"meta/{id_.hex()}", data + pack_footer([entry], len(data)))
    return address_of(NodeAddress(b"m" + id_, entry.offset, entry.stored, entry.hash))


def test_a_record_with_another_digest_is_refused(store, tmp_path, folder):
    """A version whose record says another digest than its manifest has is not restorable as what it says it is."""
    repo = filled(store, tmp_path)
    op = repo["net"].artifact.state().versions[1].op
    append(repo, "net", msgspec.structs.replace(op, digest="00" * 32))
    found = drill(repo["net:v2"], folder=folder)
    assert [path for path, _ in found.problems] == [""]
    assert found.files == 0


def test_a_version_of_a_newer_mandapa_is_not_judged(tmp_path, folder):
    """It may well be restorable, by another release."""
    store = LocalObjectStore(tmp_path / "repo", fsync=False)
    repo = filled(store, tmp_path)
    op = repo["net"].artifact.state().versions[1].op
    append(repo, "net", msgspec.structs.replace(op, requires=["telepathy"]))
    with pytest.raises(FormatVersionError, match="telepathy"):
        drill(repo["net:v2"], folder=folder)


def test_a_row_with_another_digest_is_found(store, tmp_path, folder):
    """All chunks are what the manifest says, and the file is not: only reading it again tells."""
    repo = filled(store, tmp_path)
    with repo.artifact("net").transaction(base=None) as txn:
        txn.add_bytes("large.bin", noise(5, 9 << 20))
        txn.add_bytes("small.txt", b"small")
    tree = repo["net"].tree
    leaf = tree.reader.load(tree.root)
    assert len(leaf.rows[0].chunks) > 1
    lying = Leaf(leaf.containers, [msgspec.structs.replace(leaf.rows[0], digest=b"\1" * 32), *leaf.rows[1:]])
    op = repo["net"].artifact.state().versions[2].op
    append(repo, "net", msgspec.structs.replace(op, root=put_node(store, repo, lying), digest=node_digest(lying).hex()))
    found = drill(repo["net:v3"], folder=folder)
    [(path, problem)] = found.problems
    assert path == "large.bin"
    assert "01" * 32 in problem
    assert found.files == 1


def test_an_unreadable_leaf_does_not_hide_the_others(tmp_path, folder):
    """Of a large manifest with one damaged leaf the files of the others are restored; the gap is told with its size."""
    store = LocalObjectStore(tmp_path / "repo", fsync=False)
    repo = Repository.create(store, threads=2)
    with repo.artifact("many").transaction() as txn:
        for number in range(1200):
            txn.add_bytes(f"{number:06}", b"%d" % number)
    tree = repo["many"].tree
    branch = tree.reader.load(tree.root)
    lost = branch.rows[1]
    key = container_key(branch.containers[lost.container])
    data = bytearray(store.get(key))
    data[lost.offset + lost.stored // 2] ^= 0xFF
    replaced(store, key, bytes(data))
    found = drill(Repository(store)["many"], folder=folder)
    [(path, problem)] = found.problems
    assert path == lost.path
    assert f"of {lost.assets} assets" in problem
    assert found.files == 1200 - lost.assets


def test_a_deleted_version_is_not_corrupt(store, tmp_path, folder):
    """It was deleted since it was looked up, and its bytes are gone: that is what is said."""
    repo = filled(store, tmp_path)
    version = repo["net:v0"]
    Repository(store).artifact("net").delete(0)
    with pytest.raises(NotFoundError, match="deleted"):
        drill(version, folder=folder)


def test_a_version_deleted_while_it_is_drilled(store, tmp_path, folder):
    """It was restored, and that cannot be recorded any more: both are told."""
    repo = filled(store, tmp_path)
    version = repo["net:v0"]

    class Deleting(Author):
        def now(self):
            when = super().now()
            if "net" in repo.catalog.state.names and version.artifact.state().versions[0].deleted is None:
                Repository(store).artifact("net").delete(0)
            return when

    repo.author = Deleting("ana@hall-1")
    found = drill(version, folder=folder)
    assert found.ok
    assert not found.recorded
    assert isinstance(found.unrecorded, NotFoundError)
    assert "deleted" in str(found.unrecorded)


def test_who_may_not_write_has_proven_it_all_the_same(tmp_path, folder, monkeypatch):
    """The drill counts; that it could not be recorded is told with the reason."""
    version = filled(LocalObjectStore(tmp_path / "repo", fsync=False), tmp_path)["net"]

    def create(self, key, data):
        raise AccessDeniedError("s3:PutObject is not allowed")

    monkeypatch.setattr(LocalObjectStore, "create", create)
    found = drill(version, folder=folder)
    assert found.ok
    assert not found.recorded
    assert isinstance(found.unrecorded, AccessDeniedError)


def test_all_newest_versions_are_drilled(store, tmp_path, folder):
    """One that is damaged, and one whose log is, do not stop the others."""
    repo = filled(store, tmp_path)
    for name in ("aa", "zz"):
        with repo.artifact(name).transaction() as txn:
            txn.add_bytes("x", name.encode())
    with repo.artifact("gone").transaction() as txn:
        txn.add_bytes("x", b"gone")
    repo.artifact("gone").delete(0)
    flip_a_bit(store, repo)
    broken = repo.catalog.state.names["aa"]
    store.delete([head_key(broken)])
    replaced(store, log_key(broken, 0), b"rubbish\n")
    results = dict(drill_all(Repository(store), folder=folder))
    assert list(results) == ["aa", "net:v1", "other:v0", "zz:v0"]
    assert isinstance(results["aa"], CorruptionError)
    assert not results["net:v1"].ok
    assert results["other:v0"].recorded
    assert results["zz:v0"].recorded


def test_a_mirror_can_be_drilled(tmp_path, folder):
    """What is proven of the one place is not said of the other, and the mirror is a mirror still."""
    source = filled(LocalObjectStore(tmp_path / "repo", fsync=False), tmp_path)
    mirror = Repository.create(LocalObjectStore(tmp_path / "mirror", fsync=False))
    assert drill(source["net"], folder=folder).recorded
    assert source.mirror(mirror).ok
    assert RESTORED in source["net"].facts
    assert RESTORED not in mirror["net"].facts
    assert drill(mirror["net"], folder=folder).recorded
    with source.artifact("net").transaction() as txn:
        txn.add_bytes("notes/a.txt", b"another note\n")
    again = source.mirror(mirror)
    assert again.ok
    assert [one.versions for one in again.artifacts if one.artifact == "net"] == [1]
    assert mirror["net"].digest == source["net"].digest
    assert drill(source["net:v0"], folder=folder).recorded
    assert [one.records for one in source.mirror(mirror).artifacts] == [0, 0]
    assert RESTORED in mirror["net:v1"].facts
    assert RESTORED not in mirror["net:v0"].facts


def test_room_is_looked_for_first(tmp_path, folder, monkeypatch):
    """A version that does not fit is refused before anything is made; URLs take no room."""
    version = filled(LocalObjectStore(tmp_path / "repo", fsync=False), tmp_path)["net"]
    assert version.size > 1 << 49
    real = os.statvfs
    free = SimpleNamespace(f_bavail=600_000, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda where: free if str(where) == str(folder) else real(where))
    assert drill(version, record=False, folder=folder).ok
    free.f_bavail = 500_000
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: pytest.fail("a folder was made"))
    with pytest.raises(StorageError, match="500,000 left"):
        drill(version, folder=folder)


def test_a_store_of_this_process_cannot_be_drilled(tmp_path, folder):
    """Another process would see another memory."""
    version = filled(MemoryObjectStore(), tmp_path)["net"]
    with pytest.raises(InvalidInputError, match="process of its own"):
        drill(version, folder=folder)


def test_what_was_restored_is_never_run(tmp_path, folder, monkeypatch):
    """Files that are called as modules, in the working folder and in the version, are not imported."""
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\n".encode()
    store = LocalObjectStore(tmp_path / "repo", fsync=False)
    repo = Repository.create(store)
    names = ["json.py", "pickle.py", "numpy/__init__.py", "msgspec.py", "sitecustomize.py", "usercustomize.py"]
    with repo.artifact("trap").transaction() as txn:
        for name in names:
            txn.add_bytes(name, trap)
            txn.add_bytes(f"mandapa/{name}", trap)
    monkeypatch.chdir(folder)
    found = drill(repo["trap"])
    assert found.ok
    assert found.files == 2 * len(names)
    assert not (tmp_path / "sprung").exists()


def test_checkpoints_that_cannot_be_loaded_are_told(tmp_path, folder):
    """A file that was torn when it was stored is restored as it was; the drill says that no tensor comes of it."""
    store = LocalObjectStore(tmp_path / "repo", fsync=False)
    repo = Repository.create(store)
    with repo.artifact("torn").transaction() as txn:
        txn.add_bytes("model.npz", weights(tmp_path / "m.npz", 1).read_bytes()[:-100])
        txn.add_bytes("notes.md", b"PK\x03\x04 is how a zip begins")
    found = drill(repo["torn"], folder=folder)
    assert found.ok
    assert [path for path, _ in found.unloaded] == ["model.npz"]
    assert found.tensors == 0


# -- the comparison ----------------------------------------------------------------------------------------------------


def rehearse(tmp_path, spoil):
    """A rehearsal in which the disk does something to the restored folder."""
    version = filled(LocalObjectStore(tmp_path / "repo", fsync=False), tmp_path)["net"]
    target = tmp_path / "target"
    target.mkdir()
    restore = version.restore

    def restored(*args, **kwargs):
        result = restore(*args, **kwargs)
        spoil(target)
        return result

    version.restore = restored
    return Rehearsal(version, str(target), lambda _: None).run()


def flip_on_disk(target):
    data = bytearray((target / "big.bin").read_bytes())
    data[1000] ^= 1
    (target / "big.bin").write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "path", "word"),
    [
        (flip_on_disk, "big.bin", "bytes are"),
        (lambda target: os.truncate(target / "big.bin", 10), "big.bin", "has 10 bytes"),
        (lambda target: (target / "big.bin").chmod(0o755), "big.bin", "executable"),
        (lambda target: (target / "big.bin").unlink(), "big.bin", "not restored"),
        (lambda target: (target / "new").write_bytes(b""), "new", "does not have it"),
    ],
)
def test_the_disk_is_not_believed(tmp_path, spoil, path, word):
    """What the disk made of a file after it was written is a problem of that file."""
    [(found, problem)] = rehearse(tmp_path, spoil).problems
    assert found == path
    assert word in problem


@pytest.mark.parametrize("count", [0, 1, 500, 3000])
def test_the_digest_of_a_version_is_computed_from_its_rows(count):
    """As the version itself has it, whatever its shape."""
    repo = Repository.create(MemoryObjectStore(), threads=0)
    with repo.artifact("many").transaction("empty" if not count else "") as txn:
        for number in range(count):
            txn.add_bytes(f"{number:06}", b"%d" % number)
        if count:
            txn.add_url("url", "https://example.org")
    version = repo["many"]
    assert logical_digest(located.row for located in version.rows()).hex() == version.digest


# -- ends --------------------------------------------------------------------------------------------------------------


def test_nothing_stays_when_it_is_stopped(tmp_path):
    """Ctrl-C, SIGTERM and kill -9 in the middle: the folder goes, and so does the process."""
    with serve(Knobs(bandwidth=12e6)) as slow:
        store = slow.s3(prefix="slow")
        with repo_of(store).artifact("net").transaction() as txn:
            txn.add_bytes("big.bin", noise(3, 48_000_000))  # several requests, so that a file is there before the last
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": slow.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "TMPDIR": str(tmp_path),
        }
        # Who runs the tests in the background has Ctrl-C ignored, and so have all that he starts.
        heed = "signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"import runpy, signal; {heed}; runpy.run_module('mandapa.cli', None, '__main__')"
        command = [sys.executable, "-c", code, "drill", "net", "--repo", "s3://bucket/slow", "--no-record"]

        def in_the_middle():
            return any(name.startswith("mandapa-drill") and files(tmp_path / name) for name in os.listdir(tmp_path))

        for how, code in ((signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)):
            for _ in range(10):  # on a machine that is busy with other things the moment may be missed
                caller = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                until(lambda caller=caller: in_the_middle() or caller.poll() is not None)
                caller.send_signal(how)
                caller.communicate(timeout=60)
                if caller.returncode:
                    break
            assert caller.returncode == code
            until(lambda: not os.listdir(tmp_path))


def files(folder):
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def repo_of(store):
    return Repository.create(store, codec="raw")


def until(there):
    give_up = time.monotonic() + 60
    while not there():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_a_process_that_dies_is_told(tmp_path, folder, monkeypatch):
    """No verdict, its last words, and nothing left."""
    version = filled(LocalObjectStore(tmp_path / "repo", fsync=False), tmp_path)["net"]
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'Killed: out of memory' >&2\nexit 137\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(StorageError, match="out of memory"):
        drill(version, folder=folder)
    assert shutil.which(str(fake))
