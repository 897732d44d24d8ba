"""Rounds of tools, each in a process of its own whose memory is watched; medians of them."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker import TOOLS

PATIENCE = 5.0
"""Seconds; a tool that takes more is measured in the first round only."""


OTHERS = ("MANDAPA_", "WANDB_", "MLFLOW_", "RESTIC_", "BORG_", "DVC_", "GIT_")
"""Variables that could make a tool another one."""


@dataclass(frozen=True, slots=True)
class Options:
    """Where the series are, where to work, how often."""

    data: Path
    disk: Path
    quick: bool
    rounds: int
    tools: tuple[str, ...] = tuple(TOOLS)
    """Those that take part."""


def compare(series: str, options: Options) -> dict[str, Any]:
    """All rounds of one series, in which the tools take turns; rows, and who could not be measured."""
    rows: list[dict[str, Any]] = []
    left_out = {name: TOOLS[name].missing() for name in options.tools if TOOLS[name].missing()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.tools if name not in left_out}
    for number in range(options.rounds):
        for name, runs in found.items():
            if name in left_out or (number and runs[-1]["whole"] > PATIENCE):
                continue
            try:
                runs.append(run(name, series, options))
            except RuntimeError as error:
                left_out[name] = str(error)
            print(".", end="", file=sys.stderr, flush=True)
    for name, runs in found.items():
        if name not in left_out:
            rows.append({"tool": name, "release": TOOLS[name].release(), **medians(runs)})
    print(file=sys.stderr)
    return {"rows": rows, "left_out": left_out}


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rounds; of the later commits of a round their median, and of memory the peak of all."""

    def median(key: str) -> float | None:
        return None if runs[0][key] is None else round(statistics.median(run[key] for run in runs), 5)

    raw = runs[0]["raw"]
    return {
        "rounds": len(runs),
        "first": round(statistics.median(run["commits"][0] for run in runs), 5),
        "later": round(statistics.median(statistics.median(run["commits"][1:]) for run in runs), 5),
        "added_first": runs[0]["added"][0],
        "added": round(statistics.median(runs[0]["added"][1:])),
        "of_raw": round(statistics.median(runs[0]["added"][1:]) / raw, 5),
        "restore": median("restore"),
        "piece": median("piece"),
        "peak_mib": round(max(run["peak"] for run in runs) / (1 << 20)),
        "requests": runs[0].get("requests"),
        "seconds": median("whole"),
    }


def run(name: str, series: str, options: Options) -> dict[str, Any]:
    """One round of one tool, in a fresh place that is gone afterwards."""
    home = Path(tempfile.mkdtemp(dir=options.disk, prefix="mandapa-peers-"))
    start = time.perf_counter()
    try:
        found, peak = child(["tool", name, series, str(home)], options, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return {**found, "peak": peak, "whole": time.perf_counter() - start}


def child(job: list[str], options: Options, home: Path | None = None) -> tuple[dict[str, Any], int]:
    """What a worker says, and the most memory that it and what it started had; nothing of the user's is touched."""
    home = home or options.disk
    environment = {key: value for key, value in os.environ.items() if not key.startswith(OTHERS)}
    environment |= {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {f"XDG_{kind}_HOME": str(home / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA", "STATE")}
    arguments = [*job, str(options.data.resolve()), "quick" if options.quick else ""]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve().parent), "--worker", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            cwd=home,
        ) as process,
    ):
        assert process.stdout is not None
        watch = Watch(process.pid)
        said = process.stdout.read()
        watch.close()
        if process.wait():
            errors.seek(0)
            why = errors.read().strip()
            print(why, file=sys.stderr)
            raise RuntimeError(f"it failed: {why.splitlines()[-1]}")
    return json.loads(said.splitlines()[-1]), watch.peak


class Watch(threading.Thread):
    """The most memory that a process and all below it had at one time, looked at 20 times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self._over = pid, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.05):
            self.peak = max(self.peak, memory(self.pid))

    def close(self) -> None:
        """Stop looking."""
        self._over.set()
        self.join()


def memory(pid: int) -> int:
    """Bytes in memory of a process and of all below it; pages that several of them have count for each."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        below = [
            child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except (OSError, IndexError):
        return 0  # it has ended
    return own + sum(memory(int(child)) for child in below)
