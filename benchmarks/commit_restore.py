"""Commit and restore against the same bytes raw: 1 GiB of floats and 10,000 files of 10 KiB, on disk and on S3.

``make bench`` runs it. Rounds alternate, so that a machine that slows down slows both sides; each step runs in a
process of its own, whose peak memory is shown; imports are not counted. Ratios are raw time / our time: 1.0 is as fast
as raw, more is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mandapa
from mandapa.object_store import LocalObjectStore
from mandapa.object_store.base import ObjectStore
from mandapa.repository.repository import Repository
from mandapa.testing.server import Knobs, Server, serve

MIB = 1 << 20
PACK = 16 * MIB
THREADS = 4

# -- steps: each runs in a child process and prints its seconds and peak memory


def store_at(place: str) -> ObjectStore:
    """The object store for a place given on the command line: a path, or server URL, bucket and prefix."""
    if place.startswith("http"):
        url, bucket, prefix = place.rsplit("|", 2)
        return Server(url).s3(bucket, prefix)
    return LocalObjectStore(place)


def files_in(source: Path) -> list[Path]:
    """The file, or all files of the folder."""
    return sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]


def raw_local_put(source: Path, place: str) -> None:
    """The bytes in objects of 16 MiB (small files: one object each), written and fsynced."""
    os.makedirs(place)
    buffer = memoryview(bytearray(PACK))
    for number, path in enumerate(files_in(source)):
        with path.open("rb", buffering=0) as file:
            part = 0
            while size := file.readinto(buffer):
                fd = os.open(f"{place}/{number}.{part}", os.O_CREAT | os.O_WRONLY)
                os.write(fd, buffer[:size])
                os.fsync(fd)
                os.close(fd)
                part += 1


def raw_local_get(source: Path, place: str, dest: Path) -> None:
    """The objects, read by threads into memory that is used again, and written where they belong."""
    dest.mkdir(parents=True)
    parts: dict[int, list[int]] = {}
    for name in os.listdir(place):
        number, part = name.split(".")
        parts.setdefault(int(number), []).append(int(part))
    mine = threading.local()

    def one(job: tuple[int, int, int]) -> None:
        number, part, fd = job
        if not hasattr(mine, "buffer"):
            mine.buffer = memoryview(bytearray(PACK))
        with open(f"{place}/{number}.{part}", "rb", buffering=0) as file:
            os.pwrite(fd, mine.buffer[: file.readinto(mine.buffer)], part * PACK)

    with ThreadPoolExecutor(THREADS) as pool:
        for number, found in parts.items():
            fd = os.open(dest / str(number), os.O_CREAT | os.O_WRONLY)
            jobs = [(number, part, fd) for part in found]
            list(map(one, jobs) if len(jobs) == 1 else pool.map(one, jobs))
            os.close(fd)


def raw_s3_put(source: Path, place: str) -> None:
    """The bytes in objects of 16 MiB (small files: one object each), by obstore from four threads."""
    store = store_at(place)

    def one(job: tuple[int, Path, int]) -> None:
        number, path, offset = job
        with path.open("rb") as file:
            file.seek(offset)
            store.put(f"raw/{number}.{offset}", file.read(PACK))

    jobs = [
        (number, path, offset)
        for number, path in enumerate(files_in(source))
        for offset in range(0, path.stat().st_size, PACK)
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, jobs))


def raw_s3_get(source: Path, place: str, dest: Path) -> None:
    """The objects by obstore from four threads, written where they belong."""
    store = store_at(place)
    dest.mkdir(parents=True)
    keys = [info.key for info in store.list("raw/")]
    fds = {number: os.open(dest / number, os.O_CREAT | os.O_WRONLY) for number in {name_of(key)[0] for key in keys}}

    def one(key: str) -> None:
        number, offset = name_of(key)
        os.pwrite(fds[number], store.get(key), int(offset))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, keys))


def name_of(key: str) -> tuple[str, str]:
    """File number and offset of a raw object."""
    number, offset = key.rsplit("/", 1)[-1].split(".")
    return number, offset


def ours_commit(source: Path, place: str, codec: str) -> None:
    """One commit of the file or folder."""
    repo = Repository(store_at(place), codec=codec, cache_dir=os.environ["MANDAPA_CACHE"], threads=THREADS)  # type: ignore[arg-type]
    with repo.artifact("bench").transaction() as txn:
        txn.add(source, at=None if source.is_dir() else "model.bin")


def ours_restore(place: str, dest: Path, cache_size: int = 0) -> None:
    """One download of the newest version."""
    cache = os.environ["MANDAPA_CACHE"] if cache_size else None
    repo = Repository(store_at(place), cache_dir=cache, cache_size=cache_size, threads=THREADS)
    repo["bench:latest"].download(dest)


STEPS: dict[str, Callable[..., None]] = {
    "raw_local_put": lambda a: raw_local_put(Path(a["source"]), a["place"]),
    "raw_local_get": lambda a: raw_local_get(Path(a["source"]), a["place"], Path(a["dest"])),
    "raw_s3_put": lambda a: raw_s3_put(Path(a["source"]), a["place"]),
    "raw_s3_get": lambda a: raw_s3_get(Path(a["source"]), a["place"], Path(a["dest"])),
    "commit": lambda a: ours_commit(Path(a["source"]), a["place"], a["codec"]),
    "restore": lambda a: ours_restore(a["place"], Path(a["dest"]), int(a.get("cache_size", "0"))),
}


def peak_mib() -> float:
    """Peak memory of this process alone; ru_maxrss would also count its parent's pages from before the exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def child(step: str, arguments: str) -> None:
    """Run one step and print what it took."""
    values = json.loads(arguments)
    if step == "commit":
        import pyfastcdc  # noqa: F401 - imports are not what is measured

        import mandapa.content.cutters  # noqa: F401
    start = time.perf_counter()
    STEPS[step](values)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak_mib()}))


def run(step: str, **arguments: str) -> tuple[float, float]:
    """Run one step in a child; seconds and peak MiB."""
    os.sync()
    done = subprocess.run(
        [sys.executable, __file__, "--step", step, json.dumps(arguments)], check=True, capture_output=True, text=True
    )
    answer = json.loads(done.stdout)
    return answer["seconds"], answer["peak_mib"]


# -- data


def make_floats(path: Path, size: int) -> None:
    """A safetensors file of random floats, in tensors of 16 MiB: no codec can do much about it."""
    import numpy as np

    rng = np.random.default_rng(0)
    count = size // PACK
    header = {
        f"layer.{i}.weight": {"dtype": "F32", "shape": [4 * MIB], "data_offsets": [i * PACK, (i + 1) * PACK]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(count):
            file.write(rng.standard_normal(4 * MIB, dtype=np.float32).tobytes())


def make_folder(path: Path, files: int) -> None:
    """Files of 10 KiB of random bytes, 100 in a folder."""
    rng = random.Random(0)
    for i in range(files):
        target = path / f"{i // 100:04}" / f"{i:06}.bin"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(rng.randbytes(10_240))


# -- the tables


def places(kind: str, home: Path) -> Iterator[Callable[[str], str]]:
    """Gives a maker of fresh places on the local disk, or on the S3 server."""
    if kind == "disk":
        yield lambda name: str(home / name)
        return
    with serve() as server:
        yield lambda name: f"{server.url}|bucket|{name}"


def table(title: str, kind: str, source: Path, home: Path, rounds: int) -> None:
    """One table: commit and restore of ``source``, each against raw, in alternating rounds."""
    raw_put, raw_get = ("raw_local_put", "raw_local_get") if kind == "disk" else ("raw_s3_put", "raw_s3_get")
    rows: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds):
        for place in places(kind, home):  # a new server each round, or its memory would grow by all that was stored
            for name in ("raw", "codec raw", "codec auto"):
                where = place(f"{name.replace(' ', '-')}-{number}")
                dest = home / "restored"
                if name == "raw":
                    put = run(raw_put, source=str(source), place=where)
                    get = run(raw_get, source=str(source), place=where, dest=str(dest))
                else:
                    Repository.create(store_at(where))
                    put = run("commit", source=str(source), place=where, codec=name.split()[1])
                    get = run("restore", place=where, dest=str(dest))
                rows.setdefault(f"{name}: put", []).append(put)
                rows.setdefault(f"{name}: get", []).append(get)
                shutil.rmtree(dest)
                if kind == "disk":
                    shutil.rmtree(where)
    print(f"\n{title}\n{'':24}{'seconds':>9}{'min':>8}{'max':>8}{'of raw':>8}{'peak MiB':>10}")
    for name, runs in rows.items():
        seconds = [run[0] for run in runs]
        base = [run[0] for run in rows["raw: " + name.rsplit(" ", 1)[1]]]
        ratio = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
        print(
            f"{name:24}{statistics.median(seconds):9.3f}{min(seconds):8.3f}{max(seconds):8.3f}{ratio:8.2f}"
            f"{max(run[1] for run in runs):10.0f}"
        )


def changes(home: Path, source: Path) -> None:
    """Second and third commits of a folder in one process: nothing changed, 1% changed."""
    repo = mandapa.open(str(home / "changes"), create=True)

    def commit() -> float:
        start = time.perf_counter()
        with repo.artifact("folder").transaction() as txn:
            txn.add(source)
        return time.perf_counter() - start

    first = commit()
    time.sleep(0.2)  # file times must be older than the guard for racy timestamps
    unchanged = [commit() for _ in range(5)]
    one_percent = []
    for number in range(5):
        for path in files_in(source)[number::100]:
            path.write_bytes(random.Random(number).randbytes(10_240))
        time.sleep(0.2)
        one_percent.append(commit())
    print(
        f"\n10,000 files on tmpfs, warm: first {first:.3f} s, unchanged {statistics.median(unchanged):.3f} s, "
        f"1% changed {statistics.median(one_percent):.3f} s"
    )


def again(home: Path, source: Path, rounds: int) -> None:
    """The same version restored without a cache of chunks, into an empty one, and from it, over a link of 30 ms."""
    print(f"\nRestore of {source.stat().st_size / MIB:.0f} MiB again, S3 with 30 ms latency, to tmpfs")
    print(f"{'':24}{'no cache':>10}{'first':>8}{'again':>8}")
    for name, bandwidth in (("no limit", 0.0), ("1 Gbit/s", 125e6)):
        with serve(Knobs(latency=0.03, bandwidth=bandwidth)) as server:
            where = f"{server.url}|bucket|again"
            Repository.create(store_at(where))
            run("commit", source=str(source), place=where, codec="raw")
            seconds: dict[str, list[float]] = {"0": [], "first": [], "again": []}
            for _ in range(rounds):
                shutil.rmtree(Path(os.environ["MANDAPA_CACHE"], "chunks"), ignore_errors=True)
                for kind, times in seconds.items():
                    size = "0" if kind == "0" else str(4 << 30)
                    times.append(run("restore", place=where, dest=str(home / "restored"), cache_size=size)[0])
                    shutil.rmtree(home / "restored")
        no, first, second = (statistics.median(times) for times in seconds.values())
        print(f"{name:24}{no:10.2f}{first:8.2f}{second:8.2f}")


def main() -> None:
    """Print machine facts and all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the large file")
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="a folder on the disk to measure")
    options = parser.parse_args()
    if options.step:
        child(*options.step)
        return
    tmpfs = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    disk = Path(tempfile.mkdtemp(dir=options.disk))
    os.environ["MANDAPA_CACHE"] = str(tmpfs / "cache")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, mandapa {mandapa.__version__}")
    try:
        big, folder = disk / "model.safetensors", tmpfs / "folder"
        make_floats(big, int(options.gib * (1 << 30)))
        make_folder(folder, 10_000)
        table(f"{options.gib:g} GiB of floats, local disk", "disk", big, disk, options.rounds)
        table(f"{options.gib:g} GiB of floats, S3 on loopback, restored to tmpfs", "s3", big, tmpfs, options.rounds)
        table("10,000 files of 10 KiB, tmpfs", "disk", folder, tmpfs, options.rounds)
        table("10,000 files of 10 KiB, S3 on loopback", "s3", folder, tmpfs, options.rounds)
        changes(tmpfs, folder)
        make_floats(tmpfs / "again.safetensors", 256 * MIB)
        again(tmpfs, tmpfs / "again.safetensors", options.rounds)
    finally:
        shutil.rmtree(tmpfs)
        shutil.rmtree(disk)


if __name__ == "__main__":
    main()
