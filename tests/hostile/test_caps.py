"""Objects, files and replies that are far too large: each is refused at once, and no memory is taken for it."""

from __future__ import annotations

import http.server
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mandapa
from mandapa.cli import plans, reading
from mandapa.content.cutters.layout import HEADER_MAX
from mandapa.errors import CorruptionError, InvalidInputError
from mandapa.format.keys import head_key, log_key
from mandapa.format.manifest import NODE_MAX
from mandapa.format.records import GC_LIST_BYTES, HEAD_MAX, MARKER_MAX
from mandapa.format.strict import CHUNK_MAX, CONTAINER_MAX, RECORD_MAX
from mandapa.object_store import LocalObjectStore, S3ObjectStore
from mandapa.repository import tensors
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author, create_once
from mandapa.repository.packs import condemned
from mandapa.run import repository_backend
from mandapa.run.serial import INDEX_MAX

HUGE = 1 << 40  # bytes of a file of holes: who takes memory for it before he looks fails, and so does the test
ID = "00112233445566778899aabbccddeeff"


def resident() -> int:
    """Bytes of memory of this process at its most."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10


@contextmanager
def soon_and_small() -> Iterator[None]:
    """The block takes little time and little memory."""
    before, started = resident(), time.process_time()
    yield
    assert resident() - before < 64 << 20
    assert time.process_time() - started < 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A repository of one version, with a chunk in a pack."""
    repo = mandapa.open(str(tmp_path / "repo"), create=True)
    with repo.artifact("net").transaction() as txn:
        txn.add_bytes("a.bin", os.urandom(200_000))
    return tmp_path / "repo"


def blow_up(path: Path, key: str) -> None:
    """Something huge stands at a key."""
    (path / key).parent.mkdir(parents=True, exist_ok=True)
    (path / key).touch()
    os.truncate(path / key, HUGE)


def log_of(path: Path) -> str:
    return next((path / "log").iterdir()).name


def append(path: Path) -> object:
    return mandapa.open(str(path)).artifact("net").alias("best", 0)


READS: dict[str, tuple[Callable[[Path], str], Callable[[Path], object]]] = {
    "marker": (lambda path: "mandapa.json", lambda path: mandapa.open(str(path))),
    "first record of the catalog": (lambda path: log_key("catalog", 0), lambda path: mandapa.open(str(path))),
    "first record of a log": (
        lambda path: log_key(log_of(path), 0),
        lambda path: mandapa.open(str(path))["net:v0"].assets,
    ),
    "next record of a log": (lambda path: log_key(log_of(path), 1), append),
    "list of a gc": (lambda path: "gc/e", lambda path: condemned(LocalObjectStore(path))),
    "what another has created": (
        lambda path: log_key("catalog", 99),
        lambda path: create_once(LocalObjectStore(path), log_key("catalog", 99), b"x", Author()),
    ),
}


@pytest.mark.parametrize("name", READS)
def test_a_huge_object_is_refused(path: Path, name: str) -> None:
    """Whatever it stands for: as corruption, by name, before it is read."""
    key_of, read = READS[name]
    key = key_of(path)
    shutil.rmtree(path / "head", ignore_errors=True)  # which would spare the log
    blow_up(path, key)
    with soon_and_small(), pytest.raises(CorruptionError, match=f"{HUGE} bytes, more than the") as caught:
        read(path)
    assert caught.value.key == key


@pytest.mark.parametrize("which", ["catalog", "artifact"])
def test_a_huge_head_is_done_without(path: Path, which: str) -> None:
    """It is a cache: what it should hold is read from the log."""
    blow_up(path, head_key("catalog" if which == "catalog" else log_of(path)))
    with soon_and_small():
        assert len(mandapa.open(str(path))["net:v0"].open("a.bin").read()) == 200_000


def test_fsck_tells_of_what_is_huge_and_goes_on(path: Path) -> None:
    """Containers, heads and lists: a finding for each, and memory for none."""
    repo = mandapa.open(str(path))
    with repo.artifact("net").transaction() as txn:
        txn.add_bytes("model.bin", bytes(range(256)) * 300)
    pack = next(repo.store.list("packs/")).key
    for key in (head_key("catalog"), "gc/e", pack, f"packs/{ID}"):  # nobody needs the last one
        blow_up(path, key)
    with soon_and_small():
        report = fsck(repo, deep=True)
    found = [(one.invariant, one.where) for one in report.findings]
    assert sorted(found) == [
        ("I10", "gc/e"),
        ("I8", pack),
        ("I9", head_key("catalog")),
    ]
    assert report.hurt == []  # what it needs of the pack is there


class Endless(http.server.BaseHTTPRequestHandler):
    """Answers every request with far too much, which its header tells of, or hides."""

    protocol_version = "HTTP/1.1"
    honest = True
    sent = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(HUGE) if self.honest else "10")
        if not self.honest:
            self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.send_header("ETag", '"x"')
        self.end_headers()
        piece = bytes(1 << 20)
        try:
            while type(self).sent < 1 << 30:
                self.wfile.write(piece if self.honest else b"100000\r\n" + piece + b"\r\n")
                type(self).sent += len(piece)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("honest", [True, False])
def test_a_server_that_sends_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch, honest: bool) -> None:
    """By what its reply announces, and by what comes where the reply lied."""
    monkeypatch.setattr(Endless, "honest", honest)
    monkeypatch.setattr(Endless, "sent", 0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        store = S3ObjectStore(
            "b", endpoint_url=f"http://127.0.0.1:{server.server_port}", region="x", access_key_id="x",
            secret_access_key="x",
        )  # fmt: skip
        with soon_and_small(), pytest.raises(CorruptionError, match="more than the 4096"):
            store.get("mandapa.json", limit=4096)
        assert Endless.sent < 64 << 20
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


LIMITS = {
    "marker": (MARKER_MAX, "4 KiB"),
    "record": (RECORD_MAX, "64 KiB"),
    "head": (HEAD_MAX, "1 GiB"),
    "list of a gc": (GC_LIST_BYTES, "4 MiB"),
    "node, part": (NODE_MAX, "16 MiB decoded"),
    "chunk": (CHUNK_MAX, "16 MiB decoded"),
    "container": (CONTAINER_MAX, "32 MiB"),
    "header of safetensors, directory of a zip": (HEADER_MAX, "32 MiB"),
    "pickle of tensors": (HEADER_MAX, "32 MiB"),
    "`.mandapa/tensors.json`": (tensors._NAMES_SIZE, "32 MiB"),
    "hyperparameters, facts of a run in a version": (repository_backend._TEXT_MAX, "64 KiB"),
    "file of a plan": (plans._PLAN_MAX, "256 MiB"),
    "a file as one string": (reading._JSON_MAX, "256 MiB"),
    "line of a journal; small JSON of a run's directory; outline of a state in memory": (INDEX_MAX, "64 MiB"),
}
UNITS = {"KiB": 10, "MiB": 20, "GiB": 30}


def test_the_table_of_limits_is_that_of_the_code() -> None:
    """Each number of docs/format.md §13.6 that has a constant is that constant."""
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    table = text.partition("### 13.6")[2].partition("**On the machine.**")[0]
    rows = {cells[1].strip(): cells[3] for line in table.splitlines() if len(cells := line.split("|")) == 5}
    for name, (limit, told) in LIMITS.items():
        number, unit = told.split()[:2]
        assert told in rows[name], name
        assert int(number) << UNITS[unit] == limit, name


def test_a_plan_is_read_up_to_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of holes that is called a plan is none."""
    monkeypatch.setattr(plans, "_PLAN_MAX", 1 << 20)
    plan = tmp_path / "plan"
    plan.touch()
    os.truncate(plan, HUGE)
    with soon_and_small(), pytest.raises(InvalidInputError, match="no plan"):
        plans.read_plan(plan)
