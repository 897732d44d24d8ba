"""What all parts share: places to log to, processes looked at from outside, quantiles, tables."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mandapa import Run
from mandapa.loggers import FileLogger, Logger, ObjectStoreLogger, TensorboardLogger
from mandapa.object_store import S3ObjectStore

MB = 1_000_000
GB = 1_000_000_000
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

now = time.perf_counter


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    mb: int
    """Of a checkpoint."""
    saves: int
    """Checkpoints of a block of training."""
    seconds: float
    """Of training between two of them."""
    rounds: int
    calls: int
    """Times that a cheap call is made."""
    idle: float
    """Seconds for which an idle uploader is watched."""


# -- places ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a run logs to: the arguments of `ObjectStoreLogger`."""

    store: Any
    options: dict[str, Any]
    server: int = 0
    """The process id of the server; 0: none."""

    def run(self, name: str, home: Path, *others: Logger) -> Run:
        """A run with all loggers that users put together, and others."""
        loggers = [TensorboardLogger(), FileLogger(), ObjectStoreLogger(self.store, self.options), *others]
        return Run(name, {"lr": 0.001}, loggers=loggers, dir=home / "runs")


@contextmanager
def folder(path: Path) -> Iterator[Place]:
    """A repository on the local disk."""
    yield Place(str(path), {})


@contextmanager
def s3(store: type = S3ObjectStore, **options: Any) -> Iterator[Place]:
    """A repository in a fresh S3 test server on loopback, or its memory would grow by all that is stored.

    It runs with the least priority: elsewhere it is another machine, which takes nothing from training.
    """
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("s3_server.py")), "--end-with-stdin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.setpriority(os.PRIO_PROCESS, process.pid, 19)  # of its first thread, before there are others
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin, process.stdout:
            place = {"bucket": "bucket", "prefix": "runs", "endpoint_url": process.stdout.readline().strip()}
            secrets = {"region": "us-east-1", "access_key_id": "test", "secret_access_key": "test"}
            yield Place(store, {**place, **secrets, **options}, process.pid)
    finally:
        process.kill()
        process.wait()


def warm(home: Path, mb: int) -> None:
    """Write a file and delete it, so that whoever saves next finds memory that is quick to have.

    A virtual machine gives free memory back to its host within seconds, and page cache that has to be asked for again
    is ten times slower to write into; without this the ratio of two savers says what was deleted just before each.
    """
    piece = bytes(MB)
    with (home / "warm").open("wb", buffering=0) as file:
        for _ in range(3 * mb):  # a file, its copy, and what a server makes of it
            file.write(piece)
    (home / "warm").unlink()


def wait_for(done: Callable[[], bool]) -> float:
    """When it was done."""
    while not done():
        time.sleep(0.002)
    return now()


# -- processes ---------------------------------------------------------------------------------------------------------


def uploader_of(run: Run) -> int:
    """The process id of a run's uploader."""
    return int(Path(run.dir, ".run", "uploader.lock").read_text().split()[0])


def end_uploader(run: Run) -> None:
    """After its run it has nothing left to do, but may be at it still; the next measurement wants the cores."""
    pid = uploader_of(run)
    for _ in range(500):
        if not Path(f"/proc/{pid}/cmdline").is_file() or b"uploader" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, with that of threads which have ended; nan where the system does not tell."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # the clock of a process in Linux: clock_getcpuclockid(3)
    except (AttributeError, OSError):
        return float("nan")


def children(word: str) -> list[int]:
    """The child processes whose command line holds the word."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and word in (path / "cmdline").read_text():
                found.append(int(path.name))
    return found


def peak_mib(pid: int) -> float:
    """The most memory that a process ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def busy(seconds: float) -> float:
    """The part of all cores that is in use: by others, when this process sleeps."""

    def look() -> tuple[int, int]:
        times = [int(number) for number in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        return sum(times), times[3] + times[4]

    try:
        before = look()
        time.sleep(seconds)
        after = look()
    except OSError:
        return float("nan")
    return 1 - (after[1] - before[1]) / max(1, after[0] - before[0])


def machine() -> str:
    """What one has to know to read the figures."""
    model = ""
    memory = float("nan")
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = models[0].partition(":")[2].strip() if models else ""
        memory = int(Path("/proc/meminfo").read_text().split()[1]) / (1 << 20)
    return f"Python {platform.python_version()}, Linux {platform.release()}, {CORES} cores {model}, {memory:.0f} GiB"


# -- figures -----------------------------------------------------------------------------------------------------------


def quantile(values: Sequence[float], part: float) -> float:
    """The value that so large a part of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def target(value: float, most: float, shown: str) -> str:
    """The last column of a table."""
    return f"{shown}: {'met' if value <= most else 'not met'}"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n### {title}\n")
    for row in (head, ["---", *["---:"] * (len(head) - 2), "---"], *rows):
        print(f"| {' | '.join(row)} |", flush=True)


def ms(seconds: float) -> str:
    """Seconds as milliseconds, with three digits that count."""
    value = seconds * 1000
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"
