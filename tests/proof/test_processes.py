"""Many processes commit to one artifact at once, without a lock or a server: nothing is lost, doubled or mixed up."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mandapa.object_store import LocalObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository
from mandapa.testing.services import moto

PROCESSES = 8
COMMITS = 25
WORKER = Path(__file__).with_name("worker.py")

spec = importlib.util.spec_from_file_location("worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


def race(place, commits=COMMITS, *, together=False):
    """Run all processes from one starting shot; gives the versions that each of them says it has made.

    ``together``: each commit is one race of all processes, which have the same base.
    """
    orders = [{"place": place, "process": n, "commits": commits, "together": together} for n in range(PROCESSES)]
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", WORKER, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for order in orders
    ]
    made = [[] for _ in running]
    try:
        for shot in range(1 + commits * together):
            for process in running:
                assert process.stdout.readline() == "ready\n", process.stderr.read()
            for process in running:
                process.stdin.write("go\n")
                process.stdin.flush()
            if shot:
                for process, numbers in zip(running, made, strict=True):
                    numbers.append(int(process.stdout.readline()))
        answers = [process.communicate() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [error for _, error in answers] == [""] * PROCESSES
    assert [process.returncode for process in running] == [0] * PROCESSES
    for numbers, (out, _) in zip(made, answers, strict=True):
        numbers += map(int, out.split())
    return made


def check(repo, made, commits=COMMITS):
    """What must hold whatever the order was in which the processes won."""
    versions = repo.artifact("shared").versions()
    total = PROCESSES * commits
    assert [version.number for version in versions] == list(range(total))
    assert sorted(number for numbers in made for number in numbers) == list(range(total))

    records = repo.artifact("shared").open_log().records
    assert len(records) == total
    assert len({record.txn for record in records}) == total

    for process, numbers in enumerate(made):
        assert [versions[number].message for number in numbers] == [worker.path(process, i) for i in range(commits)]
        assert {versions[number].created_by for number in numbers} == {f"process-{process}"}
        assert numbers == sorted(numbers)

    assert list(versions[0].assets) == [versions[0].message]
    for before, after in itertools.pairwise(versions):
        diff = before.diff(after)
        assert [asset.path for asset in diff.added] == [after.message]
        assert not diff.removed
        assert not diff.changed
        assert after.parent == before.number

    expected = {worker.path(p, i): worker.content(p, i) for p in range(PROCESSES) for i in range(commits)}
    found = {}
    for path in repo["shared"].assets:
        with repo["shared"].open(path) as file:
            found[path] = file.read()
    assert found == expected

    report = fsck(repo, deep=True)
    assert report.findings == []
    assert report.checked["versions"] == total


def test_processes_on_a_local_directory(tmp_path):
    """8 processes, 25 commits each, in one directory: 200 versions without a gap, each the one before plus one file."""
    store = LocalObjectStore(tmp_path / "repository")
    repo = Repository.create(store, threads=0)
    made = race({"path": str(tmp_path / "repository")})
    check(repo, made)


def test_processes_that_all_start_from_one_base(tmp_path):
    """All 8 have read the same log when they commit, five times over: seven of them lose and rebase, none gives up."""
    rounds = 5
    store = LocalObjectStore(tmp_path / "repository")
    repo = Repository.create(store, threads=0)
    made = race({"path": str(tmp_path / "repository")}, rounds, together=True)
    check(repo, made, rounds)
    for number in range(rounds):
        first = PROCESSES * number
        assert sorted(numbers[number] for numbers in made) == list(range(first, first + PROCESSES))
    # A manifest for each version, and one more for each that was made upon another's commit.
    assert sum(1 for _ in store.list("meta/")) >= rounds * (2 * PROCESSES - 1)


@pytest.mark.service
def test_processes_on_s3():
    """The same on an S3 server, where all that keeps the processes apart is If-None-Match."""
    with moto() as service:
        repo = Repository.create(service.store("runs"), threads=2)
        place = {
            "bucket": "bucket",
            "prefix": "runs",
            "endpoint_url": service.url,
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "test",
        }
        made = race(place)
        check(repo, made)
