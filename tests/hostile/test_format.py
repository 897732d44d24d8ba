"""Bytes from a hostile store: every parser of the format answers with its own errors, soon, and in little memory."""

from __future__ import annotations

import json
import random
import runpy
import struct
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from mandapa.digest import digest, hexdigest
from mandapa.errors import CorruptionError, FormatVersionError, MandapaError
from mandapa.format import manifest, records
from mandapa.format.manifest import decode_node, zstd
from mandapa.format.pack import HEADER, read_pack_table
from mandapa.format.strict import open_frame, open_sealed

MUTATIONS = 2000
EXAMPLES = runpy.run_path(str(Path(__file__).parents[1] / "format" / "examples.py"))["make"]()
ID = "00112233445566778899aabbccddeeff"


def sealed(body):
    """A line with a seal that fits, whatever is in it."""
    return body[:-1] + b',"blake3":"' + hexdigest(body[:-1]).encode() + b'"}\n'


def record(body):
    return records.decode_record(body, key="log/x/0", seq=0)


def gc_list(body):
    return records.decode_gc_list(body, key="gc/e")


def marker(body):
    return records.decode_marker(body, key="mandapa.json")


def head(body):
    return [record(line) for line in records.decode_head(body, key="head/catalog")[:1]]


def node(raw):
    """A node whose address fits its bytes."""
    return decode_node(zstd.compress(raw), digest(raw), key="meta/x")


def frame(stored):
    return decode_node(stored, digest(EXAMPLES["leaf"]), key="meta/x")


def table(data):
    return list(read_pack_table(data, key="packs/x"))


def resealed_table(data):
    """A container whose hash fits its header, table and trailer, wherever the trailer says that the table is."""
    if len(data) < 64:
        return table(data)
    start = struct.unpack_from("<I", data, len(data) - 44)[0]
    inner = data[start:-32]
    return table(data[:-32] + digest(HEADER + inner))


@contextmanager
def bounded(seconds=1.0, megabytes=80):
    """The block takes little time and little memory."""
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
        took, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert took < seconds
    assert peak < megabytes << 20


# -- the table --------------------------------------------------------------------------------------------------------


def rec(**members):
    base = {"format": 1, "seq": 0, "txn": ID, "prev": "", "at": "", "by": "", "ops": [{"op": "close"}]}
    return sealed(json.dumps({**base, **members}).encode())


def raw_rec(text):
    """A record with JSON text put in as the value of `by`."""
    text = text if isinstance(text, bytes) else text.encode()
    return sealed(
        b'{"format":1,"seq":0,"txn":"%b","prev":"","at":"","ops":[{"op":"close"}],"by":%b}' % (ID.encode(), text)
    )


def raw_op(text):
    text = text if isinstance(text, bytes) else text.encode()
    return sealed(b'{"format":1,"seq":0,"txn":"%b","prev":"","at":"","by":"","ops":[%b]}' % (ID.encode(), text))


GOOD = rec()
DEEP = b"[" * 30_000 + b"]" * 30_000
SEALED = {
    "nothing": b"",
    "a line feed": b"\n",
    "zeros": bytes(200),
    "no seal": b'{"format":1}\n',
    "a seal alone": b',"blake3":"' + b"0" * 64 + b'"}\n',
    "seal of other bytes": GOOD.replace(b'"by": ""', b'"by": "x"'),
    "seal in upper case": GOOD[:-67] + GOOD[-67:].upper().replace(b'"}\n'.upper(), b'"}\n'),
    "seal that is not ASCII": GOOD[:-67] + b"\xff" * 64 + b'"}\n',
    "no line feed": GOOD[:-1],
    "CR LF": GOOD[:-1] + b"\r\n",
    "two line feeds": GOOD + b"\n",
    "two records": GOOD + GOOD,
    "a line feed among blanks": raw_rec(b'\n""'),
    "a CR among blanks": raw_rec(b'\r""'),
    "blank after the seal": GOOD[:-2] + b" }\n",
    "byte order mark": sealed(b"\xef\xbb\xbf" + GOOD[:-79] + b"}"),
    "UTF-16": sealed('{"format":1}'.encode("utf-16")),
    "an array": sealed(b'[{"format":1}]'),
    "a string": sealed(b'"format"'),
    "a number": sealed(b"11"),
    "empty object": sealed(b"{}"),
    "format missing": sealed(b'{"a":1}'),
    "format as string": sealed(b'{"format":"1"}'),
    "format as float": sealed(b'{"format":1.0}'),
    "format true": sealed(b'{"format":true}'),
    "format null": sealed(b'{"format":null}'),
    "format twice": sealed(b'{"format":2,"format":1}'),
    "a member twice": raw_rec('"","by":""'),
    "a member twice, once escaped": raw_rec('"","b\\u0079":"x"'),
    "a member twice, deep inside": raw_op('{"op":"settings","values":{"a":{"b":1,"b":2}}}'),
    "op twice, the first unknown": raw_op('{"op":"zzz","op":"close","optional":true}'),
    "op twice, the last unknown": raw_op('{"op":"close","op":"zzz","optional":true}'),
    "trailing comma": raw_rec('"",'),
    "comments": raw_rec('/* x */ ""'),
    "single quotes": raw_rec("''"),
    "NaN": raw_rec("NaN"),
    "NaN in metadata": raw_op('{"op":"settings","values":{"a":NaN}}'),
    "Infinity in metadata": raw_op('{"op":"settings","values":{"a":-Infinity}}'),
    "a number beyond float": raw_op('{"op":"settings","values":{"a":1e999}}'),
    "an integer of 60,000 digits": raw_op('{"op":"settings","values":{"a":' + "9" * 60_000 + "}}"),
    "an integer of 60,000 digits as seq": sealed(b'{"format":1,"seq":' + b"9" * 60_000 + b"}"),
    "an integer of 60,000 digits as format": sealed(b'{"format":' + b"9" * 60_000 + b"}"),
    "nested 30,000 deep": raw_rec(DEEP),
    "nested 30,000 deep in an op": raw_op(b'{"op":"settings","values":{"a":' + DEEP + b"}}"),
    "nested 30,000 deep in an unknown op": raw_op(b'{"op":"zzz","optional":true,"a":' + DEEP + b"}"),
    "objects nested 6,000 deep": raw_rec(b'{"a":' * 6_000 + b"1" + b"}" * 6_000),
    "never closed": sealed(b'{"format":1,"a":' + b"[" * 60_000 + b"}"),
    "lone high surrogate": raw_rec('"\\ud800"'),
    "lone low surrogate": raw_rec('"\\udc00"'),
    "surrogates the wrong way round": raw_rec('"\\udc00\\ud800"'),
    "surrogate as bytes": raw_rec(b'"\xed\xa0\x80"'),
    "bytes that are not UTF-8": raw_rec(b'"\xff\xfe"'),
    "overlong UTF-8": raw_rec(b'"\xc0\xaf"'),
    "a name that is not UTF-8": raw_rec(b'"","\xff":1'),
    "a name that is not UTF-8 in an unknown op": raw_op(b'{"op":"zzz","optional":true,"\xff":1}'),
    "control character in a string": raw_rec(b'"\x01"'),
    "larger than a record": rec(by="x" * 65_536),
    "seq as string": rec(seq="0"),
    "seq as float": rec(seq=0.0),
    "seq negative": rec(seq=-1),
    "seq null": rec(seq=None),
    "seq of another slot": rec(seq=1),
    "txn empty": rec(txn=""),
    "txn in upper case": rec(txn=ID.upper()),
    "txn with a line feed": rec(txn=ID + "\n"),
    "txn in other digits": rec(txn="\u0660" * 32),
    "txn a number": rec(txn=5),
    "prev null": rec(prev=None),
    "used as string": rec(used="base:v1"),
    "used of numbers": rec(used=[1]),
    "no ops": rec(ops=[]),
    "ops null": rec(ops=None),
    "ops an object": rec(ops={"op": "close"}),
    "an op that is a string": rec(ops=["close"]),
    "an op without a name": rec(ops=[{}]),
    "an op whose name is a number": rec(ops=[{"op": 1}]),
    "an op whose name is null": rec(ops=[{"op": None}]),
    "optional as string": rec(ops=[{"op": "zzz", "optional": "true"}]),
    "optional as number": rec(ops=[{"op": "zzz", "optional": 1}]),
    "versions as numbers in strings": rec(ops=[{"op": "delete", "versions": ["1"]}]),
    "versions as floats": rec(ops=[{"op": "delete", "versions": [1.5]}]),
    "versions negative": rec(ops=[{"op": "delete", "versions": [-1]}]),
    "versions true": rec(ops=[{"op": "delete", "versions": [True]}]),
    "versions beyond 2^53": rec(ops=[{"op": "delete", "versions": [2**53]}]),
    "versions beyond 64 bits": rec(ops=[{"op": "delete", "versions": [2**70]}]),
    "versions missing": rec(ops=[{"op": "delete"}]),
    "alias that is a number of a version": rec(ops=[{"op": "alias", "name": "v12", "version": 0}]),
    "alias latest": rec(ops=[{"op": "alias", "name": "LATEST", "version": 0}]),
    "alias with a slash": rec(ops=[{"op": "alias", "name": "a/b", "version": 0}]),
    "alias with an escape sequence": rec(ops=[{"op": "alias", "name": "\x1b[2J", "version": 0}]),
    "tag in Cyrillic": rec(ops=[{"op": "tag", "name": "b\u0435st", "version": 0}]),
    "artifact named ..": rec(ops=[{"op": "register", "name": "..", "artifact": ID}]),
    "artifact id that is a path": rec(ops=[{"op": "register", "name": "a", "artifact": "../../etc"}]),
    "rename to nothing": rec(ops=[{"op": "rename", "name": "", "artifact": ID}]),
    "epoch that is a path": rec(ops=[{"op": "fence", "epoch": "../mandapa.json"}]),
    "facts as list": rec(ops=[{"op": "annotate", "version": 0, "facts": []}]),
}


@pytest.mark.parametrize("data", SEALED.values(), ids=SEALED)
def test_hostile_records(data):
    """Each is corruption, whatever its seal."""
    with bounded(), pytest.raises(CorruptionError):
        record(data)


def root(**members):
    return {"object": f"meta/{ID}", "offset": 16, "length": 5, "hash": "ab" * 32, **members}


ROOTS = {
    "object in packs": root(object=f"packs/{ID}"),
    "object that is a path": root(object="meta/../mandapa.json"),
    "object with more": root(object=f"meta/{ID}/x"),
    "object with a line feed": root(object=f"meta/{ID}\n"),
    "offset in the header": root(offset=15),
    "offset beyond": root(offset=2**40),
    "offset negative": root(offset=-1),
    "length zero": root(length=0),
    "length beyond": root(length=2**40),
    "length as string": root(length="5"),
    "hash too short": root(hash="ab"),
    "hash in upper case": root(hash="AB" * 32),
    "hash that is no hex": root(hash="zz" * 32),
    "hash in other digits": root(hash="\u0660" * 64),
    "hash null": root(hash=None),
    "a string": f"meta/{ID}",
    "null": None,
    "empty": {},
}


@pytest.mark.parametrize("bad", ROOTS.values(), ids=ROOTS)
def test_hostile_roots(bad):
    """In a version, and on either side of a repack."""
    version = {"op": "version", "number": 0, "parent": None, "digest": "ab" * 32, "assets": 0, "bytes": 0, "added": 0}
    record(rec(ops=[{**version, "root": root()}]))
    for op in (
        {**version, "root": bad},
        {"op": "repack", "version": 0, "was": root(), "root": bad},
        {"op": "repack", "version": 0, "was": bad, "root": root()},
    ):
        with pytest.raises(CorruptionError):
            record(rec(ops=[op]))


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "ab"},
        {"digest": "AB" * 32},
        {"assets": -1},
        {"bytes": 2**53},
        {"added": 1.0},
        {"number": "0"},
        {"parent": -1},
        {"metadata": []},
        {"metadata": None},
        {"message": None},
        {"requires": "zstd"},
        {"requires": [1]},
    ],
    ids=str,
)
def test_hostile_versions(change):
    """Each member of a version on its own."""
    version = {"op": "version", "number": 0, "parent": None, "digest": "ab" * 32, "assets": 0, "bytes": 0, "added": 0}
    with pytest.raises(CorruptionError):
        record(rec(ops=[{**version, "root": root(), **change}]))


MARKERS = {
    "nothing": b"",
    "an array": b"[]",
    "not JSON": b"format=1",
    "no id": b'{"format":1,"hash":"blake3"}',
    "id a number": b'{"format":1,"id":1,"hash":"blake3"}',
    "id a path": b'{"format":1,"id":"../../../../../../../../etc/shad","hash":"blake3"}',
    "id in upper case": b'{"format":1,"id":"%b","hash":"blake3"}' % ID.upper().encode(),
    "id twice": b'{"format":1,"id":"%b","id":"%b","hash":"blake3"}' % (ID.encode(), ID.encode()),
    "hash null": b'{"format":1,"id":"%b","hash":null}' % ID.encode(),
    "format as string": b'{"format":"1","id":"%b","hash":"blake3"}' % ID.encode(),
    "not UTF-8": b'{"format":1,"id":"\xff","hash":"blake3"}',
    "not UTF-8 where nobody looks": b'{"format":1,"id":"%b","hash":"blake3","x":"\xff"}' % ID.encode(),
    "deep": b'{"format":1,"x":' + b"[" * 2000 + b"]" * 2000 + b"}",
    "much too long": b'{"format":1,"id":"%b","hash":"blake3"}' % ID.encode() + b" " * 5000,
    "cut": EXAMPLES["marker"][:40],
    "twice": EXAMPLES["marker"] * 2,
}


@pytest.mark.parametrize("data", MARKERS.values(), ids=MARKERS)
def test_hostile_markers(data):
    """Each is corruption."""
    with bounded(), pytest.raises(CorruptionError):
        marker(data)


def test_a_marker_of_a_far_future_asks_for_an_upgrade():
    """However large its number."""
    for number in (0, -1, 2, 2**31, 2**64, 10**30):
        with pytest.raises(FormatVersionError):
            marker(b'{"format":%d}' % number)


LISTS = {
    "objects null": b'{"format":1,"epoch":"e","objects":null}',
    "objects of numbers": b'{"format":1,"epoch":"e","objects":[1]}',
    "epoch a path": b'{"format":1,"epoch":"../e","objects":[]}',
    "epoch empty": b'{"format":1,"epoch":"","objects":[]}',
    "epoch missing": b'{"format":1,"objects":[]}',
    "the marker": b'{"format":1,"epoch":"e","objects":["mandapa.json"]}',
    "a log": b'{"format":1,"epoch":"e","objects":["log/%b/0000000000000000"]}' % ID.encode(),
    "a pack and a log": b'{"format":1,"epoch":"e","objects":["packs/%b","catalog/0"]}' % ID.encode(),
    "deep": b'{"format":1,"epoch":"e","objects":' + b"[" * 1_000_000 + b"}",
    "four million objects": b'{"format":1,"epoch":"e","objects":[' + b'"",' * 1_390_000 + b'""]}',
    "above 4 MiB": b'{"format":1,"epoch":"%b","objects":[]}' % (b"e" * (4 << 20)),
}


@pytest.mark.parametrize("data", LISTS.values(), ids=LISTS)
def test_hostile_lists(data):
    """Each is corruption, in bounded time."""
    with bounded(), pytest.raises(CorruptionError):
        gc_list(sealed(data))


# -- zstd frames ------------------------------------------------------------------------------------------------------


def rle_frame(declared, blocks, *, single=False, size=128 << 10):
    """A frame that declares one size and holds ``blocks`` times 128 KiB of one byte, four bytes each."""
    start = b"\xe0" if single else b"\xc0\x38"
    body = [struct.pack("<I", size << 3 | 1 << 1 | (n == blocks - 1))[:3] + b"A" for n in range(blocks)]
    return b"\x28\xb5\x2f\xfd" + start + struct.pack("<Q", declared) + b"".join(body)


def skippable(data):
    return b"\x50\x2a\x4d\x18" + struct.pack("<I", len(data)) + data


LEAF = EXAMPLES["leaf"]
STORED = zstd.compress(LEAF)
UNKNOWN_SIZE = b"".join([(c := zstd.ZstdCompressor()).compress(LEAF[:100]), c.compress(LEAF[100:]), c.flush()])
FRAMES = {
    "nothing": b"",
    "one byte": b"\x28",
    "the magic alone": b"\x28\xb5\x2f\xfd",
    "garbage": bytes(range(256)),
    "zeros": bytes(1000),
    "half a frame": STORED[: len(STORED) // 2],
    "all but the last byte": STORED[:-1],
    "one byte more": STORED + b"\0",
    "two frames": STORED + STORED,
    "an empty frame before": zstd.compress(b"") + STORED,
    "an empty frame after": STORED + zstd.compress(b""),
    "a skippable frame": skippable(LEAF),
    "a skippable frame before": skippable(b"x") + STORED,
    "a skippable frame after": STORED + skippable(b"x"),
    "size not declared": UNKNOWN_SIZE,
    "declares 10 GB": rle_frame(10 << 30, 1),
    "declares 10 GB, in one segment": rle_frame(10 << 30, 1, single=True),
    "declares 2^64 - 1": rle_frame(2**64 - 2, 1),
    "declares 10 bytes, holds 1 GB": rle_frame(10, 8000),
    "declares 10 bytes, holds 1 GB, in one segment": rle_frame(10, 8000, single=True),
    "declares 1 MB, holds 1 GB": rle_frame(1 << 20, 8000),
    "declares 16 MiB, holds 1 GB": rle_frame(16 << 20, 8000),
    "declares 16 MiB, holds 1 GB, in one segment": rle_frame(16 << 20, 8000, single=True),
    "declares 16 MiB, holds 128 KiB": rle_frame(16 << 20, 1),
    "declares one byte more than it holds": rle_frame((128 << 10) + 1, 1),
    "declares one byte less than it holds": rle_frame((128 << 10) - 1, 1),
    "16 MiB of one letter": rle_frame(16 << 20, 128),
    "needs a dictionary": b"\x28\xb5\x2f\xfd\xe3" + struct.pack("<I", 7) + STORED[5:],
    "a window of 2 TB": b"\x28\xb5\x2f\xfd\xc0\xff" + struct.pack("<Q", 5) + b"\x29\0\0hello",
    "gzip": b"\x1f\x8b\x08" + bytes(30),
}


@pytest.mark.parametrize("stored", FRAMES.values(), ids=FRAMES)
def test_hostile_frames(stored):
    """As a node and as a head: corruption, and never more memory than was declared and allowed."""
    with bounded(), pytest.raises(CorruptionError):
        frame(stored)
    with bounded(), pytest.raises(CorruptionError):
        head(stored)


def test_a_sound_frame_is_opened_up_to_its_limit():
    """What is at the limit passes, what is above does not; an empty frame is a frame."""
    data = zstd.compress(b"x" * 1000)
    assert open_frame(data, key="k", limit=1000) == b"x" * 1000
    assert open_frame(memoryview(data), key="k", limit=1000) == b"x" * 1000
    assert open_frame(zstd.compress(b""), key="k", limit=0) == b""
    assert open_frame(rle_frame(16 << 20, 128), key="k", limit=16 << 20) == b"A" * (16 << 20)
    with pytest.raises(CorruptionError):
        open_frame(data, key="k", limit=999)


def test_hostile_heads():
    """Frames that are sound and hold no records; a million line feeds do not become a million lines."""
    for text in (
        b"\n" * 500_000,
        b"{}\n" * 500_000,
        b"x" * 500_000,
        b"",
        b"\r" * 5000,
        EXAMPLES["log 0"][:-1],
        b"\0\n",
    ):
        with bounded(), pytest.raises((CorruptionError, IndexError)):
            record(records.decode_head(zstd.compress(text), key="head/catalog")[0])
    stored = zstd.compress(b"\n" * (64 << 20))
    with bounded(), pytest.raises(CorruptionError):
        records.decode_head(stored, key="head/catalog")


# -- msgpack ----------------------------------------------------------------------------------------------------------


def pack(value):
    return msgspec.msgpack.encode(value)


def many(count, item):
    """An array that says how many items it has, and has them."""
    return b"\xdd" + struct.pack(">I", count) + item * count


FILE_UP_TO_CHUNKS = b"\x93\x00\x90\x91\x96\x00\xa1a\x01\x00\xc4\x20" + bytes(32)
LARGE_UP_TO_PARTS = b"\x93\x00\x90\x91\x96\x02\xa1a\x01\x00\xc4\x20" + bytes(32)


NODES = {
    "nothing": b"",
    "nil": b"\xc0",
    "a never-used byte": b"\xc1",
    "a number": b"\x01",
    "an empty array": b"\x90",
    "a map": b"\x83\x00\x01\x02\x03\x04\x05",
    "an extension": b"\xd4\x01\x00",
    "a time": b"\xd6\xff\x00\x00\x00\x00",
    "cut": LEAF[:-1],
    "one byte more": LEAF + b"\x00",
    "twice": LEAF + LEAF,
    "an array of 4 billion rows": b"\x93\x00\x90\xdd\xff\xff\xff\xff",
    "an array of 4 billion containers": b"\x93\x00\xdd\xff\xff\xff\xff\x90",
    "a container of 4 billion bytes": b"\x93\x00\x91\xc6\xff\xff\xff\xff\x90",
    "a path of 4 billion bytes": b"\x93\x00\x90\x91\x95\x01\xdb\xff\xff\xff\xff",
    "an array of 4 billion members": b"\xdd\xff\xff\xff\xff\x00",
    "a map of 4 billion members": b"\xdf\xff\xff\xff\xff\x00",
    "nested 100,000 deep": b"\x91" * 100_000,
    "nested 100,000 deep in a row": b"\x93\x00\x90\x91\x95\x01\xa1a\xa1b" + b"\x91" * 100_000,
    "two million small rows": b"\x93\x00\x90" + many(2_000_000, pack([1, "a", "b", None, ""])),
    "eight million empty containers": b"\x93\x00" + many(8_000_000, b"\xc4\x00") + b"\x90",
    "a million chunks": FILE_UP_TO_CHUNKS + many(1_000_000, b"\x97\x00\x10\x01\x01\x00\xc4\x00\xc0"),
    "two million parts": LARGE_UP_TO_PARTS + many(2_000_000, b"\x95\x00\x10\x01\xc4\x00\x01"),
    "a tag as text": pack(["0", [], []]),
    "a tag as float": pack([0.0, [], []]),
    "a tag true": pack([False, [], []]),
    "a tag nil": pack([None, [], []]),
    "a row's tag as text": pack([0, [], [["1", "a", "b", None, ""]]]),
    "a path that is not UTF-8": b"\x93\x00\x90\x91\x95\x01\xa1\xff\xa1b\xc0\xa0",
    "a path with a surrogate": b"\x93\x00\x90\x91\x95\x01\xa3\xed\xa0\x80\xa1b\xc0\xa0",
    "a path in overlong UTF-8": b"\x93\x00\x90\x91\x95\x01\xa2\xc0\xaf\xa1b\xc0\xa0",
    "a size as text": pack([0, [], [[1, "a", "b", "7", ""]]]),
    "a size as float": pack([0, [], [[1, "a", "b", 7.0, ""]]]),
    "a size negative": pack([0, [], [[1, "a", "b", -(2**63), ""]]]),
    "a size of 64 bits": pack([0, [], [[1, "a", "b", 2**64 - 1, ""]]]),
}


@pytest.mark.parametrize("raw", NODES.values(), ids=NODES)
def test_hostile_nodes(raw):
    """Raw msgpack whose hash fits: corruption, in bounded time and memory."""
    stored, hash_ = zstd.compress(raw, 1), digest(raw)
    with bounded(), pytest.raises(CorruptionError):
        decode_node(stored, hash_, key="meta/x")


def test_a_part_of_a_million_chunks_is_refused():
    """The largest node that says it is a part: more objects than others, still bounded."""
    raw = b"\x93\x02\x90" + many(1_800_000, b"\x97\x00\x10\x01\x01\x00\xc4\x00\xc0")
    stored, hash_ = zstd.compress(raw, 1), digest(raw)
    started = time.process_time()
    with pytest.raises(CorruptionError):
        decode_node(stored, hash_, key="meta/x")
    assert time.process_time() - started < 1.5
    with bounded(seconds=60, megabytes=300), pytest.raises(CorruptionError):  # tracing is what takes long
        decode_node(stored, hash_, key="meta/x")


# -- mutations --------------------------------------------------------------------------------------------------------

JSON_BITS = (
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1.5",
    b"1e400",
    b"9" * 25,
    b"9" * 5000,
    b'"1"',
    b'"\\ud800"',
    b'"\xff"',
    b"[]",
    b"{}",
    b"[" * 3000,
    b'{"a":' * 3000,
    b'"' + b"x" * 3000 + b'"',
    b",",
    b":",
    b'"',
    b"\\",
    b"}",
    b"]",
    b'"op":"zzz",',
    b'"format":1,',
    b"\x00",
    b"\n",
    b" ",
    b'"optional":true,',
)
BINARY_BITS = (
    b"\xff" * 4,
    b"\x00" * 4,
    b"\x7f\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\x00\x00\xff\xff",
    b"\xc6\x7f\xff\xff\xff",
    b"\xc0",
    b"\xc1",
    b"\x91" * 2000,
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xcb\x7f\xf0" + bytes(6),
    b"\xa1\xff",
    b"\xd9\xff",
    b"\x80",
    b"\x28\xb5\x2f\xfd",
    b"\x00",
    b"\x01\x00\x00\x00",
)


def mutate(rng, data, bits):
    """One to four changes: flipped bits, cuts, repeats, and bits that parsers stumble over."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : min(to, at + 20)]
            case 3:
                data[at:at] = data[at:to]
            case 4:
                data[at:at] = rng.choice(bits)
            case _:
                piece = rng.choice(bits)
                data[at : at + len(piece)] = piece
        if not data:
            break
    return bytes(data)


def values(rng, value):
    """A JSON value with one place, at any depth, replaced by something that does not belong there."""
    strange = (
        None,
        True,
        -1,
        0,
        2**53,
        2**64,
        10**40,
        1.5,
        "1",
        "",
        "x" * 70,
        "../..",
        "\0",
        "é",
        [],
        {},
        [[[[]]]],
        {"op": "x"},
    )
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != name}
            case 1:
                return {**value, rng.choice(("x", "op", "format", "optional", "")): rng.choice(strange)}
            case _:
                return {**value, name: values(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return rng.choice(([*value[:at], values(rng, value[at]), *value[at + 1 :]], value + value, value[:at]))
    return rng.choice(strange)


def mutated_lines(rng, line):
    """Lines of JSON: mutated as bytes, as bytes under a new seal, and as values under a new seal."""
    kind = rng.randrange(3)
    if kind == 0:
        return mutate(rng, line, JSON_BITS)
    if kind == 1:
        return sealed(mutate(rng, line[:-78] + b"}", JSON_BITS))
    found = json.loads(line)
    found.pop("blake3", None)
    return sealed(json.dumps(values(rng, found)).encode())


def mutated_nodes(rng, raw):
    if rng.random() < 0.5:
        return mutate(rng, raw, BINARY_BITS)
    return pack(_small_integers(values(rng, msgspec.msgpack.decode(raw))))


def _small_integers(value):
    """Integers that msgpack can hold."""
    if isinstance(value, list):
        return [_small_integers(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-(2**63), min(value, 2**64 - 1))
    return value


CASES = {
    "records": (record, ("log 0", "log 1", "log 2", "catalog 0", "catalog 1"), mutated_lines),
    "gc lists": (gc_list, ("gc list",), mutated_lines),
    "sealed lines": (lambda data: open_sealed(data, key="k", limit=1 << 20), ("sealed", "log 0"), mutated_lines),
    "markers": (marker, ("marker",), lambda rng, data: mutate(rng, data, JSON_BITS)),
    "heads": (head, ("head",), lambda rng, data: mutate(rng, data, BINARY_BITS)),
    "heads of mutated lines": (head, ("log 0",), lambda rng, data: zstd.compress(mutated_lines(rng, data))),
    "nodes": (node, ("leaf", "part", "large leaf", "branch", "delta leaf"), mutated_nodes),
    "frames of nodes": (frame, ("meta",), lambda rng, data: mutate(rng, data[16:-96], BINARY_BITS)),
    "containers": (table, ("pack", "meta"), lambda rng, data: mutate(rng, data, BINARY_BITS)),
    "containers with a hash that fits": (
        resealed_table,
        ("pack", "meta"),
        lambda rng, data: mutate(rng, data, BINARY_BITS),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mutations_raise_our_errors_and_nothing_else(name):
    """2,000 mutations a parser, the same every time: a value, or an error that a caller of mandapa knows; in time."""
    parse, sources, change = CASES[name]
    rng = random.Random(name)
    refused = 0
    for n in range(MUTATIONS):
        data = change(rng, EXAMPLES[sources[n % len(sources)]])
        started = time.process_time()
        try:
            parse(data)
        except (CorruptionError, FormatVersionError) as error:
            refused += 1
            message = str(error)
        except MandapaError as error:
            pytest.fail(f"{data!r}: {error!r}")
        else:
            message = ""
        assert time.process_time() - started < 1
        assert len(message) < 500
        assert message.isprintable()
    assert refused > MUTATIONS // 2


def test_what_mutations_let_pass_is_sound():
    """A node that passes encodes to a node that passes, and its digest can be taken: nothing overflows later."""
    rng = random.Random(7)
    passed = 0
    for n in range(3000):
        raw = mutated_nodes(rng, EXAMPLES[("leaf", "branch", "large leaf", "part")[n % 4]])
        try:
            found = node(raw)
        except (CorruptionError, FormatVersionError):
            continue
        passed += 1
        again, _ = manifest.encode_node(found)
        assert node(again) == found
        if not isinstance(found, manifest.Part):
            assert len(manifest.node_digest(found)) == 32
    assert passed > 20
