"""`mandapa status` and `mandapa sync`: whether a machine may go, and making it so."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mandapa
from mandapa import Limits, Run
from mandapa.loggers import ObjectStoreLogger
from mandapa.run.directory import RunDirectory, read_json, write_json


def until(true: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What ``true`` gives as soon as it is true; polled, with a deadline."""
    give_up = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < give_up, "it did not become true in time"
        time.sleep(0.01)
    return found


def committed(runs: Path, name: str, repo: Path) -> None:
    """A run of which everything is in versions."""
    with Run(name, {"lr": 1}, loggers=[ObjectStoreLogger(repo)], dir=runs) as run:
        run.log_bytes("a", b"a")
    wait_for_uploader(runs / name)


def stranded(runs: Path, name: str, door: Any, **options: Any) -> None:
    """A run that ended while its store was not to be had, and whose uploader was killed, too."""
    logger = ObjectStoreLogger(door.store, {**door.kwargs, **options})
    run = Run(name, loggers=[logger], dir=runs, limits=Limits(exit_seconds=0))
    door.shut()
    run.log_bytes("a", b"a" * 1000)
    with pytest.warns(RuntimeWarning, match="ends before everything is committed"):
        run.close()
    os.kill(read_json(RunDirectory(run.dir).status)["pid"], signal.SIGKILL)
    wait_for_uploader(runs / name)


def wait_for_uploader(folder: Path) -> None:
    until(lambda: not RunDirectory(folder).uploader_lock().held())


@pytest.fixture
def runs(place: Path) -> Path:
    return place / "runs"


@pytest.mark.parametrize("command", ["status", "sync"])
def test_no_runs_are_not_found(cli: Any, command: str) -> None:
    """In a folder without any, in none, in a file, and where nothing is named."""
    (cli.folder / "empty").mkdir()
    (cli.folder / "file").write_bytes(b"")
    for arguments in (["empty"], ["missing"], ["file"], []):
        error = cli.error(command, *arguments, code=3)
        assert "holds no run: name the folder of a run, or one with folders of runs in it" in error
    assert "mandapa-runs" in error
    cli(command, "a", "b", code=2)
    cli(command, "--nonsense", code=2)


def test_a_run_without_backend_has_nothing_to_wait_for(cli: Any) -> None:
    """The default folder is the one that runs are made in."""
    Run("net").close()
    out = cli("status").out
    assert out.splitlines() == [
        f"net  attempt 1, not training, no uploader  {os.path.join('mandapa-runs', 'net')}",
        "  no backend logger: its files are in that folder only",
        "all is committed: this machine may go",
    ]
    cli("sync")
    (found,) = cli.json("status")
    assert found == {
        "run": "net",
        "path": str(cli.folder / "mandapa-runs/net"),
        "attempt": 1,
        "live": [],
        "held": 0,
        "memory_bytes": 0,
        "uploading": False,
        "backends": [],
        "committed": True,
        "safe": True,
    }


def test_what_is_committed_may_go(cli: Any, place: Path, runs: Path) -> None:
    committed(runs, "net", place / "repo")
    for where in (runs, runs / "net"):
        out = cli("status", where).out.splitlines()
        assert out[0].startswith("net  attempt 1, not training, no uploader  ")
        assert out[1].startswith("  net:v")
        assert "all committed" in out[1]
        assert str(place / "repo") in out[1]
        assert out[2:] == ["all is committed: this machine may go"]
    (found,) = cli.json("status", runs)
    (backend,) = found["backends"]
    assert (found["safe"], backend["pending"], backend["pending_bytes"], backend["error"]) == (True, 0, 0, "")
    assert backend["committed"] == mandapa.open(place / "repo")["net"].address
    assert backend["withheld"] == []
    assert cli("sync", runs).out.splitlines() == out[:2]


def test_a_training_that_goes_on_is_told(cli: Any, place: Path, runs: Path) -> None:
    """What waits makes the machine stay; sync asks the uploader, which is at work, and does not end the training."""
    with Run("net", loggers=[ObjectStoreLogger(place / "repo")], dir=runs) as run:
        handle = run.log_bytes("a", b"a" * 5000)
        out = cli("status", runs, code=1).out.splitlines()
        assert out[0].startswith("net  attempt 1, training (rank 0), uploader at work  ")
        assert "waiting" in out[1]
        assert out[-1] == "not all is committed: this machine must stay"
        (found,) = cli.json("status", runs, code=1)
        assert (found["live"], found["uploading"], found["safe"]) == ([0], True, False)
        assert found["backends"][0]["pending_bytes"] >= 5000
        assert "all committed" in cli("sync", runs).out
        assert handle.done()
        assert cli("status", runs).out.splitlines()[-1] == "all is committed: this machine may go"

        def waits() -> bool:
            first = run.log_bytes("b", b"b")
            until(lambda: first.state != "held")
            later = run.log_bytes("c", b"c")
            until(lambda: later.state != "held")
            return not first.done()

        until(waits)  # it was asked for what waited then, and not for what comes later


def test_what_a_dead_run_left_behind_is_synced(cli: Any, runs: Path, door: Any) -> None:
    """It says who can do it, and it does it; a second time there is nothing to do."""
    stranded(runs, "net", door)
    out = cli("status", runs, code=1).out.splitlines()
    assert out[0].startswith("net  attempt 1, not training, no uploader  ")
    assert out[1].startswith("  net, no version yet  ")
    assert "3 things waiting" in out[1]
    assert f"  nobody is committing this: mandapa sync {runs}/net" in out
    door.open()
    out = cli("sync", runs).out.splitlines()
    assert out[1].startswith("  net:v0  all committed  ")
    assert not any("nobody" in line for line in out)
    version = mandapa.open(door.repo)["net"]
    assert version.open("a").read() == b"a" * 1000
    cli("status", runs)
    assert cli("sync", runs).out.splitlines() == out
    assert mandapa.open(door.repo)["net"] == version


def test_credentials_that_were_withheld_are_named(cli: Any, runs: Path, door: Any) -> None:
    """They are in no file, so whoever syncs has to set them; the error says which, and is one of access."""
    stranded(runs, "net", door, secret_key="hunter2-of-the-test")
    error = cli.error("sync", runs, code=6)
    assert "net: the door is shut" in error
    assert "(the run was given secret_key as arguments, which are written nowhere: set the store's environment" in error
    told = json.loads(cli("sync", "--json", runs, code=6).err)
    assert (told["error"], told["exit_code"]) == ("AccessDeniedError", 6)
    (found,) = cli.json("status", runs, code=1)
    assert found["backends"][0]["withheld"] == ["secret_key"]
    assert "the door is shut" in found["backends"][0]["error"]
    assert "the door is shut" in cli("status", runs, code=1).out
    for path in runs.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes()
    door.open()
    assert "all committed" in cli("sync", runs).out


def test_one_of_several_runs_does_not_hold_up_the_others(cli: Any, place: Path, runs: Path, door: Any) -> None:
    """All are told, by name; what can be committed is, and the exit code is that of the one that cannot."""
    committed(runs, "b", place / "repo")
    stranded(runs, "a", door)
    door.open()
    stranded(runs, "c", door)
    out = cli("status", runs, code=1).out
    assert [line[0] for line in out.splitlines() if "attempt" in line] == ["a", "b", "c"]
    assert out.count("nobody is committing this") == 2
    assert [found["safe"] for found in cli.json("status", runs, code=1)] == [False, True, False]
    cli("status", runs / "b")
    cli("status", runs / "c", code=1)
    door.open()
    value = read_json(str(next((runs / "c/.run/backends").iterdir())))
    value["options"]["shut"] = str(place)  # is there, so that this one's door stays shut
    write_json(str(next((runs / "c/.run/backends").iterdir())), value)
    result = cli("sync", runs, code=6)
    assert result.out.count("all committed") == 2
    assert result.err.startswith("mandapa: error: c: the door is shut")
    assert [found["safe"] for found in cli.json("status", runs, code=1)] == [True, True, False]


def test_sync_takes_no_longer_than_it_is_told(cli: Any, runs: Path, door: Any) -> None:
    stranded(runs, "net", door)
    started = time.monotonic()
    cli.error("sync", runs, "--timeout", "0", code=7)
    assert time.monotonic() - started < 5
    assert "call 'mandapa sync" in cli.error("sync", runs, "--timeout", "0", code=7)
    cli("sync", runs, "--timeout", "-1", code=2)


def test_what_a_terminal_would_obey_is_not_printed(cli: Any, runs: Path, door: Any) -> None:
    """Errors come from stores, and folders have any name."""
    folder = runs / "odd \x1b[31m\u202e"
    stranded(folder, "net", door)
    status = RunDirectory(folder / "net").status
    told = read_json(status)
    for backend in told["backends"].values():
        backend["error"] = {"type": "StorageError", "message": "bad \x1b]0;title\x07 \u202e reply", "failures": 1}
    write_json(status, told)
    for arguments in (["status", folder], ["status", folder, "--json"]):
        out = cli(*arguments, code=1).out
        assert not set(out) & set("\x1b\x07\u202e")
        assert "bad" in out


@pytest.mark.parametrize("command", ["status", "sync"])
def test_runs_that_cannot_be_looked_at(cli: Any, runs: Path, command: str) -> None:
    """Of a newer mandapa, of another user: an error of its own, and no guess."""
    Run("net", dir=runs).close()
    (runs / "net/.run/format.json").write_text('{"format": 2, "run": "net"}')
    assert "upgrade it" in cli.error(command, runs, code=7)
    (runs / "net/.run/format.json").write_text('{"format": 1, "run": "net"}')
    if os.geteuid() == 0:
        os.chown(runs / "net", 54_321, -1)
        assert "belongs to another user" in cli.error(command, runs, code=2)


def test_damage_in_a_runs_directory_ends_nothing(cli: Any, place: Path, runs: Path) -> None:
    """What only helps may be gone or junk: status, launches, a backend's note, a log."""
    committed(runs, "net", place / "repo")
    inner = runs / "net/.run"
    for name in ("status.json", "launches.json", "uploader.log"):
        (inner / name).write_bytes(b"\xff{")
    (inner / "backends/junk.json").write_bytes(b"[1]")
    (inner / "backends/none.json.1.tmp").write_bytes(b"")
    assert "all committed" in cli("status", runs).out
    assert "all committed" in cli("sync", runs).out
