"""Many processes commit to one artifact at once, without a lock or a server: nothing is lost, doubled or mixed up."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prooflib.histories import Operation, contradiction

from mandapa.format.records import VersionOp
from mandapa.object_store import LocalObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository
from mandapa.testing.server import serve

WORKER = Path(__file__).with_name("worker.py")

spec = importlib.util.spec_from_file_location("worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


def start(order):
    """A process that waits for the starting shot."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", WORKER, json.dumps(order)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def race(place, processes, commits, *, together=False, gc=False):
    """Run all processes from one starting shot; gives what each of them says of each of its commits, and what gc freed.

    ``together``: each commit is one race of all processes, which have the same base. ``gc``: one more process cleans up
    until the others are done.
    """
    orders = [{"place": place, "process": n, "commits": commits, "together": together} for n in range(processes)]
    running = [start(order) for order in orders]
    collector = start({"place": place, "process": "gc", "commits": 0}) if gc else None
    made = [[] for _ in running]
    freed = 0
    try:
        for process in filter(None, [collector, *running]):
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        for shot in range(1 + commits * together):
            if shot:
                for process in running:
                    assert process.stdout.readline() == "ready\n", process.stderr.read()
            for process in [collector, *running] if collector is not None and not shot else running:
                process.stdin.write("go\n")
                process.stdin.flush()
            if shot:
                for process, lines in zip(running, made, strict=True):
                    lines.append(process.stdout.readline())
        answers = [process.communicate() for process in running]
        if collector is not None:
            out, error = collector.communicate()
            assert (error, collector.returncode) == ("", 0)
            freed = int(out)
    finally:
        for process in filter(None, [collector, *running]):
            process.kill()
            process.wait()
    assert [error for _, error in answers] == [""] * processes
    assert [process.returncode for process in running] == [0] * processes
    for lines, (out, _) in zip(made, answers, strict=True):
        lines += out.splitlines()
    return [[tuple(map(int, line.split())) for line in lines] for lines in made], freed


def check(repo, made, commits):
    """What must hold whatever the order was in which the processes won."""
    artifact = repo.artifact("shared")
    versions = artifact.versions()
    total = len(made) * commits
    assert [version.number for version in versions] == list(range(total))
    assert sorted(number for lines in made for number, _, _ in lines) == list(range(total))

    records = [record for record in artifact.open_log().records if record.find(VersionOp) is not None]
    assert len(records) == total
    assert len({record.txn for record in records}) == total

    places = {record.find(VersionOp).number: record.seq + 1 for record in records}
    history = [
        Operation("shared", call, answer, places[number], append=True, who=f"process-{process}")
        for process, lines in enumerate(made)
        for number, call, answer in lines
    ]
    assert contradiction(history) == ""

    for process, lines in enumerate(made):
        numbers = [number for number, _, _ in lines]
        assert [versions[number].message for number in numbers] == [worker.message(process, i) for i in range(commits)]
        assert {versions[number].created_by for number in numbers} == {f"process-{process}"}
        assert numbers == sorted(numbers)

    whose = {number: (process, i) for process, lines in enumerate(made) for i, (number, _, _) in enumerate(lines)}
    assert list(versions[0].assets) == [worker.path(*whose[0])]
    for before, after in itertools.pairwise(versions):
        diff = before.diff(after)
        touched = [asset.path for asset in diff.added] + [new.path for _, new in diff.changed]
        assert touched == [worker.path(*whose[after.number])]
        assert not diff.removed
        assert after.parent == before.number

    expected = {worker.path(p, i): worker.content(p, i) for p in range(len(made)) for i in range(commits)}
    found = {}
    for path in repo["shared"].assets:
        with repo["shared"].open(path) as file:
            found[path] = file.read()
    assert found == expected

    report = fsck(repo, deep=True)
    assert report.findings == []
    assert report.checked["versions"] == total


@pytest.mark.timeout(900)
def test_processes_on_a_local_directory(tmp_path):
    """16 processes, 50 commits each, in one directory, beside a clean-up: 800 versions, each of them one file further.

    What was acknowledged first stands first, and the clean-up has taken what those who lost a race had put in vain.
    """
    store = LocalObjectStore(tmp_path / "repository")
    repo = Repository.create(store, threads=0)
    made, freed = race({"path": str(tmp_path / "repository")}, 16, 50, gc=True)
    assert freed
    check(repo, made, 50)


def test_processes_that_all_start_from_one_base(tmp_path):
    """All 8 have read the same log when they commit, five times over: seven of them lose and rebase, none gives up."""
    processes, rounds = 8, 5
    store = LocalObjectStore(tmp_path / "repository")
    repo = Repository.create(store, threads=0)
    made, _ = race({"path": str(tmp_path / "repository")}, processes, rounds, together=True)
    check(repo, made, rounds)
    for number in range(rounds):
        first = processes * number
        assert sorted(lines[number][0] for lines in made) == list(range(first, first + processes))
    # A manifest for each version, and one more for each that was made upon another's commit.
    assert sum(1 for _ in store.list("meta/")) >= rounds * (2 * processes - 1)


def test_processes_on_s3():
    """8 processes, 25 commits each, and a clean-up on an S3 server, with nothing but If-None-Match between them.

    Not on moto: it looks whether a key is there and then puts it, without a lock, so that now and then two racers win.
    """
    with serve() as server:
        repo = Repository.create(server.s3(prefix="runs"), threads=2)
        place = {
            "bucket": "bucket",
            "prefix": "runs",
            "endpoint_url": server.url,
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "test",
        }
        made, _ = race(place, 8, 25, gc=True)
        check(repo, made, 25)
