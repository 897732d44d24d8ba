"""Manifest nodes: literal bytes, round trips, rules, and where nodes end."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mandapa.digest import digest
from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError
from mandapa.format import manifest as m
from mandapa.format.strict import CHUNK_MAX, CONTAINER_MAX, INT_MAX

P, M = b"p" + bytes(range(16)), b"m" + bytes(range(16))
H, D = bytes(range(32)), bytes(range(32, 64))
ONE = [0, 16, 9, 9, 0, b"", None]
TWO = [[0, 16, 9, 9, 0, H, None], [0, 25, 5, 50, 1, D, None]]
FILE = [0, "a", 9, 0, H, [ONE]]
URL = [1, "u", "https://x/y", None, ""]
LARGE = [2, "l", 1000, 1, H, [[0, 16, 40, D, 1000]]]
CHILD = ["a", 0, 16, 40, H, D, 3, 1000]


def read(value, *, encoded=None):
    """Decode a node given as plain lists, or as msgpack bytes."""
    raw = msgspec.msgpack.encode(value) if encoded is None else encoded
    return m.decode_node(m.zstd.compress(raw), digest(raw), key="meta/x")


def leaf(*rows, table=(P,)):
    return [0, list(table), list(rows)]


def branch(*rows, level=1):
    return [1, [M], level, list(rows)]


def part(*rows, table=(P,)):
    return [2, list(table), list(rows)]


def changed(row, at, value):
    """A copy of a nested list with one place changed; ``at`` is the way there."""
    copy = list(row)
    copy[at[0]] = value if len(at) == 1 else changed(copy[at[0]], at[1:], value)
    return copy


def test_nodes_written_down_as_bytes_are_read():
    """By hand: a leaf of one URL, with integers as long as msgpack allows; a part; a branch."""
    raw = bytes.fromhex("93 00 90 91 95 01 a1 75 ab") + b"https://x/y" + bytes.fromhex("c0 a0")
    assert read(None, encoded=raw) == m.Leaf([], [m.UrlRow("u", "https://x/y", None, "")])
    long = bytes.fromhex(
        "dd 00000003 cf 0000000000000000 dc 0000 dd 00000001 dc 0005 d3 0000000000000001 db 00000001 75 d9 0b"
    )
    long += b"https://x/y" + bytes.fromhex("cd 0007 da 0000")
    assert read(None, encoded=long) == m.Leaf([], [m.UrlRow("u", "https://x/y", 7, "")])
    raw = bytes.fromhex("93 02 91 c4 11") + P + bytes.fromhex("91 97 00 10 09 09 00 c4 20") + H + b"\xc0"
    assert read(None, encoded=raw) == m.Part([P], [m.Chunk(0, 16, 9, 9, 0, H)])
    raw = bytes.fromhex("94 01 91 c4 11") + M + bytes.fromhex("01 91 98 a1 61 00 10 28 c4 20") + H + b"\xc4\x20" + D
    raw += bytes.fromhex("03 cd 03e8")
    assert read(None, encoded=raw) == m.Branch([M], 1, [m.ChildRow("a", 0, 16, 40, H, D, 3, 1000)])


def test_every_kind_of_row_is_read():
    """The rows used below are all right as they are."""
    assert len(read(leaf(FILE, [0, "b", 59, 1, H, TWO], LARGE, URL)).rows) == 4
    assert len(read(part(*TWO)).rows) == 2
    assert read(branch(CHILD)).level == 1
    assert read(leaf(table=())).rows == []
    with_base = changed(FILE, (5, 0), [0, 16, 4, 9, 7, b"", [1, 16, 9, 9, 7, D, [0, 16, 9, 9, 0, H]]])
    first = m.Chunk(0, 16, 9, 9, 0, H)
    assert read(leaf(with_base, table=(P, M))).rows[0].chunks[0].base == m.Chunk(1, 16, 9, 9, 7, D, first)


BROKEN = {
    "no rows in a part": part(),
    "no rows in a branch": branch(),
    "level 0": branch(CHILD, level=0),
    "level 17": branch(CHILD, level=17),
    "level is negative": branch(CHILD, level=-1),
    "container too short": leaf(FILE, table=(P[:-1],)),
    "container of another kind": leaf(FILE, table=(b"x" + P[1:],)),
    "container as text": leaf(FILE, table=(P.decode("latin-1"),)),
    "container not in the table": leaf(changed(FILE, (5, 0, 0), 1)),
    "container number negative": leaf(changed(FILE, (5, 0, 0), -1)),
    "empty path": leaf(changed(FILE, (1,), "")),
    "absolute path": leaf(changed(FILE, (1,), "/a")),
    "path that leaves": leaf(changed(FILE, (1,), "a/../../b")),
    "path with a NUL": leaf(changed(FILE, (1,), "a\0b")),
    "path too long": leaf(changed(FILE, (1,), "/".join(["x" * 200] * 6))),
    "path is the reserved folder": leaf(changed(FILE, (1,), ".mandapa")),
    "path as bytes": leaf(changed(FILE, (1,), b"a")),
    "order": leaf(changed(FILE, (1,), "b"), FILE),
    "the same path twice": leaf(FILE, FILE),
    "order by UTF-16 instead of UTF-8": leaf(changed(FILE, (1,), "\U00010000"), changed(FILE, (1,), "\uffff")),
    "order of children": branch(changed(CHILD, (0,), "b"), CHILD),
    "offset in the header": leaf(changed(FILE, (5, 0, 1), 15)),
    "offset beyond the container": leaf(changed(FILE, (5, 0, 1), CONTAINER_MAX)),
    "stored is negative": leaf(changed(FILE, (5, 0, 2), -1)),
    "offset is huge": leaf(changed(FILE, (5, 0, 1), 2**64 - 1)),
    "raw is zero": leaf(changed(changed(FILE, (5, 0), [0, 16, 0, 0, 0, b"", None]), (2,), 0)),
    "raw chunk of another length": leaf(changed(FILE, (5, 0, 2), 8)),
    "chunk too large": leaf(
        changed(changed(FILE, (5, 0), [0, 16, 9, CHUNK_MAX + 1, 1, b"", None]), (2,), CHUNK_MAX + 1)
    ),
    "codec is negative": leaf(changed(FILE, (5, 0, 4), -1)),
    "codec of 17 bits": leaf(changed(FILE, (5, 0, 4), 65536)),
    "codec as text": leaf(changed(FILE, (5, 0, 4), "0")),
    "hash where the digest stands for it": leaf(changed(FILE, (5, 0, 5), H)),
    "no hash in one of two chunks": leaf([0, "b", 59, 1, H, changed(TWO, (1, 5), b"")]),
    "short hash": leaf([0, "b", 59, 1, H, changed(TWO, (1, 5), D[:-1])]),
    "no hash in a part": part(changed(TWO[0], (5,), b"")),
    "size that is not the chunks'": leaf(changed(FILE, (2,), 10)),
    "size of an empty file": leaf(changed(changed(FILE, (5,), []), (2,), 1)),
    "size as float": leaf(changed(FILE, (2,), 9.0)),
    "mode 2": leaf(changed(FILE, (3,), 2)),
    "mode true": leaf(changed(FILE, (3,), True)),
    "digest too short": leaf(changed(FILE, (4,), H[:-1])),
    "65 chunks in a row": leaf([0, "b", 65, 0, H, [[0, 16, 1, 1, 0, H, None]] * 65]),
    "base outside": leaf(changed(FILE, (5, 0), [0, 16, 4, 9, 7, b"", [1, 16, 9, 9, 0, D]])),
    "base without hash": leaf(changed(FILE, (5, 0), [0, 16, 4, 9, 7, b"", [0, 16, 9, 9, 0, b""]])),
    "base too large": leaf(changed(FILE, (5, 0), [0, 16, 4, 9, 7, b"", [0, 16, 9, CHUNK_MAX + 1, 1, D]])),
    "base of a base without hash": leaf(
        changed(FILE, (5, 0), [0, 16, 4, 9, 7, b"", [0, 16, 9, 9, 7, D, [0, 16, 9, 9, 0, b""]]])
    ),
    "three bases": leaf(
        changed(FILE, (5, 0), [0, 16, 4, 9, 7, b"", [0, 16, 9, 9, 7, D, [0, 16, 9, 9, 7, D, [0, 16, 9, 9, 0, D]]]])
    ),
    "large file without parts": leaf(changed(changed(LARGE, (5,), []), (2,), 0)),
    "large file of another size": leaf(changed(LARGE, (2,), 999)),
    "too many parts": leaf(changed(changed(LARGE, (5,), [[0, 16, 40, D, 1]] * 16_385), (2,), 16_385)),
    "part of nothing": leaf(changed(changed(LARGE, (5, 0, 4), 0), (2,), 0)),
    "part too large": leaf(changed(changed(LARGE, (5, 0, 4), 2**63), (2,), 2**63)),
    "part's hash too short": leaf(changed(LARGE, (5, 0, 3), H[:5])),
    "part outside": leaf(changed(LARGE, (5, 0, 0), 7)),
    "URL empty": leaf(changed(URL, (2,), "")),
    "URL with a NUL": leaf(changed(URL, (2,), "https://x\0y")),
    "URL too long": leaf(changed(URL, (2,), "u" * 4097)),
    "URL of negative size": leaf(changed(URL, (3,), -1)),
    "URL of huge size": leaf(changed(URL, (3,), INT_MAX + 1)),
    "checksum with a line feed": leaf(changed(URL, (4,), "md5:0\n")),
    "checksum too long": leaf(changed(URL, (4,), "é" * 128)),
    "checksum nil": leaf(changed(URL, (4,), None)),
    "child of no assets": branch(changed(CHILD, (6,), 0)),
    "child of too many assets": branch(changed(CHILD, (6,), INT_MAX + 1)),
    "child of negative size": branch(changed(CHILD, (7,), -1)),
    "child of huge size": branch(changed(CHILD, (7,), 2**64 - 1)),
    "child's digest too short": branch(changed(CHILD, (5,), b"")),
    "child's hash too short": branch(changed(CHILD, (4,), b"")),
    "rows missing": [0, [P]],
    "a row too short": leaf(FILE[:-1]),
    "a map": {"rows": []},
    "nil": None,
    "a leaf's rows in a branch": branch(FILE),
    "a child in a leaf": leaf(CHILD),
    "too many rows in a leaf": leaf(*[changed(URL, (1,), f"{n:05}") for n in range(1025)]),
    "too many rows in a branch": branch(*[changed(CHILD, (0,), f"{n:05}") for n in range(513)]),
    "too many rows in a part": part(*[TWO[0]] * 1025),
}


@pytest.mark.parametrize("node", BROKEN.values(), ids=BROKEN)
def test_nodes_that_break_a_rule_are_corruption(node):
    """Each rule of §6.1 and §6.2 on its own, in a node whose hash fits."""
    with pytest.raises(CorruptionError):
        read(node)


NEWER = {
    "another kind of node": [3, [P], []],
    "another kind of row": leaf([3, "folder"]),
    "a huge tag": [2**64 - 1, [], []],
    "a negative tag": [-1, [], []],
    "one more member of a node": [*leaf(FILE), 1],
    "one more member of a file": leaf([*FILE, 0]),
    "one more member of a URL": leaf([*URL, 0]),
    "one more member of a large file": leaf([*LARGE, 0]),
    "one more member of a chunk": leaf(changed(FILE, (5, 0), [*ONE, 0])),
    "one more member of a part address": leaf(changed(LARGE, (5, 0), [*LARGE[5][0], 0])),
    "one more member of a child": branch([*CHILD, 0]),
    "one more member of a part": [*part(*TWO), 0],
}


@pytest.mark.parametrize("node", NEWER.values(), ids=NEWER)
def test_what_only_a_newer_mandapa_knows_asks_for_an_upgrade(node):
    """Unknown tags, and arrays with more members than the document lists, are never skipped."""
    with pytest.raises(FormatVersionError, match="newer"):
        read(node)


def test_the_limits_themselves_pass():
    """64 chunks, 1,024 rows, 512 children, 1,024 chunks of a part, the longest path and URL."""
    assert len(read(leaf([0, "b", 64, 0, H, [[0, 16, 1, 1, 0, H, None]] * 64])).rows[0].chunks) == 64
    assert len(read(leaf(*[changed(URL, (1,), f"{n:05}") for n in range(1024)])).rows) == 1024
    assert len(read(branch(*[changed(CHILD, (0,), f"{n:05}") for n in range(512)], level=16)).rows) == 512
    assert len(read(part(*[TWO[0]] * 1024)).rows) == 1024
    path = "/".join(["é" * 127] * 4) + "/xyz"
    assert len(path.encode()) == 1023
    row = changed(changed(changed(URL, (1,), path + "x"), (2,), "u" * 4096), (4,), "c" * 255)
    assert read(leaf(row)).rows[0].path == path + "x"
    assert read(leaf(changed(URL, (1,), ".mandapa/tensors.json"))).rows[0].path == ".mandapa/tensors.json"
    last = changed(FILE, (5, 0), [0, CONTAINER_MAX - 9, 9, 9, 0, b"", None])
    assert read(leaf(last)).rows[0].chunks[0].offset == CONTAINER_MAX - 9


def test_a_full_leaf_of_the_longest_rows_can_be_stored():
    """1,024 files of 64 deltas of deltas each, every chunk in a container of its own, and 1,020 bytes of path."""
    table = [b"p" + n.to_bytes(16, "big") for n in range(3 * 64 * 1024)]
    rows = []
    for n in range(1024):
        chunks = []
        for k in range(64):
            chunk = None
            for at in range(3):
                number = (n * 64 + k) * 3 + at
                chunk = m.Chunk(number, 2**24, 2**23, CHUNK_MAX, 300, digest(b"%d" % number), chunk)
            chunks.append(chunk)
        path = "/".join([f"{n:04}" + "x" * 200] * 4) + "/" + "y" * 200
        rows.append(m.FileRow(path, 64 * CHUNK_MAX, 0, D, tuple(chunks)))
    raw, _ = m.encode_node(m.Leaf(table, rows))
    assert 10 << 20 < len(raw) < m.NODE_MAX


@pytest.mark.parametrize("node", [node for node in BROKEN.values() if isinstance(node, list)][:6])
def test_a_node_is_what_its_address_names(node):
    """Another hash is corruption whatever the node says."""
    raw = msgspec.msgpack.encode(node)
    with pytest.raises(CorruptionError, match="address"):
        m.decode_node(m.zstd.compress(raw), H, key="k")


def test_what_no_reader_would_take_is_not_written():
    """The writer refuses URLs, sizes and orders that its own reader would refuse."""
    good = m.UrlRow("u", "https://x", None, "")
    m.encode_node(m.Leaf([], [good]))
    for change in (
        {"url": "a\nb"},
        {"size": INT_MAX + 1},
        {"checksum": "x" * 256},
        {"path": "../x"},
        {"url": "\ud800"},
    ):
        with pytest.raises(InvalidInputError):
            m.encode_node(m.Leaf([], [msgspec.structs.replace(good, **change)]))
    with pytest.raises(InvalidInputError, match="order"):
        m.encode_node(m.Leaf([], [good, good]))


paths = st.lists(st.text("abz-./é\U0001f600", min_size=1, max_size=12), max_size=12, unique=True).map(
    lambda found: sorted(p for p in found if not set(p.split("/")) & {"", ".", ".."})
)
hashes = st.binary(min_size=32, max_size=32)


@st.composite
def leaves(draw):
    table = draw(st.lists(st.binary(min_size=16, max_size=16).map(lambda b: b"p" + b), min_size=1, max_size=4))
    place = st.tuples(st.integers(0, len(table) - 1), st.integers(16, 1 << 24), st.integers(1, 1 << 23))
    rows = []
    for path in draw(paths):
        kind = draw(st.integers(0, 2))
        if kind == 1:
            size = draw(st.none() | st.integers(0, INT_MAX))
            rows.append(m.UrlRow(path, draw(st.text("ab:/?", min_size=1)), size, draw(st.text("ab:0", max_size=20))))
        elif kind == 2:
            parts = [
                m.PartAddress(*draw(place), draw(hashes), draw(st.integers(1, 1 << 34)))
                for _ in range(draw(st.integers(1, 4)))
            ]
            rows.append(
                m.LargeFileRow(path, sum(p.raw for p in parts), draw(st.integers(0, 1)), draw(hashes), tuple(parts))
            )
        else:
            count = draw(st.integers(0, 4))
            chunks = []
            for _ in range(count):
                base = None
                for codec in range(draw(st.integers(0, 2))):
                    base = m.Chunk(*draw(place), draw(st.integers(1, CHUNK_MAX)), codec + 1, draw(hashes), base)
                where = draw(place)
                hash_ = b"" if count == 1 else draw(hashes)
                chunks.append(
                    m.Chunk(*where, draw(st.integers(1, CHUNK_MAX)), draw(st.integers(1, 65535)), hash_, base)
                )
            rows.append(
                m.FileRow(path, sum(c.raw for c in chunks), draw(st.integers(0, 1)), draw(hashes), tuple(chunks))
            )
    return m.Leaf(table, rows)


@settings(max_examples=100, deadline=None)
@given(leaves())
def test_leaves_come_back_as_they_were(node):
    """Any leaf; and its logical digest depends on nothing of how it is stored."""
    raw, stored = m.encode_node(node)
    again = m.decode_node(stored, digest(raw), key="k")
    assert again == node
    assert m.encode_node(again)[0] == raw
    elsewhere = m.Leaf(
        [b"m" + bytes(16)],
        [
            row if isinstance(row, m.UrlRow) else m.FileRow(row.path, row.size, row.mode, row.digest, ())
            for row in node.rows
        ],
    )
    assert m.node_digest(elsewhere) == m.node_digest(node)


def test_the_logical_digest_tells_apart_what_differs():
    """Path, kind, mode, size, content, URL, checksum: each alone changes it, and no two mix into each other."""
    file = m.FileRow("a", 9, 0, H, (m.Chunk(0, 16, 9, 9, 0),))
    url = m.UrlRow("a", "x", 9, "y")
    replace = msgspec.structs.replace
    nodes = [
        [],
        [file],
        [replace(file, path="b")],
        [replace(file, mode=1)],
        [replace(file, size=8)],
        [replace(file, digest=D)],
        [url],
        [replace(url, url="xy", checksum="")],
        [replace(url, url="x", checksum="")],
        [replace(url, checksum="z")],
        [replace(url, size=None)],
        [replace(url, size=0)],
        [file, replace(file, path="b")],
    ]
    digests = [m.node_digest(m.Leaf([P], rows)) for rows in nodes]
    child = m.ChildRow("a", 0, 16, 40, H, D, 3, 1000)
    branches = [
        [child],
        [replace(child, digest=H)],
        [replace(child, assets=4)],
        [replace(child, size=1)],
        [child, child],
    ]
    digests += [m.node_digest(m.Branch([M], 1, rows)) for rows in branches]
    assert len(set(digests)) == len(digests)
    assert m.node_digest(m.Branch([M], 1, [replace(child, path="b", offset=17, hash=D)])) == m.node_digest(
        m.Branch([M], 1, [child])
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4000), st.integers(0, 1), st.integers(0, 10**6))
def test_nodes_end_within_their_limits(count, level, seed):
    """Every node but the last keeps the least and the most, and starting at any end gives the rest."""
    least, most, _ = (m.LEAF_LIMITS, m.BRANCH_LIMITS)[level]
    names = [f"{seed}/{n:05}" for n in range(count)]

    def cut(start):
        cutter = m.NodeCutter(level)
        return [n + 1 for n in range(start, count) if cutter.ends_after(names[n])]

    ends = cut(0)
    for size in [b - a for a, b in zip([0, *ends], ends, strict=False)]:
        assert least <= size <= most
    assert count - (ends[-1] if ends else 0) < most
    for at in range(0, len(ends), 3):
        assert cut(ends[at]) == ends[at + 1 :]
