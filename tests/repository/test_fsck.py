"""The check of a repository: what can still be read, samples, and that nothing stops it."""

from __future__ import annotations

import random
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from test_corruption import Forge, leaf

from mandapa.errors import CorruptionError, InvalidInputError
from mandapa.format.keys import container_key, head_key, log_key
from mandapa.format.manifest import Branch
from mandapa.format.records import RepackOp, encode_marker
from mandapa.object_store import LocalObjectStore, MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository
from mandapa.testing.faults import CountingObjectStore
from mandapa.testing.server import serve


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


@pytest.fixture(params=["memory", "local", "s3"])
def store(request, tmp_path):
    if request.param == "memory":
        return MemoryObjectStore()
    if request.param == "local":
        return LocalObjectStore(tmp_path / "repo", fsync=False)
    return request.getfixturevalue("server").s3(prefix=tmp_path.name.replace("_", "-"))


def noise(seed, size):
    return random.Random(seed).randbytes(size)


def author():
    return Author("tests", random=random.Random(1))


def filled(store, steps=5, codec="raw"):
    """``net`` with a large file that changes in each version, one that stays, and small ones; and ``other``."""
    repo = Repository.create(store, codec=codec, author=author())
    for step in range(steps):
        with repo.artifact("net").transaction(f"step {step}") as txn:
            txn.add_bytes("model.bin", noise(step, 200_000))
            if step == 0:
                txn.add_bytes("data/train.bin", noise(100, 150_000))
                txn.add_bytes("notes.txt", b"a note\n")
                txn.add_url("elsewhere", "https://example.org/x")
    with repo.artifact("other").transaction() as txn:
        txn.add_bytes("x.bin", noise(200, 100_000))
    return repo


def place_of(repo, address, path):
    """Key of the container, offset and length of a file's first chunk."""
    located = repo[address].tree.get(path)
    chunk = located.row.chunks[0]
    return container_key(located.table[chunk.container]), chunk.offset, chunk.stored


def replaced(store, key, data):
    store.delete([key])
    store.put(key, data)


def flip(store, key, at):
    data = bytearray(store.get(key))
    data[at] ^= 1
    replaced(store, key, bytes(data))


def pack_keys(store):
    return [info.key for prefix in ("packs/", "meta/") for info in store.list(prefix)]


# -- what can still be read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 4])
def test_a_lost_pack_costs_what_stood_in_it(store, threads):
    """One finding; of the version that needs it the other assets are whole, and so are the versions next to it."""
    repo = filled(store)
    key = place_of(repo, "net:v2", "model.bin")[0]
    store.delete([key])
    report = fsck(Repository(store, threads=threads))
    assert [(found.invariant, found.where) for found in report.findings] == [("I7", key)]
    [loss] = report.losses
    assert (loss.address, loss.lost, loss.whole, loss.unnamed) == ("net:v2", ("model.bin",), 3, 0)
    assert (loss.older, loss.newer) == ("net:v1", "net:v3")
    assert loss.problem == f"model.bin: {key} is missing"
    assert report.hurt == ["net:v2"]
    assert report.unreadable == []


def test_what_many_versions_share_is_told_once(store):
    """One finding for what is lost; a loss for each version, none of which has a whole one near it."""
    repo = filled(store)
    key = place_of(repo, "net:v4", "data/train.bin")[0]
    store.delete([key])
    report = fsck(Repository(store))
    assert len(report.findings) == 1
    assert report.hurt == [f"net:v{number}" for number in range(5)]
    assert {(loss.older, loss.newer) for loss in report.losses} == {("", "")}
    first, *later = report.losses
    assert {loss.lost for loss in later} == {("data/train.bin",)}
    assert "data/train.bin" in first.lost


def test_a_cut_pack_keeps_what_stands_before_the_cut(store):
    """Only chunks that end beyond it are lost."""
    repo = Repository.create(store, codec="raw", author=author())
    with repo.artifact("net").transaction() as txn:
        txn.add_bytes("a.bin", noise(1, 100_000))
        txn.add_bytes("b.bin", noise(2, 100_000))
    places = {path: place_of(repo, "net", path) for path in ("a.bin", "b.bin")}
    assert len({key for key, *_ in places.values()}) == 1
    later = max(places, key=lambda path: places[path][1])
    key, offset, stored = places[later]
    replaced(store, key, bytes(store.get(key))[: offset + stored - 1])
    [loss] = fsck(Repository(store)).losses
    assert (loss.lost, loss.whole) == ((later,), 1)
    version = Repository(store)["net"]
    [sound] = {"a.bin", "b.bin"} - {later}
    assert version.open(sound).read() == noise(1 if sound == "a.bin" else 2, 100_000)


def test_a_damaged_leaf_costs_its_assets_and_no_others(store):
    """Even their names are lost; how many says the node above."""
    repo = Repository.create(store, author=author())
    with repo.artifact("many").transaction() as txn:
        for number in range(3000):
            txn.add_bytes(f"{number:06}", b"%d" % number)
    tree = repo["many"].tree
    branch = tree.reader.load(tree.root)
    lost = branch.rows[1]
    key = container_key(branch.containers[lost.container])
    flip(store, key, lost.offset + lost.stored // 2)
    report = fsck(Repository(store))
    assert [(found.invariant, found.where) for found in report.findings] == [("I4", "many:v0")]
    assert key in report.findings[0].problem
    [loss] = report.losses
    assert (loss.whole, loss.unnamed, loss.lost) == (3000 - lost.assets, lost.assets, ())


def test_a_lost_root_costs_all(store):
    """Nothing of the version can be read, and all of it is counted."""
    repo = filled(store)
    store.delete([repo["other"].artifact.state().versions[0].root.object])
    report = fsck(Repository(store), deep=True)
    assert {found.invariant for found in report.findings} == {"I4"}
    [loss] = report.losses
    assert (loss.address, loss.whole, loss.unnamed, loss.lost) == ("other:v0", 0, 1, ())


def test_a_flipped_byte_is_found_by_a_deep_check(store):
    """With the path of the file that it is in, once."""
    repo = filled(store)
    key, offset, stored = place_of(repo, "net:v3", "model.bin")
    flip(store, key, offset + stored // 2)
    assert fsck(Repository(store)).ok
    report = fsck(Repository(store), deep=True)
    assert [(found.invariant, found.where) for found in report.findings] == [("I8", key)]
    [loss] = report.losses
    assert (loss.address, loss.lost, loss.whole) == ("net:v3", ("model.bin",), 3)


def test_swapped_packs_hurt_those_that_need_them(store):
    """Both are sound containers, in the wrong places."""
    repo = filled(store)
    keys = [place_of(repo, address, "model.bin")[0] for address in ("net:v1", "net:v3")]
    contents = [bytes(store.get(key)) for key in keys]
    for key, data in zip(keys, reversed(contents), strict=True):
        replaced(store, key, data)
    report = fsck(Repository(store), deep=True)
    assert {found.where for found in report.findings} == set(keys)
    assert {(loss.address, loss.lost, loss.newer) for loss in report.losses} == {
        ("net:v1", ("model.bin",), "net:v2"),
        ("net:v3", ("model.bin",), "net:v4"),
    }


def test_what_is_called_whole_can_be_read(store):
    """Whatever is lost: each asset that is not named as lost comes back, each that is does not."""
    repo = filled(store, steps=3)
    truth = {}
    for number in range(3):
        version = repo.artifact("net").version(number)
        for asset in version.assets.values():
            if asset.kind == "file":
                truth[number, asset.path] = version.open(asset.path).read()
    for key in pack_keys(store):
        data = bytes(store.get(key))
        store.delete([key])
        report = fsck(Repository(store))
        store.put(key, data)
        losses = {loss.address: loss for loss in report.losses}
        store.delete([key])
        broken = Repository(store)
        for (number, path), content in truth.items():
            loss = losses.get(f"net:v{number}")
            try:
                read = broken.artifact("net").version(number).open(path).read()
            except Exception:
                assert loss is not None
                assert path in loss.lost or loss.unnamed
            else:
                assert read == content
                assert loss is None or path not in loss.lost
        store.put(key, data)


class Racing:
    """A store to which something happens just before objects are listed."""

    def __init__(self, store, happen):
        self._store = store
        self._happen = happen

    def list(self, prefix, **options):
        if prefix == "packs/" and self._happen is not None:
            happen, self._happen = self._happen, None
            happen()
        return self._store.list(prefix, **options)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_a_version_deleted_meanwhile_is_not_blamed(store):
    """Its packs went after its log was read: no finding. One that another version needs is a finding all the same."""
    repo = filled(store)
    mine = place_of(repo, "net:v2", "model.bin")[0]
    shared = place_of(repo, "net:v2", "data/train.bin")[0]

    def happen():
        Repository(store).artifact("net").delete(2)
        store.delete([mine])

    report = fsck(Racing(store, happen))
    assert report.ok
    assert report.losses == []
    store.delete([shared])
    assert [found.where for found in fsck(store).findings] == [shared]


def test_a_version_moved_meanwhile_is_not_blamed(store):
    """A repack moved its root, and a gc took the old manifest, after its log was read: no finding."""
    repo = filled(store)
    root = repo["other"].artifact.state().versions[0].root

    def happen():
        moved = msgspec.structs.replace(root, object="meta/" + "ab" * 16)
        store.put(moved.object, bytes(store.get(root.object)))
        log = Repository(store).artifact("other").open_log()
        log.append("cd" * 16, lambda _: [RepackOp(0, root, moved)], author())
        store.delete([root.object])

    report = fsck(Racing(store, happen), deep=True)
    assert report.ok
    assert fsck(store, deep=True).ok


# -- samples -----------------------------------------------------------------------------------------------------------


class Watching(CountingObjectStore):
    """Remembers which objects were read whole."""

    def reset(self):
        super().reset()
        self.whole = []

    def get(self, key, **options):
        self.whole.append(key)
        return super().get(key, **options)

    @property
    def containers(self):
        return {key for key in self.whole if key.startswith(("packs/", "meta/"))}


def sampled(store, share, seed, threads=4):
    """The report, and which containers were read."""
    watching = Watching(store)
    repo = Repository(watching, threads=threads)
    watching.reset()
    report = fsck(repo, sample=share, seed=seed)
    assert not watching.requests.keys() & {"put", "create", "delete"}
    return report, watching.containers


def test_a_sample_reads_the_share_that_was_asked_for():
    """By bytes, one container more at most; the same by the same seed, others by another one; and says how much."""
    store = MemoryObjectStore()
    filled(store, steps=40)
    sizes = {info.key: info.size for info in store.list("") if info.key.startswith(("packs/", "meta/"))}
    total_size = sum(sizes.values())
    chosen = {}
    for seed in range(6):
        report, keys = sampled(store, 0.2, seed)
        assert report.ok
        read = sum(sizes[key] for key in keys)
        assert 0.2 * total_size <= read <= 0.2 * total_size + max(sizes.values())
        told = report.sampled
        assert (told.share, told.seed, told.containers, told.bytes) == (0.2, seed, len(keys), read)
        assert (told.of_containers, told.of_bytes) == (len(sizes), total_size)
        assert sampled(store, 0.2, seed, threads=0)[1] == keys
        chosen[seed] = keys
    assert all(a != b for a, b in pairwise(chosen.values()))
    assert sampled(store, 1, 0)[1] == set(sizes)
    assert len(sampled(store, 1e-9, 3)[1]) == 1


def test_a_sample_finds_what_is_in_it(store):
    """A flipped byte is found by exactly those seeds that choose its container, with version and path."""
    repo = filled(store)
    key, offset, stored = place_of(repo, "net:v3", "model.bin")
    flip(store, key, offset + stored // 2)
    seen = set()
    for seed in range(12):
        report, keys = sampled(store, 0.3, seed)
        seen.add(key in keys)
        assert report.ok == (key not in keys)
        if not report.ok:
            assert {(found.invariant, found.where) for found in report.findings} == {("I8", key)}
            assert [(loss.address, loss.lost) for loss in report.losses] == [("net:v3", ("model.bin",))]
    assert seen == {True, False}


def test_a_sample_of_all_finds_what_a_deep_check_finds():
    """Whichever byte of whichever container is flipped: the same versions are hurt, by the same containers."""
    store = MemoryObjectStore()
    filled(store, steps=3)
    rng = random.Random(5)
    for key in pack_keys(store):
        data = bytes(store.get(key))
        for _ in range(4):
            at = rng.randrange(len(data))
            flip(store, key, at)
            deep, all_ = fsck(store, deep=True), fsck(store, sample=1.0)
            assert not deep.ok
            assert {found.invariant for found in all_.findings} == {found.invariant for found in deep.findings}
            assert all_.hurt == deep.hurt
            assert [loss.lost for loss in all_.losses] == [loss.lost for loss in deep.losses]
            replaced(store, key, data)


def test_a_sample_decodes_deltas():
    """A chunk that stands on another one is decoded upon it: damage in the one shows in the other's version, too."""
    store = MemoryObjectStore()
    repo = Repository.create(store, codec="dense", author=author())
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(400_000).astype(np.float32)
    for _ in range(2):
        weights = weights + rng.standard_normal(weights.size).astype(np.float32) * np.float32(1e-5)
        with repo.artifact("net").transaction() as txn:
            header = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (weights.size, weights.nbytes)
            txn.add_bytes("m.safetensors", len(header).to_bytes(8, "little") + header + weights.tobytes())
    located = repo["net:v1"].tree.get("m.safetensors")
    deltas = [chunk for chunk in located.row.chunks if chunk.base is not None]
    assert deltas
    report = fsck(store, sample=1.0)
    assert report.ok
    key = container_key(located.table[deltas[0].container])
    data = bytes(store.get(key))
    flip(store, key, deltas[0].offset + deltas[0].stored // 2)
    report = fsck(store, sample=1.0)
    assert report.hurt == ["net:v1"]
    replaced(store, key, data)
    base = deltas[0].base
    flip(store, container_key(located.table[base.container]), base.offset + base.stored // 2)
    assert fsck(store, sample=1.0).hurt == ["net:v0", "net:v1"]


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_a_share_is_a_part(share):
    """Above 0, up to all; and a deep check reads all anyway."""
    store = MemoryObjectStore()
    filled(store, steps=1)
    with pytest.raises(InvalidInputError, match="share"):
        fsck(store, sample=share)
    with pytest.raises(InvalidInputError, match="deep"):
        fsck(store, sample=0.5, deep=True)


def test_a_sample_of_nothing(store):
    """A repository without containers is checked as well."""
    Repository.create(store, author=author())
    report = fsck(store, sample=0.5)
    assert report.ok
    assert (report.sampled.containers, report.sampled.of_bytes) == (0, 0)


# -- nothing stops it --------------------------------------------------------------------------------------------------


def hurt_other(store, repo):
    """Damage that a check which goes on must find: in the last artifact."""
    key, offset, stored = place_of(repo, "other", "x.bin")
    flip(store, key, offset + stored // 2)
    return ("I8", key)


@pytest.mark.parametrize("marker", [b"rubbish", b"", None])
def test_a_lost_marker_does_not_hide_the_rest(store, marker):
    """It is a finding, and everything else is checked by the store alone."""
    repo = filled(store)
    expected = hurt_other(store, repo)
    store.delete(["mandapa.json"])
    if marker is not None:
        store.put("mandapa.json", marker)
    report = fsck(store, deep=True)
    assert {(found.invariant, found.where) for found in report.findings} == {("I1", "mandapa.json"), expected}
    assert report.hurt == ["other:v0"]
    assert report.checked["versions"] == 6


def test_a_newer_repository_is_not_guessed_at(store):
    """Where the marker says another format, nothing else can be judged."""
    repo = filled(store)
    hurt_other(store, repo)
    replaced(store, "mandapa.json", encode_marker(repo.id).replace(b'"format":1', b'"format":2'))
    report = fsck(store, deep=True)
    assert [found.invariant for found in report.findings] == ["I1"]
    assert report.checked == {}


def damaged_log(store, repo, name, seq, data=None):
    id_ = repo.catalog.state.names[name]
    store.delete([head_key(id_), log_key(id_, seq)])
    if data is not None:
        store.put(log_key(id_, seq), data)


@pytest.mark.parametrize("data", [None, b"rubbish\n", b""])
def test_a_broken_log_does_not_hide_the_rest(store, data):
    """The artifact is told to be unreadable, what stood before the break is checked, and so are other artifacts."""
    repo = filled(store)
    expected = hurt_other(store, repo)
    lost = place_of(repo, "net:v1", "model.bin")[0]
    store.delete([lost, place_of(repo, "net:v4", "model.bin")[0]])
    damaged_log(store, repo, "net", 3, data)
    report = fsck(Repository(store), deep=True)
    assert {(found.invariant, found.where) for found in report.findings} == {("I3", "net"), ("I7", lost), expected}
    assert report.unreadable == ["net"]
    assert report.hurt == ["net:v1", "other:v0"]


def test_a_log_that_its_head_saves(store):
    """A damaged record below a head that counts: readers go on, and all versions are checked."""
    repo = filled(store)
    lost = place_of(repo, "net:v4", "model.bin")[0]
    store.delete([lost])
    id_ = repo.catalog.state.names["net"]
    if not [info for info in store.list("head/") if info.key == head_key(id_)]:
        pytest.fail("there is no head to be saved by")
    replaced(store, log_key(id_, 2), b"rubbish\n")
    report = fsck(Repository(store))
    assert {(found.invariant, found.where) for found in report.findings} == {("I3", "net"), ("I7", lost)}
    assert report.unreadable == []
    assert report.hurt == ["net:v4"]


def test_a_lost_catalog_does_not_hide_the_rest(store):
    """Nothing can be opened; what the logs say is checked, by their ids."""
    repo = filled(store)
    expected = hurt_other(store, repo)
    ids = dict(repo.catalog.state.names)
    store.delete([head_key("catalog")])
    replaced(store, log_key("catalog", 1), b"rubbish\n")
    report = fsck(store, deep=True)
    assert {(found.invariant, found.where) for found in report.findings} == {("I2", "catalog"), expected}
    assert set(report.unreadable) == set(ids.values())
    assert report.hurt == [f"{ids['other']}:v0"]
    assert report.checked["versions"] == 6


def test_all_kinds_of_damage_at_once(store):
    """Marker, a log, a list of a gc, a head, a leaf, a pack: each is told, once."""
    repo = filled(store)
    for name in ("aa", "zz"):
        with repo.artifact(name).transaction() as txn:
            txn.add_bytes("x", name.encode())
    store.put("gc/" + "0" * 32, b"rubbish")
    expected = {
        hurt_other(store, repo),
        ("I1", "mandapa.json"),
        ("I10", "gc/" + "0" * 32),
        ("I3", "aa"),
        ("I4", "zz:v0"),
    }
    store.put(head_key(repo.catalog.state.names["net"]), b"rubbish")
    expected.add(("I9", head_key(repo.catalog.state.names["net"])))
    lost = place_of(repo, "net:v2", "model.bin")[0]
    store.delete([lost])
    expected.add(("I7", lost))
    damaged_log(store, repo, "aa", 0, b"\n")
    root = repo["zz"].artifact.state().versions[0].root
    flip(store, root.object, root.offset + root.length // 2)
    replaced(store, "mandapa.json", b"{")
    report = fsck(store, deep=True)
    found = [(one.invariant, one.where) for one in report.findings if one.where != root.object]
    assert sorted(found) == sorted(expected)
    assert set(report.hurt) == {"net:v2", "other:v0", "zz:v0"}


# -- paths -------------------------------------------------------------------------------------------------------------


def twins(paths):
    """Whether one path is a file and a folder."""
    return any(f"{other}/" in {path[: len(other) + 1] for path in paths} for other in paths)


def test_files_that_are_folders_are_found_across_nodes():
    """However the paths are cut into leaves and branches, as a look at all of them would."""
    rng = random.Random(3)
    parts = ["a", "a-", "b", "a.b", "c"]
    answers = set()
    for number in range(60):
        paths = sorted({"/".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(rng.randint(4, 14))})
        forge = Forge()
        cuts = sorted(rng.sample(range(1, len(paths)), min(rng.randint(1, 5), len(paths) - 1)))
        leaves = [leaf(*paths[start:end]) for start, end in pairwise([0, *cuts, len(paths)])]
        level = 1
        nodes = leaves
        while len(nodes) > 2 and rng.random() < 0.7:
            half = rng.randint(1, len(nodes) - 1)
            nodes = [forge.branch(*nodes[:half], level=level), forge.branch(*nodes[half:], level=level)]
            level += 1
        forge.version(forge.branch(*nodes, level=level) if len(nodes) > 1 else nodes[0])
        problems = [found.problem for found in fsck(forge.repo).findings if "a file and a folder" in found.problem]
        answers.add(twins(paths))
        assert bool(problems) == twins(paths), (number, paths)
    assert answers == {True, False}


def test_names_of_what_is_lost_are_bounded(monkeypatch):
    """Where all is lost, each asset is counted; paths are listed as far as they are not too many, none is forgotten."""
    monkeypatch.setattr("mandapa.repository.losses._NAMES", 50)
    store = MemoryObjectStore()
    repo = Repository.create(store, codec="raw", author=author())
    for step in range(3):
        with repo.artifact("net").transaction() as txn:
            for number in range(40 if step == 0 else 1):
                txn.add_bytes(f"{number:02}", noise(1000 * step + number, 66_000))
            txn.add_bytes("small", b"%d" % step)
    store.delete([info.key for info in store.list("packs/")])
    report = fsck(store)
    assert [(len(loss.lost), loss.more, loss.whole) for loss in report.losses] == [(40, 0, 1), (10, 30, 1), (0, 40, 1)]
    assert report.losses[1].lost == tuple(f"{number:02}" for number in range(10))


def test_losses_in_large_manifests_are_what_a_reader_meets():
    """Several leaves, shared by several versions, and any container lost: as many assets are whole as can be read."""
    store = MemoryObjectStore()
    repo = Repository.create(store, codec="raw", author=author())
    paths = [f"{number:06}" for number in range(1300)]
    for step in range(3):
        with repo.artifact("many").transaction() as txn:
            for number, path in enumerate(paths[:: 1 if step == 0 else 400]):
                txn.add_bytes(path, noise(step * 5000 + number, 70_000 if number % 300 == 0 else 20))
    assert isinstance(repo.reader.load(repo["many"].tree.root), Branch)
    kinds = set()
    for key in pack_keys(store):
        data = bytes(store.get(key))
        store.delete([key])
        losses = {loss.address: loss for loss in fsck(store, sample=1.0).losses}
        for version in Repository(store, threads=0).artifact("many").versions():
            lost = set()
            for path in paths:
                try:
                    version.open(path).read()
                except CorruptionError:
                    lost.add(path)
            loss = losses.get(version.address)
            assert (loss is None) == (not lost)
            if loss is not None:
                kinds.add((bool(loss.lost), bool(loss.unnamed)))
                assert set(loss.lost) <= lost
                assert (loss.whole, len(loss.lost) + loss.unnamed) == (len(paths) - len(lost), len(lost))
        store.put(key, data)
    assert kinds >= {(True, False), (False, True), (True, True)}
