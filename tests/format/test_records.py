"""Records, heads, markers and gc lists: literal bytes in, values out; values to bytes and back; limits."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mandapa.digest import hexdigest
from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError
from mandapa.format import records as r
from mandapa.format.keys import container_key, head_key, log_key, log_prefix, parse_seq
from mandapa.format.strict import CONTAINER_MAX, INT_MAX, RECORD_MAX, open_sealed, seal

TXN = "00112233445566778899aabbccddeeff"
HASH = "ab" * 32
ROOT = {"object": f"meta/{TXN}", "offset": 16, "length": 100, "hash": HASH}
LITERAL = (
    b'{"format":1,"seq":7,"txn":"00112233445566778899aabbccddeeff",'
    b'"prev":"abababababababababababababababababababababababababababababababab","at":"2027-01-01T00:00:00Z","by":"me",'
    b'"ops":[{"op":"delete","versions":[3,4]},{"op":"alias","name":"best","version":null},{"op":"close"}],'
    b'"blake3":"9f2aea3b0df1f96b5e2f6d8e0b3b3e4dd6b9d34a4d7b0eaa4f6f7ed2b6b55e0f"}\n'
)


def sealed(body):
    """A line from the bytes of a JSON object, or from a dict."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() if isinstance(body, dict) else body
    return data[:-1] + b',"blake3":"' + hexdigest(data[:-1]).encode() + b'"}\n'


def line(**members):
    """A record that is right but for the members given; a member of None is left out."""
    base = {"format": 1, "seq": 0, "txn": TXN, "prev": "", "at": "2027-01-01T00:00:00Z", "by": "me"}
    base["ops"] = [{"op": "fence", "epoch": "e"}]
    return sealed({k: v for k, v in {**base, **members}.items() if v is not None})


def with_op(op):
    return line(ops=[op])


def read(data, seq=0):
    return r.decode_record(data, key="log/x/0000000000000000", seq=seq)


def test_a_record_written_down_as_bytes_is_read():
    """A line of bytes that no code of ours made, its seal put in by hand."""
    body = LITERAL[: -len(b',"blake3":"') - 67]
    record = read(body + b',"blake3":"' + hexdigest(body).encode() + b'"}\n', seq=7)
    assert record == r.Record(
        seq=7,
        txn=TXN,
        prev=HASH,
        at="2027-01-01T00:00:00Z",
        by="me",
        ops=(r.DeleteOp([3, 4]), r.AliasOp("best", None), r.CloseOp()),
        seal=hexdigest(body),
    )
    with pytest.raises(CorruptionError, match="BLAKE3"):
        read(LITERAL, seq=7)


def test_members_in_any_order_and_with_blanks_are_read():
    """Another writer's JSON: other order, blanks, escapes; only the seal has its place."""
    body = (
        b'{ "ops" : [ { "version" : 0 , "op" : "tag" , "name" : "p\\u0061per" } ] , "by" : "\\u092e" , "at":"", '
        b'"prev":"",\t"txn":"00112233445566778899aabbccddeeff", "seq" : 0, "format" : 1 }'
    )
    assert read(sealed(body)).ops == (r.TagOp("paper", 0),)
    assert read(sealed(body)).by == "म"


names = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,20}\Z")
labels = names.filter(lambda name: name.lower() != "latest" and not (name[0] in "vV" and name[1:].isdigit()))
ids = st.binary(min_size=16, max_size=16).map(bytes.hex)
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
counts = st.integers(0, INT_MAX)
text = st.text(st.characters(codec="utf-8"), max_size=30)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(text, json_values, max_size=4)
roots = st.builds(
    lambda id_, offset, length, hash_: r.Root(f"meta/{id_}", offset, length, hash_),
    ids,
    st.integers(16, CONTAINER_MAX // 2),
    st.integers(1, CONTAINER_MAX // 2),
    hashes,
)
ops = st.one_of(
    st.builds(
        r.VersionOp,
        number=counts,
        parent=st.none() | counts,
        root=roots,
        digest=hashes,
        assets=counts,
        bytes=counts,
        added=counts,
        message=text,
        metadata=objects,
        requires=st.lists(text, max_size=2),
    ),
    st.builds(r.AliasOp, labels, st.none() | counts),
    st.builds(r.TagOp, labels, st.none() | counts),
    st.builds(r.DeleteOp, st.lists(counts, max_size=4)),
    st.builds(r.UndeleteOp, st.lists(counts, max_size=4)),
    st.builds(r.AnnotateOp, counts, objects),
    st.builds(r.RepackOp, counts, roots, roots, st.lists(text, max_size=2)),
    st.builds(r.FenceOp, ids),
    st.builds(r.CloseOp),
    st.builds(r.RegisterOp, names, ids),
    st.builds(r.RenameOp, ids, names),
    st.builds(r.RemoveOp, ids),
    st.builds(r.SettingsOp, objects),
    st.builds(r.UnknownOp, st.sampled_from(["sprout", "graft"]), st.booleans()),
)


@settings(max_examples=150, deadline=None)
@given(
    st.builds(
        r.Record,
        seq=counts,
        txn=ids,
        prev=st.just("") | hashes,
        at=text,
        by=text,
        ops=st.lists(ops, min_size=1, max_size=4).map(tuple),
        run=text,
        used=st.lists(text, max_size=3).map(tuple),
    )
)
def test_records_come_back_as_they_were(record):
    """Every op and member survives; the line is JSON to everybody; a second encoding is equal."""
    data = r.encode_record(record)
    again = r.decode_record(data, key="k", seq=record.seq)
    assert again == r.msgspec.structs.replace(record, seal=again.seal)
    assert r.encode_record(again) == data
    assert json.loads(data)["blake3"] == again.seal
    assert data.count(b"\n") == 1


def test_unknown_ops_are_told_apart_by_optional():
    """An op that is not known comes back by name, whatever else it says; a boolean `optional` is kept."""
    assert read(with_op({"op": "sprout", "leaf": [1, {}]})).ops == (r.UnknownOp("sprout", False),)
    assert read(with_op({"op": "sprout", "optional": True})).ops == (r.UnknownOp("sprout", True),)


def test_the_largest_record_is_read_and_a_larger_one_is_not_written():
    """64 KiB exactly pass; one byte more is the writer's error, and the reader's."""
    empty = len(line(by=""))
    data = line(by="x" * (RECORD_MAX - empty))
    assert len(data) == RECORD_MAX
    record = read(data)
    assert record.by == "x" * (RECORD_MAX - empty)
    with pytest.raises(CorruptionError, match="more than"):
        read(line(by="x" * (RECORD_MAX - empty + 1)))
    with pytest.raises(InvalidInputError, match="65,537"):
        r.encode_record(r.msgspec.structs.replace(record, by=record.by + "x"))


@pytest.mark.parametrize(
    "changes",
    [
        {"txn": "no id"},
        {"ops": ()},
        {"seq": -1},
        {"seq": INT_MAX + 1},
        {"by": "\ud800"},
        {"ops": (r.AliasOp("v1", 0),)},
        {"ops": (r.TagOp("Latest", 0),)},
        {"ops": (r.AliasOp("a/b", None),)},
        {"ops": (r.RegisterOp("", TXN),)},
        {"ops": (r.RegisterOp("ok", "id"),)},
        {"ops": (r.DeleteOp([-1]),)},
        {"ops": (r.FenceOp("../x"),)},
        {"ops": (r.RepackOp(0, r.Root("packs/x", 16, 1, HASH), r.Root(f"meta/{TXN}", 16, 1, HASH)),)},
        {"ops": (r.RepackOp(0, r.Root(f"meta/{TXN}", 16, 1, HASH), r.Root(f"meta/{TXN}", 8, 1, HASH)),)},
    ],
    ids=str,
)
def test_what_no_reader_would_take_is_not_written(changes):
    """The writer finds out before the record is in the log, where it would stay for ever."""
    record = r.Record(seq=0, txn=TXN, prev="", at="", by="", ops=(r.CloseOp(),))
    r.encode_record(record)
    with pytest.raises(InvalidInputError):
        r.encode_record(r.msgspec.structs.replace(record, **changes))


def test_a_record_is_of_its_slot():
    """A record copied to another slot is corruption."""
    with pytest.raises(CorruptionError, match="holds record 0"):
        read(line(), seq=1)


def test_newer_members_and_formats_ask_for_an_upgrade():
    """Unknown members of records, ops, roots and lists; another format, however the rest looks."""
    newer = [
        line(colour="red"),
        with_op({"op": "close", "why": "x"}),
        with_op({"op": "fence", "epoch": "e", "optional": True}),
        with_op({"op": "repack", "version": 0, "was": {**ROOT, "x": 1}, "root": ROOT}),
        line(format=2),
        sealed({"format": 3, "everything": "else"}),
    ]
    for data in newer:
        with pytest.raises(FormatVersionError, match=r"upgrade|newer"):
            read(data)
    with pytest.raises(FormatVersionError):
        r.decode_gc_list(sealed({"format": 1, "epoch": "e", "objects": [], "more": 1}), key="gc/e")
    with pytest.raises(FormatVersionError):
        r.decode_gc_list(sealed({"format": 2}), key="gc/e")


def test_sealed_lines_of_any_object():
    """`seal` and `open_sealed` are each other's inverse."""
    data = seal({"format": 1, "x": ["é", None]})
    assert data == '{"format":1,"x":["é",null],"blake3":"%s"}\n'.encode().replace(b"%s", hexdigest(data[:-78]).encode())
    assert open_sealed(data, key="k", limit=len(data)) == (
        '{"format":1,"x":["é",null]}'.encode(),
        hexdigest(data[:-78]),
    )


# -- heads ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40))
def test_heads_come_back_line_by_line(count):
    """What goes in comes out, in order."""
    lines = [line(seq=n, by=str(n)) for n in range(count)]
    assert r.decode_head(r.encode_head(lines), key="head/catalog") == lines


def test_a_long_history_fits_in_a_head():
    """10,000 records that look much alike are not mistaken for a bomb."""
    metadata = {"note": "the same words again and again " * 60}
    lines = [
        line(seq=n, txn=f"{n:032x}", ops=[{"op": "annotate", "version": 0, "facts": metadata}]) for n in range(10_000)
    ]
    assert r.decode_head(r.encode_head(lines), key="head/catalog") == lines


# -- the marker -------------------------------------------------------------------------------------------------------


def test_the_marker_written_down_as_bytes_is_read():
    """The literal marker; blanks, other members and their order do not matter."""
    data = b'{"format":1,"id":"00112233445566778899aabbccddeeff","hash":"blake3"}\n'
    assert r.encode_marker(TXN) == data
    assert r.decode_marker(data, key="mandapa.json").id == TXN
    other = b'\r\n{ "hash": "blake3", "id": "00112233445566778899aabbccddeeff", "since": {}, "format": 1 }'
    assert r.decode_marker(other, key="mandapa.json") == r.Marker(format=1, id=TXN, hash="blake3")


def test_markers_of_other_formats_ask_for_an_upgrade():
    """Format or hash; a later format need not have the members of this one."""
    for data in (
        b'{"format":2}',
        b'{"format":2,"id":7,"hash":[]}',
        b'{"format":1,"id":"%s","hash":"k12"}' % TXN.encode(),
    ):
        with pytest.raises(FormatVersionError):
            r.decode_marker(data, key="mandapa.json")
    with pytest.raises(InvalidInputError):
        r.encode_marker("x")


# -- gc lists ---------------------------------------------------------------------------------------------------------


def test_a_gc_list_written_down_as_bytes_is_read():
    """The literal list."""
    body = b'{"format":1,"epoch":"e1","objects":["packs/00112233445566778899aabbccddeeff","tx/a/0.1"]}'
    found = r.decode_gc_list(sealed(body), key="gc/e1")
    assert found == r.GcList(format=1, epoch="e1", objects=[f"packs/{TXN}", "tx/a/0.1"])
    assert r.encode_gc_list("e1", found.objects) == sealed(body)


def test_the_longest_gc_list():
    """65,536 objects fit; one more does not, and the writer learns it."""
    objects = [f"packs/{n:032x}" for n in range(r.GC_LIST_MAX)]
    assert r.decode_gc_list(r.encode_gc_list("e", objects), key="gc/e").objects == objects
    with pytest.raises(InvalidInputError, match="65,537"):
        r.encode_gc_list("e", [*objects, "packs/x"])
    with pytest.raises(CorruptionError):
        r.decode_gc_list(sealed({"format": 1, "epoch": "e", "objects": ["tx/a"] * 65_537}), key="gc/e")


@pytest.mark.parametrize(
    "key",
    [
        "mandapa.json",
        "catalog/0000000000000000",
        f"log/{TXN}/0000000000000000",
        f"head/{TXN}",
        "gc/e",
        "packs/x",
        "packs/",
        "../packs/x",
        f"packs/{TXN}/x",
        f"/packs/{TXN}",
        f"packs/{TXN}\n",
        "tx/",
        "tx/../log",
        "tx//x",
        "",
    ],
)
def test_no_list_names_what_must_stay(key):
    """Logs, heads, the marker, other lists, and what is no key are refused by writer and reader."""
    with pytest.raises(InvalidInputError):
        r.encode_gc_list("e", [key])
    with pytest.raises(CorruptionError):
        r.decode_gc_list(sealed({"format": 1, "epoch": "e", "objects": [key]}), key="gc/e")


# -- keys -------------------------------------------------------------------------------------------------------------


def test_keys_are_those_of_the_document():
    """Each kind of key, literally."""
    assert container_key(b"p" + bytes(16)) == "packs/" + "0" * 32
    assert container_key(b"m" + b"\xff" * 16) == "meta/" + "f" * 32
    assert (log_prefix("catalog"), log_prefix(TXN)) == ("catalog/", f"log/{TXN}/")
    assert log_key("catalog", 12) == "catalog/0000000000000012"
    assert log_key(TXN, 10**16 - 1) == f"log/{TXN}/9999999999999999"
    assert (head_key("catalog"), head_key(TXN)) == ("head/catalog", f"head/{TXN}")
    assert parse_seq(log_key(TXN, 34)) == 34
    for key in (
        "catalog/",
        "catalog/12",
        "catalog/000000000000001x",
        "catalog/00000000000000001",
        "catalog/-000000000000001",
        "catalog/" + "\u0660" * 16,
    ):
        assert parse_seq(key) is None
