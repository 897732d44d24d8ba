"""What a repository of 10,000 versions takes: `mandapa du`, and a plan of `mandapa expire`, from a fresh process.

Two shapes: one artifact with 10,000 versions, and 1,000 artifacts with 10 versions each. Each version changes one of
three small files. The repository lies in a folder. ``first`` is the first call, which reads every log and manifest,
``warm`` any later one, the median of five; ``s`` is by the clock, ``cpu_s`` of processors. Run:
``python benchmarks/usage.py [--versions 10000] [--rounds 5] [--folder DIR]``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mandapa.object_store import LocalObjectStore
from mandapa.repository.repository import Repository

MANDAPA = [sys.executable, "-m", "mandapa.cli"]


def make(folder: Path, artifacts: int, versions: int) -> None:
    """A repository of that shape; without fsync, which costs time and says nothing here."""
    repo = Repository.create(LocalObjectStore(folder, fsync=False), threads=0)
    for number in range(artifacts):
        artifact = repo.artifact(f"run-{number:05}")
        for version in range(versions):
            with artifact.transaction(f"step {version}", metadata={"val/loss": 1 / (1 + version)}) as txn:
                if version == 0:
                    txn.add_bytes("hparams.yaml", b"lr: %d\n" % number)
                    txn.add_bytes("log.txt", b"")
                txn.add_bytes("checkpoint/model.bin", os.urandom(500))


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds of one whole command: of the clock, and of processors."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bench(name: str, artifacts: int, versions: int, folder: Path, count: int) -> None:
    """Measure one shape, and print a line of JSON."""
    place = folder / name
    if not place.exists():
        start = time.perf_counter()
        make(place, artifacts, versions)
        print(f"# {name}: made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    commands = {
        "du": [*MANDAPA, "--repo", str(place), "du"],
        "expire": [*MANDAPA, "--repo", str(place), "expire", "--all", "--keep-last", "5"],
    }
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        # As installed: modules are compiled once, not by each call.
        environment = {**os.environ, "MANDAPA_CACHE": cache, "PYTHONPYCACHEPREFIX": f"{cache}/compiled"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for command, words in commands.items():
            first, first_cpu = measure(words, environment)
            rounds = [measure(words, environment) for _ in range(count)]
            seconds, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
            found = {"first_s": first, "first_cpu_s": first_cpu, "warm_s": seconds, "warm_cpu_s": cpu}
            values = {key: round(value, 2) for key, value in found.items()}
            print(json.dumps({"shape": name, "command": command, **values}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="Keep the repositories there, and use them again.")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        bench("one", 1, options.versions, folder, options.rounds)
        bench("many", options.versions // 10, 10, folder, options.rounds)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
