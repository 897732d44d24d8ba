"""The journal: what was written is read, whatever else happens to the file; and sets of numbers."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mandapa.digest import hexdigest
from mandapa.errors import FormatVersionError, StorageError
from mandapa.format.strict import seal
from mandapa.run.journal import (
    ENTRIES,
    LINE_MAX,
    OUTCOMES,
    ArtifactEntry,
    AssetEntry,
    BeginEntry,
    CheckpointEntry,
    CommitEntry,
    EndEntry,
    Entry,
    File,
    Intervals,
    Journal,
    JournalReader,
    Made,
    Started,
    UrlEntry,
    UseEntry,
)


def use(n: int, address: str = "a:v1") -> UseEntry:
    return UseEntry(n=n, time="2026-01-01T00:00:00.000000Z", attempt=1, address=address)


def write(path: Path, count: int) -> Journal:
    journal = Journal(str(path), ENTRIES)
    for _ in range(count):
        journal.append(use(journal.last + 1))
    return journal


def numbers(path: Path) -> list[int]:
    return [entry.n for entry in JournalReader(str(path), ENTRIES).new()]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows above that size meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rank0.journal"


# -- lines -------------------------------------------------------------------------------------------------------------

COMMON = {"n": 1, "time": "2026-01-01T00:00:00.000000Z", "attempt": 3}
LINES = [
    BeginEntry(**COMMON, launch="x#0", local_ranks=[0, 1], fresh=True, backends=["a"], base={"a": None, "b": 7}),
    AssetEntry(**COMMON, file=File(path="a/ü.txt", source=".run/staged/1-0-1", size=3), skip=["b"]),
    AssetEntry(**COMMON, file=File(path="log", source="/else/where", size=0), grows=True, reserved=True),
    UrlEntry(**COMMON, path="data", url="s3://bucket/data", size=1 << 52, checksum="etag:1"),
    CheckpointEntry(
        **COMMON, step=5, epoch=1, metrics={"loss": 0.5, "why": "NaN"}, files=[], best=("loss", "min"), keep_local=3
    ),
    CheckpointEntry(**COMMON, step=5, files=[File(path="a/b.pt", source="x", size=1)], place="a/b.pt", whole=True),
    ArtifactEntry(**COMMON, name="other", source="x", at=None, size=1, aliases=["prod"], metadata={"a": [1, None]}),
    UseEntry(**COMMON, address="data:v3/train"),
    CommitEntry(**COMMON),
    EndEntry(**COMMON, status="failed"),
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: type(line).__name__)
def test_each_entry_is_read_as_written(path: Path, line: Entry) -> None:
    Journal(str(path), ENTRIES).append(line)
    assert list(JournalReader(str(path), ENTRIES).new()) == [line]


def test_each_outcome_is_read_as_written(path: Path) -> None:
    batch = Intervals([(0, 1), (0, 2), (3, 7)]).stretches()
    lines = [
        Started(n=1, txn="ab", batch=batch, attempt=2, folder=True, as_incomplete=True, early=True),
        Made(n=2, txn="ab", version="net:v3", number=3),
        Made(n=3, txn="ab", version="", number=None),
    ]
    journal = Journal(str(path), OUTCOMES)
    for line in lines:
        journal.append(line, durable=True)
    assert list(JournalReader(str(path), OUTCOMES).new()) == lines


def test_a_line_is_json_that_ends_with_its_seal(path: Path) -> None:
    """Any tool can read it: one object a line, the last member the BLAKE3 of what is before it."""
    write(path, 1).close()
    line = path.read_bytes()
    assert line == (
        b'{"kind":"use","format":1,"n":1,"time":"2026-01-01T00:00:00.000000Z","attempt":1,"address":"a:v1",'
        b'"blake3":"' + json.loads(line)["blake3"].encode() + b'"}\n'
    )
    assert json.loads(line)["blake3"] == hexdigest(line.rpartition(b',"blake3"')[0])


def test_the_file_is_the_owners_alone(path: Path) -> None:
    write(path, 1).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_reader_goes_on_where_it_was(path: Path) -> None:
    """Before there is a file, while one is written, and after the writer was opened again."""
    reader = JournalReader(str(path), ENTRIES)
    assert list(reader.new()) == []
    journal = write(path, 2)
    assert [entry.n for entry in reader.new()] == [1, 2]
    assert list(reader.new()) == []
    journal.close()
    journal = write(path, 1)
    assert [entry.n for entry in reader.new()] == [3]
    journal.append(use(4))
    assert [entry.n for entry in reader.new()] == [4]
    assert reader.end == path.stat().st_size
    assert reader.damaged == 0


def test_a_reader_that_stops_half_way_loses_nothing(path: Path) -> None:
    write(path, 3).close()
    reader = JournalReader(str(path), ENTRIES)
    for entry in reader.new():
        assert entry.n == 1
        break
    assert [entry.n for entry in reader.new()] == [2, 3]


def test_long_journals_are_read_in_parts(path: Path) -> None:
    """Lines lie across the borders of what is read at once."""
    journal = Journal(str(path), ENTRIES)
    for n in range(1, 41):
        journal.append(use(n, address="a" * 70_000 + ":v1"))
    assert path.stat().st_size > 2 * LINE_MAX
    assert numbers(path) == list(range(1, 41))


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        list(JournalReader(str(tmp_path), ENTRIES).new())


# -- torn and damaged --------------------------------------------------------------------------------------------------


def test_a_torn_tail_counts_as_not_written(path: Path) -> None:
    """Cut anywhere, only the last line is gone; a reader waits for its end, a writer cuts it off and goes on."""
    write(path, 3).close()
    whole = path.read_bytes()
    second = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(second, len(whole)):
        path.write_bytes(whole[:cut])
        reader = JournalReader(str(path), ENTRIES)
        assert [entry.n for entry in reader.new()] == [1, 2]
        assert (reader.end, reader.damaged) == (second, 0)
        if cut % 20 == 0:
            path.write_bytes(whole)
            assert [entry.n for entry in reader.new()] == [3]
            path.write_bytes(whole[:cut])
            write(path, 1).close()
            assert path.read_bytes() == whole


def test_a_damaged_line_hurts_no_other(path: Path) -> None:
    """Any byte of it, changed in any way that is not noticed by accident."""
    write(path, 3).close()
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    end = whole.index(b"\n", start)
    for at in range(start, end):
        for other in (whole[at] ^ 1, 0xFF):
            damaged = bytearray(whole)
            damaged[at] = other
            if other == ord("\n"):
                continue
            path.write_bytes(damaged)
            reader = JournalReader(str(path), ENTRIES)
            assert [entry.n for entry in reader.new()] == [1, 3]
            assert reader.damaged == 1


@pytest.mark.parametrize("holes", [(0, 5), (40, 90)], ids=["before", "inside"])
def test_blocks_that_a_crash_left_empty_are_left_out(path: Path, holes: tuple[int, int]) -> None:
    """File systems leave zeros where data never came to the disk."""
    write(path, 2).close()
    whole = path.read_bytes()
    first, last = holes
    path.write_bytes(whole[:first] + bytes(last - first) + whole[last:])
    assert numbers(path) == [2]


@pytest.mark.parametrize(
    "junk",
    [b"\n", b"\n\n\n", b"{}\n", b"hello\n", b"\xff\xfe\n", b"null\n", b"[" * 100_000 + b"\n", seal({"format": 1})],
    ids=["end", "ends", "empty", "text", "bytes", "null", "deep", "sealed"],
)
def test_junk_between_lines_is_left_out(path: Path, junk: bytes) -> None:
    path.write_bytes(junk + seal(use(1)) + junk + seal(use(2)) + junk)
    reader = JournalReader(str(path), ENTRIES)
    assert [entry.n for entry in reader.new()] == [1, 2]
    assert reader.damaged == 3 * junk.count(b"\n")


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["torn", "whole"])
def test_a_line_without_end_is_not_kept_in_memory(path: Path, end: bytes) -> None:
    """A megabyte without a line's end is damage; what comes after it counts."""
    path.write_bytes(seal(use(1)) + b"x" * (3 * LINE_MAX) + end)
    reader = JournalReader(str(path), ENTRIES)
    assert [entry.n for entry in reader.new()] == [1]
    assert reader.damaged >= 1
    journal = Journal(str(path), ENTRIES)
    assert journal.last == 1
    journal.append(use(2))
    journal.close()
    assert 2 in numbers(path)


def test_a_kind_that_is_not_known_is_left_out(path: Path) -> None:
    """Neither does a member of the wrong type end the reading."""
    known = msgspec.to_builtins(use(1))
    bad = [{**known, "kind": "new"}, {**known, "n": "1"}, {**known, "n": None}, {**known, "address": 5}]
    path.write_bytes(b"".join(map(seal, bad)) + seal(use(2)))
    reader = JournalReader(str(path), ENTRIES)
    assert [entry.n for entry in reader.new()] == [2]
    assert reader.damaged == len(bad)


def test_a_checkpoint_of_before_places_were_written_is_in_the_folder_of_that_name(path: Path) -> None:
    """Journals of older mandapas are read, and a part of theirs is never taken for a whole one."""
    Journal(str(path), ENTRIES).append(CheckpointEntry(**COMMON, step=5, files=[]))
    line = json.loads(path.read_bytes())
    old = {name: value for name, value in line.items() if name not in ("place", "whole", "blake3")}
    path.write_bytes(seal(old))
    (found,) = JournalReader(str(path), ENTRIES).new()
    assert (found.place, found.whole) == ("checkpoint", False)


def test_members_that_a_later_version_adds_are_no_damage(path: Path) -> None:
    path.write_bytes(seal({**msgspec.to_builtins(use(1)), "more": [1, 2]}))
    assert numbers(path) == [1]


def test_a_journal_of_a_newer_format_is_refused(path: Path) -> None:
    """By reader and writer, each time; the file stays as it is."""
    newer = seal({**msgspec.to_builtins(use(2)), "format": 2, "kind": "other"})
    path.write_bytes(seal(use(1)) + newer)
    before = path.read_bytes()
    reader = JournalReader(str(path), ENTRIES)
    for _ in range(2):
        with pytest.raises(FormatVersionError, match="format 2"):
            list(reader.new())
    with pytest.raises(FormatVersionError, match="format 2"):
        Journal(str(path), ENTRIES)
    assert path.read_bytes() == before


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_number_that_was_read_is_not_read_again(path: Path) -> None:
    """A line twice, or an older one after it, is not something new."""
    path.write_bytes(b"".join(seal(use(n)) for n in (1, 2, 2, 1, 5, 4, 6)))
    reader = JournalReader(str(path), ENTRIES)
    assert [entry.n for entry in reader.new()] == [1, 2, 5, 6]
    assert reader.damaged == 0


def test_numbers_go_on_above_all_that_is_known(path: Path) -> None:
    """Above what the file has, and above what a backend has committed of a file that was cut."""
    write(path, 2).close()
    journal = Journal(str(path), ENTRIES, after=1)
    assert journal.last == 2
    journal.close()
    journal = Journal(str(path), ENTRIES, after=10)
    assert journal.last == 10
    journal.append(use(11))
    journal.close()
    assert numbers(path) == [1, 2, 11]


def test_a_reader_notices_a_file_that_was_cut(path: Path) -> None:
    """It starts over, and knows by the numbers what it has."""
    write(path, 3).close()
    whole = path.read_bytes()
    reader = JournalReader(str(path), ENTRIES)
    list(reader.new())
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    assert list(reader.new()) == []
    with path.open("ab") as file:
        file.write(seal(use(4)))
    assert [entry.n for entry in reader.new()] == [4]


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_writes_nothing_and_can_go_on(path: Path) -> None:
    """Room for none of a line, for a part of it, and for all but its end."""
    journal = write(path, 2)
    before = path.read_bytes()
    line = len(before) // 2
    for room in (0, 1, line // 2, line - 1):
        with largest_file(len(before) + room), pytest.raises(StorageError, match="cannot be written") as found:
            journal.append(use(3))
        assert found.value.retryable
        assert path.read_bytes() == before
        assert journal.last == 2
    journal.append(use(3))
    assert numbers(path) == [1, 2, 3]


def test_a_disk_that_fails_to_sync_holds_no_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit whose first line is not durable has not begun."""
    journal = write(path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "the disk fails")))
        with pytest.raises(StorageError, match="the disk fails"):
            journal.append(use(2), durable=True)
    assert numbers(path) == [1]
    journal.append(use(2), durable=True)
    journal.sync()
    assert numbers(path) == [1, 2]


def test_a_line_that_no_reader_would_take_is_not_written(path: Path) -> None:
    journal = write(path, 1)
    with pytest.raises(StorageError, match="bytes"):
        journal.append(use(2, address="a" * LINE_MAX))
    journal.append(use(2))
    assert numbers(path) == [1, 2]


def test_closing_twice_is_closing(path: Path) -> None:
    journal = write(path, 1)
    journal.close()
    journal.close()


# -- sets of numbers ---------------------------------------------------------------------------------------------------

PAIRS = st.tuples(st.integers(0, 2), st.integers(1, 30))


@given(st.lists(st.one_of(PAIRS, st.lists(PAIRS))))
def test_intervals_are_sets_of_numbers(steps: list[tuple[int, int] | list[tuple[int, int]]]) -> None:
    """Whatever is added in whatever order: the same members, in as few stretches as can be."""
    model: set[tuple[int, int]] = set()
    found = Intervals()
    for step in steps:
        more = step if isinstance(step, list) else [step]
        model.update(more)
        found.add(Intervals(more).stretches())
    for rank in range(4):
        known = sorted(n for other, n in model if other == rank)
        assert [n for n in range(33) if (rank, n) in found] == known
        assert found.highest(rank) == max(known, default=0)
        stretches = found.stretches().get(str(rank), [])
        assert [n for first, last in stretches for n in range(first, last + 1)] == known
        assert all(last + 1 < first for (_, last), (first, _) in pairwise(stretches))


@given(st.lists(PAIRS))
def test_intervals_survive_being_written(pairs: list[tuple[int, int]]) -> None:
    """As a part of a line, and in a set of its own."""
    some = Intervals(pairs)
    line = Started(n=1, txn="", batch=some.stretches(), attempt=1, folder=True)
    again = Intervals()
    again.add(OUTCOMES.decode(msgspec.json.encode(line)).batch)
    assert again.stretches() == some.stretches()


def test_what_intervals_give_is_not_their_own() -> None:
    some = Intervals([(0, 1)])
    some.stretches()["0"].append((7, 9))
    assert (0, 8) not in some
