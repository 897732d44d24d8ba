"""Mirrors: the destination says what the source says, whatever comes in between, and nothing is sent twice."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from mandapa.errors import ConflictError, CorruptionError, InvalidInputError, NotFoundError
from mandapa.format.keys import container_key
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author
from mandapa.repository.replay import ORIGIN
from mandapa.repository.repository import Repository

sys.path.insert(0, os.path.dirname(__file__))
from mirroring import check, commit, reopened, repository, says


@pytest.fixture
def source() -> Repository:
    """Versions, URLs, aliases, tags, facts, deletions, two artifacts, one of which has an empty version."""
    repo = repository()
    for number in range(4):
        with repo.artifact("net").transaction(message=f"step {number}", metadata={"loss": 1 / (number + 1)}) as txn:
            txn.add_bytes("w/a", bytes([number]) * 100_000)
            txn.add_bytes("w/b", b"the same" * 20_000)
            txn.add_url("data", "s3://elsewhere/x", size=5, checksum="etag:1")
            txn.uses("base:v3")
            txn.alias("best")
    with repo.artifact("empty").transaction(message="nothing") as txn:
        pass
    net = repo.artifact("net")
    net.tag("paper", 1)
    net.tag("draft", 2)
    net.tag("draft", None)
    net.alias("gone", 2)
    net.alias("gone", None)
    net.delete(2)
    return repo


def test_all_that_is_said_is_said_there(source):
    """Numbers, digests, messages, lineage, aliases, tags, dropped tags, deletions and contents; and the origin."""
    destination = repository()
    done = source.mirror(destination)
    assert done.ok
    assert [(one.artifact, one.versions) for one in done.artifacts] == [("empty", 1), ("net", 3)]
    check(source, destination)
    version = destination["net:v1"]
    assert version.facts[ORIGIN] == {
        "repository": source.id,
        "url": source.url,
        "artifact": source.artifact("net").open_log().id,
        "version": 1,
        "at": source["net:v1"]._state.record.at,
        "by": source.author.by,
    }
    assert "draft" in destination.artifact("net").state()._burned
    assert [step.name for step in destination.artifact("net").moves("draft")] == ["draft", "draft"]
    assert destination.catalog.state.names["net"] != source.catalog.state.names["net"]


def test_what_is_new_follows(source):
    """Commits, moves, deletions and those taken back; a second call has nothing to do."""
    destination = repository()
    source.mirror(destination)
    commit(source, "net", "more", w__c=b"new", alias="best")
    source.artifact("net").alias("best", 1)
    source.artifact("net").delete(3)
    source.artifact("net").undelete(2)
    done = source.mirror(reopened(destination))
    assert done.ok
    check(source, destination)
    again = source.mirror(reopened(destination))
    assert (again.ok, again.added, [one.records for one in again.artifacts]) == (True, 0, [0, 0])


def test_only_some(source):
    """Patterns and names choose; one that fits nothing is an error, with a hint."""
    destination = repository()
    assert [one.artifact for one in source.mirror(destination, only="n*").artifacts] == ["net"]
    assert [one.name for one in destination.artifacts()] == ["net"]
    with pytest.raises(NotFoundError, match="did you mean 'net'"):
        source.mirror(destination, only=["nett"])
    source.mirror(destination, only=["empty", "net"])
    check(source, destination)


def test_a_version_deleted_before_it_was_copied(source):
    """It is there as a deleted one, its number taken; nobody can bring it back there, until the source has it again."""
    destination = repository()
    source.mirror(destination)
    [hidden] = destination.artifact("net").deleted()
    assert (hidden.number, hidden.digest) == (2, source.artifact("net").deleted()[0].digest)
    with pytest.raises(NotFoundError, match="bytes are gone"):
        destination.artifact("net").undelete(2)
    source.artifact("net").undelete(2)
    source.artifact("net").alias("second", 2)
    assert source.mirror(destination).ok
    check(source, destination)


def test_what_the_destination_has_of_its_own_is_left_alone(source):
    """A name that is taken: that artifact is left alone and named, the others are mirrored."""
    destination = repository()
    commit(destination, "NET", a=b"mine")
    done = source.mirror(destination)
    assert not done.ok
    [bad] = [one for one in done.artifacts if one.error is not None]
    assert bad.artifact == "net"
    assert "'NET'" in str(bad.error)
    assert isinstance(bad.error, ConflictError)
    assert says(destination).keys() == {"NET", "empty"}
    destination.artifact("NET").rename("mine")
    assert source.mirror(destination).ok
    assert says(destination)["net"] == says(source)["net"]


def test_a_version_that_somebody_committed_to_the_mirror(source):
    """It is named, and nothing is mixed."""
    destination = repository(author=Author("eve@there"))
    source.mirror(destination)
    commit(destination, "net", a=b"mine")
    commit(source, "net", a=b"theirs")
    before = says(destination)
    done = source.mirror(destination)
    [bad] = [one.error for one in done.artifacts if one.error is not None]
    assert "v4 was made here by 'eve@there'" in str(bad)
    assert says(destination) == before


@pytest.mark.parametrize("what", ["alias", "tag", "delete", "drop", "undelete"])
def test_what_is_changed_in_the_mirror_and_put_back(source, what):
    """A change there is a conflict that names it; once it is put back, the mirror goes on."""
    destination = repository()
    source.mirror(destination)
    commit(source, "net", a=b"theirs")
    net = destination.artifact("net")
    do, undo, word = {
        "alias": (lambda: net.alias("mine", 1), lambda: net.alias("mine", None), "alias 'mine' is dropped"),
        "tag": (lambda: net.tag("mine", 1), lambda: net.tag("mine", None), "tag 'mine' is dropped"),
        "delete": (lambda: net.delete(0), lambda: net.undelete(0), "v0 was deleted here"),
        "drop": (lambda: net.alias("best", None), lambda: net.alias("best", 3), "alias 'best' is v3"),
        "undelete": (lambda: net.undelete(0), lambda: net.delete(0), "v0 was deleted in the source"),
    }[what]
    if what == "undelete":
        source.artifact("net").delete(0)
        source.mirror(destination)
        commit(source, "net", b=b"more")
    do()
    [bad] = [one.error for one in source.mirror(destination).artifacts if one.error is not None]
    assert word in str(bad)
    undo()
    assert source.mirror(destination).ok
    found, wanted = says(destination)["net"], says(source)["net"]
    found["burned"] = [name for name in found["burned"] if name != "mine"]
    assert found == wanted


def test_new_names_follow(source):
    """Renamed in the source, renamed there, names that go round included."""
    destination = repository()
    commit(source, "third", a=b"1")
    source.mirror(destination)
    source.artifact("net").rename("tmp")
    source.artifact("empty").rename("net")
    source.artifact("third").rename("empty")
    source.artifact("tmp").rename("Third")
    assert source.mirror(destination).ok
    check(source, destination)


def test_a_new_name_that_is_taken(source):
    """A conflict that names it; the artifact keeps the name that it has."""
    destination = repository()
    source.mirror(destination)
    commit(destination, "mine", a=b"1")
    source.artifact("net").rename("mine")
    [bad] = [one.error for one in source.mirror(destination).artifacts if one.error is not None]
    assert "'mine' was renamed in the source" in str(bad)
    assert [one.name for one in destination.artifacts()] == ["empty", "mine", "net"]


def test_a_removed_artifact_is_kept(source):
    """It is said, and nothing of it is lost; a new one of that name needs its name first."""
    destination = repository()
    source.mirror(destination)
    before = says(destination)
    source.artifact("net").remove()
    done = source.mirror(destination)
    assert done.ok
    assert [one.artifact for one in done.artifacts if one.removed] == ["net"]
    assert says(destination) == before
    commit(source, "net", a=b"another")
    assert not source.mirror(destination).ok
    destination.artifact("net").rename("net-old")
    assert source.mirror(destination).ok
    assert says(destination)["net"] == says(source)["net"]


def test_a_mirror_that_was_removed_comes_back(source):
    """Under a new id: one that was removed is never used again."""
    destination = repository()
    source.mirror(destination)
    first = destination.catalog.state.names["net"]
    destination.artifact("net").remove()
    assert source.mirror(destination).ok
    assert destination.catalog.state.names["net"] != first
    check(source, destination)


def test_a_mirror_of_a_mirror(source):
    """It says the same, and each version where it came from, and that one's origin."""
    middle, destination = repository(), repository()
    source.mirror(middle)
    assert middle.mirror(destination).ok
    check(source, destination)
    origin = destination["net:v1"].facts[ORIGIN]
    assert (origin["repository"], origin["origin"]["repository"]) == (middle.id, source.id)
    source.artifact("net").alias("best", 0)
    source.mirror(middle)
    assert middle.mirror(destination).ok
    check(source, destination)


def test_a_copy_of_the_bytes_is_no_mirror(source):
    """Neither the repository itself nor a copy of its bytes is a destination."""
    twin = MemoryObjectStore()
    for info in source.place.list(""):
        twin.put(info.key, source.place.get(info.key))
    for destination in (source, Repository(twin)):
        with pytest.raises(InvalidInputError, match="a repository of its own"):
            source.mirror(destination)


def test_damage_in_the_source_is_not_copied(source):
    """A chunk that is not what was stored is an error; other artifacts, and the versions before it, are there."""
    commit(source, "net", w__d=np.random.default_rng(0).bytes(200_000))
    located = source["net:v4"].tree.get("w/d")
    key = container_key(located.table[located.row.chunks[0].container])
    data = bytearray(source.place.get(key))
    data[1000] ^= 1
    source.place.put(key, bytes(data))
    destination = repository()
    [bad] = [one for one in source.mirror(destination).artifacts if one.error is not None]
    assert isinstance(bad.error, CorruptionError)
    assert key in str(bad.error)
    assert [version.number for version in destination.artifact("net").versions()] == [0, 1, 3]
    assert fsck(reopened(destination), deep=True).findings == []
