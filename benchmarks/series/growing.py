"""A log that grows, and a folder of small files of which some change."""

from __future__ import annotations

import os
import random
from pathlib import Path

FILE = 10_240
MB = 1_000_000


def make_log(path: Path, megabytes: int) -> None:
    """Lines as a training writes them: much that repeats, and numbers that do not."""
    rng = random.Random(0)
    left, first = megabytes * MB, 0
    with path.open("wb") as file:
        while left > 0:
            lines = []
            for step in range(first, first + 10_000):
                seconds, loss, norm = step // 7, 2.0 + 9 / (1 + step / 1000) + rng.gauss(0, 0.02), rng.expovariate(2)
                clock = f"{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02},{rng.randrange(1000):03}"
                lines.append(
                    f"2026-11-{1 + seconds // 86400 % 30:02} {clock} INFO  trainer: rank {step % 8} step {step}"
                )
                lines.append(f" loss {loss:.5f} grad_norm {norm:.4f} lr {6e-4 / (1 + step / 9e5):.4e}")
                lines.append(f" tokens/s {rng.gauss(41_000, 300):.0f} mem 61.{step % 10}GiB\n")
            part = "".join(lines).encode()[:left]
            file.write(part)
            left -= len(part)
            first += 10_000


def grow(source: Path, path: Path, megabytes: int) -> None:
    """Append what is missing to so many megabytes."""
    with source.open("rb") as log, path.open("ab") as file:
        at = file.tell()
        log.seek(at)
        while at < megabytes * MB:
            at += file.write(log.read(min(8 * MB, megabytes * MB - at)))


def change(folder: Path, files: int, number: int) -> None:
    """All files, 100 in a folder; then each hundredth one anew."""
    rng = random.Random(number)
    for i in range(files) if number == 0 else range(number, files, 100):
        path = folder / f"{i // 100:04}" / f"{i:06}.bin"
        if number == 0 and i % 100 == 0:
            path.parent.mkdir(parents=True)
        path.with_suffix(".new").write_bytes(rng.randbytes(FILE))
        os.replace(path.with_suffix(".new"), path)
