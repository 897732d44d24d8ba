"""Mirrors: the destination says what the source says, whatever comes in between, and nothing is sent twice."""

from __future__ import annotations

import os
import sys

import msgspec
import numpy as np
import pytest

from mandapa.content.edit import edit_tree
from mandapa.content.index import Index
from mandapa.content.upload import Upload
from mandapa.digest import hexdigest
from mandapa.errors import ConflictError, CorruptionError, FormatVersionError, InvalidInputError, NotFoundError
from mandapa.format.keys import container_key, log_key
from mandapa.format.records import FenceOp, Record, Root, VersionOp, encode_record
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.gc import Collection
from mandapa.repository.log import Author
from mandapa.repository.replay import ORIGIN
from mandapa.repository.repository import Repository
from mandapa.repository.version import address_of, root_of

sys.path.insert(0, os.path.dirname(__file__))
from mirroring import check, commit, reopened, repository, says, whole


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


def deceive(repo: Repository, name: str, **changes: object) -> None:
    """The next record of an artifact: a version like its last one, with other words in its record."""
    log = repo.artifact(name).open_log()
    op = log.records[-1].find(VersionOp)
    new = msgspec.structs.replace(op, number=op.number + 1, **changes)
    log.append(repo.author.new_id().hex(), lambda _: [new], repo.author)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"digest": "ab" * 32}, CorruptionError, "something else than its record says"),
        ({"requires": ["quantum"]}, FormatVersionError, "needs quantum"),
        ({"root": Root(f"meta/{'ab' * 16}", 16, 99, "ab" * 32)}, CorruptionError, "meta/abab"),
    ],
)
def test_a_source_that_lies(source, changes, error, says):
    """A record that its manifest does not bear out is not told; what was before it stays, the others are mirrored."""
    commit(source, "net", more=b"1")
    deceive(source, "net", **changes)
    destination = repository()
    [bad] = [one for one in source.mirror(destination).artifacts if one.error is not None]
    assert isinstance(bad.error, error)
    assert says in str(bad.error)
    assert destination.artifact("net").state().next_number == 5
    assert destination["empty"].digest == source["empty"].digest
    whole(destination)


@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_is_a_folder(source, first):
    """A manifest that no reader could restore is not made again elsewhere."""
    destination = repository()
    if not first:
        commit(source, "bad", d=b"1")
        source.mirror(destination)
    log = source.register("bad")
    root = log.refresh().versions[0].root if log.refresh().versions else None
    with Upload(source.store, index=Index(None)) as upload:
        rows = {path: upload.add_bytes(path, b"1") for path in ("d", "d/x")}
        made = edit_tree(source.reader, upload, None if root is None else root_of(root), rows)
        upload.flush()
    op = VersionOp(
        number=log.state.next_number,
        parent=None,
        root=address_of(made.address),
        digest=made.digest.hex(),
        assets=made.assets,
        bytes=made.size,
        added=0,
    )
    log.append(source.author.new_id().hex(), lambda _: [op], source.author)
    [bad] = [one for one in source.mirror(destination).artifacts if one.error is not None]
    assert "'d' is a file and a folder" in str(bad.error)
    assert isinstance(bad.error, CorruptionError)
    whole(destination)


def test_a_log_of_a_newer_mandapa(source):
    """Its ops cannot be told: the artifact is left alone, and said to need a newer mandapa."""
    log = source.artifact("net").open_log()
    data = encode_record(
        Record(
            seq=len(log.records),
            txn="ab" * 16,
            prev=log.records[-1].seal,
            at="2027-01-01T00:00:00Z",
            by="new",
            ops=(FenceOp("e"),),
        )
    )
    body = data[:-78].replace(b'{"op":"fence","epoch":"e"}', b'{"op":"sparkle","optional":true}')
    sealed = body + b',"blake3":"' + hexdigest(body).encode() + b'"}\n'
    source.place.create(log_key(log.id, len(log.records)), sealed)
    destination = repository()
    [bad] = [one for one in reopened(source).mirror(destination).artifacts if one.error is not None]
    assert isinstance(bad.error, FormatVersionError)
    assert [artifact.name for artifact in destination.artifacts()] == ["empty"]


def test_a_damaged_log_stops_its_artifact_alone(source):
    """The others are mirrored."""
    log = source.artifact("net").open_log()
    source.place.put(log_key(log.id, 1), b"not a record")
    source.place.delete([f"head/{log.id}"])
    destination = repository()
    [bad] = [one for one in reopened(source).mirror(destination).artifacts if one.error is not None]
    assert (bad.artifact, type(bad.error)) == ("net", CorruptionError)
    assert [artifact.name for artifact in destination.artifacts()] == ["empty"]


def test_progress_and_being_stopped(source):
    """Each object that is put is told; what the callback raises stops all of it, and the next call goes on."""
    destination = repository()
    told: list[int] = []
    done = source.mirror(destination, progress=told.append)
    assert sum(told) == done.added
    commit(source, "net", a=np.random.default_rng(0).bytes(100_000))

    class StopError(Exception):
        pass

    def stop(_: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        source.mirror(destination, progress=stop)
    assert destination.artifact("net").state().next_number == 4
    assert source.mirror(destination).ok
    check(source, destination)


def test_hidden_versions_are_no_burden(source):
    """Neither a clean-up with any grace, nor bringing back what is whole, minds them; expire goes on around them."""
    destination = repository()
    source.mirror(destination)
    for grace in (0, 60, 7 * 86_400):
        for _ in Collection(reopened(destination), grace=grace).steps():
            pass
    check(source, destination)
