"""Commits of which most is known already: a checkpoint with a frozen backbone, and a log that grows.

``make bench`` runs it. Bytes are those of all new objects in the store, manifests and records included; times are of
commits in one warm process, on the local disk.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

import mandapa
from mandapa.content.codecs import Mode
from mandapa.repository.repository import Repository

MB = 1_000_000


def stored(repo: Path) -> int:
    """Bytes of all objects."""
    return sum(path.stat().st_size for path in repo.rglob("*") if path.is_file())


def commit(repo: Repository, file: Path, at: str) -> float:
    """Seconds that one commit of one file takes."""
    start = time.perf_counter()
    with repo.artifact("bench").transaction() as txn:
        txn.add(file, at=at)
    return time.perf_counter() - start


def frozen(home: Path, codec: Mode, versions: int) -> None:
    """21 M parameters as torch saves them, under a new file name each time; a quarter of them is trained."""
    generator = torch.Generator().manual_seed(0)
    state = {f"layer.{i}.weight": torch.randn(512, 512, generator=generator) for i in range(60)}
    state |= {f"head.{i}.weight": torch.randn(512, 512, generator=generator) for i in range(20)}
    changed = sum(t.numel() * 4 for name, t in state.items() if name.startswith("head"))
    place = home / f"frozen-{codec}"
    repo = mandapa.open(str(place), create=True, codec=codec)
    seconds, added = [], []
    for number in range(versions):
        for name, tensor in state.items():
            if name.startswith("head"):
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-3)
        file = home / f"step-{number:05}.pt"
        torch.save(state, file)
        before = stored(place)
        seconds.append(commit(repo, file, "checkpoint/model.pt"))
        added.append(stored(place) - before)
        size = file.stat().st_size
        file.unlink()
    worst = max(added[1:])
    print(
        f"frozen backbone, {size / MB:.1f} MB of which {changed / MB:.1f} MB change, codec {codec}: a version adds "
        f"{worst / MB:.2f} MB = {worst / size:.3f} of the file = {worst / changed:.4f} of what changed "
        f"(+{(worst - changed) / len(state):.0f} bytes a tensor), in {statistics.median(seconds[1:]):.3f} s"
    )


def growing(home: Path, codec: Mode) -> None:
    """A log of 300 MB that grows by 25 MB a version, to 500 MB."""
    rng = random.Random(0)
    lines = [f"step {i} loss {rng.random():.6f} lr {rng.random():.2e}\n".encode() for i in range(20_000)]
    file, place = home / "train.log", home / f"log-{codec}"
    repo = mandapa.open(str(place), create=True, codec=codec)

    def grow(size: int) -> None:
        with file.open("ab") as log:
            while size > 0:
                part = b"".join(rng.choices(lines, k=10_000))
                log.write(part)
                size -= len(part)

    grow(300 * MB)
    commit(repo, file, "train.log")
    seconds, added = [], []
    for _ in range(8):
        grow(25 * MB)
        before = stored(place)
        seconds.append(commit(repo, file, "train.log"))
        added.append(stored(place) - before)
    file.unlink()
    print(
        f"log that grows by 25 MB from 300 to 500 MB, codec {codec}: a version adds "
        f"{statistics.median(added) / MB:.1f} MB in {statistics.median(seconds):.3f} s (slowest {max(seconds):.3f})"
    )


def main() -> None:
    """Print both, for both codecs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=10)
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="a folder on the disk to measure")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(dir=options.disk))
    os.environ["MANDAPA_CACHE"] = str(home / "cache")
    codecs: tuple[Mode, Mode] = ("raw", "auto")
    try:
        for codec in codecs:
            frozen(home, codec, options.versions)
        for codec in codecs:
            growing(home, codec)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
