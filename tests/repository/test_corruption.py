"""Damaged repositories: a reader gets the right bytes or an error, and fsck says what broke and whom it hurts.

First half: every kind of object of a real repository, damaged in every way that disks, networks and people know. Second
half: for each invariant of docs/format.md §12, repositories made by hand that break it and no other.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import msgspec
import pytest

from mandapa.content.codecs import decode
from mandapa.content.fetch import pieces_of
from mandapa.content.tree import Located, child_address
from mandapa.digest import digest
from mandapa.errors import CorruptionError, FormatVersionError, MandapaError, NotFoundError
from mandapa.format.keys import CATALOG, container_key, head_key, log_key
from mandapa.format.manifest import (
    Branch,
    ChildRow,
    Chunk,
    FileRow,
    LargeFileRow,
    Leaf,
    NodeAddress,
    NodeCutter,
    Part,
    PartAddress,
    UrlRow,
    encode_node,
    node_digest,
    zstd,
)
from mandapa.format.pack import HEADER, KIND_CHUNK, KIND_NODE, PackEntry, pack_footer, read_pack_table
from mandapa.format.records import (
    AliasOp,
    CloseOp,
    Record,
    RegisterOp,
    RemoveOp,
    RepackOp,
    Root,
    SettingsOp,
    VersionOp,
    encode_gc_list,
    encode_head,
    encode_marker,
    encode_record,
)
from mandapa.format.strict import seal
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository
from mandapa.repository.version import address_of, root_of
from mandapa.testing.faults import CountingObjectStore

EPOCHS = ("0" * 32, "1" * 32)


def cut(paths):
    """The paths of leaves as the format cuts them."""
    cutter, leaves, part = NodeCutter(0), [], []
    for path in paths:
        part.append(path)
        if cutter.ends_after(path):
            leaves.append(part)
            part = []
    return [*leaves, part] if part else leaves


SEVERAL = next(paths for d in range(1000) if len(cut(paths := [f"{d}/{i:03}" for i in range(180)])) == 2)
"""Few paths that make two leaves."""


def no_waiting(seconds):
    raise AssertionError(f"waited {seconds} s: damage is no reason to try again")


def author(seed=0):
    return Author("tests", random=random.Random(seed), sleep=no_waiting)


def safetensors(tensors):
    """A file of byte tensors."""
    at, header = 0, {}
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


# -- a repository that has everything ----------------------------------------------------------------------------------


@cache
def sound():
    """Key -> bytes of a repository with every kind of object, each more than once."""
    rng = random.Random(7)
    store = MemoryObjectStore()
    repo = Repository.create(store, codec="raw", threads=0, author=author())
    model = repo.artifact("model")
    with model.transaction("first", {"step": 0}) as txn:
        txn.add_bytes("weights.bin", rng.randbytes(200_000))
        txn.add_bytes("notes/a.txt", b"a note\n")
        txn.add_bytes("notes/empty", b"")
        txn.add_url("data.parquet", "https://example.org/data.parquet", size=5, checksum="md5:00")
        txn.alias("best")
    contents = [rng.randbytes(64 << 10) for _ in range(3)]
    tensors = {f"t{i:03}": contents[i % 3] for i in range(70)}
    with model.transaction("a large file, with parts") as txn:
        txn.add_bytes("model.safetensors", safetensors(tensors))
    tensors["t010"] = rng.randbytes(64 << 10)
    with model.transaction("one tensor changed") as txn:
        txn.add_bytes("model.safetensors", safetensors(tensors))
        txn.alias("best")
    with model.transaction("other weights") as txn:
        txn.add_bytes("weights.bin", rng.randbytes(150_000))
        txn.remove("notes")
    with model.transaction("to be deleted") as txn:
        txn.add_bytes("oops.bin", rng.randbytes(70_000))
    model.tag("paper", 1)
    model.delete(4)
    many = repo.artifact("many")
    for step in range(2):
        with many.transaction(f"leaves and a branch {step}") as txn:
            for path in SEVERAL[:: 1 if step == 0 else 77]:
                txn.add_bytes(path, f"{step} {path}".encode())
    for number, epoch in enumerate(EPOCHS):
        store.put(f"gc/{epoch}", encode_gc_list(epoch, [f"packs/{number:032x}"]))
    return {info.key: bytes(store.get(info.key)) for info in store.list("")}


def filled(objects):
    store = MemoryObjectStore()
    for key, data in objects.items():
        store.put(key, data)
    return store


def without_heads():
    return {key: data for key, data in sound().items() if not key.startswith("head/")}


VERSIONS = {"model": range(5), "many": range(2)}
LIVE = [("model", 0), ("model", 1), ("model", 2), ("model", 3), ("many", 0), ("many", 1)]


def observe(store, folder=None):
    """Everything that a reader can learn: name of a fact -> what it is, or the error that came instead."""
    facts = {}

    def note(*name, look):
        try:
            facts[name] = look()
        except MandapaError as error:
            facts[name] = error

    def read(version, path):
        with version.open(path) as file:
            return file.read()

    try:
        repo = Repository(store, threads=0, author=author())
    except MandapaError as error:
        return {("open",): error}
    note("artifacts", look=lambda: [artifact.name for artifact in repo.artifacts()])
    for name, numbers in VERSIONS.items():
        artifact = repo.artifact(name)
        note(name, "numbers", look=lambda artifact=artifact: [version.number for version in artifact.versions()])
        note(name, "names", look=lambda artifact=artifact: (artifact.aliases(), artifact.tags(), artifact.moves()))
        for number in numbers:
            try:
                version = artifact.version(number)
            except MandapaError as error:
                facts[name, number, "version"] = error
                continue
            facts[name, number, "version"] = (version.digest, version.message, version.metadata, version.names)
            note(name, number, "assets", look=lambda version=version: version.assets.items())
            note(name, number, "whole", look=lambda version=version: restored(version, folder))
            paths = (
                SEVERAL[::40] if name == "many" else ("weights.bin", "model.safetensors", "notes/a.txt", "notes/empty")
            )
            for path in paths:
                note(name, number, path, look=lambda args=(version, path): read(*args))
    return facts


def restored(version, folder):
    """The content of a download; empty for the artifact of many files, which `open` reads."""
    if folder is None or version.artifact.name == "many":
        return None
    target = folder / f"{random.getrandbits(64):x}"
    version.download(target)
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}


@cache
def truth():
    return observe(filled(sound()))


@dataclass(frozen=True)
class Range:
    """Bytes of a container that a version needs."""

    start: int
    end: int
    is_node: bool


@cache
def needs():
    """Live version -> key of a container -> the ranges that it needs."""
    repo = Repository(filled(sound()), threads=0)
    found = {}
    for name, number in LIVE:
        version = repo.artifact(name).version(number)
        ranges = found[name, number] = defaultdict(set)

        def node(address, ranges=ranges):
            ranges[container_key(address.container)].add(Range(address.offset, address.offset + address.stored, True))
            loaded = repo.reader.load(address)
            if isinstance(loaded, Branch):
                for row in loaded.rows:
                    node(child_address(row, loaded.containers))
            elif isinstance(loaded, Leaf):
                for row in loaded.rows:
                    if isinstance(row, LargeFileRow):
                        for part in row.parts:
                            node(child_address(part, loaded.containers))
                    for piece in pieces_of(Located(row, loaded.containers), repo.reader.load):
                        ranges[container_key(piece.container)].add(
                            Range(piece.offset, piece.offset + piece.stored, False)
                        )

        node(version.tree.root)
    return found


def kind_of(key):
    """The kinds of objects that there are."""
    return "marker" if key == "mandapa.json" else key.split("/")[0]


KINDS = ("marker", "catalog", "log", "packs", "meta", "head", "gc")
DAMAGES = ("flip", "truncate", "empty", "swap", "delete", "junk")


@dataclass(frozen=True)
class Damage:
    """A repository with one object damaged (or two exchanged), and what that touches."""

    keys: tuple[str, ...]
    objects: dict
    start: int = 0
    end: int = 1 << 40
    """The bytes ``[start, end)`` of the object are not what they were."""

    def hits(self, key, range_):
        return key in self.keys and range_.start < self.end and self.start < range_.end


def flipped(data, at, bit):
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def flips(key, data, rng):
    """Places to flip a bit: some anywhere, and in containers one in every region and in every node."""
    places = {rng.randrange(len(data)) for _ in range(2)} | {0, len(data) - 1}
    if kind_of(key) in ("packs", "meta"):
        entries = list(read_pack_table(data, key=key))
        nodes = [entry for entry in entries if entry.kind == KIND_NODE]
        for entry in [*nodes, *rng.sample(entries, min(2, len(entries)))]:
            places.add(rng.randrange(entry.offset, entry.offset + entry.stored))
        table = entries[-1].offset + entries[-1].stored
        places |= {8, 9, rng.randrange(table, len(data) - 48), len(data) - 48}
    return sorted(places)


def means_the_same(key, data, at):
    """Whether a flipped bit lies in an entry that decodes to what it was: zstd frames have bits without a meaning."""
    for entry in read_pack_table(sound()[key], key=key):
        if entry.offset <= at < entry.offset + entry.stored:
            try:
                raw = decode(entry.codec, data[entry.offset : entry.offset + entry.stored], entry.raw)
            except CorruptionError:
                return False
            return digest(raw) == entry.hash
    return False


def damages(kind, damage, objects):
    """Every object of a kind damaged in that way, one after the other; seeded by the object's key."""
    keys = sorted(key for key in objects if kind_of(key) == kind)
    for number, key in enumerate(keys):
        data = objects[key]
        rng = random.Random(key)
        if damage == "flip":
            for at in flips(key, data, rng):
                bad = flipped(data, at, rng.randrange(8))
                if kind in ("packs", "meta") and means_the_same(key, bad, at):
                    continue
                yield Damage((key,), objects | {key: bad}, at, at + 1)
        elif damage == "truncate":
            for size in {len(data) // 2, len(data) - 1, rng.randrange(1, len(data))}:
                yield Damage((key,), objects | {key: data[:size]}, size)
        elif damage == "empty":
            yield Damage((key,), objects | {key: b""})
        elif damage == "delete":
            yield Damage((key,), {other: value for other, value in objects.items() if other != key})
        elif damage == "junk":
            for junk in (b"\0", b"\n", rng.randbytes(100_000)):
                yield Damage((key,), objects | {key: data + junk}, len(data))
        elif len(keys) > 1:
            other = keys[(number + 1) % len(keys)]
            yield Damage((key, other), objects | {key: objects[other], other: data})


# -- containers: what is named is verified ----------------------------------------------------------------------------


def check_versions(damage, facts, sound_facts):
    """Whom a damage hurts: those versions answer with `CorruptionError` or rightly, all others only rightly."""
    hurt = {version for version, ranges in needs().items() if touched(damage, ranges)}
    failed = set()
    for name, value in facts.items():
        if type(value) is CorruptionError:
            assert name[:2] in hurt, f"{name} of a sound version: {value!r}"
            failed.add(name[:2])
        else:
            assert same(value, sound_facts[name]), name
    return hurt, failed


def same(value, other):
    """Whether two facts are equal; errors are when they say the same."""
    return repr(value) == repr(other) if isinstance(value, MandapaError) else value == other


def same_facts(facts, others):
    return facts.keys() == others.keys() and all(same(value, others[name]) for name, value in facts.items())


def touched(damage, ranges):
    return any(damage.hits(key, one) for key, found in ranges.items() for one in found)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["packs", "meta"])
def test_damaged_containers(kind, damage, tmp_path):
    """Each version that needs the damaged bytes says CorruptionError, and fsck names it; every other one is sound."""
    expected = {folder: observe(filled(sound()), folder) for folder in (tmp_path, None)}
    count = 0
    for one in damages(kind, damage, sound()):
        folder = None if count % 3 else tmp_path  # downloads take their time
        count += 1
        store = filled(one.objects)
        facts = observe(store, folder)
        hurt, failed = check_versions(one, facts, expected[folder])
        assert failed >= {version for version in hurt if version[0] == "model"}  # of which every byte was asked for
        if damage == "delete":
            errors = [v for k, v in facts.items() if isinstance(v, CorruptionError)]
            assert all("fsck" in str(error) for error in errors)

        counting = CountingObjectStore(store)
        repo = Repository(counting, threads=0, author=author())
        counting.reset()
        report = fsck(repo, deep=True)
        assert not counting.requests.keys() & {"put", "create", "delete"}
        named = {tuple(where.split(":v")) for where in report.hurt}
        named = {(name, int(number)) for name, number in named}
        users = {version for version, ranges in needs().items() if set(one.keys) & ranges.keys()}
        assert hurt <= named <= users, (one.keys, one.start)
        found = {finding.invariant for finding in report.findings}
        if not users:
            assert found == set()  # nothing needs it: a gc may take it
            continue
        assert found, (one.keys, one.start)
        assert found <= {"I4", "I7", "I8"}
        nodes_hit = any(r.is_node and one.hits(k, r) for ranges in needs().values() for k in ranges for r in ranges[k])
        assert ("I4" in found) == nodes_hit
        if damage in ("flip", "junk") and not nodes_hit:
            assert found == {"I8"}
        if damage in ("truncate", "empty", "delete") and kind == "packs" and users:
            last = max(r.end for ranges in needs().values() for r in ranges.get(one.keys[0], ()))
            assert ("I7" in found) == (damage == "delete" or one.start < last + 48)
        if "I7" in found and damage != "swap" and kind == "packs":
            shallow = fsck(repo)
            assert "I7" in {finding.invariant for finding in shallow.findings}
            assert set(shallow.hurt) == set(report.hurt)
    assert count >= 3


# -- logs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_records(damage):
    """Without heads: the whole artifact answers with CorruptionError, others are sound, and fsck reports I3.

    A last record that is missing is a commit that was not made: nobody can tell. So the state before it is read.
    """
    objects = without_heads()
    for one in damages("log", damage, objects):
        store = filled(one.objects)
        facts = observe(store)
        logs = {key.split("/")[1] for key in one.keys}
        names = {Repository(store, threads=0).catalog.state.name_of(log) for log in logs}
        report = fsck(Repository(store, threads=0, author=author()))
        if damage == "delete" and is_last(one.keys[0], objects):
            assert report.findings == []
            for name, expected in truth().items():
                about_content = name[0] in names and name[2:] not in ((), ("version",))
                if name[0] not in names or (about_content and name in facts):
                    assert same(facts[name], expected)
            continue
        for name, value in facts.items():
            if name[0] in names:
                assert type(value) is CorruptionError, (one.keys, name, value)
            else:
                assert same(value, truth()[name])
        assert {finding.invariant for finding in report.findings} == {"I3"}
        assert {finding.where for finding in report.findings} == names


def is_last(key, objects):
    return key == max(other for other in objects if other.startswith(key.rpartition("/")[0]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_records_below_a_head(damage):
    """With a head that counts, what it holds is read rightly though records are damaged; fsck reports them anyway.

    A head counts by the last record it holds: if that one is damaged, so is the artifact.
    """
    for one in damages("log", damage, sound()):
        last = [key for key in one.keys if is_last(key, sound())]
        if last:
            continue  # as without heads
        store = filled(one.objects)
        assert same_facts(observe(store), truth())
        report = fsck(Repository(store, threads=0, author=author()))
        assert "I3" in {finding.invariant for finding in report.findings}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_catalog(damage):
    """Nothing can be opened, with CorruptionError; a check that was opened before reports I2."""
    objects = without_heads()
    for one in damages("catalog", damage, objects):
        store = filled(objects)
        repo = Repository(store, threads=0, author=author())
        store.delete(list(objects))
        for key, data in one.objects.items():
            store.put(key, data)
        if damage == "delete" and is_last(one.keys[0], objects):
            continue  # a registration that was not made: see the logs of nobody below
        [(name, error)] = observe(store).items()
        assert name == ("open",)
        assert type(error) is CorruptionError
        assert "I2" in {finding.invariant for finding in fsck(repo).findings}


def test_a_lost_registration_leaves_a_log_of_nobody():
    """When the catalog's last record is lost, fsck sees the log that no record registers: I3."""
    objects = without_heads()
    last = max(key for key in objects if key.startswith("catalog/"))
    store = filled({key: data for key, data in objects.items() if key != last})
    report = fsck(Repository(store, threads=0, author=author()))
    assert [finding.invariant for finding in report.findings] == ["I3"]
    assert report.findings[0].where.startswith("log/")


def test_two_damages_at_once_are_both_reported():
    """A record and an object of one artifact are damaged: the check ends with both findings, not with an error."""
    objects = without_heads()
    log = sorted(key for key in objects if key.startswith("log/") and key.count("/") == 2)
    last = max(log, key=lambda key: (sum(other.startswith(key.rpartition("/")[0]) for other in log), key))
    first_pack = next(key for key in needs()["model", 0] if key.startswith("packs/"))
    for lost in (first_pack, next(key for key in needs()["model", 0] if key.startswith("meta/"))):
        damaged = {key: data for key, data in objects.items() if key != lost} | {last: b"rubbish"}
        report = fsck(Repository(filled(damaged), threads=0, author=author()))
        assert "I3" in {finding.invariant for finding in report.findings}
        assert {"I4", "I7"} & {finding.invariant for finding in report.findings}
        assert "model:v0" in report.hurt


# -- the rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_heads(damage):
    """Heads are caches: everything reads as before, and fsck calls at most the head itself broken."""
    for one in damages("head", damage, sound()):
        store = filled(one.objects)
        assert same_facts(observe(store), truth())
        report = fsck(Repository(store, threads=0, author=author()), deep=True)
        assert {finding.invariant for finding in report.findings} <= {"I9"}
        assert {finding.where for finding in report.findings} <= set(one.keys)
        assert report.hurt == []
        if damage in ("truncate", "empty", "junk"):
            assert len(report.findings) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_lists(damage):
    """Lists of gc concern no reader; a writer who cannot decode one stops, and fsck reports I10."""
    for one in damages("gc", damage, sound()):
        store = filled(one.objects)
        assert same_facts(observe(store), truth())
        report = fsck(Repository(store, threads=0, author=author()))
        expected = set() if damage == "delete" else set(one.keys)
        assert {(finding.invariant, finding.where) for finding in report.findings} == {("I10", k) for k in expected}
        if damage not in ("delete", "swap"):
            repo = Repository(store, threads=0, author=author())
            with pytest.raises(CorruptionError), repo.artifact("many").transaction() as txn:
                txn.copy("model:v0", "weights.bin")
            assert repo["many"].number == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_marker(damage):
    """There is no repository, or none that can be read; a flipped bit of its id changes nothing but the id."""
    for one in damages("marker", damage, sound()):
        store = filled(one.objects)
        facts = observe(store)
        if ("open",) in facts:
            expected = {"delete": (NotFoundError,), "flip": (CorruptionError, FormatVersionError)}
            assert type(facts["open",]) in expected.get(damage, (CorruptionError,))
        else:
            assert damage in ("flip", "junk") or one.objects["mandapa.json"] == sound()["mandapa.json"].rstrip()
            assert same_facts(facts, truth())


def test_a_sound_repository_has_no_findings():
    """The repository that all this damages is sound, with threads and without, and checking it writes nothing."""
    for threads in (0, 4):
        counting = CountingObjectStore(filled(sound()))
        repo = Repository(counting, threads=threads, author=author())
        counting.reset()
        report = fsck(repo, deep=True)
        assert report.findings == []
        assert report.hurt == []
        assert report.checked["versions"] == len(LIVE)
        assert not counting.requests.keys() & {"put", "create", "delete"}


def test_the_repository_has_every_kind_of_object():
    """What is damaged here: nodes of all kinds, packs, records, heads, lists, each more than once."""
    kinds = [kind_of(key) for key in sound()]
    assert all(kinds.count(kind) > 1 for kind in KINDS if kind != "marker")
    repo = Repository(filled(sound()), threads=0)
    tops = {type(repo.reader.load(repo.artifact(name).version(number).tree.root)) for name, number in LIVE}
    assert tops == {Leaf, Branch}
    rows = [located.row for number in (0, 1) for located in repo[f"model:v{number}"].rows()]
    assert {type(row) for row in rows} == {FileRow, UrlRow, LargeFileRow}
    assert isinstance(truth()["model", 4, "version"], NotFoundError)


# -- one fixture for each way to break an invariant -------------------------------------------------------------------


class Forge:
    """A sound repository of one artifact without versions, to which anything can be added by hand."""

    def __init__(self):
        self.store = MemoryObjectStore()
        self.repo = Repository.create(self.store, threads=0, author=author(), codec="raw")
        self.log = self.repo.register("forged")
        self.ids = 0

    def new_id(self):
        self.ids += 1
        return self.ids.to_bytes(16, "big")

    def container(self, *pieces, kind="m"):
        """Put a container of (stored, raw, codec, kind of entry); gives its name and the entries."""
        data, entries = HEADER, []
        for stored, raw, codec, what in pieces:
            entries.append(PackEntry(len(data), len(stored), len(raw), codec, what, digest(raw)))
            data += stored
        name = kind.encode() + self.new_id()
        self.store.put(container_key(name), data + pack_footer(entries, len(data)))
        return name, entries

    def chunks(self, *contents):
        """A pack of raw chunks: its name, and chunks that refer to it as container 0."""
        name, entries = self.container(*[(data, data, 0, KIND_CHUNK) for data in contents], kind="p")
        return name, [Chunk(0, e.offset, e.stored, e.raw, e.codec, e.hash) for e in entries]

    def node(self, node):
        raw, stored = encode_node(node)
        name, [entry] = self.container((stored, raw, 1, KIND_NODE))
        return NodeAddress(name, entry.offset, entry.stored, entry.hash)

    def child(self, node, number):
        """A row for a branch whose table has the node's container at ``number``; and that container."""
        at = self.node(node)
        assets = len(node.rows) if isinstance(node, Leaf) else sum(row.assets for row in node.rows)
        size = sum(row.size or 0 for row in node.rows)
        row = ChildRow(node.rows[0].path, number, at.offset, at.stored, at.hash, node_digest(node), assets, size)
        return row, at.container

    def branch(self, *nodes, level=1):
        rows, table = zip(*[self.child(node, i) for i, node in enumerate(nodes)], strict=True)
        return Branch(list(table), level, list(rows))

    def version(self, node, **changes):
        """Commit a version with that root; changes are to what the record should say."""
        op = VersionOp(
            number=self.log.refresh().next_number,
            parent=None,
            root=address_of(node if isinstance(node, NodeAddress) else self.node(node)),
            digest="0" * 64 if isinstance(node, NodeAddress | Part) else node_digest(node).hex(),
            assets=0 if isinstance(node, NodeAddress | Part) else total(node, "assets"),
            bytes=0 if isinstance(node, NodeAddress | Part) else total(node, "size"),
            added=0,
        )
        op = msgspec.structs.replace(op, **changes)
        self.log.append(self.new_id().hex(), lambda _: [op], author(1))
        return op

    def record(self, *ops, log=None, **changes):
        """Put a record at the end of a log without asking whether it fits."""
        log = log or self.log
        log.refresh()
        record = Record(
            seq=len(log.records),
            txn=self.new_id().hex(),
            prev=log.records[-1].seal if log.records else log.id,
            at="2027-01-01T00:00:00Z",
            by="",
            ops=ops,
        )
        record = msgspec.structs.replace(record, **changes)
        data = encode_record(record)
        self.store.put(log_key(log.id, record.seq), data)
        return data

    def forget_heads(self):
        self.store.delete([info.key for info in self.store.list("head/")])

    def check(self, deep=True):
        return fsck(self.repo, deep=deep)


def total(node, what):
    if isinstance(node, Branch):
        return sum(getattr(row, what) for row in node.rows)
    return len(node.rows) if what == "assets" else sum(row.size or 0 for row in node.rows)


def url(path):
    return UrlRow(path, "https://example.org/x", None, "")


def leaf(*paths):
    return Leaf([], [url(path) for path in paths])


def cut_leaves(paths):
    """Leaves that end where the format says."""
    return [leaf(*part) for part in cut(paths)]


MANY = [f"{i:06}" for i in range(3000)]
FORGERIES = {}


def breaks(invariant, *, hurts=True, deep=True):
    """Registers a function that breaks one invariant in a `Forge`; ``deep=False``: a deep check finds more."""

    def register(function):
        FORGERIES[f"{invariant} {function.__name__.replace('_', ' ')}"] = (invariant, function, hurts, deep)
        return function

    return register


def one_chunk(path, data, chunk):
    """A row of a file of one chunk, whose hash is the file's."""
    return FileRow(path, len(data), 0, digest(data), (msgspec.structs.replace(chunk, hash=b""),))


# I1


@breaks("I1", hurts=False)
def marker_is_gone(forge):
    forge.store.delete(["mandapa.json"])


@breaks("I1", hurts=False)
def marker_is_rubbish(forge):
    forge.store.put("mandapa.json", b"{}")


@breaks("I1", hurts=False)
def marker_of_a_newer_format(forge):
    forge.store.put("mandapa.json", encode_marker(forge.repo.id).replace(b'"format":1', b'"format":2'))


# I2


@breaks("I2", hurts=False)
def catalog_with_a_transaction_twice(forge):
    forge.record(SettingsOp({"a": 1}), log=forge.repo.catalog, txn="ab" * 16)
    forge.record(SettingsOp({"a": 2}), log=forge.repo.catalog, txn="ab" * 16)


@breaks("I2", hurts=False)
def catalog_with_a_gap(forge):
    forge.record(SettingsOp({"a": 1}), log=forge.repo.catalog, seq=len(forge.repo.catalog.records) + 1)


@breaks("I2", hurts=False)
def catalog_with_a_broken_chain(forge):
    forge.record(SettingsOp({"a": 1}), log=forge.repo.catalog, prev="00" * 32)


@breaks("I2", hurts=False)
def catalog_with_a_name_twice(forge):
    forge.record(RegisterOp("FORGED", "cd" * 16), log=forge.repo.catalog)


@breaks("I2", hurts=False)
def catalog_with_an_op_of_an_artifact(forge):
    forge.record(CloseOp(), log=forge.repo.catalog)


@breaks("I2", hurts=False)
def catalog_that_removes_what_is_not_there(forge):
    forge.record(RemoveOp("cd" * 16), log=forge.repo.catalog)


@breaks("I2", hurts=False)
def catalog_with_an_id_used_before(forge):
    forge.record(CloseOp())
    forge.record(RemoveOp(forge.log.id), RegisterOp("other", forge.log.id), log=forge.repo.catalog)


# I3


@breaks("I3", hurts=False)
def log_with_a_transaction_twice(forge):
    forge.version(leaf("a"))
    forge.record(AliasOp("x", 0), txn="ab" * 16)
    forge.record(AliasOp("y", 0), txn="ab" * 16)


@breaks("I3", hurts=False)
def log_with_a_gap(forge):
    forge.version(leaf("a"))
    forge.record(AliasOp("x", 0), seq=2)


@breaks("I3", hurts=False)
def log_without_its_first_record(forge):
    forge.version(leaf("a"))
    forge.version(leaf("a", "b"))
    forge.store.delete([log_key(forge.log.id, 0)])


@breaks("I3", hurts=False)
def log_with_a_broken_chain(forge):
    forge.version(leaf("a"))
    forge.record(AliasOp("x", 0), prev="00" * 32)


@breaks("I3", hurts=False)
def log_with_a_number_left_out(forge):
    forge.version(leaf("a"))
    op = forge.log.records[0].ops[0]
    forge.record(msgspec.structs.replace(op, number=2))


@breaks("I3", hurts=False)
def alias_of_no_version(forge):
    forge.version(leaf("a"))
    forge.record(AliasOp("x", 7))


@breaks("I3", hurts=False)
def log_with_an_op_of_the_catalog(forge):
    forge.record(SettingsOp({"a": 1}))


@breaks("I3", hurts=False)
def log_that_goes_on_after_its_end(forge):
    forge.version(leaf("a"))
    forge.record(CloseOp())
    forge.record(AliasOp("x", 0))


@breaks("I3", hurts=False)
def log_of_a_removed_artifact_not_closed(forge):
    forge.record(RemoveOp(forge.log.id), log=forge.repo.catalog)


@breaks("I3", hurts=False)
def log_of_an_artifact_never_registered(forge):
    forge.store.put(log_key("cd" * 16, 0), forge.record(AliasOp("x", None), seq=0))
    forge.store.delete([log_key(forge.log.id, 0)])


@breaks("I3", hurts=False)
def log_with_a_record_of_a_newer_format(forge):
    data = json.loads(forge.record(CloseOp()))
    del data["blake3"]
    forge.store.put(log_key(forge.log.id, 0), seal(data | {"format": 2}))


# I4


@breaks("I4")
def root_with_another_hash(forge):
    forge.version(msgspec.structs.replace(forge.node(leaf("a")), hash=b"\0" * 32))


@breaks("I4")
def root_that_is_not_there(forge):
    forge.version(NodeAddress(b"m" + bytes(16), 16, 100, b"\0" * 32))


@breaks("I4")
def root_beyond_the_end(forge):
    at = forge.node(leaf("a"))
    forge.version(msgspec.structs.replace(at, offset=1 << 20))


@breaks("I4")
def root_that_is_a_part(forge):
    _, chunks = forge.chunks(b"abc")
    forge.version(Part([b"p" + bytes(16)], chunks))


@breaks("I4")
def child_that_is_a_part(forge):
    pack, chunks = forge.chunks(b"abc")
    at = forge.node(Part([pack], chunks))
    [*_, last] = cut_leaves(MANY)
    first = forge.child(leaf("000"), 0)[0]
    rows = [msgspec.structs.replace(first, offset=at.offset, stored=at.stored, hash=at.hash)]
    row, container = forge.child(last, 1)
    forge.version(Branch([at.container, container], 1, [*rows, row]))


@breaks("I4")
def child_that_is_not_there(forge):
    branch = forge.branch(*cut_leaves(MANY))
    forge.version(branch)
    forge.store.delete([container_key(branch.containers[2])])


@breaks("I4")
def part_that_is_not_there(forge):
    pack, chunks = forge.chunks(b"abc", b"defg")
    at = forge.node(Part([pack], chunks))
    part = PartAddress(0, at.offset, at.stored, at.hash, 7)
    forge.version(Leaf([at.container], [LargeFileRow("a", 7, 0, digest(b"abcdefg"), (part,))]))
    forge.store.delete([container_key(at.container)])


@breaks("I4")
def repack_to_a_root_that_is_not_there(forge):
    op = forge.version(leaf("a"))
    there = msgspec.structs.replace(op.root, object="meta/" + "0" * 32)
    forge.record(RepackOp(0, op.root, there))


@breaks("I4", deep=False)
def node_that_is_none(forge):
    raw = b"neither a leaf nor a branch"
    name, [entry] = forge.container((zstd.compress(raw), raw, 1, KIND_NODE))
    forge.version(NodeAddress(name, entry.offset, entry.stored, entry.hash))


# I5


@breaks("I5", hurts=False)
def table_with_a_container_that_no_row_needs(forge):
    pack, chunks = forge.chunks(b"abc")
    other, _ = forge.chunks(b"xyz")
    forge.version(Leaf([pack, other], [one_chunk("a", b"abc", chunks[0])]))


@breaks("I5", hurts=False)
def table_with_a_container_twice(forge):
    pack, chunks = forge.chunks(b"abc", b"xyz")
    second = msgspec.structs.replace(chunks[1], container=1)
    forge.version(Leaf([pack, pack], [one_chunk("a", b"abc", chunks[0]), one_chunk("b", b"xyz", second)]))


@breaks("I5", hurts=False)
def table_of_a_part_with_a_container_that_no_chunk_needs(forge):
    pack, chunks = forge.chunks(b"abc", b"defg")
    other, _ = forge.chunks(b"xyz")
    at = forge.node(Part([pack, other], chunks))
    part = PartAddress(0, at.offset, at.stored, at.hash, 7)
    forge.version(Leaf([at.container], [LargeFileRow("a", 7, 0, digest(b"abcdefg"), (part,))]))


@breaks("I5", hurts=False)
def table_of_a_branch_with_a_container_twice(forge):
    branch = forge.branch(*cut_leaves(MANY))
    forge.version(Branch([*branch.containers, branch.containers[0]], 1, branch.rows))


@breaks("I5", hurts=False)
def leaf_that_ends_too_early(forge):
    forge.version(forge.branch(leaf("a", "b"), leaf("c")))


@breaks("I5", hurts=False)
def leaf_that_ends_too_late(forge):
    first, second, *rest = cut_leaves(MANY)
    assert len(first.rows) + len(second.rows) <= 1024
    forge.version(forge.branch(Leaf([], first.rows + second.rows), *rest))


@breaks("I5", hurts=False)
def root_with_one_child(forge):
    forge.version(forge.branch(leaf("a", "b")))


@breaks("I5", hurts=False)
def file_and_folder_of_one_name(forge):
    forge.version(leaf("a", "a/b"))


@breaks("I5", hurts=False)
def file_and_folder_with_another_in_between(forge):
    forge.version(leaf("a", "a-b", "a/b"))


@breaks("I5", hurts=False)
def file_and_folder_in_two_leaves(forge):
    first, *rest = cut_leaves(MANY)
    last = first.rows[-1].path
    second = Leaf([], [url(f"{last}/x"), *rest[0].rows[1:]])
    leaves = cut_leaves([row.path for node in (first, second, *rest[1:]) for row in node.rows])
    assert leaves[0] == first
    forge.version(forge.branch(*leaves))


@breaks("I5")
def paths_that_go_back_from_leaf_to_leaf(forge):
    first = cut_leaves(MANY)[0]
    forge.version(forge.branch(first, leaf(first.rows[10].path + "x")))


@breaks("I5")
def child_that_starts_elsewhere(forge):
    branch = forge.branch(*cut_leaves(MANY))
    rows = [branch.rows[0], msgspec.structs.replace(branch.rows[1], path=branch.rows[1].path + "x"), *branch.rows[2:]]
    forge.version(Branch(branch.containers, 1, rows))


@breaks("I5")
def child_of_another_level(forge):
    branch = forge.branch(*cut_leaves(MANY))
    forge.version(Branch(branch.containers, 2, branch.rows))


@breaks("I5")
def part_of_another_size(forge):
    pack, chunks = forge.chunks(b"abc", b"defg")
    at = forge.node(Part([pack], chunks))
    part = PartAddress(0, at.offset, at.stored, at.hash, 8)
    forge.version(Leaf([at.container], [LargeFileRow("a", 8, 0, digest(b"abcdefg"), (part,))]))


@breaks("I5")
def leaf_where_a_part_should_be(forge):
    at = forge.node(leaf("x"))
    part = PartAddress(0, at.offset, at.stored, at.hash, 8)
    forge.version(Leaf([at.container], [LargeFileRow("a", 8, 0, digest(b"abcdefg"), (part,))]))


# I6


@breaks("I6")
def record_with_another_digest(forge):
    forge.version(leaf("a"), digest="00" * 32)


@breaks("I6", hurts=False)
def record_with_another_count(forge):
    forge.version(leaf("a"), assets=2)


@breaks("I6", hurts=False)
def record_with_another_size(forge):
    forge.version(leaf("a"), bytes=2)


def with_second_child(forge, **changes):
    branch = forge.branch(*cut_leaves(MANY))
    rows = [branch.rows[0], msgspec.structs.replace(branch.rows[1], **changes), *branch.rows[2:]]
    forge.version(Branch(branch.containers, 1, rows))


@breaks("I6")
def child_with_another_digest(forge):
    with_second_child(forge, digest=b"\0" * 32)


@breaks("I6", hurts=False)
def child_with_another_count(forge):
    with_second_child(forge, assets=1)


@breaks("I6", hurts=False)
def child_with_another_size(forge):
    with_second_child(forge, size=1)


@breaks("I6", deep=False)
def codec_that_is_not_known(forge):
    pack, [entry] = forge.container((b"ab", b"abc", 999, KIND_CHUNK), kind="p")
    row = FileRow("a", 3, 0, digest(b"abc"), (Chunk(0, entry.offset, 2, 3, 999, b""),))
    forge.version(Leaf([pack], [row]))


@breaks("I6", deep=False)
def chunk_that_lacks_its_base(forge):
    pack, [entry] = forge.container((b"ab", b"abc", 4, KIND_CHUNK), kind="p")
    row = FileRow("a", 3, 0, digest(b"abc"), (Chunk(0, entry.offset, 2, 3, 4, b""),))
    forge.version(Leaf([pack], [row]))


@breaks("I6", deep=False)
def chunk_with_a_base_that_it_does_not_need(forge):
    pack, [chunk, base] = forge.chunks(b"abc", b"abd")
    row = one_chunk("a", b"abc", msgspec.structs.replace(chunk, base=base))
    forge.version(Leaf([pack], [row]))


# I7


@breaks("I7")
def pack_that_is_not_there(forge):
    pack, [chunk] = forge.chunks(b"abc")
    forge.version(Leaf([pack], [one_chunk("a", b"abc", chunk)]))
    forge.store.delete([container_key(pack)])


@breaks("I7", hurts=False, deep=False)
def pack_that_is_too_short(forge):
    pack, [chunk] = forge.chunks(b"abc")
    forge.version(Leaf([pack], [one_chunk("a", b"abc", chunk)]))
    key = container_key(pack)
    forge.store.put(key, bytes(forge.store.get(key))[: chunk.offset + 3 + 47])


@breaks("I7", hurts=False, deep=False)
def meta_that_is_too_short(forge):
    op = forge.version(leaf("a"))
    data = bytes(forge.store.get(op.root.object))
    forge.store.put(op.root.object, data[: op.root.offset + op.root.length + 47])


# I8


@breaks("I8")
def delta_that_makes_other_bytes(forge):
    pack, [base, entry] = forge.container((bytes(8), bytes(8), 0, KIND_CHUNK), (b"", b"1234", 5, KIND_CHUNK), kind="p")
    fp32 = Chunk(0, base.offset, base.stored, base.raw, 0, base.hash)
    forge.version(Leaf([pack], [FileRow("a", 4, 0, digest(b"1234"), (Chunk(0, entry.offset, 0, 4, 5, b"", fp32),))]))


@breaks("I8")
def chunk_of_other_bytes(forge):
    pack, [chunk] = forge.chunks(b"abc")
    forge.version(Leaf([pack], [one_chunk("a", b"abc", chunk)]))
    key = container_key(pack)
    forge.store.put(key, bytes(forge.store.get(key)).replace(b"abc", b"abd"))


@breaks("I8", hurts=False)
def chunk_that_its_container_does_not_list(forge):
    pack, [chunk] = forge.chunks(b"abcdef")
    inner = Chunk(0, chunk.offset + 1, 3, 3, 0, b"")
    forge.version(Leaf([pack], [FileRow("a", 3, 0, digest(b"bcd"), (inner,))]))


@breaks("I8")
def chunk_that_its_row_names_wrongly(forge):
    pack, [chunk] = forge.chunks(b"abc")
    forge.version(Leaf([pack], [one_chunk("a", b"xyz", chunk)]))


@breaks("I8")
def chunks_that_do_not_make_the_file(forge):
    pack, chunks = forge.chunks(b"abc", b"defg")
    forge.version(Leaf([pack], [FileRow("a", 7, 0, digest(b"other"), tuple(chunks))]))


@breaks("I8")
def chunks_in_another_order_beside_a_sound_file(forge):
    pack, chunks = forge.chunks(b"abc", b"defg")
    rows = [FileRow(path, 7, 0, digest(b"abcdefg"), tuple(chunks)) for path in ("a", "b")]
    rows[1] = FileRow("b", 7, 0, digest(b"abcdefg"), tuple(reversed(chunks)))
    forge.version(Leaf([pack], rows))


@breaks("I8")
def chunks_of_a_large_file_that_do_not_make_it(forge):
    pack, chunks = forge.chunks(b"abc", b"defg")
    at = forge.node(Part([pack], chunks))
    part = PartAddress(0, at.offset, at.stored, at.hash, 7)
    forge.version(Leaf([at.container], [LargeFileRow("a", 7, 0, digest(b"other"), (part,))]))


@breaks("I8", hurts=False)
def container_whose_table_lies(forge):
    pack, [chunk] = forge.chunks(b"abc")
    forge.version(Leaf([pack], [one_chunk("a", b"abc", chunk)]))
    key = container_key(pack)
    forge.store.put(key, flipped(bytes(forge.store.get(key)), chunk.offset + 3, 0))


# I9


def lying_head(forge):
    """The log's last line, and another story before it."""
    forge.version(leaf("a"))
    forge.version(leaf("a", "b"))
    other = encode_record(msgspec.structs.replace(forge.log.records[0], by="somebody else"))
    return encode_head([other, forge.log.lines[1]])


@breaks("I9", hurts=False)
def head_with_another_story(forge):
    forge.store.put(head_key(forge.log.id), lying_head(forge))


@breaks("I9", hurts=False)
def head_that_does_not_decode(forge):
    forge.version(leaf("a"))
    forge.store.put(head_key(forge.log.id), b"rubbish")


@breaks("I9", hurts=False)
def head_of_the_catalog_that_does_not_decode(forge):
    forge.store.put(head_key(CATALOG), b"")


# I10


@breaks("I10", hurts=False)
def list_of_another_epoch(forge):
    forge.store.put(f"gc/{EPOCHS[0]}", encode_gc_list(EPOCHS[1], []))


@breaks("I10", hurts=False)
def list_that_is_rubbish(forge):
    forge.store.put(f"gc/{EPOCHS[0]}", b"rubbish")


@breaks("I10", hurts=False)
def list_that_names_what_no_gc_may_delete(forge):
    forge.store.put(f"gc/{EPOCHS[0]}", seal({"format": 1, "epoch": EPOCHS[0], "objects": ["mandapa.json"]}))


@breaks("I10", hurts=False)
def list_of_a_newer_format(forge):
    forge.store.put(f"gc/{EPOCHS[0]}", seal({"format": 2, "epoch": EPOCHS[0], "objects": []}))


@breaks("I10", hurts=False)
def list_with_a_member_of_a_newer_format(forge):
    forge.store.put(f"gc/{EPOCHS[0]}", seal({"format": 1, "epoch": EPOCHS[0], "objects": [], "why": "?"}))


@pytest.mark.parametrize("name", FORGERIES)
def test_each_invariant_is_checked(name):
    """A repository that breaks one invariant in one way: fsck reports that invariant, no other, and whom it hurts."""
    invariant, forgery, hurts, deep = FORGERIES[name]
    forge = Forge()
    assert forge.check().findings == []
    forgery(forge)
    counting = CountingObjectStore(forge.store)
    forge.repo.store = counting
    report = forge.check(deep)
    assert {finding.invariant for finding in report.findings} == {invariant}, report.findings
    assert bool(report.hurt) == hurts
    assert set(report.hurt) <= {"forged:v0"}
    assert not counting.requests.keys() & {"put", "create", "delete"}


def test_every_invariant_has_a_forgery():
    """I1 to I10."""
    assert {invariant for invariant, *_ in FORGERIES.values()} == {f"I{number}" for number in range(1, 11)}


# Chunks in a wrong order are each what the manifest says: only the digest of the whole tells (docs/format.md §13).
READABLE = [
    name for name in FORGERIES if name[:2] in ("I4", "I5", "I6", "I7", "I8") and not name.startswith("I8 chunks")
]


@pytest.mark.parametrize("name", READABLE)
def test_a_forged_version_is_never_read_as_other_bytes(name):
    """What a reader gets of a forged manifest has the digest of its row, or is an error, which fsck has foretold."""
    forge = Forge()
    _, forgery, hurts, _ = FORGERIES[name]
    forgery(forge)
    version = Repository(forge.store, threads=0, author=author())["forged"]
    try:
        for located in version.rows():
            if not isinstance(located.row, UrlRow):
                with version.open(located.row.path) as file:
                    assert digest(file.read()) == located.row.digest
    except (CorruptionError, FormatVersionError):
        assert hurts


def test_forges_are_sound_without_forgery():
    """What the forgeries are made with makes sound repositories, too: leaves, branches, parts, files of many chunks."""
    forge = Forge()
    pack, chunks = forge.chunks(b"abc", b"defg")
    at = forge.node(Part([pack], chunks))
    part = PartAddress(0, at.offset, at.stored, at.hash, 7)
    forge.version(leaf("a", "a-b", "ab"))
    forge.version(forge.branch(*cut_leaves(MANY)))
    forge.version(Leaf([at.container], [LargeFileRow("a", 7, 0, digest(b"abcdefg"), (part,))]))
    forge.version(Leaf([pack], [FileRow("a", 7, 0, digest(b"abcdefg"), tuple(chunks))]))
    report = forge.check()
    assert report.findings == []
    assert report.checked["versions"] == 4
    assert root_of(Root(*msgspec.structs.astuple(address_of(at)))) == at


def test_a_log_in_the_place_of_another_is_noticed():
    """Record 0 names its log: two artifacts' records, exchanged, are corruption to readers and to fsck."""
    store = MemoryObjectStore()
    repo = Repository.create(store, threads=0)
    for name in ("a", "b"):
        with repo.artifact(name).transaction() as txn:
            txn.add_bytes("name", name.encode())
    keys = [info.key for info in store.list("log/")]
    store.delete([info.key for info in list(store.list("head/"))])
    first, second = (bytes(store.get(key)) for key in keys)
    store.put(keys[0], second)
    store.put(keys[1], first)
    again = Repository(store, threads=0)
    with pytest.raises(CorruptionError):
        again["a"]
    assert {(f.invariant, f.where) for f in fsck(again).findings} >= {("I3", "a"), ("I3", "b")}
