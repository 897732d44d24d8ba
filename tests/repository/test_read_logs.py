"""All logs of a repository at once: what is read, what is believed without reading, and what is noticed."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from mandapa.errors import CorruptionError
from mandapa.format.keys import head_key, log_key
from mandapa.format.records import AliasOp, CloseOp, RegisterOp, RemoveOp
from mandapa.object_store import LocalObjectStore, MemoryObjectStore
from mandapa.repository.log import Log
from mandapa.repository.logs import keep_logs, read_logs
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState
from mandapa.testing.faults import CountingObjectStore

ARTIFACTS = 12


def put(repo, name, count=1):
    for _ in range(count):
        with repo.artifact(name).transaction("m") as txn:
            txn.add_bytes("x", repo.author.new_id())


def name_of(number):
    return f"run-{number:02}"


@pytest.fixture
def store():
    """12 artifacts, of 1 to 12 records."""
    made = MemoryObjectStore()
    repo = Repository.create(made, threads=0)
    for number in range(ARTIFACTS):
        put(repo, name_of(number), 1 + number)
    return made


@pytest.fixture
def counting(store):
    return CountingObjectStore(store)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def opened(store, cache=None):
    repo = Repository(store, threads=0, cache_dir=cache)
    if isinstance(store, CountingObjectStore):
        store.reset()
    return repo


def check(store, facts):
    """Each log is as one that is read alone, and the times are those of the store."""
    truth = Repository(store, threads=0)
    catalog = truth.catalog.refresh()
    assert [fact.id for fact in facts] == sorted([*catalog.names.values(), *catalog.removed])
    for fact in facts:
        log = Log(store, fact.id, ArtifactState, threads=0, heads=False)
        log.refresh()
        assert fact.log.lines == log.lines
        assert fact.log.records == log.records
        assert list(fact.log.state.versions) == list(log.state.versions)
        assert fact.log.state.live() == log.state.live()
        assert fact.name == catalog.name_of(fact.id)
        assert fact.times == {seq: store.head(log_key(fact.id, seq)).last_modified for seq in range(len(log.records))}


def test_all_logs_are_read(store, cache):
    """With and without threads, a cache, and what is known from before; those of removed artifacts too."""
    opened(store).artifact(name_of(3)).remove()
    for threads in (0, 3):
        repo = Repository(store, threads=threads, cache_dir=cache)
        check(store, read_logs(repo))
        check(store, read_logs(repo))
    facts = read_logs(Repository(store, threads=0))
    check(store, facts)
    assert [fact.log.state.closed for fact in facts if fact.name is None] == [True]


def test_an_artifact_without_records_is_there(store):
    """It was registered, and its first commit never came."""
    repo = opened(store)
    repo.register("no-version-yet")
    facts = read_logs(repo)
    check(store, facts)
    assert [len(fact.log.records) for fact in facts if fact.name == "no-version-yet"] == [0]


def test_an_empty_repository():
    """Has no logs."""
    assert read_logs(Repository.create(MemoryObjectStore(), threads=0)) == []


def test_cost_of_logs_that_have_not_moved(cache):
    """1,000 artifacts: a request for each 1,000 records, to list them, and one for the catalog; a new process, too."""
    store = MemoryObjectStore()
    repo = Repository.create(store, threads=0)
    for number in range(1000):
        log = repo.register(f"a{number}")
        log.append(repo.author.new_id().hex(), lambda _: [CloseOp()], repo.author)
    counting = CountingObjectStore(store)
    read_logs(opened(counting, cache))
    for repo in (opened(counting, cache), opened(counting, cache)):
        for _ in range(2):
            counting.reset()
            facts = read_logs(repo)
            assert len(facts) == 1000
            assert counting.requests == {"list": 1, "get": 1}
            assert counting.bytes_read == 0


def test_cost_of_logs_that_moved(store, counting, cache):
    """One request for each new record; of a log that is not known one for each, or a head and what came after it."""
    heads = sum(1 for number in range(ARTIFACTS) if number + 1 > 3)
    read_logs(opened(counting, cache))
    assert counting.requests == {"list": 1, "get": 1 + (1 + 2 + 3) + 2 * heads}
    other = opened(store)
    put(other, name_of(0), 2)
    put(other, name_of(9), 3)
    put(other, "new")
    repo = opened(counting, cache)
    repo.catalog.refresh()
    counting.reset()
    facts = read_logs(repo)
    assert counting.requests == {"list": 1, "get": 1 + 2 + 3 + 1}
    check(store, facts)
    counting.reset()
    check(store, read_logs(opened(store, cache)))
    read_logs(repo)
    assert counting.requests == {"list": 1, "get": 1}


def test_an_append_after_it_reads_nothing(store, counting, cache):
    """One create at the tail that is known from the cache; a head, if one is due, is put and not read."""
    read_logs(opened(store, cache))
    repo = opened(counting, cache)
    facts = read_logs(repo)
    for fact in facts:
        counting.reset()
        fact.log.append(repo.author.new_id().hex(), lambda _: [AliasOp("best", 0)], repo.author)
        assert counting.requests["create"] == 1
        assert set(counting.requests) <= {"create", "put"}
        assert repo.log(fact.id) is fact.log
    check(store, read_logs(opened(store)))


def test_heads_are_written_as_before(store, cache):
    """Who knows a log from the cache writes a head when as many records as ever came after the last one."""
    repo = opened(store)
    put(repo, "long", 200)
    id_ = repo.catalog.state.names["long"]
    written = []
    for _ in range(12):
        again = opened(store, cache)
        read_logs(again)
        before = bytes(store.get(head_key(id_)))
        again.log(id_).append(repo.author.new_id().hex(), lambda _: [AliasOp("best", 0)], repo.author)
        written.append(bytes(store.get(head_key(id_))) != before)
    assert 3 <= sum(written) <= 4


def test_what_was_appended_is_kept(store, counting, cache):
    """Without reading it again: one listing more tells the times by which it is believed."""
    repo = opened(counting, cache)
    for fact in read_logs(repo):
        fact.log.append(repo.author.new_id().hex(), lambda _: [AliasOp("best", 0)], repo.author)
    counting.reset()
    keep_logs(repo)
    assert counting.requests == {"list": 1}
    keep_logs(repo)
    assert counting.requests == {"list": 1}
    again = opened(counting, cache)
    check(store, read_logs(again))
    counting.reset()
    read_logs(again)
    assert counting.requests == {"list": 1, "get": 1}
    check(store, read_logs(opened(counting, cache)))
    fresh = opened(counting, cache)
    read_logs(fresh)
    assert counting.requests == {"list": 1, "get": 1}


def test_what_a_process_did_not_read_stays_kept(store, counting, cache):
    """It keeps what it read or made, and leaves the rest as it is."""
    read_logs(opened(store, cache))
    repo = opened(store, cache)
    put(repo, name_of(4))
    put(repo, "new", 2)
    keep_logs(repo)
    read_logs(opened(counting, cache))
    assert counting.requests == {"list": 1, "get": 1}
    check(store, read_logs(opened(store, cache)))


def test_what_is_kept_is_what_the_store_has(store, cache):
    """A store that was set back since, by our own record alone, and went on with one as long: ours is not kept."""
    repo = opened(store, cache)
    [fact] = [fact for fact in read_logs(repo) if fact.name == name_of(6)]
    known = len(fact.log.records)
    fact.log.append(repo.author.new_id().hex(), lambda _: [AliasOp("mine", 0)], repo.author)
    keep_logs(repo)
    rewind(store, fact.id, known)
    other = opened(store)
    log = other.artifact(name_of(6)).open_log()
    log.append(other.author.new_id().hex(), lambda _: [AliasOp("ours", 0)], other.author)
    assert len(log.lines[-1]) == len(fact.log.lines[-1])
    again = opened(store, cache)
    check(store, read_logs(again))
    again.artifact(name_of(6)).alias("best", 1)
    check(store, read_logs(opened(store)))


def test_what_does_not_fit_what_is_known_is_read_from_the_start(store, cache):
    """A process whose store was set back under it finds out by the next record, and by what is shorter or longer."""
    repo = opened(store, cache)
    [fact] = [fact for fact in read_logs(repo) if fact.name == name_of(6)]
    known = len(fact.log.records)
    fact.log.append(repo.author.new_id().hex(), lambda _: [AliasOp("mine", 0)], repo.author)
    for name in ("ours", "longer"):
        rewind(store, fact.id, known)
        other = opened(store)
        log = other.artifact(name_of(6)).open_log()
        log.append(other.author.new_id().hex(), lambda _, name=name: [AliasOp(name, 0)], other.author)
        if name == "ours":
            other.artifact(name_of(6)).alias("best", 1)
        check(store, read_logs(repo))


def rewind(store, id_, count):
    """The store as of a backup: the log is shorter."""
    seq = count
    while (key := log_key(id_, seq)) in store._objects:
        store.delete([key])
        seq += 1
    store.delete([head_key(id_)])


@pytest.mark.parametrize("where", ["memory", "folder", "appended"])
@pytest.mark.parametrize("after", ["nothing", "as many", "more"])
def test_a_store_that_was_restored_is_noticed(store, cache, where, after):
    """A log that was set back, and went on otherwise, is read again: by the process that knew it and by a later one."""
    repo = opened(store, cache)
    facts = read_logs(repo)
    [fact] = [fact for fact in facts if fact.name == name_of(6)]
    if where == "appended":
        # The record that this process added has a time that no listing has shown.
        fact.log.append(repo.author.new_id().hex(), lambda _: [AliasOp("mine", 0)], repo.author)
        keep_logs(repo)
    known = len(fact.log.records)
    rewind(store, fact.id, 5)
    other = opened(store)
    put(other, name_of(6), {"nothing": 0, "as many": known - 5, "more": known - 3}[after])
    again = repo if where == "memory" else opened(store, cache)
    facts = read_logs(again)
    check(store, facts)
    [fact] = [fact for fact in facts if fact.name == name_of(6)]
    assert len(fact.log.records) == {"nothing": 5, "as many": known, "more": known + 2}[after]
    assert "mine" not in fact.log.state.aliases
    check(store, read_logs(opened(store, cache)))


def test_the_same_records_with_other_times_are_read_again(store, counting, cache):
    """A copy that was put back over the store: nothing is believed, and what is read is the same."""
    read_logs(opened(store, cache))
    for key, (data, at) in list(store._objects.items()):
        store._objects[key] = (data, at + timedelta(hours=1))
    repo = opened(counting, cache)
    facts = read_logs(repo)
    check(store, facts)
    assert counting.requests["get"] > ARTIFACTS


def test_a_cache_of_another_place_is_not_believed(store, cache):
    """A copy of a repository has the same id, and a history of its own."""
    read_logs(opened(store, cache))
    copy = MemoryObjectStore()
    copy._objects.update(store._objects)
    repo = opened(copy)
    put(repo, name_of(0))
    check(copy, read_logs(opened(copy, cache)))
    put(opened(store), name_of(0), 3)
    check(store, read_logs(opened(store, cache)))
    check(copy, read_logs(opened(copy, cache)))


@pytest.mark.parametrize("harm", ["rubbish", "row", "line", "foreign", "gap", "read-only"])
def test_a_damaged_cache_is_dropped(store, counting, cache, harm):
    """It is never an error, and never believed."""
    read_logs(opened(store, cache))
    [path] = cache.glob("*.logs.sqlite")
    if harm == "rubbish":
        path.write_bytes(b"\0" * 5000)
    elif harm == "read-only":
        path.unlink()
        path.mkdir()
    else:
        alter(path, store, harm)
    check(store, read_logs(opened(store, cache)))
    if harm != "read-only":
        read_logs(opened(counting, cache))
        assert counting.requests == {"list": 1, "get": 1}


def alter(path, store, harm):
    from mandapa.repository.logs import _decode, _encode, _Segment
    from mandapa.repository.shelf import _seal

    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT key, value FROM kept WHERE length(key)=24").fetchall()
        assert len(rows) == ARTIFACTS
        for key, value in rows:
            segment = _decode(value)
            if harm == "row":
                new = value[:-30] + b"?" + value[-29:]
                db.execute("UPDATE kept SET value=? WHERE key=?", (new, key))
            elif harm == "line":
                # Sealed as if it were ours, so that the records' own seals have to tell.
                lines = [line.replace(b'"message":"m"', b'"message":"n"') for line in segment.lines]
                new = _encode(_Segment(lines, segment.seen, segment.head))
                db.execute("UPDATE kept SET value=?, seal=? WHERE key=?", (new, _seal(key, new), key))
            elif harm == "gap":
                moved = key[:16] + (1).to_bytes(8, "big")
                db.execute("UPDATE kept SET key=?, seal=? WHERE key=?", (moved, _seal(moved, value), key))
        if harm == "foreign":
            db.execute("PRAGMA user_version=99")
    db.close()


def test_many_segments_become_one(store, cache):
    """A log that moves between all looks takes few rows."""
    for _ in range(30):
        put(opened(store), name_of(0))
        read_logs(opened(store, cache))
    [path] = cache.glob("*.logs.sqlite")
    with sqlite3.connect(path) as db:
        [(rows,)] = db.execute("SELECT count(*) FROM kept").fetchall()
    db.close()
    assert rows <= ARTIFACTS + 9
    check(store, read_logs(opened(store, cache)))


def test_two_processes_at_once(store, cache):
    """Their caches do not mix."""
    one, two = opened(store, cache), opened(store, cache)
    with ThreadPoolExecutor(2) as pool:
        for facts in pool.map(read_logs, [one, two]):
            check(store, facts)
    check(store, read_logs(opened(store, cache)))


def test_keys_that_are_no_records_are_ignored(store, cache):
    """Beside the records, and logs that were never registered."""
    repo = opened(store)
    [first] = [id_ for name, id_ in repo.catalog.state.names.items() if name == name_of(0)]
    store.put(f"log/{first}/readme", b"?")
    store.put(f"log/{first}/00000000000000000", b"?")
    store.put(f"log/{first}/more/{5:016d}", b"?")
    store.put("log/readme", b"?")
    store.put(log_key("ab" * 16, 0), b"?")
    store.put(log_key("ab" * 16, 7), b"?")
    check(store, read_logs(opened(store, cache)))


@pytest.mark.parametrize("at", [0, 3])
def test_a_record_that_is_missing_is_corruption(store, cache, at):
    """Below one that is there; with a cache that knew it, as well."""
    repo = opened(store, cache)
    [fact] = [fact for fact in read_logs(repo) if fact.name == name_of(6)]
    store.delete([log_key(fact.id, at), head_key(fact.id)])
    for again in (opened(store), opened(store, cache)):
        with pytest.raises(CorruptionError, match="missing"):
            read_logs(again)


def test_an_altered_record_is_corruption(store):
    """As for who reads that log alone."""
    repo = opened(store)
    id_ = repo.catalog.state.names[name_of(1)]
    data = bytes(store.get(log_key(id_, 1)))
    store.put(log_key(id_, 1), data.replace(b'"message":"m"', b'"message":"n"'))
    with pytest.raises(CorruptionError, match="BLAKE3"):
        read_logs(repo)


class Growing(MemoryObjectStore):
    """Shows, as a folder may, a record that came while it was listed, and not the one before it."""

    hidden = ""

    def list(self, prefix, *, start_after=""):
        return (info for info in super().list(prefix, start_after=start_after) if info.key != self.hidden)


def test_a_folder_that_grows_while_it_is_listed(cache):
    """What came before the listing is read; the rest the next time."""
    store = Growing()
    repo = Repository.create(store, threads=0)
    put(repo, "a", 6)
    store.hidden = log_key(repo.catalog.state.names["a"], 4)
    [fact] = read_logs(opened(store, cache))
    assert len(fact.log.records) >= 4  # a head may tell of more
    assert list(fact.times) == [0, 1, 2, 3]
    store.hidden = ""
    check(store, read_logs(opened(store, cache)))


def test_commits_while_it_reads(tmp_path, cache):
    """A log that another thread of the process appends to is read to a tail that was there, and nothing is lost."""
    repo = Repository.create(LocalObjectStore(tmp_path / "r", fsync=False), threads=2, cache_dir=cache)
    put(repo, "a")
    put(repo, "b")
    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(put, repo, name, 20) for name in "ab"]
        seen = []
        while not all(one.done() for one in writing):
            seen.append(sum(len(fact.times) for fact in read_logs(repo)))
        for one in writing:
            one.result()
    assert seen == sorted(seen)
    check(repo.store, read_logs(repo))
    check(repo.store, read_logs(opened(repo.place, cache)))


def test_an_artifact_removed_and_made_anew(store, cache):
    """Two logs, of which one has the name."""
    repo = opened(store, cache)
    read_logs(repo)
    repo.artifact(name_of(2)).remove()
    put(repo, name_of(2))
    facts = read_logs(repo)
    check(store, facts)
    assert sum(fact.name == name_of(2) for fact in facts) == 1
    assert sum(fact.name is None for fact in facts) == 1
    record = repo.catalog.records[-1]
    assert isinstance(record.ops[0], RegisterOp)
    assert repo.catalog.records[-2].find(RemoveOp) is not None
