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


def race(place):
    """Run all processes from one starting shot; gives the versions that each of them says it has made."""
    orders = [json.dumps({"place": place, "process": number, "commits": COMMITS}) for number in range(PROCESSES)]
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", WORKER, order],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for order in orders
    ]
    try:
        for process in running:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        for process in running:
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [error for _, error in answers] == [""] * PROCESSES
    assert [process.returncode for process in running] == [0] * PROCESSES
    return [list(map(int, out.split())) for out, _ in answers]


def check(repo, made):
    """What must hold whatever the order was in which the processes won."""
    versions = repo.artifact("shared").versions()
    total = PROCESSES * COMMITS
    assert [version.number for version in versions] == list(range(total))
    assert sorted(number for numbers in made for number in numbers) == list(range(total))

    records = repo.artifact("shared").open_log().records
    assert len(records) == total
    assert len({record.txn for record in records}) == total

    for process, numbers in enumerate(made):
        assert [versions[number].message for number in numbers] == [worker.path(process, i) for i in range(COMMITS)]
        assert {versions[number].created_by for number in numbers} == {f"process-{process}"}
        assert numbers == sorted(numbers)

    assert list(versions[0].assets) == [versions[0].message]
    for before, after in itertools.pairwise(versions):
        diff = before.diff(after)
        assert [asset.path for asset in diff.added] == [after.message]
        assert not diff.removed
        assert not diff.changed
        assert after.parent == before.number

    expected = {worker.path(p, i): worker.content(p, i) for p in range(PROCESSES) for i in range(COMMITS)}
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
