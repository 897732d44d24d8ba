"""A reader of format 1 that knows docs/format.md and nothing of mandapa's code: it reads a local repository.

    python tests/golden/stranger.py REPOSITORY ARTIFACT NUMBER [PATH]

Needs the blake3, zstd, msgpack and pcodec of its language: the packages that mandapa depends on are at hand.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3
from pcodec import standalone

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def sealed(data: bytes) -> dict[str, Any]:
    """The object of a sealed line."""
    body, _, rest = data.rpartition(b',"blake3":"')
    assert rest == blake3(body).hexdigest().encode() + b'"}\n', "the seal does not fit"
    return json.loads(body + b"}")


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a log, in order, chained."""
    found, prev = [], folder.name
    for seq, path in enumerate(sorted(folder.iterdir())):
        assert path.name == f"{seq:016}", "a gap in the log"
        record = sealed(path.read_bytes())
        assert (record["format"], record["seq"], record["prev"]) == (1, seq, prev), "the chain is broken"
        prev = path.read_bytes()[-67:-3].decode()
        found.append(record)
    return found


def container(root: Path, address: bytes) -> bytes:
    """A container by its 17 bytes."""
    return (root / {b"p": "packs", b"m": "meta"}[address[:1]] / address[1:].hex()).read_bytes()


def node(root: Path, where: bytes, offset: int, length: int, hash_: bytes) -> list[Any]:
    """A manifest node: [tag, containers, ...]."""
    raw = zstd.decompress(container(root, where)[offset : offset + length])
    assert blake3(raw).digest() == hash_, "not the node that was named"
    return msgspec.msgpack.decode(raw)


def rows(root: Path, top: list[Any]) -> list[tuple[list[Any], list[bytes]]]:
    """All rows below a node, each with its table of containers."""
    if top[0] == 0:
        return [(row, top[1]) for row in top[2]]
    found = []
    for _, at, offset, length, hash_, *_ in top[3]:
        found += rows(root, node(root, top[1][at], offset, length, hash_))
    return found


def content(root: Path, row: list[Any], table: list[bytes]) -> bytes:
    """The bytes of a file's row."""
    tag, path, size, _mode, digest, chunks = row
    if tag == 2:
        parts = [node(root, table[at], offset, length, hash_) for at, offset, length, hash_, _ in chunks]
        pairs = [(chunk, part[1]) for part in parts for chunk in part[2]]
    else:
        pairs = [(chunk, table) for chunk in chunks]
    data = b"".join([decoded(root, chunk, of, digest) for chunk, of in pairs])
    assert len(data) == size and blake3(data).digest() == digest, path
    return data


def decoded(root: Path, chunk: list[Any], table: list[bytes], digest: bytes) -> bytes:
    """The raw bytes of a chunk."""
    at, offset, stored, raw, codec, hash_, base = chunk
    data = container(root, table[at])[offset : offset + stored]
    below = b"" if base is None else decoded(root, base, table, b"")
    found = {0: lambda: data, 1: lambda: zstd.decompress(data), 5: lambda: rounded(below)}.get(codec)
    result = found() if found else numbers(data, raw, codec, below)
    assert len(result) == raw and blake3(result).digest() == (hash_ or digest), "not the chunk that was named"
    return result


def numbers(data: bytes, raw: int, codec: int, below: bytes) -> bytes:
    """Codecs 2 to 4."""
    width = data[0]
    count, over = divmod(raw, width)
    rest = data[1 + over :]
    if codec == 2:
        planes = []
        for _ in range(width):
            length = int.from_bytes(rest[:4], "little")
            planes.append(rest[4 : 4 + length] if length == count else zstd.decompress(rest[4 : 4 + length]))
            rest = rest[4 + length :]
        return b"".join([bytes(number) for number in zip(*planes, strict=True)]) + data[1 : 1 + over]
    values = [int(value) for value in standalone.simple_decompress(rest)] if count else []
    if codec == 4:
        bases = [int.from_bytes(below[i * width : (i + 1) * width], "little") for i in range(count)]
        values = [(b + d) % (1 << 8 * width) for b, d in zip(bases, values, strict=True)]
    return b"".join([value.to_bytes(width, "little") for value in values]) + data[1 : 1 + over]


def rounded(below: bytes) -> bytes:
    """Codec 5."""
    found = b""
    for (x,) in struct.iter_unpack("<I", below):
        nan = x & 0x7FFFFFFF > 0x7F800000
        found += (0x7FC0 if nan else (x + 0x7FFF + (x >> 16 & 1)) >> 16 & 0xFFFF).to_bytes(2, "little")
    return found


def versions(root: Path, name: str) -> dict[int, dict[str, Any]]:
    """The live versions of an artifact: number -> op, with ``root`` where it is now."""
    ids = {}
    for record in records(root / "catalog"):
        for op in record["ops"]:
            if op["op"] in ("register", "rename"):
                ids[op["artifact"]] = op["name"]
            elif op["op"] == "remove":
                del ids[op["artifact"]]
    [log] = [id_ for id_, known in ids.items() if known == name]
    found, dead = {}, set()
    for record in records(root / "log" / log):
        for op in record["ops"]:
            if op["op"] == "version":
                found[op["number"]] = dict(op)
            elif op["op"] == "repack":
                found[op["version"]]["root"] = op["root"]
            elif op["op"] == "delete":
                dead.update(op["versions"])
            elif op["op"] == "undelete":
                dead.difference_update(op["versions"])
            elif op["op"] not in ("alias", "tag", "annotate", "fence", "close"):
                assert op.get("optional"), f"{op['op']} needs a newer reader"
    return {number: op for number, op in found.items() if number not in dead}


def assets(root: Path, version: dict[str, Any]) -> list[tuple[list[Any], list[bytes]]]:
    """The rows of a version."""
    at = version["root"]
    kind, id_ = at["object"].split("/")
    address = kind[:1].encode() + bytes.fromhex(id_)
    return rows(root, node(root, address, at["offset"], at["length"], bytes.fromhex(at["hash"])))


if __name__ == "__main__":
    repository, artifact, number, *path = sys.argv[1:]
    for row, table in assets(Path(repository), versions(Path(repository), artifact)[int(number)]):
        if not path:
            print(row[1])
        elif row[1] == path[0]:
            sys.stdout.buffer.write(content(Path(repository), row, table))
