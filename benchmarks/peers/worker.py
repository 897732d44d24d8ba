"""One tool takes one series, in a process of its own."""

from __future__ import annotations

import filecmp
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backups
import ours
import tools
import trackers
import versioned
from series import Plan, Series, load
from tools import Tool, UnableError

TOOLS: dict[str, type[Tool]] = {
    "cp and fsync": tools.Copy,
    "obstore put": tools.Obstore,
    "mandapa": ours.Mandapa,
    "mandapa, raw": ours.Raw,
    "mandapa, dense": ours.Dense,
    "mandapa, repacked": ours.Repacked,
    "mandapa, command line": ours.CommandLine,
    "hf_xet": versioned.Xet,
    "restic": backups.Restic,
    "borg": backups.Borg,
    "borg, zstd": backups.BorgZstd,
    "DVC": versioned.Dvc,
    "Oxen": versioned.Oxen,
    "W&B offline": trackers.WandB,
    "MLflow": trackers.MLflow,
}
"""Every tool by its name, in the order of the tables."""

PIECE = 1 << 20
"""Bytes that are read where the format knows no tensors."""


def work(name: str, series_name: str, home: str, data: str, quick: str) -> dict[str, Any]:
    """Keep every version, restore the last one, read one tensor of it."""
    series = load(Path(data), Plan.quick() if quick else Plan())[series_name]
    tool = TOOLS[name](Path(home))
    tool.prepare()
    seconds, added, requests = [], [], []
    for number in range(series.versions):
        series.advance(number, tool.source)
        os.sync()
        time.sleep(0.02 if quick else 0.2)  # files are old enough then for whoever compares times
        stored, asked = tool.stored(), tool.requests
        seconds.append(timed(lambda number=number: tool.commit(number)))
        added.append(tool.stored() - stored)
        requests.append(tool.requests - asked)
    found: dict[str, Any] = {
        "commits": seconds,
        "added": added,
        "raw": tools.tree_bytes(tool.source),
        "requests": requests,
    }
    for what, look in {"restore": restore, "piece": piece}.items():
        asked = tool.requests
        try:
            found[what] = look(tool, series)
        except UnableError:
            found[what] = None
        requests.append(tool.requests - asked)
    if not any(requests):
        del found["requests"]
    return found


def timed(act: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def restore(tool: Tool, series: Series) -> float:
    """Seconds; each file is compared, bit by bit."""
    dest = tool.home / "restored"
    seconds = timed(lambda: tool.restore(dest))
    names = files_in(tool.source)
    different = [name for name in names if not filecmp.cmp(tool.source / name, dest / name, shallow=False)]
    if different or files_in(dest) != names:
        raise RuntimeError(f"the restored version is another one: {different[:3]}")
    return seconds


def files_in(folder: Path) -> set[str]:
    """Paths of the files below."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def piece(tool: Tool, series: Series) -> float:
    """Seconds until the bytes of one tensor in the middle of a file, or a MiB of it, are there."""
    file = series.file or min(files_in(tool.source))
    path = tool.source / file
    start, stop = tensor(path) if path.suffix == ".safetensors" else middle(path)
    read: list[bytes] = []
    seconds = timed(lambda: read.append(tool.piece(file, start, stop)))
    with path.open("rb") as source:
        source.seek(start)
        if read != [source.read(stop - start)]:
            raise RuntimeError("a part that was read is another one")
    return seconds


def middle(path: Path) -> tuple[int, int]:
    """At most a MiB."""
    size = path.stat().st_size
    length = min(PIECE, size)
    return (size - length) // 2, (size + length) // 2


def tensor(path: Path) -> tuple[int, int]:
    """Where the first tensor after the middle of the file is."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    spans = sorted(entry["data_offsets"] for entry in header.values())
    start, stop = next(span for span in spans if span[0] >= spans[-1][1] // 2 and span[1] > span[0])
    return 8 + length + start, 8 + length + stop
