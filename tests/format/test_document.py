"""docs/format.md is true: its examples decode, its vectors come out, its numbers are the code's."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import msgspec
import pytest

from mandapa.content.codecs import FEATURES, decode
from mandapa.digest import digest, hexdigest
from mandapa.format import manifest, records, strict
from mandapa.format.keys import container_key, head_key, log_key
from mandapa.format.manifest import Branch, Leaf, NodeCutter, Part, decode_node, encode_node, node_digest
from mandapa.format.pack import KIND_NODE, read_pack_table
from mandapa.format.strict import open_sealed

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "format.md").read_text("utf-8")
BLOCKS = dict(re.findall(r"<!-- example: ([^>]+?) -->\n```\w+\n(.*?)\n```\n", TEXT, re.DOTALL))
MADE = runpy.run_path(str(Path(__file__).with_name("examples.py")))


def example(name):
    """The bytes of an example: hex, or a line of JSON with its line feed."""
    block = BLOCKS[name]
    return f"{block}\n".encode() if block.startswith("{") else bytes.fromhex(block.replace("\n", ""))


def section(number):
    """The text of a section, up to the next heading of any kind."""
    return re.search(rf"^#+ {re.escape(number)}\.? .*?\n(.*?)(?=^#+ |\Z)", TEXT, re.DOTALL | re.MULTILINE)[1]


def test_the_document_shows_every_example_as_the_code_makes_it():
    """JSON, raw nodes and packs are equal byte for byte; frames, which a zstd may choose, hold the same."""
    made = MADE["make"]()
    assert set(BLOCKS) == {*made, "ends", "logical"}
    for name, data in made.items():
        if name not in ("meta", "head", "log 0", "log 1", "log 2", "large leaf", "branch"):
            assert example(name) == data, name


def test_records_form_chained_logs():
    """The examples' records are two logs without gaps, each naming the seal of the one before."""
    for log, count in (("log", 3), ("catalog", 2)):
        prev = "catalog" if log == "catalog" else records.decode_record(example("log 0"), key="k", seq=0).prev
        assert log == "catalog" or f'"artifact":"{prev}"' in example("catalog 0").decode()
        for seq in range(count):
            data = example(f"{log} {seq}")
            record = records.decode_record(data, key=log_key("catalog", seq), seq=seq)
            assert record.prev == prev
            assert records.encode_record(record) == data
            prev = record.seal


def test_a_seal_can_be_checked_as_the_document_says():
    """The seal is of the bytes before the comma before "blake3"; the last 78 bytes are literal but for the digits."""
    for name in ("sealed", "gc list", "log 0", "log 1", "log 2", "catalog 0", "catalog 1"):
        line = example(name)
        body, tail = line[:-78], line[-78:]
        assert tail == b',"blake3":"' + hexdigest(body).encode() + b'"}\n'
        assert json.loads(line) == {**json.loads(body + b"}"), "blake3": hexdigest(body)}
        assert open_sealed(line, key="k", limit=1 << 16) == (body + b"}", hexdigest(body))


def test_the_example_repository_reads_back_by_the_steps_of_the_document():
    """Record -> root -> leaf -> chunks in the pack -> contents; digests, counts and sizes as the record says."""
    marker = records.decode_marker(example("marker"), key="mandapa.json")
    assert marker.id == MADE["REPOSITORY"]
    op = records.decode_record(example("log 0"), key="k", seq=0).find(records.VersionOp)
    meta, pack = example("meta"), example("pack")
    assert op.root.object == container_key(MADE["META"])
    stored = meta[op.root.offset : op.root.offset + op.root.length]
    leaf = decode_node(stored, bytes.fromhex(op.root.hash), key=op.root.object)
    assert isinstance(leaf, Leaf)
    assert encode_node(leaf)[0] == example("leaf")
    assert node_digest(leaf).hex() == op.digest
    assert leaf.containers == [MADE["PACK"]]
    assert (op.assets, op.bytes) == (len(leaf.rows), sum(row.size for row in leaf.rows))
    assert op.added == len(meta) + len(pack)
    contents = {}
    for row in leaf.rows:
        if isinstance(row, manifest.FileRow):
            parts = [decode(c.codec, pack[c.offset : c.offset + c.stored], c.raw) for c in row.chunks]
            contents[row.path] = b"".join(parts)
            assert digest(contents[row.path]) == row.digest
    assert contents == {
        "empty.txt": b"",
        "log/steps.txt": b"step 1\n" * 36,
        "run.sh": b"hello, hall\n",
        "two.bin": b"first half;second half",
    }


def test_containers_verify_and_their_tables_name_what_is_in_them():
    """Both containers: every entry decodes to its hash; the node in meta/ is the one that the record names."""
    for entry in read_pack_table(example("pack"), key="p"):
        data = example("pack")[entry.offset : entry.offset + entry.stored]
        assert digest(decode(entry.codec, data, entry.raw)) == entry.hash
    [node] = read_pack_table(example("meta"), key="m")
    assert node[1:5] == (len(example("meta")) - 16 - 48 - 48, len(example("leaf")), 1, KIND_NODE)
    assert node.hash == digest(example("leaf"))


def test_the_nodes_of_every_kind_decode():
    """Raw msgpack of part, large file, branch and delta; a generic msgpack reader sees the documented arrays."""
    kinds = {"leaf": Leaf, "part": Part, "large leaf": Leaf, "branch": Branch, "delta leaf": Leaf}
    for name, kind in kinds.items():
        raw = example(name)
        node = decode_node(manifest.zstd.compress(raw), digest(raw), key="k")
        assert type(node) is kind
        assert encode_node(node)[0] == raw
        assert isinstance(msgspec.msgpack.decode(raw), list)
    leaf = msgspec.msgpack.decode(example("leaf"))
    assert leaf[0] == 0
    assert leaf[1] == [MADE["PACK"]]
    assert leaf[2][0] == [1, "data/train.csv", "s3://elsewhere/train.csv", 1234, "etag:9b2cf5"]
    assert leaf[2][3] == [0, "run.sh", 12, 1, digest(b"hello, hall\n"), [[0, 16, 12, 12, 0, b"", None]]]
    assert msgspec.msgpack.decode(example("delta leaf"))[2][0][5][0][6][:5] == [0, 16, 12, 12, 0]


def test_the_head_holds_the_lines_of_the_log():
    """Three records, back to back."""
    assert records.decode_head(example("head"), key=head_key("a")) == [example(f"log {n}") for n in range(3)]


def test_the_gc_list_names_what_it_may():
    """Its epoch is that of the fence in the log."""
    found = records.decode_gc_list(example("gc list"), key="gc/x")
    fence = records.decode_record(example("log 2"), key="k", seq=2).find(records.FenceOp)
    assert found.epoch == fence.epoch
    assert found.objects == [container_key(MADE["PACK"]), container_key(MADE["META"])]


def test_the_vectors_of_node_ends():
    """Hashes of paths, and the sizes of nodes computed again from the rule alone."""
    lines = BLOCKS["ends"].splitlines()
    for line in lines[:-2]:
        head, path = line.split("  ")
        assert digest(path.encode())[:8].hex() == head
    for line, level, least, most, below in (
        (lines[-2], 0, 128, 1024, 2**32 // 512),
        (lines[-1], 1, 64, 512, 2**32 // 256),
    ):
        title, sizes = line.split(": ")
        want = [int(size) for size in sizes.split()]
        got, count = [], 0
        for n in range(int(title.split()[-1])):
            count += 1
            hash_ = digest(f"{n:06}".encode())
            value = int.from_bytes(hash_[4:8] if level else hash_[:4], "little")
            if count == most or (count >= least and value < below):
                got.append(count)
                count = 0
        assert want == got + ([count] if count else [])
        assert want == MADE["leaf_sizes"](sum(want), level)
        assert NodeCutter(level).count == 0


def test_the_vectors_of_logical_digests():
    """Computed by the code, and once more by hand from the document's table of bytes."""
    vectors = {name: digest_ for digest_, name in (line.split("  ") for line in BLOCKS["logical"].splitlines())}
    assert vectors == {name: value.hex() for name, value in MADE["logical"]().items()}
    content, u64 = digest(b"hello\n"), lambda n: n.to_bytes(8, "little")
    leaf = hexdigest(b"mandapa leaf 1\na\0" + b"\x00\x00" + u64(6) + content)
    assert vectors["a = hello"] == leaf
    assert vectors["a = hello, executable"] == hexdigest(b"mandapa leaf 1\na\0" + b"\x00\x01" + u64(6) + content)
    assert vectors["no assets"] == hexdigest(b"mandapa leaf 1\n")
    url = b"https://example.org/x\0"
    assert vectors["u = URL, size unknown"] == hexdigest(b"mandapa leaf 1\nu\0\1\0" + b"\xff" * 8 + digest(url))
    assert vectors["u = URL, size 0, md5:00"] == hexdigest(
        b"mandapa leaf 1\nu\0\1\0" + u64(0) + digest(url + b"md5:00")
    )
    children = u64(1) + u64(6) + bytes.fromhex(leaf) + u64(2) + u64(7) + bytes(32)
    assert vectors["branch over two"] == hexdigest(b"mandapa branch 1\n" + children)


def test_the_limits_are_those_of_the_code():
    """The table of §2.1 against the constants."""
    text = section("2.1")
    for words, value in (
        ("2^53 - 1", strict.INT_MAX == 2**53 - 1),
        ("| chunk, decoded | 16 MiB", strict.CHUNK_MAX == 16 << 20),
        ("| container | 32 MiB", strict.CONTAINER_MAX == 32 << 20),
        ("| manifest node, decoded | 16 MiB", manifest.NODE_MAX == 16 << 20),
        (
            "| 1,024 / 512 / 1,024 |",
            (manifest.LEAF_LIMITS[1], manifest.BRANCH_LIMITS[1], manifest.PART_CHUNKS) == (1024, 512, 1024),
        ),
        ("| chunks of a file in its row | 64;", manifest.INLINE_CHUNKS == 64),
        ("| 1,024 / 16,384 |", (manifest.PART_CHUNKS, manifest.PARTS_MAX) == (1024, 16_384)),
        ("| record | 64 KiB |", strict.RECORD_MAX == 64 << 10),
        ("| 65,536 objects, 4 MiB |", records.GC_LIST_MAX == 65_536 and records.GC_LIST_BYTES == 4 << 20),
        ("| marker | 4 KiB |", records.MARKER_MAX == 4 << 10),
        ("1 GiB decoded, and 1,024 times", (records.HEAD_MAX, records._HEAD_RATIO) == (1 << 30, 1024)),
        ("| 4 KiB of UTF-8", strict.MESSAGE_MAX == 4 << 10),
        ("| 16 KiB as JSON", strict.METADATA_MAX == 16 << 10),
        ("| 128 characters |", strict.NAME_MAX == 128),
        ("| 1,024 / 255 bytes", (strict.PATH_MAX, strict.SEGMENT_MAX) == (1024, 255)),
        ("| 4,096 / 255 bytes", (strict.URL_MAX, strict.CHECKSUM_MAX) == (4096, 255)),
    ):
        assert words in text, words
        assert value, words
    text = section("6.3")
    assert "| leaf | 128 | 1,024 | 2^32 / 512 = 8,388,608 |" in text
    assert "| branch | 64 | 512 | 2^32 / 256 = 16,777,216 |" in text
    assert (manifest.LEAF_LIMITS, manifest.BRANCH_LIMITS) == ((128, 1024, 512), (64, 512, 256))


OPS = records.KnownOp.__args__


@pytest.mark.parametrize("kind", OPS, ids=lambda kind: kind.__struct_config__.tag)
def test_every_op_and_member_is_documented(kind):
    """The op has a row in §8.2, and each of its members is named there."""
    text = section("8.2")
    name = kind.__struct_config__.tag
    row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    for member in kind.__struct_fields__:
        assert f"`{member}`" in (text if name == "version" else row)


def test_every_member_of_a_record_is_documented():
    """The table of §8.1 and the line's members are the same set."""
    names = re.findall(r"^\| `(\w+)` \|", section("8.1"), re.MULTILINE)
    assert names == list(records._Line.__struct_fields__)


def test_the_codecs_are_those_of_the_document():
    """Every codec that this version of the code writes is listed with its name."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", section("5.3"), re.MULTILINE)
    assert {int(codec): name for codec, name in rows} == dict(FEATURES)


def test_sections_that_code_points_to_exist():
    """Each ``docs/format.md §N`` in the sources is a heading; so is each quoted title; links within go somewhere."""
    headings = set(re.findall(r"^#+ (\d+(?:\.\d+)*)\.? ", TEXT, re.MULTILINE))
    titles = re.findall(r"^#+ [\d.]+ (.+)$", TEXT, re.MULTILINE)
    for source in (ROOT / "src").rglob("*.py"):
        for reference in re.findall(r"docs/format\.md,? ([^\n]*)", source.read_text("utf-8")):
            for number in re.findall(r"§([\d.]*\d)", reference):
                assert number in headings, (source, number)
            for title in re.findall(r'^"([^"]+)"', reference):
                assert any(found.startswith(title) for found in titles), (source, title)
    for number in re.findall(r"§([\d.]*\d)", TEXT):
        assert number in headings, number


def test_fsck_numbers_only_invariants_that_are_listed():
    """Every ``I<n>`` in the sources of fsck is an invariant of §12, numbered without gaps."""
    numbers = [int(n) for n in re.findall(r"^- \*\*I(\d+)\*\*", section("12"), re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    source = ROOT / "src" / "mandapa" / "repository" / "fsck.py"
    if source.exists():
        assert {int(n) for n in re.findall(r'"I(\d+)"', source.read_text("utf-8"))} <= set(numbers)
