"""Makes the examples of docs/format.md from the code: ``python tests/format/examples.py`` prints them by name."""

from __future__ import annotations

from mandapa.digest import digest, hexdigest
from mandapa.format import records as r
from mandapa.format.keys import container_key
from mandapa.format.manifest import (
    Branch,
    ChildRow,
    Chunk,
    FileRow,
    LargeFileRow,
    Leaf,
    NodeCutter,
    Part,
    PartAddress,
    UrlRow,
    encode_node,
    node_digest,
)
from mandapa.format.pack import HEADER, KIND_CHUNK, KIND_NODE, PackEntry, pack_footer
from mandapa.format.strict import seal
from mandapa.repository.policy import Policy

REPOSITORY = "5b1f6a0c9d2e4783a1b0c4d5e6f70819"
ARTIFACT = "c0ffee00112233445566778899aabbcc"
PACK = b"p" + bytes.fromhex("a0a1a2a3a4a5a6a7a8a9aaabacadaeaf")
META = b"m" + bytes.fromhex("b0b1b2b3b4b5b6b7b8b9babbbcbdbebf")
EPOCH = "e0e1e2e3e4e5e6e7e8e9eaebecedeeef"
TXN = [f"10111213141516171819{n:012}" for n in range(8)]
AT = "2027-01-15T09:30:00.000000Z"
# What zstd made of the text below; another release of the library may choose other bytes that say the same.
STEPS = b"step 1\n" * 36
STEPS_FRAME = bytes.fromhex("28b52ffd20fc750000387374657020310a01007251c508")
HELLO = b"hello, hall\n"
HALVES = (b"first half;", b"second half")


def container(pieces):
    """A container of ``(stored, raw, codec, kind)`` and its table."""
    data, entries = HEADER, []
    for stored, raw, codec, kind in pieces:
        entries.append(PackEntry(len(data), len(stored), len(raw), codec, kind, digest(raw)))
        data += stored
    return data + pack_footer(entries, len(data)), entries


def make():
    """Name -> bytes of every example."""
    out = {"marker": r.encode_marker(REPOSITORY)}
    pack, rows = container(
        [
            (HELLO, HELLO, 0, KIND_CHUNK),
            (STEPS_FRAME, STEPS, 1, KIND_CHUNK),
            (HALVES[0], HALVES[0], 0, KIND_CHUNK),
            (HALVES[1], HALVES[1], 0, KIND_CHUNK),
        ]
    )
    out["pack"] = pack
    whole = b"".join(HALVES)
    leaf = Leaf(
        [PACK],
        [
            UrlRow("data/train.csv", "s3://elsewhere/train.csv", 1234, "etag:9b2cf5"),
            FileRow("empty.txt", 0, 0, digest(b""), ()),
            FileRow("log/steps.txt", len(STEPS), 0, digest(STEPS), (chunk(rows[1], ()),)),
            FileRow("run.sh", len(HELLO), 1, digest(HELLO), (chunk(rows[0], ()),)),
            FileRow("two.bin", len(whole), 0, digest(whole), (chunk(rows[2]), chunk(rows[3]))),
        ],
    )
    raw, stored = encode_node(leaf)
    out["leaf"] = raw
    meta, nodes = container([(stored, raw, 1, KIND_NODE)])
    out["meta"] = meta
    root = r.Root(container_key(META), nodes[0].offset, nodes[0].stored, hexdigest(raw))
    size = 1234 + len(STEPS) + len(HELLO) + len(whole)
    version = r.VersionOp(
        number=0,
        parent=None,
        root=root,
        digest=node_digest(leaf).hex(),
        assets=5,
        bytes=size,
        added=len(pack) + len(meta),
        message="first",
        metadata={"step": 3, "val/loss": 1.98, "lr": "NaN"},
    )
    lines, prev = [], ARTIFACT
    for seq, ops in enumerate(
        [
            (version, r.AliasOp("best", 0)),
            (r.TagOp("paper", 0), r.AnnotateOp(0, {"reviewed": True, "note": None})),
            (r.FenceOp(EPOCH),),
        ]
    ):
        run = {"run": "resnet-7", "used": ("base-model:v3",)} if seq == 0 else {}
        record = r.Record(seq=seq, txn=TXN[seq], prev=prev, at=AT, by="ana@hall-1", ops=ops, **run)
        lines.append(r.encode_record(record))
        prev = r.decode_record(lines[-1], key="k", seq=seq).seal
        out[f"log {seq}"] = lines[-1]
    out["head"] = r.encode_head(lines)
    prev = "catalog"
    for seq, ops in enumerate(
        [
            (r.RegisterOp("resnet-7", ARTIFACT),),
            (
                r.SettingsOp({"writers": "many", "probe": {"verdict": "ok", "reasons": [], "at": AT}}),
                r.RenameOp(ARTIFACT, "resnet-8"),
            ),
        ]
    ):
        record = r.Record(seq=seq, txn=TXN[4 + seq], prev=prev, at=AT, by="ana@hall-1", ops=ops)
        out[f"catalog {seq}"] = r.encode_record(record)
        prev = r.decode_record(out[f"catalog {seq}"], key="k", seq=seq).seal
    out["policy"] = Policy(keep_last=5, keep_best=("3:val/loss:min",), newer_than="14d").to_json()
    out["gc list"] = r.encode_gc_list(EPOCH, [container_key(PACK), container_key(META)])
    out.update(shapes(leaf, rows))
    out["sealed"] = seal({"format": 1, "word": "मण्डप"})
    return out


def chunk(entry, hashed=True):
    return Chunk(0, entry.offset, entry.stored, entry.raw, entry.codec, entry.hash if hashed else b"")


def shapes(leaf, rows):
    """A branch, a part, and a leaf with a large file, raw."""
    part = Part([PACK], [chunk(rows[2]), chunk(rows[3])])
    part_raw, part_stored = encode_node(part)
    whole = b"".join(HALVES)
    large = Leaf(
        [META],
        [
            LargeFileRow(
                "two.bin",
                len(whole),
                0,
                digest(whole),
                (PartAddress(0, 16, len(part_stored), digest(part_raw), len(whole)),),
            )
        ],
    )
    large_raw, large_stored = encode_node(large)
    leaf_raw, leaf_stored = encode_node(leaf)
    branch = Branch(
        [META],
        1,
        [
            ChildRow("data/train.csv", 0, 16, len(leaf_stored), digest(leaf_raw), node_digest(leaf), 5, 1520),
            ChildRow("two.bin", 0, 400, len(large_stored), digest(large_raw), node_digest(large), 1, len(whole)),
        ],
    )
    base = Chunk(0, 16, 12, 12, 0, digest(HELLO))
    delta = Leaf([PACK, META], [FileRow("w.bin", 12, 0, digest(HELLO), (Chunk(1, 16, 9, 12, 7, b"", base),))])
    return {
        "part": part_raw,
        "large leaf": large_raw,
        "branch": encode_node(branch)[0],
        "delta leaf": encode_node(delta)[0],
    }


def leaf_sizes(count, level=0):
    """Rows a node when ``count`` paths 000000, 000001, ... are cut."""
    cutter, sizes, here = NodeCutter(level), [], 0
    for n in range(count):
        here += 1
        if cutter.ends_after(f"{n:06}"):
            sizes.append(here)
            here = 0
    return sizes + ([here] if here else [])


def logical():
    """Name -> logical digest, for the vectors of §7."""
    one = FileRow("a", 6, 0, digest(b"hello\n"), (Chunk(0, 16, 6, 6, 0),))
    leaf = Leaf([PACK], [one])
    url = [UrlRow("u", "https://example.org/x", None, ""), UrlRow("u", "https://example.org/x", 0, "md5:00")]
    child = ChildRow("a", 0, 16, 100, bytes(32), node_digest(leaf), 1, 6)
    return {
        "no assets": node_digest(Leaf([], [])),
        "a = hello": node_digest(leaf),
        "a = hello, executable": node_digest(Leaf([PACK], [FileRow("a", 6, 1, digest(b"hello\n"), one.chunks)])),
        "u = URL, size unknown": node_digest(Leaf([], [url[0]])),
        "u = URL, size 0, md5:00": node_digest(Leaf([], [url[1]])),
        "branch over two": node_digest(
            Branch([META], 1, [child, ChildRow("b", 0, 16, 100, bytes(32), bytes(32), 2, 7)])
        ),
    }


def dump(data):
    """Hex, 32 bytes a line."""
    return "\n".join(data[at : at + 32].hex() for at in range(0, len(data), 32))


if __name__ == "__main__":
    for name, data in make().items():
        print(f"\n== {name} ({len(data)})")
        print(data.decode() if data[:1] == b"{" else dump(data))
    for name, data in logical().items():
        print(f"{name}: {data.hex()}")
    print(leaf_sizes(6000), leaf_sizes(2000, 1))
    for text in ("", "a", "000000", "नमस्ते"):
        print(repr(text), digest(text.encode())[:8].hex())
