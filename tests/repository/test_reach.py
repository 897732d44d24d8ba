"""What versions reach: exactly what their manifests name, read once, counted right, kept on this machine."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save

from mandapa.content.fetch import pieces_of
from mandapa.content.tree import NodeReader, Tree, child_address
from mandapa.digest import digest
from mandapa.errors import CorruptionError, NotFoundError
from mandapa.format.manifest import (
    Branch,
    ChildRow,
    Chunk,
    FileRow,
    LargeFileRow,
    Leaf,
    NodeAddress,
    Part,
    UrlRow,
    encode_node,
    node_digest,
)
from mandapa.format.pack import HEADER
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.reach import Reach
from mandapa.repository.repository import Repository
from mandapa.repository.version import address_of, root_of
from mandapa.testing.faults import CountingObjectStore

TENSORS = 80


def checkpoint(step: int) -> bytes:
    """Tensors, of which the first two change with each step, by a little."""
    rng = np.random.default_rng(0)
    tensors = {f"layer.{at:03}": rng.normal(size=20_000).astype(np.float32) for at in range(TENSORS)}
    for at in range(2):
        tensors[f"layer.{at:03}"] *= np.float32(1 + 1e-4 * step)
    return save(tensors)


@pytest.fixture(scope="module")
def full():
    """The objects of a repository with large files, deltas, URLs, a tree of two levels, and content that is shared."""
    repo = Repository.create(MemoryObjectStore("reach-full"), codec="dense", threads=2)
    for step in range(3):
        with repo.artifact("model").transaction() as txn:
            txn.add_bytes("checkpoint/model.safetensors", checkpoint(step))
            txn.add_url("data", "s3://elsewhere/data")
            txn.add_bytes("log.txt", b"step\n" * step)
    for change in range(2):
        with repo.artifact("files").transaction() as txn:
            for at in range(3000) if change == 0 else range(7):
                txn.add_bytes(f"data/{at:05}", b"%d of %d\n" % (at, change))
    with repo.artifact("copy").transaction() as txn:
        txn.copy("model:v1", "checkpoint", at="from-model")
    with repo.artifact("empty").transaction(metadata={"a": 1}) as txn:
        pass
    return dict(repo.place._objects)


@pytest.fixture
def store(full):
    made = MemoryObjectStore()
    made._objects.update(full)
    return made


@pytest.fixture
def repo(store):
    return Repository(store, threads=0)


def versions(repo):
    return {
        f"{artifact.name}:v{number}": version
        for artifact in repo.artifacts()
        for number, version in artifact.state().versions.items()
    }


def truth(store, root):
    """The ranges that a version reaches, by another way: the walk that readers take."""
    reader = NodeReader(store)
    top = root_of(root)
    found = {(top.container, top.offset, top.stored)}
    nodes = [reader.load(top)]
    while nodes:
        node = nodes.pop()
        below = []
        if isinstance(node, Branch):
            below = [child_address(row, node.containers) for row in node.rows]
        elif isinstance(node, Leaf):
            below = [
                child_address(part, node.containers)
                for row in node.rows
                if isinstance(row, LargeFileRow)
                for part in row.parts
            ]
        found |= {(at.container, at.offset, at.stored) for at in below}
        nodes += [reader.load(at) for at in below]
    for located in Tree(reader, top).rows():
        if not isinstance(located.row, UrlRow):
            for piece in pieces_of(located, reader.load):
                found |= {(one.container, one.offset, one.stored) for one in piece.chain()}
    return found


def named(reach, ids):
    """The ranges of ids: (container, offset, stored)."""
    owners = [reach.containers[at] for at in reach.container_of(ids).tolist()]
    offsets = reach._known.column(1)[ids].tolist()
    return set(zip(owners, offsets, reach.stored(ids).tolist(), strict=True))


def test_the_repository_has_all_kinds(repo):
    """The tests below look at large files, deltas, branches and URLs."""
    kinds = set()
    for version in versions(repo).values():
        tree = Tree(repo.reader, root_of(version.root))
        kinds.add(type(repo.reader.load(tree.root)))
        kinds |= {type(located.row) for located in tree.rows()}
        for located in tree.rows():
            if not isinstance(located.row, UrlRow):
                kinds |= {len(piece.chain()) for piece in pieces_of(located, repo.reader.load)}
    assert {Leaf, Branch, FileRow, LargeFileRow, UrlRow, 1, 2} <= kinds


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_exactly_what_a_manifest_names(store, tmp_path, threads, cached):
    """Every range of nodes, parts, chunks and bases, once, and no other; read, or known from before."""
    if cached:
        before = Reach(Repository(store, cache_dir=tmp_path))
        before.fetch([version.root for version in versions(Repository(store)).values()])
        before.close()
    repo = Repository(store, threads=threads, cache_dir=tmp_path)
    reach = Reach(repo)
    for address, version in versions(repo).items():
        ids = reach.of(version.root)
        assert ids.dtype == np.int64
        assert (np.diff(ids) > 0).all()
        expected = truth(store, version.root)
        assert named(reach, ids) == expected, address
        assert len(ids) == len(expected)
        assert reach.total(ids) == sum([stored for _, _, stored in expected])
        assert {reach.containers[at] for at in reach.container_of(ids)} == set(
            Tree(repo.reader, root_of(version.root)).containers()
        )


def test_a_union_is_the_union(repo):
    """Of any roots, some twice, or none."""
    reach = Reach(repo)
    roots = [version.root for version in versions(repo).values()]
    for some in ([], roots[:1], roots[1:4] + roots[2:3], roots):
        ids = reach.union(some)
        expected = set().union(*[reach.of(root).tolist() for root in some])
        assert ids.tolist() == sorted(expected)


def test_exclusive_bytes(repo):
    """What no other group has, by sets; and how many groups have an id."""
    reach = Reach(repo)
    groups = [reach.of(version.root) for version in versions(repo).values()]
    sets = [set(group.tolist()) for group in groups]
    expected = []
    for at, own in enumerate(sets):
        others = set().union(*(sets[:at] + sets[at + 1 :]))
        expected.append(sum(reach.stored(np.array(sorted(own - others), np.int64)).tolist()))
    assert reach.exclusive(groups) == expected
    assert any(expected)
    counts = reach.counted(groups)
    assert [counts[at] for at in range(len(counts))] == [sum(at in one for one in sets) for at in range(len(counts))]


def test_a_node_is_read_once(store, tmp_path):
    """By one object, and by a machine; a version more costs its own nodes; one request a node."""
    counting = CountingObjectStore(store)
    repo = Repository(counting, threads=0, cache_dir=tmp_path)
    roots = [version.root for version in versions(repo).values()]
    nodes = {address for root in roots for address in nodes_of(store, root)}
    counting.reset()
    reach = Reach(repo)
    reach.fetch(roots)
    assert counting.requests == {"get_ranges": len(nodes)}
    before = [reach.of(root).tolist() for root in roots]
    reach.close()
    again = Reach(Repository(counting, threads=0, cache_dir=tmp_path))
    counting.reset()
    assert [named(again, again.of(root)) for root in roots] == [named(reach, np.array(ids)) for ids in before]
    again.close()
    assert counting.requests == {}
    with repo.artifact("files").transaction() as txn:
        txn.add_bytes("data/00003", b"new")
    new = versions(repo)[txn.version.address].root
    added = nodes_of(store, new) - nodes
    assert len(added) == 2
    counting.reset()
    last = Reach(Repository(counting, threads=0, cache_dir=tmp_path))
    counting.reset()
    assert named(last, last.of(new)) == truth(store, new)
    assert counting.requests == {"get_ranges": 2}
    last.close()
    counting.reset()
    assert named(last, Reach(Repository(store, cache_dir=tmp_path)).of(new)) == truth(store, new)


def nodes_of(store, root):
    reader = NodeReader(store)
    found = set()
    todo = [root_of(root)]
    while todo:
        address = todo.pop()
        found.add(address)
        node = reader.load(address)
        if isinstance(node, Branch):
            todo += [child_address(row, node.containers) for row in node.rows]
        elif isinstance(node, Leaf):
            todo += [
                child_address(p, node.containers) for r in node.rows if isinstance(r, LargeFileRow) for p in r.parts
            ]
    return found


def test_without_a_folder_it_is_known_in_memory(store):
    """As long as the repository is open."""
    counting = CountingObjectStore(store)
    repo = Repository(counting, threads=0)
    roots = [version.root for version in versions(repo).values()]
    reach = Reach(repo)
    expected = [named(reach, reach.of(root)) for root in roots]
    reach.close()
    counting.reset()
    again = Reach(repo)
    assert [named(again, again.of(root)) for root in roots] == expected
    assert counting.requests == {}


def test_a_node_that_is_gone(store, tmp_path):
    """Is an error for each version that needs it, and for no other; what is half known is not kept as known."""
    counting = CountingObjectStore(store)
    repo = Repository(counting, threads=0, cache_dir=tmp_path)
    all_ = versions(repo)
    victim = all_["files:v0"].root
    mine = nodes_of(store, victim)
    others = set().union(*[nodes_of(store, v.root) for name, v in all_.items() if name != "files:v0"])
    top = root_of(victim)
    gone = {at.container for at in mine - others if at != top} - {at.container for at in others}
    if not gone:  # of one commit, all nodes stand in one container: lose a leaf that the next version shares
        gone = {top.container}
    objects = dict(store._objects)
    for container in gone:
        store.delete([f"meta/{container[1:].hex()}"])
    reach = Reach(repo)
    lost = []
    for name, version in all_.items():
        needs = {at.container for at in nodes_on(objects, version.root)}
        if needs & gone:
            lost.append(name)
            with pytest.raises(NotFoundError):
                reach.of(version.root)
        else:
            assert named(reach, reach.of(version.root)) == truth(store, version.root)
    assert "files:v0" in lost
    assert "model:v0" not in lost
    with pytest.raises(NotFoundError):
        reach.union([version.root for version in all_.values()])
    reach.close()
    store._objects.update(objects)
    again = Reach(Repository(store, cache_dir=tmp_path))
    for version in all_.values():
        assert named(again, again.of(version.root)) == truth(store, version.root)


def nodes_on(objects, root):
    store = MemoryObjectStore()
    store._objects.update(objects)
    return nodes_of(store, root)


def put_nodes(store, *nodes):
    """Their addresses in one container, without the table, which no reader of versions looks at."""
    encoded = [encode_node(node) for node in nodes]
    container = b"m" + bytes(range(16))
    store.put(f"meta/{container[1:].hex()}", HEADER + b"".join([stored for _, stored in encoded]))
    at, found = 16, []
    for raw, stored in encoded:
        found.append(NodeAddress(container, at, len(stored), digest(raw)))
        at += len(stored)
    return found


def child(leaf, address, *, path):
    digest_ = node_digest(leaf) if not isinstance(leaf, Part) else bytes(32)
    return ChildRow(path, 0, address.offset, address.stored, address.hash, digest_, 1, 1)


def test_a_child_of_another_level_is_refused(repo, store):
    """Than its parent says: corruption, with leaves and with lists of chunks."""
    leaf = Leaf([], [UrlRow("a", "s3://b", None, "")])
    [at] = put_nodes(store, leaf)
    wrong = Branch([at.container], 2, [child(leaf, at, path="a")])
    at, top = put_nodes(store, leaf, wrong)
    with pytest.raises(CorruptionError, match="level"):
        Reach(repo).of(address_of(top))
    part = Part([at.container], [Chunk(0, 16, 1, 1, 0, bytes(32))])
    [at] = put_nodes(store, part)
    wrong = Branch([at.container], 1, [child(part, at, path="a")])
    at, top = put_nodes(store, part, wrong)
    with pytest.raises(CorruptionError, match="level"):
        Reach(repo).of(address_of(top))
    [at] = put_nodes(store, leaf)
    fine = Branch([at.container], 1, [child(leaf, at, path="a")])
    at, top = put_nodes(store, leaf, fine)
    assert len(Reach(repo).of(address_of(top))) == 2


def test_bytes_that_are_no_node_are_refused(repo, store):
    """Their hash is another: corruption for that version, not for its neighbours in the container."""
    one, two = Leaf([], [UrlRow("a", "s3://b", None, "")]), Leaf([], [UrlRow("b", "s3://b", None, "")])
    first, second = put_nodes(store, one, two)
    lie = NodeAddress(second.container, second.offset, second.stored, first.hash)
    beyond = NodeAddress(second.container, 1 << 20, second.stored, second.hash)
    reach = Reach(repo)
    reach.fetch([address_of(at) for at in (first, second, lie, beyond)])
    assert len(reach.of(address_of(first))) == len(reach.of(address_of(second))) == 1
    for bad in (lie, beyond):
        with pytest.raises(CorruptionError):
            reach.of(address_of(bad))


def test_a_child_of_no_bytes_is_refused(repo, store):
    """No node is empty."""
    leaf = Leaf([], [UrlRow("a", "s3://b", None, "")])
    [at] = put_nodes(store, leaf)
    other = b"m" + bytes(16)
    empty = NodeAddress(other, 16, 0, bytes(32))
    store.put(f"meta/{other[1:].hex()}", bytes(100))
    rows = [child(leaf, at, path="a"), msgspec.structs.replace(child(leaf, empty, path="b"), container=1)]
    at, top = put_nodes(store, leaf, Branch([at.container, other], 1, rows))
    with pytest.raises(CorruptionError):
        Reach(repo).of(address_of(top))


def test_one_call_asks_for_few_bytes(repo, store):
    """However many addresses name the same ones: memory is bounded by what a call may take together."""
    asked = []

    class Watching(CountingObjectStore):
        def get_ranges(self, key, ranges):
            asked.append((len(ranges), sum(length for _, length in ranges)))
            return super().get_ranges(key, ranges)

    size = 3 << 20
    container = b"m" + bytes(range(16))
    store.put(f"meta/{container[1:].hex()}", bytes(size + 16))
    lies = [address_of(NodeAddress(container, 16, size, bytes([at]) * 32)) for at in range(20)]
    small = [address_of(NodeAddress(container, 16, 10, bytes([at]) * 32)) for at in range(200)]
    reach = Reach(Repository(Watching(store), threads=0))
    reach.fetch([*lies, *small])
    assert sum(count for count, _ in asked) == 220
    assert max(total for _, total in asked) < 5 << 20
    assert max(count for count, _ in asked) == 64
    assert len(asked) <= 20 + 5
    for root in lies + small:
        with pytest.raises(CorruptionError):
            reach.of(root)


# -- what is kept -----------------------------------------------------------------------------------------------------


def kept(folder: Path) -> Path:
    [path] = folder.glob("*.nodes.sqlite")
    return path


def fill(store, tmp_path):
    repo = Repository(store, cache_dir=tmp_path)
    reach = Reach(repo)
    reach.fetch([version.root for version in versions(repo).values()])
    reach.close()
    return repo


def check(store, tmp_path):
    repo = Repository(store, cache_dir=tmp_path)
    reach = Reach(repo)
    for version in versions(repo).values():
        assert named(reach, reach.of(version.root)) == truth(store, version.root)
    reach.close()


@pytest.mark.parametrize("harm", ["rubbish", "cut", "row", "foreign", "missing row"])
def test_a_damaged_file_is_made_anew(store, tmp_path, harm):
    """Whatever is wrong with it: answers are right, and the next time it is of use again."""
    fill(store, tmp_path)
    path = kept(tmp_path)
    if harm == "rubbish":
        path.write_bytes(b"no database" * 1000)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        with sqlite3.connect(path) as db:
            if harm == "row":
                [(value,)] = db.execute("SELECT value FROM kept WHERE length(key)=4").fetchall()
                half = len(value) // 2
                db.execute("UPDATE kept SET value=? WHERE length(key)=4", (value[:half] + b"!" + value[half + 1 :],))
            elif harm == "foreign":
                db.execute("PRAGMA user_version=77")
            else:
                db.execute("DELETE FROM kept WHERE length(key)=4")
        db.close()
    check(store, tmp_path)
    counting = CountingObjectStore(store)
    repo = Repository(counting, threads=0, cache_dir=tmp_path)
    roots = [version.root for version in versions(repo).values()]
    counting.reset()
    reach = Reach(repo)
    for root in roots:
        reach.of(root)
    assert counting.requests == {}


def test_two_at_once(store, tmp_path):
    """Who comes second does not mix its numbers into those of the first."""
    repo = Repository(store, cache_dir=tmp_path)
    every = list(versions(repo).values())
    one, two = Reach(repo), Reach(Repository(store, cache_dir=tmp_path))
    one.fetch([version.root for version in every[:3]])
    two.fetch([version.root for version in reversed(every[2:])])
    one.close()
    two.close()
    check(store, tmp_path)


def test_many_additions_become_one(store, tmp_path):
    """The number of rows stays small, and what they say together stays right."""
    repo = Repository(store, cache_dir=tmp_path)
    for at in range(40):
        with repo.artifact("grows").transaction() as txn:
            txn.add_bytes(f"f{at}", b"x" * at)
        reach = Reach(repo)
        reach.of(versions(repo)[txn.version.address].root)
        reach.close()
    with sqlite3.connect(kept(tmp_path)) as db:
        [(rows,)] = db.execute("SELECT count(*) FROM kept").fetchall()
    db.close()
    assert rows <= 17
    check(store, tmp_path)


def test_what_no_version_has_is_dropped(store, tmp_path):
    """When all versions were asked for, and most nodes served none; the rest stays known."""
    repo = fill(store, tmp_path)
    before = kept(tmp_path).stat().st_size
    reach = Reach(repo)
    root = versions(repo)["copy:v0"].root
    reach.of(root)
    reach.close(whole=True)
    with sqlite3.connect(kept(tmp_path)) as db:
        [(size,)] = db.execute("SELECT sum(length(value)) FROM kept").fetchall()
    db.close()
    assert size < before / 5
    counting = CountingObjectStore(store)
    repo = Repository(counting, threads=0, cache_dir=tmp_path)
    counting.reset()
    again = Reach(repo)
    assert named(again, again.of(root)) == truth(store, root)
    assert counting.requests == {}
    check(store, tmp_path)


def test_numpy_is_loaded_only_when_something_is_counted():
    """Importing the module is light."""
    code = "import sys, mandapa.repository.reach; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_looking_and_keeping(tmp_path, seed):
    """Versions come and go, some looks see all and drop the rest, some lose against others, some are never kept."""
    rng = random.Random(seed)
    store = MemoryObjectStore()
    repo = Repository.create(store, threads=0)
    roots = []
    late = None
    for step in range(40):
        with repo.artifact(f"a{rng.randrange(3)}").transaction() as txn:
            for _ in range(rng.randrange(1, 4)):
                txn.add_bytes(f"f{rng.randrange(6)}", rng.randbytes(rng.choice([10, 10, 1000, 70_000])))
            if rng.random() < 0.3:
                txn.add_bytes("same", b"same" * 20_000)
        roots.append(versions(repo)[txn.version.address].root)
        if rng.random() < 0.1:
            roots.pop(rng.randrange(len(roots)))
        reach = Reach(Repository(store, threads=0, cache_dir=tmp_path))
        asked = rng.sample(roots, rng.randrange(len(roots) + 1))
        whole = rng.random() < 0.3
        if whole:
            asked = roots
        if rng.random() < 0.5:
            reach.fetch(asked)
        for root in asked:
            ids = reach.of(root)
            assert named(reach, ids) == truth(store, root), step
            assert len(ids) == len(truth(store, root)), step
        expected = set().union(*[truth(store, root) for root in asked])
        union = reach.union(asked)
        assert named(reach, union) == expected
        assert len(union) == len(expected)  # a range that two versions share has one number
        if late is not None and rng.random() < 0.5:
            late.close(whole=rng.random() < 0.5)
        late = reach if rng.random() < 0.2 else None
        if late is None:
            reach.close(whole=whole)
