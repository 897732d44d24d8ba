"""A log told again: every record of a source fits the state of its mirror, whatever can be copied by then."""

from __future__ import annotations

import msgspec
import pytest

from mandapa.format.records import (
    AliasOp,
    AnnotateOp,
    DeleteOp,
    FenceOp,
    Record,
    RepackOp,
    Root,
    TagOp,
    UndeleteOp,
    VersionOp,
    encode_record,
)
from mandapa.repository.replay import (
    ORIGIN,
    Content,
    artifact_id,
    difference,
    follows,
    is_upkeep,
    origin_of,
    replay,
    txn_id,
)
from mandapa.repository.state import ArtifactState

THERE = Root(f"meta/{'a' * 32}", 16, 9, "1" * 64)
HERE = Root(f"meta/{'b' * 32}", 16, 9, "1" * 64)


def version(number: int, **extra) -> VersionOp:
    return VersionOp(
        number=number, parent=None, root=THERE, digest=f"{number:064x}", assets=1, bytes=2, added=3, **extra
    )


def record(*ops, seq: int = 0, used: tuple[str, ...] = (), by: str = "ana") -> Record:
    return Record(seq=seq, txn="0" * 32, prev="p", at="2027-01-01", by=by, ops=ops, used=used, seal=f"{seq:064x}")


class Pair:
    """A source and its mirror, side by side."""

    def __init__(self, *live: int) -> None:
        self.there, self.here = ArtifactState(), ArtifactState()
        self.live = live
        self.count = 0

    def tell(self, *ops) -> list[str]:
        """Apply ops to the source, tell them again, and give the ops that this took."""
        one = record(*ops, seq=self.count)
        self.count += 1
        for op in ops:
            self.there.apply(op, one)
        contents = {number: Content(HERE, ("zstd",), 7) for number in self.live}
        origins = {op.number: {"version": op.number} for op in ops if isinstance(op, VersionOp)}
        told = replay(one, self.here, contents, origins)
        assert difference(self.there, self.here, {one.txn}) == ""
        return [type(op).__name__.removesuffix("Op").lower() for op in told]


def test_what_is_live_is_told_as_it_is():
    """With its own root, features and bytes, and the origin; the rest word for word."""
    pair = Pair(0)
    assert pair.tell(version(0, message="m", metadata={"a": 1}), AliasOp("best", 0)) == ["version", "annotate", "alias"]
    op = pair.here.versions[0].op
    assert (op.root, op.requires, op.added, op.message, op.metadata) == (HERE, ["zstd"], 7, "m", {"a": 1})
    assert pair.here.versions[0].facts == {ORIGIN: {"version": 0}}
    assert pair.tell(TagOp("t", 0), AnnotateOp(0, {"x": 1})) == ["tag", "annotate"]
    assert pair.tell(AliasOp("best", None)) == ["alias"]
    assert pair.tell(TagOp("t", None), DeleteOp([0])) == ["tag", "delete"]
    assert pair.tell(UndeleteOp([0])) == ["undelete", "repack"]


def test_a_hidden_version_never_is_live_between_records():
    """Made and deleted at once; what is said of it later is said between bringing it back and deleting it."""
    pair = Pair()
    assert pair.tell(version(0), AliasOp("best", 0), TagOp("t", 0)) == [
        *("version", "annotate", "tag", "tag", "delete"),
    ]
    assert pair.here.live() == []
    assert pair.tell(AnnotateOp(0, {"x": 1})) == ["undelete", "annotate", "delete"]
    assert pair.tell(TagOp("u", 0)) == ["undelete", "tag", "tag", "delete"]
    assert pair.tell(TagOp("u", None), TagOp("t", None)) == []
    assert pair.tell(AliasOp("best", None), DeleteOp([0])) == []
    assert pair.here._burned == pair.there._burned == {"t", "u"}
    assert pair.here.versions[0].facts["x"] == 1


def test_an_alias_stays_where_it_was_until_it_can_move():
    """While it names a hidden version in the source it names the one before, as long as that one lives."""
    pair = Pair(0, 2)
    pair.tell(version(0), AliasOp("best", 0))
    assert pair.tell(version(1), AliasOp("best", 1)) == ["version", "annotate", "delete"]
    assert pair.here.aliases == {"best": 0}
    assert pair.tell(DeleteOp([0])) == ["alias", "delete"]
    assert pair.here.aliases == {}
    pair.tell(version(2), AliasOp("best", 2))
    assert pair.here.aliases == pair.there.aliases


def test_a_hidden_version_comes_back_whole():
    """With the root that it was given; hidden again where it cannot be had."""
    pair = Pair()
    pair.tell(version(0))
    pair.tell(version(1))
    pair.tell(DeleteOp([0, 1]))
    assert pair.tell(UndeleteOp([1])) == []
    pair.live = (0,)
    assert pair.tell(UndeleteOp([0])) == ["undelete", "repack"]
    assert pair.here.versions[0].root == HERE
    assert pair.here.live() == [0]


def test_upkeep_is_not_told():
    """Fences and repacks are each repository's own affair."""
    fence, repack = FenceOp("e"), RepackOp(0, THERE, HERE)
    assert is_upkeep(record(fence, repack))
    assert not follows(record(fence, repack))
    assert follows(record(fence, AliasOp("a", None)))
    pair = Pair(0)
    pair.tell(version(0))
    assert pair.tell(fence, repack) == []


def test_what_others_said_of_origins_is_not_told():
    """A fact of that name is the mirror's own; that of the source stands within it, if it is not large."""
    pair = Pair(0)
    pair.tell(version(0))
    assert pair.tell(AnnotateOp(0, {ORIGIN: {"repository": "x"}})) == []
    state = pair.there.versions[0]
    assert origin_of(state, "r", "u", "a") == {
        "repository": "r",
        "url": "u",
        "artifact": "a",
        "version": 0,
        "at": "2027-01-01",
        "by": "ana",
        "origin": {"repository": "x"},
    }
    pair.tell(AnnotateOp(0, {ORIGIN: {"x": "y" * 3000}}))
    assert "origin" not in origin_of(pair.there.versions[0], "r", "u", "a")


@pytest.mark.parametrize("size", [1_000, 40_000, 60_000, 62_000, 63_000, 64_000])
def test_a_full_record_fits(size):
    """One that is as large as a record may be is told without its origin; what cannot be told is never cut."""
    one = record(version(0), AnnotateOp(0, {"x": "y" * size}), used=("z:v1",), by="b" * 500)
    if len(encode_record(one)) > 65_536:
        return
    told = replay(one, ArtifactState(), {0: Content(HERE, (), 1)}, {0: {"by": "b" * 500}})
    assert any(isinstance(op, AnnotateOp) and "x" in op.facts for op in told)
    assert len(encode_record(msgspec.structs.replace(one, ops=tuple(told)))) <= 65_536


def test_ids_say_all_that_they_depend_on():
    """Another repository, artifact, record, destination or generation is another id; the same is the same."""
    first = artifact_id("s", "a", "d", 0)
    others = [("t", "a", "d", 0), ("s", "b", "d", 0), ("s", "a", "e", 0), ("s", "a", "d", 1)]
    assert len({first, *(artifact_id(*other) for other in others)}) == 5
    assert first == artifact_id("s", "a", "d", 0)
    one, two = record(version(0)), record(version(0), seq=1)
    assert len({txn_id("s", "a", one, "m"), txn_id("s", "a", two, "m"), txn_id("s", "a", one, "n")}) == 3
    assert len(first) == 32


@pytest.mark.parametrize(
    ("op", "says"),
    [
        (version(1), "v1 was made here by 'eve'"),
        (DeleteOp([0]), "v0 was deleted here by 'eve'"),
        (AnnotateOp(0, {"x": 1}), "v0 has other facts here: 'x'"),
        (AliasOp("a", 0), "the alias 'a' is dropped in the source, and v0 here"),
        (TagOp("a", 0), "the tag 'a' is dropped in the source, and v0 here"),
    ],
)
def test_what_others_did_is_named(op, says):
    """Any op that changes what is said; the same on the other side is a difference, too."""
    pair = Pair(0)
    pair.tell(version(0))
    eve = msgspec.structs.replace(record(op, by="eve"), txn="e" * 32)
    changed = pair.here.copy()
    changed.apply(op, eve)
    assert says in difference(pair.there, changed, set())
    assert difference(changed, pair.there, set()) != ""
