"""Writes the golden repository of format 1 and what a reader must find in it.

    python tests/golden/make_golden.py tests/golden

It holds every kind of object, row and op that format 1 has; a second one holds every codec, a third one is a mirror
that was cleaned up. Format 1 is frozen, so they are never made again: a mandapa of any later release reads the bytes
that are checked in.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mandapa.content.codecs.bf16 import round_to_bf16
from mandapa.content.edit import edit_tree
from mandapa.content.index import Index
from mandapa.content.link import Link
from mandapa.content.tree import Tree
from mandapa.content.upload import Upload
from mandapa.format.keys import log_key
from mandapa.format.records import (
    AnnotateOp,
    FenceOp,
    RepackOp,
    SettingsOp,
    encode_gc_list,
    encode_head,
)
from mandapa.format.strict import seal
from mandapa.object_store import LocalObjectStore, MemoryObjectStore
from mandapa.repository.log import Author
from mandapa.repository.policy import Policy
from mandapa.repository.repack import RepackPlan
from mandapa.repository.repository import Repository
from mandapa.repository.version import address_of, root_of

EPOCH = "0123456789abcdef0123456789abcdef"


class Clock:
    """A second later at each look."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


def safetensors(tensors: dict[str, bytes]) -> bytes:
    """A file of byte tensors."""
    at, header = 0, {}
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


def make(root: Path, work: Path) -> dict[str, object]:
    """Write the repository under ``root``; returns what is in it."""
    author = Author("golden@example", clock=Clock(), random=random.Random(1), sleep=lambda _: None)
    repo = Repository.create(LocalObjectStore(root), author=author, threads=0)
    rng = random.Random(2)

    model = repo.artifact("model")
    tensors = {f"layer.{i}": rng.randbytes(1000 + i) for i in range(20)}
    with model.transaction("first", {"step": 0, "val/loss": 2.5, "best": None}) as txn:
        txn.add_bytes("checkpoint/model.safetensors", safetensors(tensors))
        txn.add_bytes("logs/train.txt", b"step 0 loss 2.5\n" * 100)
        txn.add_bytes("empty", b"")
        txn.add_bytes("päth/ünï.txt", "Grüße\n".encode())
        txn.add_url("data/train.parquet", "s3://elsewhere/train.parquet", size=123, checksum="etag:abc")
        script = work / "run.sh"
        script.write_bytes(b"#!/bin/sh\nexit 0\n")
        script.chmod(0o755)
        txn.add(script)
        txn.alias("best")
    tensors["layer.3"] = rng.randbytes(1003)
    with model.transaction("second", {"step": 100, "nan": float("nan")}) as txn:
        txn.add_bytes("checkpoint/model.safetensors", safetensors(tensors))
        txn.add_bytes("logs/train.txt", b"step 0 loss 2.5\n" * 100 + b"step 100 loss 2.0\n" * 50)
        txn.remove("empty")
        txn.alias("best")
    # More than 256 chunks, all but a few alike: their list stands in parts.
    many = {f"t{i:03}": bytes([i % 3]) * 65_536 for i in range(300)}
    with model.transaction("large") as txn:
        txn.add_bytes("large.safetensors", safetensors(many))
    model.tag("release-1", 1)
    with model.transaction("to be deleted") as txn:
        txn.add_bytes("oops.txt", b"oops")
    with model.transaction("to come back") as txn:
        txn.add_bytes("back.txt", b"back")
        txn.remove("oops.txt")
    model.delete(3, 4)
    model.undelete(4)

    folder = repo.artifact("folder")
    with folder.transaction("many files") as txn:
        for i in range(3000):
            txn.add_bytes(f"part-{i // 500}/{i:05}.txt", f"{i}\n".encode())
    with folder.transaction("from elsewhere") as txn:
        txn.copy("model:best", "checkpoint", at="weights")

    gone = repo.artifact("gone")
    with gone.transaction() as txn:
        txn.add_bytes("a", b"a")
    gone.rename("removed")
    gone.remove()

    # Ops that no command of this release writes.
    log = model.open_log()
    root_before = log.state.versions[0].root
    upload = Upload(repo.store, index=Index(), threads=0, new_id=author.new_id)
    rows = {item.row.path: item for item in Tree(repo.reader, root_of(root_before)).rows()}
    moved = edit_tree(repo.reader, upload, None, rows)
    upload.flush()
    upload.close()

    def append(*ops: object) -> None:
        log.append(author.new_id().hex(), lambda _: ops, author)  # type: ignore[arg-type]

    append(RepackOp(0, root_before, address_of(moved.address), []))
    append(AnnotateOp(1, {"restored": "2026-02-01T00:00:00Z", "note": "good"}))
    append(FenceOp(EPOCH))
    repo.catalog.append(author.new_id().hex(), lambda _: [FenceOp(EPOCH), SettingsOp({"golden": True})], author)
    repo.store.put(f"gc/{EPOCH}", encode_gc_list(EPOCH, ["packs/" + "00" * 16]))
    repo.store.put(f"head/{log.id}", encode_head(log.lines[:7]))
    last = log.records[-1]
    optional = {
        "format": 1,
        "seq": last.seq + 1,
        "txn": author.new_id().hex(),
        "prev": last.seal,
        "at": author.now(),
        "by": "somebody newer",
        "ops": [{"op": "from-the-future", "optional": True, "facts": [1, 2, 3]}],
    }
    repo.store.create(log_key(log.id, last.seq + 1), seal(optional))
    return facts(Repository(LocalObjectStore(root), threads=0))


def facts(repo: Repository) -> dict[str, object]:
    """What a reader finds: the same, whatever a compressor made of the bytes."""
    found: dict[str, object] = {"id": repo.id, "settings": {k: v for k, v in repo.settings().items() if k != "probe"}}
    for artifact in repo.artifacts():
        versions = {}
        for version in artifact.versions():
            assets = {}
            for path, asset in version.assets.items():
                if asset.kind == "url":
                    assets[path] = [asset.url, asset.size, asset.checksum]
                else:
                    with version.open(path) as file:
                        content = hashlib.sha256(file.read()).hexdigest()
                    assets[path] = [asset.size, asset.digest, asset.executable, content]
            # Thousands of alike files need not be spelled out.
            listed = assets if len(assets) < 100 else hashlib.sha256(json.dumps(assets).encode()).hexdigest()
            versions[str(version.number)] = {
                "digest": version.digest,
                "message": version.message,
                "metadata": dict(version.metadata),
                "facts": dict(version.facts),
                "created": version.created.isoformat(),
                "by": version.created_by,
                "parent": version.parent,
                "used": list(version.used),
                "assets": listed,
            }
        found[artifact.name] = {
            "versions": versions,
            "aliases": artifact.aliases(),
            "tags": artifact.tags(),
            "moves": [[step.name, step.version] for step in artifact.moves()],
            "deleted": [version.number for version in artifact.deleted()],
        }
    return found


def make_codecs(root: Path) -> dict[str, object]:
    """Write the repository of the codecs under ``root``; returns what is in it.

    A small training: fp32 weights with NaNs, zeros of both signs and denormals among them, and their bf16 copy; stored
    raw, as byte planes, dense four times, and repacked.
    """
    author = Author("golden@example", clock=Clock(), random=random.Random(3), sleep=lambda _: None)
    repo = Repository.create(LocalObjectStore(root), author=author, threads=0, codec="raw")
    rng = random.Random(4)
    weights = [rng.gauss(0, 0.02) for _ in range(50_000)]
    odd = bytes.fromhex("0100c07f 010080ff 00000080 00000000 01000000 0000807f")
    for step, codec in enumerate(["raw", "auto", "dense", "dense", "dense", "dense", "raw"]):
        repo = Repository(LocalObjectStore(root), author=author, threads=0, codec=codec)
        if codec == "auto":
            repo.link = Link(near=False)  # nothing is known of it, so byte planes
        weights = [(0 if step == 2 else w) + rng.gauss(0, 0.02 if step == 2 else 1e-6) for w in weights]
        fp32 = odd + struct.pack(f"<{len(weights)}f", *weights)
        with repo.artifact("net").transaction(f"step {step}") as txn:
            txn.add_bytes("state.safetensors", mixed(fp32, bytes(round_to_bf16(fp32)), step))
            txn.add_bytes("odd.bin", fp32[:4099])
    repo.artifact("net").repack(RepackPlan("net", repo.id, repo.artifact("net").plan_repack().steps[-1:]))
    return facts(Repository(LocalObjectStore(root), threads=0))


def make_mirror(root: Path) -> dict[str, object]:
    """Versions that were gone before they were mirrored, others that went and came back since, and a clean-up."""
    author = Author("golden@example", clock=Clock(), random=random.Random(5), sleep=lambda _: None)
    store = MemoryObjectStore("golden")  # what a mirror says of its source must not say where this was run
    store.delete([info.key for info in store.list("")])
    source = Repository.create(store, author=author, threads=0, codec="raw")
    rng = random.Random(6)
    old, net = rng.randbytes(70_000), source.artifact("net")
    for step in range(6):
        with net.transaction(f"step {step}", {"step": step, "loss": 1 / (step + 1)}) as txn:
            txn.add_bytes("state.bin", rng.randbytes(70_000))
            txn.add_bytes("old.bin", old if step < 4 else old[:60_000])
            txn.add_bytes("notes.txt", f"step {step}".encode())
    with source.artifact("data").transaction("rows") as txn:
        txn.add_bytes("rows.csv", b"a,b\n1,2\n")
        txn.add_url("far.parquet", "https://example.com/far.parquet", size=7, checksum="sha256:00")
    net.tag("paper", 1)
    net.alias("prod", 2)
    net.tag("dropped", 3)
    net.tag("dropped", None)
    source.set_policy(None, Policy(keep_last=2))
    source.expire(source.plan_expire())
    source.gc(grace=0)
    mirror = Repository.create(LocalObjectStore(root), author=author, threads=0, codec="raw")
    assert source.mirror(mirror).ok
    net.delete(4)
    net.alias("prod", 5)
    assert source.mirror(mirror).ok
    net.undelete(4)
    net.delete(2)
    assert source.mirror(mirror).ok
    mirror.set_policy(None, Policy(keep_last=3, keep_best=("1:loss:min",)))
    mirror.set_policy("data", Policy(newer_than="14d"))
    assert mirror.gc(grace=0).freed
    return facts(Repository(LocalObjectStore(root), threads=0))


def mixed(fp32: bytes, bf16: bytes, step: int) -> bytes:
    """A safetensors file of both."""
    header = {
        "__metadata__": {"step": str(step)},
        "copy": {"dtype": "BF16", "shape": [len(bf16) // 2], "data_offsets": [0, len(bf16)]},
        "master": {"dtype": "F32", "shape": [len(fp32) // 4], "data_offsets": [len(bf16), len(bf16) + len(fp32)]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bf16 + fp32


if __name__ == "__main__":
    home = Path(sys.argv[1])
    work = home / "work"
    makers = {"format-1": lambda root: make(root, work), "format-1-codecs": make_codecs, "format-1-mirror": make_mirror}
    for name, write in makers.items():
        if (home / name).exists():
            continue  # what is checked in stays
        os.makedirs(work, exist_ok=True)
        (home / f"{name}.json").write_text(json.dumps(write(home / name), indent=1, sort_keys=True) + "\n")
    shutil.rmtree(work, ignore_errors=True)
