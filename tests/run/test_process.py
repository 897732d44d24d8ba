"""The uploader's process: one for a directory, started, kept, replaced, and started again when it dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mandapa.errors import ConflictError, StorageError
from mandapa.run import process as module
from mandapa.run.backend import key_of
from mandapa.run.directory import RunDirectory, read_json, write_json
from mandapa.run.journal import ENTRIES, CheckpointEntry, Journal
from mandapa.run.logger import BackendSpec
from mandapa.run.process import UploaderProcess, environment, fingerprint
from mandapa.run.uploader import Uploader

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")

STORES = """
import time
from mandapa.object_store import LocalObjectStore

class Hangs(LocalObjectStore):
    def get(self, key, *, limit=None):
        time.sleep(1000)
"""


def until(true: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What ``true`` gives as soon as it is true; polled, with a deadline."""
    give_up = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < give_up, "it did not become true in time"
        time.sleep(0.01)
    return found


@pytest.fixture
def directory(place: Path) -> Iterator[RunDirectory]:
    """Of a run whose trainer is this process."""
    found = RunDirectory(place / "net", "net")
    lock = found.take_rank(0)
    yield found
    lock.release()


class Config:
    """What an uploader is told, for a store in a folder."""

    def __init__(self, folder: Path, store: str | None = None, **options: Any) -> None:
        self.spec = BackendSpec(store or str(folder), options, "net")
        self.key = key_of(self.spec)
        value = {"store": self.spec.store, "options": options, "artifact": "net"}
        self.bytes = msgspec.json.encode({"backends": [value], "limits": {}})


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return True


# -- configurations ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_configurations_apart_and_shows_none() -> None:
    secret = b'{"secret_access_key": "hunter2"}'
    found = fingerprint(secret, "salt")
    assert found == fingerprint(secret, "salt")
    assert len({found, fingerprint(secret, "other"), fingerprint(secret + b" ", "salt")}) == 3
    assert "hunter2" not in found
    assert len(found) == 64


def test_a_child_imports_what_this_process_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is in the working directory, which is another one there."""
    monkeypatch.syspath_prepend(str(tmp_path / "extra"))
    monkeypatch.syspath_prepend("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    found = environment()["PYTHONPATH"].split(os.pathsep)
    assert found[0] == str(tmp_path)
    assert str(tmp_path / "extra") in found
    assert "" not in found


# -- one uploader ------------------------------------------------------------------------------------------------------


def test_an_uploader_has_a_life_of_its_own(directory: RunDirectory, place: Path) -> None:
    """Its own session, streams and priority, and nothing in memory that only training needs."""
    config = Config(place / "repo")
    status = UploaderProcess(directory, config.bytes).begin(10, [config.key])
    pid = status["pid"]
    assert status["backends"][config.key]["state"] == "ok"
    assert os.getsid(pid) == pid
    assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0)
    streams = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]
    assert streams[0].startswith("pipe:")
    assert streams[1:] == [directory.log] * 2
    assert b"torch" not in Path(f"/proc/{pid}/maps").read_bytes()
    assert read_json(directory.backend(config.key))["store"] == str(place / "repo")


def test_one_with_the_same_configuration_is_kept_another_is_replaced(directory: RunDirectory, place: Path) -> None:
    """For a second rank, or a restarted trainer; with other credentials or limits the old one goes."""
    first, second = Config(place / "repo"), Config(place / "other")
    pids = [UploaderProcess(directory, first.bytes).begin(10, [first.key])["pid"] for _ in range(2)]
    assert pids[0] == pids[1]
    status = UploaderProcess(directory, second.bytes).begin(10, [second.key])
    assert status["pid"] != pids[0]
    assert gone(pids[0])
    assert not gone(status["pid"])
    assert status["backends"][second.key]["url"].endswith("/other")
    assert first.key not in status["backends"], "nothing waits for the old one"


def test_one_that_is_at_work_is_left_alone(directory: RunDirectory, place: Path) -> None:
    config = Config(place / "repo")
    first = UploaderProcess(directory, config.bytes)
    pid = first.begin(10, [config.key])["pid"]
    for uploader in (first, UploaderProcess(directory, config.bytes)):
        uploader.ensure()
        assert uploader.status()["pid"] == pid
    assert module._children[-1].pid == pid


def test_one_that_was_killed_is_replaced(directory: RunDirectory, place: Path) -> None:
    """What it said last is not believed."""
    config = Config(place / "repo")
    uploader = UploaderProcess(directory, config.bytes)
    pid = uploader.begin(10, [config.key])["pid"]
    os.kill(pid, 9)
    until(lambda: not directory.uploader_lock().held())
    assert uploader.status()["running"]
    status = UploaderProcess(directory, config.bytes).begin(10, [config.key])
    assert status["pid"] != pid
    assert status["backends"][config.key]["state"] == "ok"


def test_it_ends_when_it_is_not_needed(directory: RunDirectory, place: Path) -> None:
    """No trainer lives, and nothing waits."""
    config = Config(place / "repo")
    pid = UploaderProcess(directory, config.bytes).begin(10, [config.key])["pid"]
    directory.rank_lock(0).release()
    until(lambda: not directory.uploader_lock().held())
    until(lambda: gone(pid))
    assert not read_json(directory.status)["running"]


@pytest.mark.parametrize("turn", [1, 2, 3, 6])
def test_what_a_trainer_wrote_before_it_died_is_read(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """Also when it writes and dies between two looks of the uploader, which ends then."""
    journal = Journal(directory.journal(0), ENTRIES)
    polls = 0

    def poll(self: Uploader) -> bool:
        nonlocal polls
        found = real(self)
        polls += 1
        if polls == turn:
            journal.append(CheckpointEntry(n=1, time="", attempt=1, step=1, files=[]))
            directory.rank_lock(0).release()
        return found

    real = Uploader._poll
    monkeypatch.setattr(Uploader, "_poll", poll)
    uploader = Uploader(directory, {})
    assert uploader.run()
    assert uploader._hub.feed.saved[0, 1] == 1
    journal.close()


# -- when it cannot ----------------------------------------------------------------------------------------------------


def test_one_that_ends_at_once_is_told(directory: RunDirectory) -> None:
    """Where to look for why."""
    with pytest.raises(StorageError, match=r"the uploader ended at once; .*uploader\.log says why"):
        UploaderProcess(directory, b"no configuration").begin(10, ["x"])
    assert "DecodeError" in Path(directory.log).read_text()


def test_a_process_that_cannot_be_started_is_told(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    uploader = UploaderProcess(directory, b"")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(StorageError, match="the uploader cannot be started: No such file") as found:
        uploader.begin(1, [])
    assert found.value.retryable


def test_a_store_that_does_not_answer_is_waited_for_so_long(
    directory: RunDirectory, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then training begins without its answer."""
    (place / "hanging_stores.py").write_text(STORES)
    monkeypatch.syspath_prepend(str(place))
    config = Config(place, "hanging_stores:Hangs", path=str(place / "repo"))
    uploader = UploaderProcess(directory, config.bytes)
    started = time.monotonic()
    status = uploader.begin(0.6, [config.key])
    assert 0.6 <= time.monotonic() - started < 8
    assert status.get("backends", {}).get(config.key, {"state": "opening"})["state"] == "opening"


HOLDER = """
import sys
from mandapa.run.directory import RunDirectory
assert RunDirectory(sys.argv[1]).uploader_lock().take()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("host", [None, "elsewhere"])
def test_what_is_no_uploader_of_this_machine_is_not_killed(
    directory: RunDirectory, place: Path, host: str | None
) -> None:
    """Somebody else holds the lock: `mandapa sync`, say, or the uploader of another machine on a shared disk."""
    command = [sys.executable, "-c", HOLDER, directory.path]
    config = Config(place / "repo")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        if host:
            Path(directory.inner, "uploader.lock").write_text(f"{holder.pid} {host}\n")
        write_json(directory.status, {"running": True, "pid": holder.pid, "salt": "", "config": "", "backends": {}})
        uploader = UploaderProcess(directory, config.bytes)
        if host:
            with pytest.raises(ConflictError, match="runs on elsewhere: a run's directory serves one machine"):
                uploader.begin(0.3, [config.key])
        else:
            assert uploader.begin(0.3, [config.key])["pid"] == holder.pid
        uploader.ensure()
        assert holder.poll() is None
        assert holder.communicate()[0] == ""


def test_one_that_keeps_dying_is_started_less_and_less_often(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, after a second, two, five, ten, and then each half minute."""
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    uploader = UploaderProcess(directory, b"no configuration")
    starts = []
    known = len(module._children)
    while now[0] < 1050:
        uploader.ensure()
        if len(module._children) > known:
            known = len(module._children)
            starts.append(now[0] - 1000)
            module._children[-1].wait(timeout=20)
        now[0] += 0.5
    assert starts == [0, 1, 3, 8, 18, 48]
