"""What a transaction means: base, claims, conflicts, folders, names, retries."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mandapa.errors import ClosedError, ConflictError, InvalidInputError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.repository import transaction as transactions
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository
from mandapa.testing.faults import CountingObjectStore

TXN = "ab" * 16


@pytest.fixture
def store():
    return CountingObjectStore(MemoryObjectStore())


@pytest.fixture
def repo(store):
    made = Repository.create(store, threads=0)
    yield made
    assert fsck(made, deep=True).findings == []


@pytest.fixture
def other(store, repo):
    """Another process."""
    return Repository(store, threads=0)


@pytest.fixture
def tree(tmp_path):
    """Makes files below a new folder: ``tree(a=b"1", d={"x": b"2"})``."""
    made = iter(range(100))

    def make(**content):
        folder = tmp_path / f"tree-{next(made)}"
        folder.mkdir()
        fill(folder, content)
        return folder

    return make


def fill(folder, content):
    for name, value in content.items():
        if isinstance(value, dict):
            (folder / name).mkdir()
            fill(folder / name, value)
        else:
            (folder / name).write_bytes(value)


def read(version):
    """Path -> bytes of all files."""
    found = {}
    for path in version.assets:
        with version.open(path) as file:
            found[path] = file.read()
    return found


def put(repo, name="a", /, message="", **content):
    """One transaction that adds these assets, ``__`` standing for ``/``, or removes where None."""
    with repo.artifact(name).transaction(message) as txn:
        change(txn, content)
    return txn.version


def change(txn, content, meanwhile=lambda: None):
    for key, data in content.items():
        path = key.replace("__", "/")
        if data is None:
            txn.remove(path)
        else:
            txn.add_bytes(path, data)
    meanwhile()


@contextmanager
def refused(repo, error, match=None):
    """A transaction that ends with an error and makes nothing."""
    before = repo.artifact("a").find_log()
    count = len(before.refresh().versions) if before else 0
    with pytest.raises(error, match=match), repo.artifact("a").transaction("m") as txn:
        yield txn
    assert txn.version is None
    after = repo.artifact("a").find_log()
    assert (len(after.refresh().versions) if after else 0) == count


# -- base -------------------------------------------------------------------------------------------------------------


def test_incremental(repo):
    """A version is the newest live one with the changes of the transaction."""
    put(repo, a=b"1", d__x=b"2")
    second = put(repo, a=b"3", b=b"4")
    assert read(second) == {"a": b"3", "b": b"4", "d/x": b"2"}
    assert (second.number, second.parent) == (1, 0)
    repo.artifact("a").delete(1)
    third = put(repo, c=b"5")
    assert read(third) == {"a": b"1", "c": b"5", "d/x": b"2"}
    assert (third.number, third.parent) == (2, 0)


def test_base_none(repo, other):
    """Upon nothing, a version is exactly what is added, whatever comes in between, and never conflicts."""
    put(repo, a=b"1", d__x=b"2")
    with repo.artifact("a").transaction(base=None) as txn:
        txn.add_bytes("a", b"3")
        put(other, a=b"4", b=b"5")
    assert read(txn.version) == {"a": b"3"}
    assert (txn.version.number, txn.version.parent) == (2, None)


def test_all_versions_deleted(repo):
    """Without a live version the base is empty, and numbers go on."""
    put(repo, a=b"1")
    repo.artifact("a").delete(0)
    version = put(repo, b=b"2")
    assert (version.number, version.parent, read(version)) == (1, None, {"b": b"2"})


@pytest.mark.parametrize(
    "arguments", [{"base": "v1"}, {"on_conflict": "theirs"}, {"txn_id": "x"}, {"txn_id": "A" * 32}]
)
def test_bad_arguments(repo, arguments):
    """What a transaction cannot mean is refused before anything is read."""
    with pytest.raises(InvalidInputError):
        repo.artifact("a").transaction(**arguments)


# -- no change, no version --------------------------------------------------------------------------------------------


def test_nothing_changes(repo, store, tree):
    """Equal bytes again, in whatever way: no version is made, and ``version`` is the base."""
    folder = tree(a=b"1", d={"x": b"2"})
    with repo.artifact("a").transaction() as txn:
        txn.add(folder)
    store.reset()
    for changes in (
        lambda txn: None,
        lambda txn: txn.add(folder),
        lambda txn: txn.add_bytes("a", b"1"),
        lambda txn: (txn.remove("a"), txn.add(folder / "a")),
        lambda txn: (txn.add_bytes("new", b""), txn.remove("new")),
        lambda txn: txn.copy("a:v0", "d"),
    ):
        with repo.artifact("a").transaction() as again:
            changes(again)
        assert again.version == txn.version
    assert not store.requests["create"]
    assert not store.requests["put"]


def test_nothing_at_all(repo):
    """An empty transaction of an artifact that is not there makes nothing, not even the artifact."""
    for base in ("latest", None):
        with repo.artifact("a").transaction(base=base) as txn:
            pass
        assert txn.version is None
    assert repo.artifacts() == []
    assert not repo.artifact("a").exists()


@pytest.mark.parametrize("arguments", [{"message": "again"}, {"metadata": {"x": 1}}])
def test_message_or_metadata_make_a_version(repo, arguments):
    """The content may be the same; then so is the digest, and no content is stored."""
    first = put(repo, a=b"1" * 1000)
    with repo.artifact("a").transaction(**arguments) as txn:
        pass
    assert txn.version.number == 1
    assert txn.version.digest == first.digest
    assert txn.version.added == 0
    assert read(txn.version) == read(first)


def test_a_block_that_raises_makes_nothing(repo):
    """The error goes through, no version is there."""
    put(repo, a=b"1")
    with refused(repo, ZeroDivisionError) as txn:
        txn.add_bytes("b", b"2" * 100_000)
        raise ZeroDivisionError


def test_used_once(repo):
    """Outside its block a transaction takes nothing, silently or not; nor is it used twice."""
    txn = repo.artifact("a").transaction()
    early = [lambda: txn.add_bytes("a", b"1"), lambda: txn.remove("a"), lambda: txn.alias("x"), lambda: txn.add("/")]
    for call in early:
        with pytest.raises(ClosedError):
            call()
    with txn:
        txn.add_bytes("a", b"1")
    late = [lambda: txn.add_bytes("b", b"1"), lambda: txn.copy("a:v0", "a", "b"), lambda: txn.add_url("b", "s3://x/y")]
    for call in [*early, *late]:
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(ClosedError), txn:
        pass
    assert len(repo.artifact("a").versions()) == 1


# -- files and folders ------------------------------------------------------------------------------------------------


def test_add_file(repo, tree):
    """A file goes to ``at``, or to its own name."""
    folder = tree(one=b"1")
    with repo.artifact("a").transaction() as txn:
        txn.add(folder / "one")
        txn.add(str(folder / "one"), at="d/two")
    assert read(txn.version) == {"one": b"1", "d/two": b"1"}


def test_add_folder_takes_its_prefix(repo, tree, tmp_path):
    """A folder's contents go under ``at``; what was there and is not in the folder is gone, so get gives it back."""
    put(repo, a=b"old", d__old=b"old", d__x=b"old", e=b"kept")
    folder = tree(x=b"1", deep={"y": b"2"}, empty={})
    with repo.artifact("a").transaction() as txn:
        txn.add(folder, at="d")
    assert read(txn.version) == {"a": b"old", "d/deep/y": b"2", "d/x": b"1", "e": b"kept"}
    txn.version.download(tmp_path / "back", "d/*")
    assert sorted(str(p.relative_to(tmp_path / "back")) for p in (tmp_path / "back").rglob("*") if p.is_file()) == [
        "d/deep/y",
        "d/x",
    ]
    with repo.artifact("a").transaction() as txn:
        txn.add(folder)
    assert read(txn.version) == {"deep/y": b"2", "x": b"1"}


def test_two_adds_accumulate(repo, tree):
    """What the transaction added before stays when it adds another folder to the same place."""
    put(repo, old=b"0")
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes("bytes", b"1")
        txn.add(tree(a=b"2", b=b"2"))
        txn.add(tree(b=b"3", c=b"3"))
    assert read(txn.version) == {"a": b"2", "b": b"3", "bytes": b"1", "c": b"3"}


def test_remove(repo):
    """An asset, a folder, or everything; of the base, and of what was added."""
    put(repo, a=b"1", d__x=b"2", d__y=b"3", dd=b"4")
    assert list(put(repo, a=None).assets) == ["d/x", "d/y", "dd"]
    assert list(put(repo, d=None).assets) == ["dd"]
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes("new/x", b"5")
        txn.remove("new")
        txn.remove("")
    assert list(txn.version.assets) == []
    assert txn.version.number == 3


def test_remove_what_is_not_there(repo):
    """An error, in the base and out of it; a name that another begins with is no folder."""
    put(repo, dd=b"1", e__x=b"2")
    for path in ("d", "dd/x", "e/xx", "nothing"):
        with pytest.raises(NotFoundError, match="nothing is at"), repo.artifact("a").transaction() as txn:
            txn.remove(path)
    with pytest.raises(NotFoundError), repo.artifact("b").transaction() as txn:
        txn.remove("a")


def test_a_file_takes_the_place_of_a_folder_and_back(repo, tree):
    """Once the one is removed the other may come, by whatever call."""
    put(repo, d__x=b"1", d__y=b"2", f=b"3")
    with repo.artifact("a").transaction() as txn:
        txn.remove("d")
        txn.add_bytes("d", b"4")
        txn.add(tree(x=b"5"), at="f")
    assert read(txn.version) == {"d": b"4", "f/x": b"5"}
    with repo.artifact("a").transaction() as txn:
        txn.remove("f")
        txn.copy("a:v0", "f")
    assert read(txn.version) == {"d": b"4", "f": b"3"}


@pytest.mark.parametrize("path", ["d", "f/x", "f/x/y"])
def test_a_file_and_a_folder_in_one_place(repo, path):
    """Refused, whether the other one is in the base or in the transaction."""
    with pytest.raises(InvalidInputError, match="a file and a folder"), repo.artifact("a").transaction() as txn:
        change(txn, {"d/x": b"1", "f": b"2", path: b"3"})
    put(repo, d__x=b"1", f=b"2")
    with pytest.raises(InvalidInputError, match="remove it before"), repo.artifact("a").transaction() as txn:
        txn.add_bytes(path, b"3")
    assert len(repo.artifact("a").versions()) == 1


def test_x_bit(repo, tree, tmp_path):
    """Whether the owner may run it is kept, is a change, and comes back."""
    folder = tree(run=b"#!/bin/sh\n")
    with repo.artifact("a").transaction() as txn:
        txn.add(folder)
    (folder / "run").chmod(0o755)
    with repo.artifact("a").transaction() as again:
        again.add(folder)
    assert again.version.number == 1
    assert [version.assets["run"].executable for version in (txn.version, again.version)] == [False, True]
    again.version.download(tmp_path / "back")
    assert os.access(tmp_path / "back" / "run", os.X_OK)


def test_add_bytes_takes_any_buffer(repo):
    """The bytes are those of the moment of the call."""
    data = bytearray(b"12345")
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes("array", data)
        txn.add_bytes("view", memoryview(data)[1:3])
        data[:] = b"xxxxx"
        with pytest.raises(InvalidInputError):
            txn.add_bytes("text", "12345")
    assert read(txn.version) == {"array": b"12345", "view": b"23"}


# -- claims -----------------------------------------------------------------------------------------------------------

BASE = {"a": b"0", "b": b"0", "d/x": b"0", "d/y": b"0"}
CLAIMS = [
    # ours, theirs, paths that clash
    ({"c": b"1"}, {"e": b"2"}, ()),
    ({"a": b"1"}, {"b": b"2"}, ()),
    ({"d/x": b"1"}, {"d/y": b"2", "d/z": b"2"}, ()),
    ({"a": b"1"}, {"a": b"1"}, ()),
    ({"c": b"1"}, {"c": b"1"}, ()),
    ({"a": None}, {"a": None, "b": b"2"}, ()),
    ({"d": None}, {"d": None}, ()),
    ({"d": None}, {"a": b"2"}, ()),
    ({"a": b"1"}, {"a": b"2"}, ("a",)),
    ({"c": b"1", "e": b"1"}, {"c": b"2", "e": b"2"}, ("c", "e")),
    ({"a": b"1"}, {"a": None}, ("a",)),
    ({"a": None}, {"a": b"2"}, ("a",)),
    ({"d": None}, {"d/x": b"2"}, ("d/x",)),
    ({"d": None}, {"d/new": b"2"}, ("d/new",)),
    ({"c": b"1"}, {"c/x": b"2"}, ("c/x",)),
    ({"c/x": b"1"}, {"c": b"2"}, ("c",)),
    ({"c/x/y": b"1"}, {"c": b"2"}, ("c",)),
]


@contextmanager
def race(repo, other, theirs, **how):
    """A transaction with another commit in between."""
    put(repo, **{path.replace("/", "__"): data for path, data in BASE.items()})
    with repo.artifact("a").transaction(**how) as txn:
        yield txn
        with other.artifact("a").transaction("theirs") as between:
            change(between, theirs)


def applied(base, changes):
    found = dict(base)
    for at, data in changes.items():
        if data is None:
            found = {path: value for path, value in found.items() if path != at and not path.startswith(f"{at}/")}
        else:
            found[at] = data
    return found


@pytest.mark.parametrize(("ours", "theirs", "clash"), CLAIMS)
def test_claims(repo, other, ours, theirs, clash):
    """Disjoint claims merge, equal bytes are no conflict; else nothing is made, and the paths are named."""
    if not clash:
        with race(repo, other, theirs, message="ours") as txn:
            change(txn, ours)
        assert (txn.version.number, txn.version.parent) == (2, 1)
        assert read(txn.version) == applied(applied(BASE, theirs), ours)
        return
    with pytest.raises(ConflictError) as caught, race(repo, other, theirs) as txn:
        change(txn, ours)
    assert caught.value.paths == clash
    assert all(path in str(caught.value) for path in clash)
    assert txn.version is None
    assert [version.message for version in repo.artifact("a").versions()] == ["", "theirs"]


@pytest.mark.parametrize(("ours", "theirs", "clash"), CLAIMS)
def test_claims_that_win(repo, other, ours, theirs, clash):
    """With on_conflict="ours" our claims win, and what nobody else claims of theirs stays."""
    with race(repo, other, theirs, message="ours", on_conflict="ours") as txn:
        change(txn, ours)
    theirs_left = {path: data for path, data in theirs.items() if path not in clash}
    assert read(txn.version) == applied(applied(BASE, theirs_left), ours)


def test_a_folder_claims_what_is_not_in_it(repo, other, tree):
    """What another adds below a folder that we add is a conflict; beside it, it is not."""
    folder = tree(x=b"1")
    with pytest.raises(ConflictError) as caught, race(repo, other, {"d/new": b"2"}) as txn:
        txn.add(folder, at="d")
    assert caught.value.paths == ("d/new",)
    with repo.artifact("a").transaction() as txn:
        txn.add(folder, at="d")
        put(other, dd=b"3", d__x=b"1")
    assert read(txn.version) == {"a": b"0", "b": b"0", "d/x": b"1", "dd": b"3"}


def test_the_same_by_another(repo, other):
    """When another has made the version that ours would be, no second one is made."""
    with race(repo, other, {"a": b"1"}) as txn:
        txn.add_bytes("a", b"1")
    assert txn.version.message == "theirs"
    assert len(repo.artifact("a").versions()) == 2


def test_only_the_x_bit_differs(repo, other, tree):
    """Equal bytes of another mode are a conflict: one of the two would be lost."""
    folder = tree(run=b"1")
    (folder / "run").chmod(0o755)
    with pytest.raises(ConflictError), race(repo, other, {"run": b"1"}) as txn:
        txn.add(folder / "run")


def test_several_versions_in_between(repo, other):
    """What counts is the difference between our base and the newest, however it came about."""
    put(repo, a=b"0")
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes("a", b"1")
        put(other, a=b"2")
        put(other, b=b"3")
        put(other, a=b"0")
    assert (txn.version.number, read(txn.version)) == (4, {"a": b"1", "b": b"3"})


def test_the_base_is_deleted_meanwhile(repo, other):
    """The version is made upon the newest that is left; what only the deleted one held is not in it."""
    put(repo, a=b"0")
    put(repo, b=b"1")
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes("c", b"2")
        other.artifact("a").delete(1)
    assert (txn.version.parent, read(txn.version)) == (0, {"a": b"0", "c": b"2"})
    with refused(repo, ConflictError) as txn:
        txn.add_bytes("c", b"3")
        other.artifact("a").delete(2)


def test_the_base_is_swept_meanwhile(store, repo, other):
    """A base that can no longer be read is a conflict, not a missing file; nothing is made."""
    put(repo, a=b"0")
    put(repo, b=b"1")
    slow = Repository(store, threads=0)
    with refused(slow, ConflictError, "run it again") as txn:
        txn.add_url("c", "s3://elsewhere/x")  # needs nothing of the base
        root = other["a:v1"].tree.root
        other.artifact("a").delete(1)
        store.delete([container_key(root.container)])


def test_the_artifact_is_removed_meanwhile(repo, other):
    """A transaction that is under way fails; nothing is made, nor a new artifact of that name."""
    put(repo, a=b"0")
    txn = repo.artifact("a").transaction()
    with pytest.raises(NotFoundError, match="was removed meanwhile"), txn:
        change(txn, {"b": b"1"}, meanwhile=other.artifact("a").remove)
    assert repo.artifacts() == []


# -- names, message, metadata -----------------------------------------------------------------------------------------


def test_alias_moves_with_the_version(repo):
    """Version and alias are one record: nobody sees the one without the other."""
    put(repo, a=b"0")
    repo.artifact("a").alias("best", 0)
    with repo.artifact("a").transaction() as txn:
        txn.alias("best")
        txn.alias("prod")
        with pytest.raises(InvalidInputError):
            txn.alias("v1")
    assert repo.artifact("a").aliases() == {"best": 1, "prod": 1}
    assert len(repo.artifact("a").open_log().records[-1].ops) == 3


@pytest.mark.parametrize("name", ["paper", "Paper", "Best"])
def test_alias_that_cannot_be(repo, name):
    """An alias that is a tag, or another alias but for case, is a conflict; the version is not made either."""
    put(repo, a=b"0")
    repo.artifact("a").tag("paper", 0)
    repo.artifact("a").alias("best", 0)
    with refused(repo, ConflictError) as txn:
        txn.add_bytes("b", b"1")
        txn.alias(name)


def test_message_limit(repo):
    """4 KiB of UTF-8."""
    with repo.artifact("a").transaction("ü" * 2048) as txn:
        pass
    assert txn.version.message == "ü" * 2048
    for message in ("ü" * 2049, "\ud800", b"bytes"):
        with pytest.raises(InvalidInputError):
            repo.artifact("a").transaction(message)


def test_metadata(repo):
    """Comes back as JSON keeps it: NaN and infinities as strings, tuples as lists, scalars of numpy as numbers."""
    given = {"nan": float("nan"), "inf": [float("inf"), -float("inf")], "t": (1, 2), "n": None, "np": np.float32(0.5)}
    with repo.artifact("a").transaction(metadata=given) as txn:
        pass
    assert repo["a"].metadata == {"nan": "NaN", "inf": ["Infinity", "-Infinity"], "t": [1, 2], "n": None, "np": 0.5}
    assert repo["a"].metadata == txn.version.metadata


def test_metadata_limit(repo):
    """16 KiB of JSON; and nothing that JSON has no word for."""
    with repo.artifact("a").transaction(metadata={"x": "y" * (16 * 1024 - 8)}) as txn:
        pass
    assert txn.version is not None
    bad = [{"x": "y" * (16 * 1024 - 7)}, {1: 2}, {"x": object()}, {"x": {1, 2}}, {"x": b"1"}, {"x": 1 << 64}, ["x"]]
    for metadata in bad:
        with pytest.raises(InvalidInputError):
            repo.artifact("a").transaction(metadata=metadata)


def test_the_largest_message_and_metadata_fit_a_record(repo):
    """However badly JSON has to escape them."""
    with repo.artifact("a").transaction("\0" * 4096, {"x": "\0" * 2729}) as txn:
        pass
    assert repo["a"].message == txn.version.message == "\0" * 4096


# -- special files, hostile paths, files that change ------------------------------------------------------------------


def test_symlinks(repo, tree):
    """To a file: its bytes; to a folder: followed."""
    folder = tree(a=b"1", d={"x": b"2"})
    (folder / "file").symlink_to("a")
    (folder / "folder").symlink_to("d")
    with repo.artifact("a").transaction() as txn:
        txn.add(folder)
        txn.add(folder / "file", at="alone")
    assert read(txn.version) == {"a": b"1", "alone": b"1", "d/x": b"2", "file": b"1", "folder/x": b"2"}


def test_special_files(repo, tree):
    """Dangling links, pipes and sockets are an error that names them, or are left out when the caller says so."""
    folder = tree(a=b"1")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket"))
    with pytest.raises(InvalidInputError) as caught, repo.artifact("a").transaction() as txn:
        txn.add(folder)
    assert all(name in str(caught.value) for name in ("dangling", "pipe", "socket"))
    with repo.artifact("a").transaction() as txn:
        txn.add(folder, skip_special=True)
    assert read(txn.version) == {"a": b"1"}


def test_a_cycle_of_links(repo, tree):
    """Is an error, and not an endless walk."""
    folder = tree(d={"x": b"1"})
    (folder / "d" / "up").symlink_to("..")
    with pytest.raises(InvalidInputError, match="leads back"), repo.artifact("a").transaction() as txn:
        txn.add(folder)


def test_what_is_not_there(repo, tmp_path):
    """No file, no folder: an error before anything is put."""
    with pytest.raises(NotFoundError), repo.artifact("a").transaction() as txn:
        txn.add(tmp_path / "nothing")


HOSTILE = [
    *("", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", ".mandapa", ".mandapa/x"),
    *("a\0b", "a\nb", "a\x7fb", "a\x85b", "a\\b", "a\u2028b", "\ud800", "x" * 256, "/".join(["x" * 200] * 6)),
]


@pytest.mark.parametrize("path", HOSTILE, ids=ascii)
def test_hostile_paths(repo, tree, path):
    """Refused by every call that puts something somewhere, and nothing is made."""
    put(repo, a=b"1")
    folder = tree(x=b"2")
    for call in (
        lambda txn: txn.add_bytes(path, b"3"),
        lambda txn: txn.add(folder / "x", at=path),
        lambda txn: txn.add(folder, at=path) if path else txn.add_bytes(path, b""),  # a folder may go to the root
        lambda txn: txn.add_url(path, "s3://elsewhere/x"),
        lambda txn: txn.copy("a:v0", "a", at=path),
    ):
        with refused(repo, InvalidInputError) as txn:
            call(txn)


def test_names_that_only_some_systems_hold(repo):
    """Are stored: device names, colons, trailing dots, twins by case or normal form."""
    paths = ["aux", "a:b", "dot.", " ", "A", "a", "\u00e9", "e\u0301", "-", "~", "...", "x" * 255]
    with repo.artifact("a").transaction() as txn:
        for path in paths:
            txn.add_bytes(path, path.encode())
    assert read(txn.version) == {path: path.encode() for path in paths}


def test_a_file_that_vanishes(repo, tree, monkeypatch):
    """Between the walk and the reading: an error that names it, and no version."""
    folder = tree(a=b"1", b=b"2")
    walk = transactions.walk

    def walk_and_remove(*arguments, **options):
        found = walk(*arguments, **options)
        (folder / "b").unlink()
        return found

    monkeypatch.setattr(transactions, "walk", walk_and_remove)
    with refused(repo, NotFoundError, "tree-0/b") as txn:
        txn.add(folder)


@pytest.mark.parametrize("size", [10, 3 << 20])
def test_a_file_that_changes(repo, tree, monkeypatch, size):
    """While it is read: an error that names it, and no version; never a mix of old and new bytes."""
    folder = tree(a=b"1" * size)
    read_file, preadv = os.read, os.preadv

    def changes(call):
        def changed(*arguments):
            got = call(*arguments)
            with open(folder / "a", "ab") as file:
                file.write(b"2")
            return got

        return changed

    with refused(repo, InvalidInputError, "changed while") as txn, monkeypatch.context() as patch:
        patch.setattr(os, "read", changes(read_file))
        patch.setattr(os, "preadv", changes(preadv))
        txn.add(folder)


# -- copies -----------------------------------------------------------------------------------------------------------


def test_copy(repo):
    """An asset, a folder, everything, to the same place or another; lineage says from where, once each."""
    put(repo, "base", x=b"1", d__y=b"2", d__z=b"3")
    put(repo, a=b"0", d__old=b"0")
    with repo.artifact("a").transaction() as txn:
        txn.copy("base:v0", "x")
        txn.copy("base", "x", at="deep/x")
        txn.copy("base:v0/d")
        txn.copy("base:v0", "d", at="e")
        txn.copy("base", at="all")
    assert read(txn.version) == {
        "a": b"0", "all/d/y": b"2", "all/d/z": b"3", "all/x": b"1", "d/y": b"2", "d/z": b"3",
        "deep/x": b"1", "e/y": b"2", "e/z": b"3", "x": b"1",
    }  # fmt: skip
    assert txn.version.used == ("base:v0",)
    assert txn.version.added < 2000


def test_copy_of_what_is_not_there(repo):
    """No such artifact, version or path, or a deleted version: an error that says so."""
    put(repo, "base", x=b"1")
    put(repo, "base", y=b"1")
    repo.artifact("base").delete(0)
    for address, path in (("nothing", ""), ("base:v7", ""), ("base", "z"), ("base:v0", "x")):
        with pytest.raises(NotFoundError), repo.artifact("a").transaction() as txn:
            txn.copy(address, path)


# -- again, by the same id --------------------------------------------------------------------------------------------


def test_the_same_id_is_the_same_version(repo, other, tree):
    """Whoever runs it again, and whatever has come since: one version. What it was made of may be gone by then."""
    folder = tree(a=b"1")
    put(repo, "source", x=b"2")

    def run(repo):
        with repo.artifact("a").transaction("once", txn_id=TXN) as txn:
            txn.add(folder)
            txn.copy("source:v0", "x")
            txn.add_bytes("b", b"3")
        return txn.version

    first = run(repo)
    put(other, "source", y=b"2")
    other.artifact("source").delete(0)
    put(other, later=b"4", a=b"5")
    (folder / "a").unlink()
    folder.rmdir()
    for again in (repo, other):
        assert run(again) == first
    assert [version.message for version in repo.artifact("a").versions()] == ["once", ""]


def test_an_id_of_another_command(repo):
    """The id of something that made no version is no transaction's."""
    put(repo, a=b"1")
    repo.artifact("a").alias("best", 0)
    taken = repo.artifact("a").open_log().records[-1].txn
    with pytest.raises(InvalidInputError, match="another command"), repo.artifact("a").transaction(txn_id=taken):
        pass


def test_progress(repo):
    """Is told of every byte that is put."""
    seen = []
    with repo.artifact("a").transaction() as txn:
        txn.progress = seen.append
        txn.add_bytes("a", os.urandom(300_000))
    assert sum(seen) == txn.version.added


def test_two_transactions_of_one_process(repo):
    """Each has its own base; the second to end is rebased like anybody's."""
    put(repo, a=b"0")
    with repo.artifact("a").transaction() as outer:
        outer.add_bytes("b", b"1")
        with repo.artifact("a").transaction() as inner:
            inner.add_bytes("c", b"2")
    assert (inner.version.number, outer.version.number) == (1, 2)
    assert read(outer.version) == {"a": b"0", "b": b"1", "c": b"2"}


def test_paths_are_any_path_like(repo, tree):
    """`add` takes strings and path-likes; relative ones count from the working directory."""
    folder = tree(a=b"1")
    with repo.artifact("a").transaction() as txn:
        txn.add(Path(os.path.relpath(folder)))
    assert read(txn.version) == {"a": b"1"}
