"""mandapa alone: how fast one core reads what is stored, and what a slow link makes of a commit."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from series import Series
from worker import timed

import mandapa.content.cutters  # noqa: F401 - imports are not what is measured
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.repository import Repository
from mandapa.testing.server import Knobs, Server, serve

MODES: Any = ("raw", "auto", "dense")


def add(repo: Repository, source: Path) -> None:
    """One commit."""
    with repo.artifact("bench").transaction() as txn:
        txn.add(source, at="model")


def read_rates(series: Series) -> dict[str, dict[str, float]]:
    """Raw bytes a second that one core fetches from memory, decodes and verifies, by codec; of the last version."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = {}
    for mode in MODES:
        store = MemoryObjectStore()
        Repository.create(store)
        repo = Repository(store, codec=mode, threads=0)
        for path in series.paths[-2:]:
            add(repo, path)
        buffer = memoryview(bytearray(series.size))
        seconds = [timed(lambda: read_into(Repository(store, threads=0), buffer)) for _ in range(3)]  # noqa: B023
        if bytes(buffer) != series.paths[-1].read_bytes():
            raise RuntimeError("what was read is something else")
        found[mode] = {"decode": series.size / statistics.median(seconds)}
    return found


def read_into(repo: Repository, buffer: memoryview) -> None:
    """The whole file, which fills the buffer."""
    with repo["bench"].open("model") as file:
        at = 0
        while size := file.readinto(buffer[at:]):
            at += size


def link(series: Series, megabits: int) -> list[dict[str, Any]]:
    """Seconds that a later commit takes over a link, by codec; and that the bare bytes take."""
    rows = []
    with serve(Knobs(bandwidth=megabits * 125_000)) as server:
        bare = server.s3(prefix="bare")
        seconds = timed(lambda: put(bare, series.paths[-1]))
        rows.append({"codec": "the bytes, put by obstore", "sent": 1.0, "seconds": seconds})
        rows += [{"codec": mode, **commit_over(server, series, mode)} for mode in MODES]
    for row in rows:
        row |= {"series": series.name, "title": series.title, "of_raw": rows[0]["seconds"] / row["seconds"]}
    return rows


def put(store: Any, path: Path) -> None:
    """Objects of 16 MiB."""
    data = memoryview(path.read_bytes())
    for at in range(0, len(data), 16 << 20):
        store.put(f"packs/{at}", data[at : at + (16 << 20)])


def commit_over(server: Server, series: Series, mode: Any) -> dict[str, float]:
    """Seconds of the commit of the last version, upon the one before, and what it sent of its bytes."""
    store = server.s3(prefix=mode)
    Repository.create(store)
    with tempfile.TemporaryDirectory() as cache:
        repo = Repository(store, codec=mode, cache_dir=cache, cache_size=1 << 30)
        add(repo, series.paths[-2])
        time.sleep(0.2)
        seconds = timed(lambda: add(repo, series.paths[-1]))
        return {"seconds": seconds, "sent": repo["bench"].added / series.size}
