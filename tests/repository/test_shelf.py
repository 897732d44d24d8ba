"""What a machine keeps: whole rows, of one state, or nothing; and never an error."""

from __future__ import annotations

import os
import sqlite3

import pytest

from mandapa.repository.shelf import Shelf


@pytest.fixture(params=["folder", "memory"])
def make(request, tmp_path):
    """The same shelf again, as another process has it; of memory there is only one."""
    if request.param == "memory":
        shelf = Shelf(None, "things", repository="ab" * 16, url="memory://x")
        return lambda: shelf
    return lambda: Shelf(tmp_path / "cache", "things", repository="ab" * 16, url="memory://x")


def test_rows_are_put_replaced_and_dropped(make):
    """And read back as they are."""
    assert make().read().rows == {}
    make().write(make().read(), {b"a": b"1", b"b": b"2"})
    make().write(make().read(), {b"b": b"3", b"c": bytes(1 << 20)}, [b"a", b"missing"])
    assert make().read().rows == {b"b": b"3", b"c": bytes(1 << 20)}


def test_a_write_on_top_of_another_state_has_no_effect(make):
    """Neither of one before the first write, nor of an older one; nor its drops."""
    empty = make().read()
    make().write(empty, {b"a": b"1"})
    old = make().read()
    make().write(empty, {b"a": b"other"}, [b"a"])
    assert make().read() == old
    make().write(old, {b"b": b"2"})
    make().write(old, {b"c": b"3"}, [b"a"])
    assert make().read().rows == {b"a": b"1", b"b": b"2"}


def test_places_do_not_mix(tmp_path):
    """Another name, repository or URL is another shelf."""
    base = {"repository": "ab" * 16, "url": "s3://one"}
    shelf = Shelf(tmp_path, "things", **base)
    shelf.write(shelf.read(), {b"a": b"1"})
    for other in ({**base, "url": "s3://two"}, {**base, "repository": "cd" * 16}):
        assert Shelf(tmp_path, "things", **other).read().rows == {}
    assert Shelf(tmp_path, "others", **base).read().rows == {}
    assert Shelf(tmp_path, "things", **base).read().rows == {b"a": b"1"}


@pytest.mark.parametrize("column", ["key", "value", "seal"])
def test_a_damaged_row_is_not_there(tmp_path, column):
    """The others are; types that none of ours has do no harm."""
    shelf = Shelf(tmp_path, "things", repository="ab" * 16, url="s3://x")
    shelf.write(shelf.read(), {b"aa": b"11", b"bb": b"22"})
    [path] = tmp_path.iterdir()
    for bad in (b"xx", "text", 7, None):
        with sqlite3.connect(path) as db:
            db.execute(f"UPDATE kept SET {column}=? WHERE key=x'6161'", (bad,))
        db.close()
        assert shelf.read().rows == {b"bb": b"22"}


def test_a_file_that_is_locked_is_done_without(tmp_path):
    """Reading gives nothing, writing does nothing; later it is as it was."""
    shelf = Shelf(tmp_path, "things", repository="ab" * 16, url="s3://x")
    shelf.write(shelf.read(), {b"a": b"1"})
    before = shelf.read()
    [path] = tmp_path.iterdir()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN EXCLUSIVE")
    locked = shelf.read()
    assert locked.rows == {}
    shelf.write(before, {b"b": b"2"})
    db.execute("ROLLBACK")
    db.close()
    assert shelf.read() == before
    shelf.write(locked, {b"c": b"3"})
    assert shelf.read() == before


def test_a_forked_child_uses_it(tmp_path):
    """No connection is inherited."""
    shelf = Shelf(tmp_path, "things", repository="ab" * 16, url="s3://x")
    shelf.write(shelf.read(), {b"a": b"1"})
    child = os.fork()
    if child == 0:
        before = shelf.read()
        shelf.write(before, {b"b": b"2"})
        os._exit(0 if before.rows == {b"a": b"1"} else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert shelf.read().rows == {b"a": b"1", b"b": b"2"}
