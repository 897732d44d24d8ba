"""Heads: caches of logs. A good one saves requests; no other one ever changes what is read."""

from __future__ import annotations

import random
from itertools import pairwise

import msgspec
import pytest

from mandapa.errors import ConflictError, StorageError
from mandapa.format.keys import head_key, log_key
from mandapa.format.records import AliasOp, AnnotateOp, decode_head, decode_record, encode_head, encode_record
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.log import HEAD_EVERY, Author, Log
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState
from mandapa.testing.faults import CountingObjectStore

RECORDS = 300


def author(seed=1):
    return Author("tests", random=random.Random(seed), sleep=lambda _: None)


def grow(log, count, seed=2):
    """Append records that each change the state."""
    rng = random.Random(seed)
    who = author(seed)
    for number in range(count):
        ops = [AliasOp(f"alias-{rng.randrange(20)}", 0), AnnotateOp(0, {f"fact-{rng.randrange(50)}": number})]
        log.append(who.new_id().hex(), lambda _, ops=ops: ops, who)


def copy_of(store):
    other = MemoryObjectStore()
    for info in store.list(""):
        other.put(info.key, bytes(store.get(info.key)))
    return other


def facts(log):
    """What a log says: everything that a head could get wrong."""
    state = log.refresh()
    return (
        [record.seal for record in log.records],
        log.lines,
        state.versions,
        state.aliases,
        state.tags,
        state.moves,
        state.closed,
        state.read_only,
    )


@pytest.fixture(scope="module")
def long_store():
    """A repository whose artifact has some 300 records; and its id. Copy it before anything is changed."""
    store = MemoryObjectStore()
    repo = Repository.create(store, threads=0, author=author())
    with repo.artifact("a").transaction("first") as txn:
        txn.add_bytes("x", b"x")
    with repo.artifact("b").transaction("other") as txn:
        txn.add_bytes("y", b"y")
    log = repo.artifact("a").open_log()
    grow(log, RECORDS - 1)
    assert len(log.records) == RECORDS
    return store, log.id, repo.artifact("b").open_log().id


@pytest.fixture
def long(long_store):
    store, a, b = long_store
    return copy_of(store), a, b


def read(store, id_, *, heads=True, threads=0):
    """A log read for the first time; and what that cost."""
    counting = CountingObjectStore(store)
    log = Log(counting, id_, ArtifactState, threads=threads, heads=heads)
    return facts(log), counting.requests


def truth(store, id_):
    return read(store, id_, heads=False)[0]


# -- what a good head saves --------------------------------------------------------------------------------------------


def test_a_long_log_is_opened_by_its_head(long):
    """300 records take a head, the record it ends with, and what came later: not a request a record."""
    store, a, _ = long
    lines = decode_head(store.get(head_key(a)), key="head")
    behind = RECORDS - len(lines)
    assert behind < RECORDS // HEAD_EVERY
    found, requests = read(store, a)
    assert found == truth(store, a)
    # Head, its last record, one at a time or by a list what came later, and that there is no more.
    assert sum(requests.values()) <= 4 + behind
    _, requests = read(store, a, heads=False)
    assert sum(requests.values()) >= RECORDS


def test_opening_and_looking_up_costs_few_requests(long):
    """A fresh process opens the repository and finds a version of the long artifact in few requests."""
    store, a, _ = long
    counting = CountingObjectStore(store)
    repo = Repository(counting, threads=0)
    assert repo["a"].number == 0
    assert repo.artifact("a").aliases() == repo.log(a).state.aliases
    # Marker; head, its last record, what comes next (nothing) of the catalog. Then the catalog again; head, its last
    # record, the next one, a list, one more of the log. And for the aliases: is there more in the catalog, in the log?
    assert sum(counting.requests.values()) <= 4 + 6 + 2


def test_threads_change_nothing(long):
    """With threads and without: the same records, lines and state, through a head and without one."""
    store, a, _ = long
    expected = truth(store, a)
    for threads in (0, 1, 8):
        for heads in (True, False):
            assert read(store, a, heads=heads, threads=threads)[0] == expected
    head = decode_head(store.get(head_key(a)), key="head")
    store.put(head_key(a), encode_head(head[:100]))  # 200 records are read beyond it
    for threads in (0, 8):
        assert read(store, a, threads=threads)[0] == expected


# -- heads that do not count -------------------------------------------------------------------------------------------


def stale(lines, other):
    """Current long ago: it counts, and the rest is read."""
    return encode_head(lines[:7])


def of_one_record(lines, other):
    return encode_head(lines[:1])


def corrupt(lines, other):
    data = encode_head(lines)
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


def cut(lines, other):
    return encode_head(lines)[:-1]


def rubbish(lines, other):
    return b"rubbish"


def empty(lines, other):
    return b""


def empty_frame(lines, other):
    return encode_head([])


def blank_lines(lines, other):
    return encode_head([b"\n"] * 10)


def altered_inside(lines, other):
    """A record of another author, well sealed, in the middle; the last line is the log's own."""
    return encode_head([*lines[:10], forged(lines, 10, by="somebody else"), *lines[11:]])


def altered_at_the_end(lines, other):
    return encode_head([*lines[:-1], forged(lines, len(lines) - 1, by="somebody else")])


def altered_first(lines, other):
    return encode_head([forged(lines, 0, by="somebody else"), *lines[1:]])


def a_story_of_its_own(lines, other):
    """Every record forged and well chained, but for the last, which is the log's own."""
    story, prev = [], record(lines[0], 0).prev
    for number in range(len(lines) - 1):
        story.append(forged(lines, number, by="somebody else", prev=prev))
        prev = record(story[-1], number).seal
    return encode_head([*story, lines[-1]])


def a_story_to_its_end(lines, other):
    """Every record forged and well chained, the last one, too."""
    story, prev = [], record(lines[0], 0).prev
    for number in range(len(lines)):
        story.append(forged(lines, number, by="somebody else", prev=prev))
        prev = record(story[-1], number).seal
    return encode_head(story)


def a_line_left_out(lines, other):
    return encode_head([*lines[:10], *lines[11:]])


def a_line_twice(lines, other):
    return encode_head([*lines[:10], lines[9], *lines[10:]])


def two_lines_exchanged(lines, other):
    return encode_head([*lines[:10], lines[11], lines[10], *lines[12:]])


def of_the_other_log(lines, other):
    return encode_head(other)


def beyond_the_log(lines, other):
    """Records that were never committed, well chained."""
    more, prev = list(lines), record(lines[-1], len(lines) - 1).seal
    for number in range(len(lines), len(lines) + 5):
        old = record(lines[-1], len(lines) - 1)
        new = msgspec.structs.replace(old, seq=number, prev=prev, txn=f"{number:032x}", ops=(AliasOp("never", 0),))
        more.append(encode_record(new))
        prev = record(more[-1], number).seal
    return encode_head(more)


def record(line, seq):
    return decode_record(line, key="a line", seq=seq)


def forged(lines, number, **changes):
    return encode_record(msgspec.structs.replace(record(lines[number], number), **changes))


COUNT = (stale, of_one_record)
DO_NOT = (
    corrupt,
    cut,
    rubbish,
    empty,
    empty_frame,
    blank_lines,
    altered_inside,
    altered_at_the_end,
    altered_first,
    a_story_of_its_own,
    a_story_to_its_end,
    a_line_left_out,
    a_line_twice,
    two_lines_exchanged,
    of_the_other_log,
    beyond_the_log,
)


@pytest.mark.parametrize("threads", [0, 4])
@pytest.mark.parametrize("make", [*COUNT, *DO_NOT], ids=lambda make: getattr(make, "__name__", None))
def test_whatever_the_head_says_the_state_is_that_of_the_log(long, make, threads):
    """Old, broken, lying, somebody else's: the same records and state as without a head, and no error."""
    store, a, b = long
    lines, other = truth(store, a)[1], truth(store, b)[1]
    expected = truth(store, a)
    store.put(head_key(a), make(lines, other))
    assert read(store, a, threads=threads)[0] == expected
    assert Repository(store, threads=threads).artifact("a").aliases() == expected[3]


@pytest.mark.parametrize("make", DO_NOT, ids=lambda make: make.__name__)
def test_commits_go_on_over_a_bad_head(long, make):
    """A writer that met a bad head appends at the right slot, and leaves a good head behind as soon as one is due."""
    store, a, b = long
    lines, other = truth(store, a)[1], truth(store, b)[1]
    store.put(head_key(a), make(lines, other))
    log = Log(store, a, ArtifactState, threads=0)
    log.refresh()
    grow(log, RECORDS // HEAD_EVERY + 1, seed=3)
    now = truth(store, a)
    assert len(now[0]) == RECORDS + RECORDS // HEAD_EVERY + 1
    assert now[1][:RECORDS] == lines
    written = decode_head(store.get(head_key(a)), key="head")
    assert written == now[1][: len(written)]
    assert len(written) > RECORDS
    assert read(store, a)[0] == now
    assert fsck(Repository(store, threads=0)).findings == []


# -- when heads are written --------------------------------------------------------------------------------------------


def test_heads_are_rewritten_as_the_log_grows():
    """While a log is short after each record, then when a 64th of it came since, at the latest after 64 records."""
    store = CountingObjectStore(MemoryObjectStore())
    repo = Repository.create(store, threads=0, author=author())
    with repo.artifact("a").transaction("first") as txn:
        txn.add_bytes("x", b"x")
    log = repo.artifact("a").open_log()
    written = [len(decode_head(store.get(head_key(log.id)), key="head"))]
    for _ in range(700):
        grow(log, 1, seed=len(log.records))
        length = len(decode_head(store.get(head_key(log.id)), key="head"))
        if length != written[-1]:
            written.append(length)
            assert length == len(log.records)
        assert len(log.records) - length < min(HEAD_EVERY, max(1, len(log.records) // HEAD_EVERY))
    assert written[:127] == list(range(1, 128))
    steps = [later - earlier for earlier, later in pairwise(written)]
    assert steps == sorted(steps)
    assert max(steps) == 700 // HEAD_EVERY


def test_a_head_is_for_each_log_its_own(long):
    """Every log has one head at most, under its own name, and the catalog has one."""
    store, a, b = long
    assert [info.key for info in store.list("head/")] == sorted(["head/catalog", head_key(a), head_key(b)])


def test_two_writers_keep_one_head_right(long):
    """Two that append in turns, each with its own idea of the last head, leave one that counts after every commit."""
    store, a, _ = long
    logs = [Log(store, a, ArtifactState, threads=0) for _ in range(2)]
    for turn in range(40):
        logs[turn % 2].refresh()
        grow(logs[turn % 2], 1, seed=100 + turn)
        lines = truth(store, a)[1]
        head = decode_head(store.get(head_key(a)), key="head")
        assert head == lines[: len(head)]
        assert read(store, a)[0] == truth(store, a)
    assert len(lines) == RECORDS + 40
    assert len(lines) - len(head) <= 2 * (RECORDS // HEAD_EVERY)


class NoHeads(MemoryObjectStore):
    """Refuses every head."""

    refused = 0

    def put(self, key, data):
        if key.startswith("head/"):
            self.refused += 1
            raise StorageError("no heads today")
        super().put(key, data)


def test_a_head_that_cannot_be_written_fails_no_commit():
    """The commit stands, whatever becomes of the head; and the next one tries again."""
    store = NoHeads()
    repo = Repository.create(store, threads=0, author=author())
    for number in range(3):
        with repo.artifact("a").transaction() as txn:
            txn.add_bytes("x", b"%d" % number)
        assert txn.made
    assert store.refused >= 3
    assert [version.number for version in Repository(store, threads=0).artifact("a").versions()] == [0, 1, 2]


def test_reading_writes_no_head(long):
    """Readers write nothing: not a better head, not a repaired one."""
    store, a, _ = long
    store.put(head_key(a), b"rubbish")
    counting = CountingObjectStore(store)
    repo = Repository(counting, threads=0)
    repo["a"].assets["x"]
    repo.artifact("a").moves()
    assert not counting.requests.keys() & {"put", "create", "delete"}
    assert bytes(store.get(head_key(a))) == b"rubbish"


def test_a_refused_command_writes_nothing(long):
    """An op that does not fit is refused before anything is put: no record, no head."""
    store, a, _ = long
    counting = CountingObjectStore(store)
    repo = Repository(counting, threads=0)
    repo.artifact("a").tag("t", 0)
    counting.reset()
    with pytest.raises(ConflictError):
        repo.artifact("a").tag("t", 0)
    assert not counting.requests.keys() & {"put", "create", "delete"}
    assert store.head(log_key(a, RECORDS)).size > 0
