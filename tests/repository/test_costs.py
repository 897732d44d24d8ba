"""What things cost in requests and bytes. Requests are counted in memory and without threads, so numbers are exact."""

from __future__ import annotations

import random

import pytest

from mandapa.object_store import MemoryObjectStore
from mandapa.repository.repository import Repository
from mandapa.testing.faults import CountingObjectStore

READS = ("get", "get_ranges", "head", "list")
FILES = 100_000
FILE = 5_000
CHANGES = 30


class Until(MemoryObjectStore):
    """Knows what was written before a commit was acknowledged; heads of logs come after that."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def put(self, key, data):
        self._note(key, data)
        super().put(key, data)

    def create(self, key, data):
        self._note(key, data)
        super().create(key, data)

    def _note(self, key, data):
        self.writes.append((key.rpartition("/")[0].split("/")[0], len(data)))

    def take(self):
        """(kinds written in order, bytes) since the last call."""
        taken, self.writes = self.writes, []
        return [kind for kind, _ in taken], {kind: sum(n for k, n in taken if k == kind) for kind, _ in taken}


def reads(counting):
    return sum(counting.requests[verb] for verb in READS)


def change(repo, path, data, name="big"):
    with repo.artifact(name).transaction() as txn:
        txn.add_bytes(path, data)
    return txn.version


@pytest.fixture(scope="module")
def big():
    """An artifact of 100,000 small files; and their paths."""
    rng = random.Random(0)
    paths = [f"data/{i // 1000:04}/sample-{rng.getrandbits(40):010x}.bin" for i in range(FILES)]
    store = Until()
    repo = Repository.create(store, threads=0)
    with repo.artifact("big").transaction() as txn:
        for number, path in enumerate(paths):
            txn.add_bytes(path, number.to_bytes(8, "little"))
    store.take()
    return store, paths


# -- one file of very many ---------------------------------------------------------------------------------------------


def cost_of_changes(store, paths, open_repo, seed):
    """The worst of many one-file commits: bytes besides the file, writes until acknowledged, reads."""
    rng = random.Random(seed)
    worst = {"bytes": 0, "writes": 0, "reads": 0}
    for _ in range(CHANGES):
        repo, counting = open_repo()
        store.take()
        counting.reset()
        content = rng.randbytes(FILE)
        path = rng.choice(paths)
        version = change(repo, path, content)
        kinds, sizes = store.take()
        assert kinds == ["meta", "log", *["head"] * (len(kinds) - 2)]
        worst["bytes"] = max(worst["bytes"], sum(sizes.values()) - sizes.get("head", 0) - FILE)
        worst["writes"] = max(worst["writes"], sum(kind != "head" for kind in kinds))
        worst["reads"] = max(worst["reads"], reads(counting))
        assert version.asset_count == FILES
        with version.open(path) as file:
            assert file.read() == content
    return worst


def test_one_file_of_a_hundred_thousand_by_who_has_just_opened_the_repository(big):
    """Besides the file at most 120 KB, 3 writes until the record is there, and 10 reads, worst of 30."""
    store, paths = big

    def fresh():
        counting = CountingObjectStore(store)
        return Repository(counting, threads=0), counting

    worst = cost_of_changes(store, paths, fresh, 1)
    assert worst["bytes"] <= 120_000
    assert worst["writes"] <= 3
    assert worst["reads"] <= 10


def test_one_file_of_a_hundred_thousand_by_who_has_read_the_log(big):
    """The same with a repository that has made a version before: 4 reads at most."""
    store, paths = big
    counting = CountingObjectStore(store)
    repo = Repository(counting, threads=0)
    change(repo, paths[0], b"warm")

    worst = cost_of_changes(store, paths, lambda: (repo, counting), 2)
    assert worst["bytes"] <= 120_000
    assert worst["writes"] <= 3
    assert worst["reads"] <= 4


def test_one_asset_of_a_hundred_thousand_is_opened(big):
    """A fresh reader of an open repository needs the log, two levels of the manifest, and the bytes."""
    store, paths = big
    counting = CountingObjectStore(store)
    repo = Repository(counting, threads=0)
    counting.reset()
    version = repo["big:v0"]
    with version.open(paths[77_777]) as file:
        assert file.read() == (77_777).to_bytes(8, "little")
    # Catalog: is there a next record? The log: its head, the head's record, the next record. Root, leaf, chunk.
    assert reads(counting) <= 8
    assert counting.bytes_read <= 400_000
    counting.reset()
    with version.open(paths[77_777]) as file:
        assert file.read() == (77_777).to_bytes(8, "little")
    assert counting.requests == {"get_ranges": 1}
    assert counting.bytes_read <= 100


# -- small things ------------------------------------------------------------------------------------------------------


@pytest.fixture
def store():
    return Until()


@pytest.fixture
def small(store):
    """An open repository with one version of two files, and its counting store."""
    counting = CountingObjectStore(store)
    repo = Repository.create(counting, threads=0)
    with repo.artifact("a").transaction("first") as txn:
        txn.add_bytes("x", b"x")
        txn.add_bytes("large", random.Random(1).randbytes(5_000_000))
    store.take()
    counting.reset()
    return repo, counting


def test_a_small_commit_is_two_writes_and_the_head(small, store):
    """Meta, then the record; the head after it. To learn that nothing is new takes two reads."""
    repo, counting = small
    change(repo, "x", b"y", "a")
    kinds, _ = store.take()
    assert kinds == ["meta", "log", "head"]
    assert counting.requests == {"get": 2, "put": 2, "create": 1}


def test_the_first_commit_of_an_artifact_registers_it_first(small, store):
    """Catalog, its head, then as any other commit."""
    repo, _ = small
    change(repo, "x", b"new", "other")
    kinds, _ = store.take()
    assert kinds == ["catalog", "head", "meta", "log", "head"]


def test_large_files_go_to_packs_before_the_manifest(small, store):
    """A commit of 5 MB: the pack, meta, the record, the head."""
    repo, _ = small
    change(repo, "more", random.Random(2).randbytes(5_000_000), "a")
    kinds, sizes = store.take()
    assert kinds == ["packs", "meta", "log", "head"]
    assert sizes["packs"] + sizes["meta"] <= 5_000_000 + 6_000


def test_a_look_up_is_two_requests_when_nothing_is_new(small):
    """Is there a new record in the catalog, in the log? Two requests, whatever the address."""
    repo, counting = small
    repo.artifact("a").alias("best", 0)
    for address in ("a", "a:latest", "a:v0", "a:best", f"a:@{repo['a'].digest[:12]}"):
        counting.reset()
        assert repo[address].number == 0
        assert counting.requests == {"get": 2}


def test_an_alias_moves_with_three_requests_and_the_head(small, store):
    """Two reads that nothing is new, the record; no object but the log's."""
    repo, counting = small
    repo.artifact("a").alias("best", 0)
    assert counting.requests == {"get": 2, "create": 1, "put": 1}
    assert store.take()[0] == ["log", "head"]


def test_a_transaction_without_changes_writes_nothing(small, store):
    """Equal bytes again, no message: no version, no write, not even a chunk."""
    repo, counting = small
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes("x", b"x")
    assert not txn.made
    assert txn.version.number == 0
    assert store.take()[0] == []
    assert counting.requests["put"] + counting.requests["create"] == 0


def test_a_range_of_a_large_asset(small):
    """Opening asks for the leaf once; one range is one request, and no more bytes than the chunks that it touches."""
    _, counting = small
    version = Repository(counting, threads=0)["a"]
    content = random.Random(1).randbytes(5_000_000)
    counting.reset()
    with version.open("large") as file:
        file.seek(2_345_678)
        assert file.read(1000) == content[2_345_678:2_346_678]
    assert counting.requests == {"get_ranges": 2}  # the leaf, the range
    assert counting.bytes_read <= 1_000_000
    counting.reset()
    with version.open("large") as file:
        assert file.read() == content
    assert counting.requests["get_ranges"] == reads(counting) <= 2


def test_metadata_of_a_version_costs_nothing(small):
    """Number, message, sizes, names stand in the record, which was read."""
    repo, counting = small
    version = repo["a"]
    counting.reset()
    assert (version.number, version.message, version.asset_count, len(version.assets)) == (0, "first", 2, 2)
    assert version.size == 5_000_001
    assert version.names == ("latest",)
    assert counting.requests == {}


# -- folders -----------------------------------------------------------------------------------------------------------


def make_folder(root, count):
    rng = random.Random(3)
    contents = {}
    for number in range(count):
        path = f"{number % 50:02}/{number:05}.bin"
        contents[path] = rng.randbytes(rng.randrange(50, 300))
    for folder in sorted({path.split("/")[0] for path in contents}):
        (root / folder).mkdir(parents=True)
    for path, data in contents.items():
        (root / path).write_bytes(data)
    return contents


def test_a_folder_of_ten_thousand_files(tmp_path, store):
    """At most 5 requests more than the data needs: first commit, unchanged, one file changed, and restoring it."""
    contents = make_folder(tmp_path / "data", 10_000)
    counting = CountingObjectStore(store)
    repo = Repository.create(counting, threads=0)
    with repo.artifact("other").transaction("so that the catalog is there") as txn:
        txn.add_bytes("x", b"x")

    def commit():
        counting.reset()
        store.take()
        with repo.artifact("folder").transaction() as txn:
            txn.add(tmp_path / "data")
        return txn, store.take()

    size = sum(map(len, contents.values()))
    txn, (kinds, sizes) = commit()
    assert txn.made
    assert txn.version.asset_count == 10_000
    assert txn.version.size == size
    needed = -(-size // (16 << 20)) + 1  # content and the manifest
    assert sum(counting.requests.values()) <= needed + 5
    assert sizes["meta"] + sizes.get("packs", 0) <= size + 200 * len(contents)

    txn, (kinds, _) = commit()
    assert not txn.made
    assert kinds == []
    assert sum(counting.requests.values()) <= 5

    changed = "07/00007.bin"
    (tmp_path / "data" / changed).write_bytes(b"changed")
    txn, (kinds, sizes) = commit()
    assert kinds == ["meta", "log", "head"]
    assert sizes["meta"] <= 120_000
    assert sum(counting.requests.values()) <= 2 + 5

    counting.reset()
    result = txn.version.download(tmp_path / "out")
    assert result.files == 10_000
    # Two meta containers; chunks stand together, nodes apart from them.
    assert sum(counting.requests.values()) <= 2 + 5
    contents[changed] = b"changed"
    assert {path: (tmp_path / "out" / path).read_bytes() for path in contents} == contents


# -- what a version is -------------------------------------------------------------------------------------------------


def test_what_has_no_chunks_reads_no_leaves_for_them(store):
    """A URL, or a removal, in 20,000 assets reads the nodes of its own path, not what could share chunks."""
    repo = Repository.create(store, threads=0)
    with repo.artifact("a").transaction() as txn:
        for number in range(20_000):
            txn.add_bytes(f"d/{number:05}", number.to_bytes(4, "little"))
    for act in (lambda txn: txn.add_url("u/x", "s3://elsewhere/x", size=1), lambda txn: txn.remove("d/00007")):
        counting = CountingObjectStore(store)
        with Repository(counting, threads=0).artifact("a").transaction() as txn:
            act(txn)
        assert counting.requests["get_ranges"] <= 3


def wanted(count=1500):
    """A folder's content: path -> bytes; enough for several leaves."""
    return {f"d{i % 7}/f{i:04}": f"content {i // 2}".encode() * (i % 5) for i in range(count)}


def digest_of(files, executable=()):
    """The digest of a version of exactly these files, made in one go."""
    return make(files, executable).digest


def make(files, executable=(), tmp=None):
    repo = Repository.create(MemoryObjectStore(), threads=0)
    with repo.artifact("a").transaction("also when there is no file") as txn:
        for path, data in files.items():
            txn.add_bytes(path, data)
        for path in executable:
            txn.add(tmp, at=path)
    return txn.version


@pytest.mark.parametrize("seed", range(6))
def test_the_digest_does_not_depend_on_how_content_came_about(seed):
    """Random orders, several versions, detours, removals, copies from elsewhere: equal content, equal digest."""
    rng = random.Random(seed)
    files = wanted()
    repo = Repository.create(MemoryObjectStore(), threads=0, codec=rng.choice(["raw", "auto"]))
    with repo.artifact("source").transaction() as txn:
        for path in rng.sample(sorted(files), 200):
            txn.add_bytes(f"elsewhere/{path}", files[path])
    todo = rng.sample(sorted(files), len(files))
    have = {}
    while todo or have != files:
        with repo.artifact("a").transaction("step") as txn:
            for path in todo[: rng.randrange(100, 600)]:
                if f"elsewhere/{path}" in repo["source"].assets and rng.random() < 0.5:
                    txn.copy("source", f"elsewhere/{path}", at=path)
                    have[path] = files[path]
                else:
                    have[path] = files[path] if rng.random() < 0.8 else rng.randbytes(20)
                    txn.add_bytes(path, have[path])
            for i in range(rng.randrange(30)):
                have[f"detour/{i}"] = rng.randbytes(10)
                txn.add_bytes(f"detour/{i}", have[f"detour/{i}"])
            if have and rng.random() < 0.3:
                victim = rng.choice(sorted(have))
                txn.remove(victim)
                del have[victim]
            if any(path.startswith("detour/") for path in have) and rng.random() < 0.7:
                txn.remove("detour")
                have = {path: data for path, data in have.items() if not path.startswith("detour/")}
        assert txn.version.asset_count == len(have)
        todo = [path for path in rng.sample(sorted(files), len(files)) if have.get(path) != files[path]]
        if not todo and have != files:
            with repo.artifact("a").transaction() as txn:
                txn.remove("detour")
            have = {path: data for path, data in have.items() if path in files}
    version = repo["a"]
    assert version.digest == digest_of(files)
    assert {path: version.assets[path].size for path in version.assets} == {p: len(d) for p, d in files.items()}
    # The tree is the same, too: nothing of the detours is left in its shape.
    assert [len(leaf.rows) for leaf in version.tree.leaves()] == [len(leaf.rows) for leaf in make(files).tree.leaves()]


def test_any_difference_makes_another_digest(tmp_path):
    """A byte, a path, a file more or less, an empty file, the x bit, a URL instead of a file: all digests differ."""
    files = wanted(300)
    path = "d3/f0003"
    script = tmp_path / "script"
    script.write_bytes(files[path])
    script.chmod(0o755)
    other = dict(files)
    other[path] = bytes([files[path][0] ^ 1]) + files[path][1:]
    renamed = {("d3/f0003x" if p == path else p): data for p, data in files.items()}
    case = {("d3/F0003" if p == path else p): data for p, data in files.items()}
    fewer = {p: data for p, data in files.items() if p != path}
    swapped = files | {"d0/f0007": files["d1/f0008"], "d1/f0008": files["d0/f0007"]}
    assert swapped != files
    repo = Repository.create(MemoryObjectStore(), threads=0)
    with repo.artifact("url").transaction() as txn:
        for p, data in fewer.items():
            txn.add_bytes(p, data)
        txn.add_url(path, "https://example.org/f", size=len(files[path]))
    digests = {
        "as it is": digest_of(files),
        "a byte": digest_of(other),
        "a path": digest_of(renamed),
        "case": digest_of(case),
        "fewer": digest_of(fewer),
        "an empty file more": digest_of(files | {"d3/f0003-empty": b""}),
        "swapped": digest_of(swapped),
        "x bit": make(fewer, [path], script).digest,
        "url": repo["url"].digest,
        "nothing": digest_of({}),
    }
    assert len(set(digests.values())) == len(digests)
    script.chmod(0o644)
    assert make(fewer, [path], script).digest == digests["as it is"]
