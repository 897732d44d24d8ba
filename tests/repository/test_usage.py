"""What a repository takes: every number against sets of ranges, what cannot be read, what it costs to know."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime

import msgspec
import pytest

from mandapa.content.edit import edit_tree
from mandapa.content.fetch import pieces_of
from mandapa.content.index import Index
from mandapa.content.tree import NodeReader, Tree, child_address
from mandapa.content.upload import Upload
from mandapa.errors import InvalidInputError, NotFoundError, StorageError
from mandapa.format.keys import container_key, log_key
from mandapa.format.manifest import Branch, LargeFileRow, Leaf, UrlRow
from mandapa.format.records import RepackOp, decode_record, encode_record
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.log import Author
from mandapa.repository.prices import Prices
from mandapa.repository.repository import Repository
from mandapa.repository.version import address_of, root_of
from mandapa.testing.faults import CountingObjectStore

MONTHS = {"model": 3, "copy": 4, "notes": 4, "gone": 5}


class Clock:
    """A month that tests set."""

    month = 1

    def __call__(self) -> datetime:
        return datetime(2026, self.month, 1, tzinfo=UTC)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store():
    return MemoryObjectStore()


def data(seed, size=100_000):
    return random.Random(seed).randbytes(size)


@pytest.fixture
def repo(store, clock):
    """Shared content, deleted versions, a removed artifact, a version stored twice, and what nothing reaches."""
    repo = Repository.create(store, threads=0, author=Author("tests", clock=clock))

    def put(name, run="", **content):
        clock.month = MONTHS[name]
        artifact = repo.artifact(name)
        artifact.run = run
        with artifact.transaction() as txn:
            for path, bytes_ in content.items():
                txn.add_bytes(path, bytes_)
        return txn.version

    put("model", "first", weights=data(1), log=b"one\n")
    put("model", "first", weights=data(2), log=b"one\ntwo\n")
    put("model", "second", weights=data(3))
    clock.month = MONTHS["copy"]
    with repo.artifact("copy").transaction() as txn:
        txn.copy("model:v0", "weights", at="mine")
        txn.add_url("data", "s3://elsewhere/data", size=10**9)
    put("notes", a=b"a" * 10, b=b"b" * 20)
    put("gone", weights=data(4), w=data(1))
    repo.artifact("model").delete(1)
    repo.artifact("gone").remove()
    repo.artifact("notes").repack()
    store.put("packs/" + "0" * 32, bytes(1000))
    store.put("tx/1/2.3", bytes(500))
    return repo


def ranges(store, root):
    """What a version reaches, by the walk that readers take."""
    reader = NodeReader(store)
    top = root_of(root)
    found, nodes = {(top.container, top.offset, top.stored)}, [reader.load(top)]
    while nodes:
        node = nodes.pop()
        below = []
        if isinstance(node, Branch):
            below = [child_address(row, node.containers) for row in node.rows]
        elif isinstance(node, Leaf):
            parts = [part for row in node.rows if isinstance(row, LargeFileRow) for part in row.parts]
            below = [child_address(part, node.containers) for part in parts]
        found |= {(at.container, at.offset, at.stored) for at in below}
        nodes += [reader.load(at) for at in below]
    for located in Tree(reader, top).rows():
        if not isinstance(located.row, UrlRow):
            for piece in pieces_of(located, reader.load):
                found |= {(one.container, one.offset, one.stored) for one in piece.chain()}
    return found


def size(found):
    return sum(stored for _, _, stored in found)


def groups_of(repo, by):
    """Row -> ([live versions' states], [roots that no live version has])."""
    found = {}
    catalog = repo.catalog.refresh()
    ids = {id_: name for name, id_ in catalog.names.items()} | {i: f"{n} (removed)" for i, n in catalog.removed.items()}
    for id_, name in ids.items():
        state = repo.log(id_).refresh()
        for version in state.versions.values():
            key = {"artifact": name, "run": version.record.run or "(no run)", "month": version.record.at[:7]}[by]
            live, past = found.setdefault(key, ([], []))
            (past if version.deleted or state.closed else live).append(version)
            moved = [
                op.was
                for record in repo.log(id_).records
                for op in record.ops
                if isinstance(op, RepackOp) and op.version == version.op.number
            ]
            past += moved
    return found


@pytest.mark.parametrize("by", ["artifact", "run", "month"])
def test_every_number(repo, store, by):
    """Rows and totals are what sets of ranges say."""
    usage = repo.usage(by)
    groups = groups_of(repo, by)
    live = {name: [ranges(store, v.root) for v in group[0]] for name, group in groups.items()}
    past = {name: [ranges(store, getattr(p, "root", p)) for p in group[1]] for name, group in groups.items()}
    everything = set().union(*[one for some in live.values() for one in some])
    assert {row.name for row in usage.rows} == set(groups)
    for row in usage.rows:
        mine = set().union(*live[row.name])
        others = set().union(*[one for name, some in live.items() if name != row.name for one in some])
        assert row.versions == len(live[row.name])
        assert row.logical == sum(version.op.bytes for version in groups[row.name][0])
        assert row.stored == size(mine)
        assert row.exclusive == size(mine - others)
        assert row.shared == size(mine & others)
        assert row.reclaimable == size(set().union(*past[row.name]) - everything)
        assert row.objects == len({container for container, _, _ in mine})
    assert sum(row.reclaimable for row in usage.rows) > 0
    assert any(row.shared for row in usage.rows)
    assert [row.stored for row in usage.rows] == sorted([row.stored for row in usage.rows], reverse=True)
    total = usage.total
    sizes = {info.key: info.size for prefix in ("packs/", "meta/", "tx/") for info in store.list(prefix)}
    needed = {container_key(container) for container, _, _ in everything}
    assert usage.unreached == len(sizes.keys() - needed)
    assert usage.unreached_bytes == sum(sizes[key] for key in sizes.keys() - needed)
    dead = sum(sizes[key] - 64 for key in needed) - size(everything) - 48 * len(everything)
    assert total.reclaimable == usage.unreached_bytes + dead
    assert total.stored == size(everything)
    assert total.exclusive == sum(row.exclusive for row in usage.rows)
    assert total.objects == len(needed)
    assert total.versions == 4
    assert total.logical == sum(row.logical for row in usage.rows)
    assert usage.unreadable == ()


def test_rows(repo):
    """Which rows there are: removed artifacts are named so, runs and months are those of the commits."""
    rows = {row.name: row for row in repo.usage().rows}
    assert set(rows) == {"model", "copy", "notes", "gone (removed)"}
    assert (rows["model"].versions, rows["model"].deleted) == (2, 1)
    assert (rows["gone (removed)"].versions, rows["gone (removed)"].deleted) == (0, 0)
    assert rows["copy"].logical == 100_000 + 10**9
    assert {row.name: row.versions for row in repo.usage("run").rows} == {"first": 1, "second": 1, "(no run)": 2}
    assert {row.name: row.versions for row in repo.usage("month").rows} == {"2026-03": 2, "2026-04": 2, "2026-05": 0}


def test_costs(repo, store):
    """Of rows: their own bytes, and an even part of those they share. In all: every object and record there is."""
    gb = 1 << 30
    prices = Prices(storage_gb_month=gb, writes_1000=1000.0, reads_1000=1000.0, egress_gb=gb)
    usage = repo.usage("artifact", prices)
    rows = {row.name: row for row in usage.rows}
    both = rows["model"].shared
    assert both == 100_000
    assert rows["model"].cost.month == rows["model"].stored - both / 2
    assert rows["copy"].cost.month == rows["copy"].stored - both / 2
    there = [info for prefix in ("packs/", "meta/", "tx/", "log/", "catalog/") for info in store.list(prefix)]
    assert usage.total.cost.month == sum(info.size for info in there)
    assert usage.total.writes == usage.total.cost.writes == len(there)
    assert rows["model"].writes == rows["model"].objects + 3
    assert usage.total.cost.read == usage.total.objects + usage.total.cost.month
    assert usage.prices == prices


def test_an_empty_repository():
    """Takes what its catalog takes."""
    usage = Repository.create(MemoryObjectStore(), threads=0).usage()
    assert usage.rows == ()
    assert usage.total.stored == usage.total.reclaimable == usage.unreached == 0


def test_a_version_that_cannot_be_read_is_named(repo, store):
    """The others are counted; a deleted version whose bytes are gone is not worth a word."""
    version = repo["copy"]
    store.delete([root_key(version)])
    deleted = repo.artifact("model").deleted()[0]
    store.delete([root_key(deleted)])
    before = repo.usage()
    assert [one.address for one in before.unreadable] == ["copy:v0"]
    assert "not there" in before.unreadable[0].problem
    assert {row.name: row.versions for row in before.rows if row.versions} == {"model": 2, "notes": 1}
    assert {row.name: row.deleted for row in before.rows} == {"model": 0, "notes": 0, "gone (removed)": 0}


def root_key(version):
    return container_key(root_of(version._state.root).container)


def test_a_version_that_moves_or_goes_meanwhile(repo, store):
    """A repack or a delete between the log and the manifest, and a clean-up after it: no version is blamed."""
    other = Repository(store, threads=0)

    class Late(CountingObjectStore):
        done = False

        def get_ranges(self, key, ranges):
            if not self.done:
                type(self).done = True
                kept = root_key(other["notes"])
                gone = root_key(other["copy"])
                with other.artifact("notes").transaction() as txn:
                    txn.add_bytes("c", b"c")
                move(other, "notes", 0)
                other.artifact("copy").delete(0)
                store.delete([kept, gone])
            return super().get_ranges(key, ranges)

    usage = Repository(Late(store), threads=0).usage()
    assert Late.done
    assert usage.unreadable == ()
    assert {row.name: (row.versions, row.deleted) for row in usage.rows} == {
        "model": (2, 1),
        "notes": (1, 0),
        "copy": (0, 1),
        "gone (removed)": (0, 0),
    }


def move(repo, name, number):
    """Store a version's manifest at another place, as a repack does."""
    version = repo[f"{name}:v{number}"]
    rows = {located.row.path: located for located in version.rows()}
    with Upload(
        repo.store,
        index=Index(None),
        codec="raw",
        threads=0,
        new_id=repo.author.new_id,
        nodes=repo.reader,
        link=repo.link,
    ) as upload:
        for path in list(rows):
            with version.open(path) as file:
                rows[path] = upload.add_bytes(path, file.read())
        root = edit_tree(NodeReader(repo.store), upload, None, rows)
        upload.flush()
    op = RepackOp(number, version._state.root, address_of(root.address))
    log = repo.artifact(name).open_log()
    log.append(repo.author.new_id().hex(), lambda _: [op], repo.author)


def test_what_it_costs_to_know(repo, store, tmp_path):
    """Once this machine has looked: a listing each of records and of objects, and one look at the catalog."""
    Repository(store, threads=0, cache_dir=tmp_path).usage()
    counting = CountingObjectStore(store)
    again = Repository(counting, threads=0, cache_dir=tmp_path)
    counting.reset()
    usage = again.usage()
    assert counting.requests == {"list": 4, "get": 1}
    assert usage == repo.usage()


def test_what_was_read_before_an_error_is_kept(repo, store, tmp_path):
    """A store that fails midway costs the rest, not all again; progress is told."""

    class Failing(CountingObjectStore):
        left = 3

        def get_ranges(self, key, ranges):
            self.left -= 1
            if self.left < 0:
                raise StorageError("away", retryable=False)
            return super().get_ranges(key, ranges)

    seen = []
    with pytest.raises(StorageError):
        Repository(Failing(store), threads=0, cache_dir=tmp_path).usage(progress=lambda what, n: seen.append((what, n)))
    assert seen == [("manifest nodes", 1), ("manifest nodes", 2), ("manifest nodes", 3)]
    whole, rest = CountingObjectStore(store), CountingObjectStore(store)
    assert Repository(whole, threads=0).usage() == Repository(rest, threads=0, cache_dir=tmp_path).usage()
    assert rest.requests["get_ranges"] == whole.requests["get_ranges"] - 3


def test_another_by_is_refused(repo):
    """With the words that there are."""
    with pytest.raises(InvalidInputError, match="artifact, run, month"):
        repo.usage("color")


def test_a_month_that_is_none(repo, store):
    """A record may say any time: its versions are in a row of 1970, and nothing fails."""
    log = repo.register("odd")
    with repo.artifact("odd").transaction() as txn:
        txn.add_bytes("x", b"x")
    line = bytes(store.get(log_key(log.id, 0)))
    record = decode_record(line, key="", seq=0)
    store.put(log_key(log.id, 0), encode_record(msgspec.structs.replace(record, at="when it was ready")))
    store.delete([f"head/{log.id}"])
    assert "1970-01" in {row.name for row in Repository(store, threads=0).usage("month").rows}


# -- prices -----------------------------------------------------------------------------------------------------------


def test_prices_from_files(tmp_path):
    """TOML and JSON say the same; what is left out is free; a date may be one."""
    toml = tmp_path / "p.toml"
    toml.write_text('storage_gb_month = 0.01\nwrites_1000 = 1\ncurrency = "EUR"\ndate = 2026-11-01\n')
    other = tmp_path / "p.json"
    other.write_text(json.dumps({"storage_gb_month": 0.01, "writes_1000": 1, "currency": "EUR", "date": "2026-11-01"}))
    expected = Prices(storage_gb_month=0.01, writes_1000=1, currency="EUR", date="2026-11-01")
    assert Prices.load(toml) == Prices.load(other) == expected
    cost = expected.cost(stored=200 << 30, writes=5000, reads=7)
    assert (cost.month, cost.writes, cost.read) == (2.0, 5.0, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "storage_gb_month = -1",
        "storage_gb_month = nan",
        "storage_gb_month = inf",
        'storage_gb_month = "a lot"',
        "storage = 1",
        "storage_gb_month 1",
        "[]",
        "\udcff",
        "x = " + "[" * 5000,
        "a = 1\n" + "#" * 70_000,
        'currency = "' + "x" * 201 + '"',
    ],
)
@pytest.mark.parametrize("name", ["p.toml", "p.json"])
def test_a_file_that_is_no_table_of_prices(tmp_path, text, name):
    """Is refused, with the names that there are; whatever is in it."""
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidInputError, match="storage_gb_month, writes_1000"):
        Prices.load(path)


def test_prices_that_are_not_there(tmp_path):
    """Are not found."""
    with pytest.raises(NotFoundError):
        Prices.load(tmp_path / "none.toml")


def test_list_prices():
    """The clouds charge, with source and date; folders and memory do not."""
    for url in ("s3://bucket/x", "gs://bucket", "az://container"):
        prices = Prices.of(url)
        assert 0.01 < prices.storage_gb_month < 0.05
        assert prices.source
        assert prices.date
    for url in ("file:///tmp/x", "memory://x"):
        assert Prices.of(url).cost(stored=1 << 40, writes=10**6, reads=10**6).month == 0
