"""Names: of versions, aliases, tags, artifacts; what each call says when there is no such thing."""

from __future__ import annotations

from functools import partial

import pytest

from mandapa.errors import ConflictError, CorruptionError, InvalidInputError, NotFoundError
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository


@pytest.fixture
def store():
    return MemoryObjectStore()


@pytest.fixture
def repo(store):
    """``a`` with v0 to v4, of which v2 is deleted; v1 is ``best``, v3 is the tag ``paper``; v4 equals v0."""
    made = Repository.create(store, threads=0, author=Author("ana@hall"))
    for data in (b"0", b"1", b"2", b"3", b"0"):
        put(made, x=data, d__y=data)
    made.artifact("a").delete(2)
    made.artifact("a").alias("best", 1)
    made.artifact("a").tag("paper", 3)
    return made


@pytest.fixture
def other(store, repo):
    return Repository(store, threads=0)


def put(repo, name="a", /, **content):
    with repo.artifact(name).transaction("m") as txn:
        for path, data in content.items():
            txn.add_bytes(path.replace("__", "/"), data)
    return txn.version


# -- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "number"),
    [
        ("", 4),
        (":latest", 4),
        (":v0", 0),
        (":best", 1),
        (":paper", 3),
        (":latest~0", 4),
        (":latest~1", 3),
        (":latest~2", 1),
        (":v4~3", 0),
        (":paper~1", 1),
        (":best~1", 0),
    ],
)
def test_refs(repo, ref, number):
    """The same text names the same version everywhere; ``~N`` counts live versions only."""
    assert repo[f"a{ref}"].number == number
    assert repo[f"a{ref}/d/y"].path == "d/y"
    if ref:
        assert repo.artifact("a").version(ref[1:]).number == number


def test_digests(repo):
    """The highest live version of that digest."""
    first, deleted = repo["a:v0"], repo.artifact("a").deleted()[0]
    assert first.digest == repo["a:v4"].digest
    assert repo[f"a:@{first.digest}"].number == 4
    assert repo[f"a:@{first.digest[:8]}~1"].number == 3
    with pytest.raises(NotFoundError, match="was deleted"):
        repo[f"a:@{deleted.digest[:12]}"]
    with pytest.raises(NotFoundError, match="whose digest starts with"):
        repo["a:@00000000"]
    repo.artifact("a").delete(4)
    assert repo[f"a:@{first.digest[:8]}"].number == 0


def test_digests_that_start_alike(repo, monkeypatch):
    """Are refused as long as several live versions have them."""
    artifact = repo.artifact("a")
    with pytest.raises(InvalidInputError, match="the digests of 3 versions"):
        artifact._by_digest(artifact.state(), "")
    for number in (0, 3, 4):
        if number == 3:
            artifact.tag("paper", None)
        artifact.delete(number)
    assert artifact._by_digest(artifact.state(), "") == 1


@pytest.mark.parametrize(
    ("address", "error", "says"),
    [
        ("a:v9", NotFoundError, "the newest is v4"),
        ("a:v2", NotFoundError, r"was deleted \(.*by ana@hall\)"),
        ("a:v2~1", NotFoundError, "was deleted"),
        ("a:v0~1", NotFoundError, "no 1 live versions before"),
        ("a:prod", NotFoundError, "it has: best, paper"),
        ("b", NotFoundError, "has no artifact 'b'"),
        ("A", NotFoundError, "did you mean 'a'"),
        ("a:", InvalidInputError, "names no version"),
        ("a:~1", InvalidInputError, "names no version"),
        ("a~1", InvalidInputError, "write a:latest~1"),
        ("a:@123", InvalidInputError, "no digest"),
        ("a:@1234567G", InvalidInputError, "no digest"),
        ("a:v01", InvalidInputError, "means a version by its number"),
        ("a:-x", InvalidInputError, "cannot name an alias"),
        ("a/", InvalidInputError, "ends with '/'"),
        ("a//x", InvalidInputError, "is absolute"),
        ("a/../x", InvalidInputError, "segment"),
        ("", InvalidInputError, "cannot name an artifact"),
        ("/x", InvalidInputError, "cannot name an artifact"),
        ("a b", InvalidInputError, "cannot name an artifact"),
        (7, InvalidInputError, "a string"),
    ],
)
def test_addresses_that_name_nothing(repo, address, error, says):
    """The error tells what there is instead."""
    with pytest.raises(error, match=says):
        repo[address]


def test_look_ups_read_the_store(repo, other):
    """What another process did before the call is seen; a version in hand stays what it is."""
    held, best = other["a"], other["a:best"]
    put(repo, x=b"new")
    repo.artifact("a").alias("best", 0)
    repo.artifact("a").delete(1)
    assert (held.number, best.number) == (4, 1)
    assert (other["a"].number, other["a:best"].number) == (5, 0)
    with pytest.raises(NotFoundError):
        other["a:v1"]
    assert held == repo["a:v4"]
    assert hash(held) == hash(repo["a:v4"])
    assert held != best
    assert held.names == ()
    assert other["a"].names == ("latest",)


def test_assets_that_are_not_there(repo):
    """A path that is none, a folder, a URL: each says what it is."""
    with repo.artifact("a").transaction() as txn:
        txn.add_url("u", "s3://elsewhere/x")
    with pytest.raises(NotFoundError, match="no asset 'nothing'"):
        txn.version.open("nothing")
    with pytest.raises(InvalidInputError, match="is a folder"):
        txn.version.open("d")
    with pytest.raises(InvalidInputError, match="is a URL"):
        txn.version.open("u")
    with pytest.raises(KeyError):
        txn.version.assets["nothing"]
    assert "nothing" not in txn.version.assets


def test_versions_of_a_path(repo):
    """Those in which it changed, came or went; of a folder, anything below it."""
    numbers = lambda path: [version.number for version in repo.artifact("a").versions(path)]  # noqa: E731
    assert numbers(None) == [0, 1, 3, 4]
    put(repo, x=b"0", z=b"9")
    with repo.artifact("a").transaction() as txn:
        txn.remove("d")
    assert numbers("x") == [0, 1, 3, 4]
    assert numbers("d") == numbers("d/y") == [0, 1, 3, 4, 6]
    assert numbers("z") == [5]
    assert numbers("nothing") == []


# -- aliases and tags -------------------------------------------------------------------------------------------------


def test_aliases_move_and_every_move_is_recorded(repo):
    """Set, moved, dropped, set again."""
    artifact = repo.artifact("a")
    artifact.alias("best", "latest")
    artifact.alias("best", None)
    artifact.alias("best", repo["a:v0"])
    assert artifact.aliases() == {"best": 0}
    assert [(step.name, step.version) for step in artifact.moves("best")] == [
        ("best", 1),
        ("best", 4),
        ("best", None),
        ("best", 0),
    ]
    assert {step.by for step in artifact.moves()} == {"ana@hall"}
    assert all(step.at.tzinfo for step in artifact.moves())


def test_a_tag_never_moves(repo):
    """Nor does its name come back, in any case, once it is dropped."""
    artifact = repo.artifact("a")
    with pytest.raises(ConflictError, match="never moves"):
        artifact.tag("paper", 1)
    artifact.tag("paper", None)
    assert artifact.tags() == {}
    for call in (artifact.tag, artifact.alias):
        for name in ("paper", "Paper"):
            with pytest.raises(ConflictError, match="never used again"):
                call(name, 1)


@pytest.mark.parametrize("name", ["latest", "Latest", "v1", "V01", "", "-x", "a b", "ü", "x" * 129, "a/b", 7])
def test_names_that_no_label_can_have(repo, name):
    """Refused by alias and tag alike."""
    for call in (repo.artifact("a").alias, repo.artifact("a").tag):
        with pytest.raises(InvalidInputError):
            call(name, 1)


def test_labels_of_nothing(repo):
    """No such version, a deleted one, no such label, no such artifact."""
    artifact, stranger = repo.artifact("a"), repo.artifact("b")
    for call in (artifact.alias, artifact.tag):
        for version in (9, 2, "v9", "nothing"):
            with pytest.raises(NotFoundError):
                call("new", version)
        with pytest.raises(NotFoundError, match="has no"):
            call("nothing", None)
    for call in (stranger.alias, stranger.tag, stranger.delete, stranger.undelete):
        with pytest.raises(NotFoundError, match="has no artifact 'b'"):
            call("x", 0)
    for call in (stranger.versions, stranger.aliases, stranger.remove, partial(stranger.rename, "c")):
        with pytest.raises(NotFoundError, match="has no artifact 'b'"):
            call()


def test_versions_of_another_artifact(repo):
    """A version in hand is one of its artifact's, never just a number."""
    stranger = put(repo, "b", x=b"1")
    artifact = repo.artifact("a")
    for call in (partial(artifact.alias, "new"), partial(artifact.tag, "new"), artifact.delete, artifact.undelete):
        with pytest.raises(InvalidInputError, match="b:v0 is no version of a"):
            call(stranger)


# -- deleting ---------------------------------------------------------------------------------------------------------


def test_delete_is_all_or_none(repo):
    """One that is named, deleted or not there keeps all of them."""
    artifact = repo.artifact("a")
    for versions, error in (((0, 1), ConflictError), ((0, "paper"), ConflictError), ((0, 2), NotFoundError)):
        with pytest.raises(error):
            artifact.delete(*versions)
    with pytest.raises(ConflictError, match="is best: move or drop that first"):
        artifact.delete("best")
    with pytest.raises(InvalidInputError):
        artifact.delete()
    assert [version.number for version in artifact.versions()] == [0, 1, 3, 4]
    assert artifact.delete("latest", 0, "v0") == [0, 4]
    assert repo["a"].number == 3


def test_latest_means_what_it_means_at_first(repo, other, store):
    """A version that comes while `delete("latest")` is under way is not what was meant."""

    class Slow:
        def __init__(self):
            self.meanwhile = lambda: put(other, x=b"5")

        def __getattr__(self, name):
            return getattr(store, name)

        def create(self, key, data):
            self.meanwhile()
            self.meanwhile = lambda: None
            store.create(key, data)

    slow = Repository(Slow(), threads=0, author=Author(sleep=lambda _: None))
    assert slow.artifact("a").delete("latest") == [4]
    assert [version.number for version in repo.artifact("a").versions()] == [0, 1, 3, 5]


def test_undelete(repo):
    """By number, digest or the version itself; only what is deleted."""
    artifact = repo.artifact("a")
    deleted = artifact.deleted()[0]
    for version in (2, "v2", f"@{deleted.digest[:10]}", deleted):
        assert artifact.undelete(version) == [2]
        assert repo["a:v2"].digest == deleted.digest
        artifact.delete(2)
    with pytest.raises(NotFoundError, match="has no v9"):
        artifact.undelete(9)
    for versions in ((), (1,), ("best",), ("v2~1",), (2, 1)):
        with pytest.raises(InvalidInputError):
            artifact.undelete(*versions)
    assert [version.number for version in artifact.deleted()] == [2]


# -- artifacts --------------------------------------------------------------------------------------------------------


def test_rename(repo, other):
    """The history goes with it; the old name is free; whoever holds the old one is told."""
    held = other.artifact("a")
    assert held.exists()
    repo.artifact("a").rename("b")
    assert [artifact.name for artifact in repo.artifacts()] == ["b"]
    assert repo["b:best"].number == 1
    with pytest.raises(NotFoundError, match="has no artifact 'a'"):
        held.version()
    assert put(repo, "a", x=b"1").number == 0
    repo.artifact("b").rename("B")
    repo.artifact("B").rename("B")
    with pytest.raises(ConflictError, match="'a' already"):
        repo.artifact("B").rename("A")
    with pytest.raises(InvalidInputError):
        repo.artifact("B").rename("no name")
    assert [artifact.name for artifact in repo.artifacts()] == ["B", "a"]


def test_names_differ_by_more_than_case(repo):
    """An artifact that would be the twin of another by case cannot be made."""
    with pytest.raises(ConflictError, match="differ by more than case"):
        put(repo, "A", x=b"1")
    assert len(repo.artifacts()) == 1


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a:b", "ü", "x" * 129, "a\n", 7])
def test_names_that_no_artifact_can_have(repo, name):
    """Are refused without a request."""
    with pytest.raises(InvalidInputError):
        repo.artifact(name)


def test_remove(repo, other):
    """Gone with all its versions, for everybody; a new one of that name has nothing of it."""
    held, removed = other["a:best"], other.artifact("a")
    with held.open("x") as file:
        assert file.read() == b"1"
    repo.artifact("a").remove()
    assert repo.artifacts() == []
    for call in (removed.version, removed.remove, partial(removed.delete, 0), partial(removed.rename, "b")):
        with pytest.raises(NotFoundError):
            call()
    assert put(repo, x=b"new").number == 0
    assert other["a"].number == 0
    assert repo.artifact("a").aliases() == {}
    assert held.number == 1


def test_what_is_gone_says_why(repo, other, store):
    """Bytes of a deleted version, of a removed artifact, and bytes that should be there: three different answers."""
    deleted, removed, broken = other["a:v4"], other["a:best"], other["a:v0"]
    repo.artifact("a").delete(4)
    store.delete([info.key for info in store.list("meta/")])
    with pytest.raises(NotFoundError, match=r"a:v4 was deleted \(.* by ana@hall\)"):
        deleted.open("x")
    with pytest.raises(CorruptionError, match="run 'mandapa fsck'"):
        broken.open("x")
    repo.artifact("a").remove()
    with pytest.raises(NotFoundError, match="the artifact 'a' was removed"):
        removed.open("x")
