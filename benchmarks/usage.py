"""What a repository of 10,000 versions takes: `mandapa du`, and a plan of `mandapa expire`, from a fresh process.

Two shapes: one artifact with 10,000 versions, and 1,000 artifacts with 10 versions each. Each version changes one of
three small files. The repository lies in a folder; *cold* is the first call, which reads every log and manifest, *warm*
is any later one, the median of five. Run: ``python benchmarks/usage.py [--versions 10000] [--folder DIR]``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mandapa.object_store import LocalObjectStore
from mandapa.repository.repository import Repository

ROUNDS = 5
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


def measure(command: list[str], environment: dict[str, str]) -> float:
    """Seconds of one whole command."""
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def bench(name: str, artifacts: int, versions: int, folder: Path) -> None:
    """Measure one shape, and print a line of JSON."""
    place = folder / name
    if not place.exists():
        start = time.perf_counter()
        make(place, artifacts, versions)
        print(f"# {name}: made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    commands = {
        "du": [*MANDAPA, "--repo", str(place), "du"],
        "expire": [*MANDAPA, "--repo", str(place), "expire", "--keep-last", "5"],
    }
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = {**os.environ, "MANDAPA_CACHE": cache}
        for command, words in commands.items():
            cold = measure(words, environment)
            warm = statistics.median(measure(words, environment) for _ in range(ROUNDS))
            found = {"shape": name, "command": command, "first_s": round(cold, 2), "warm_s": round(warm, 2)}
            print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="Keep the repositories there, and use them again.")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        bench("one", 1, options.versions, folder)
        bench("many", options.versions // 10, 10, folder)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
