"""What ranks that were started together agree on, though none of them waits for another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from mandapa.errors import StorageError
from mandapa.run import launch as module
from mandapa.run.directory import Lock, RunDirectory, read_json
from mandapa.run.facts import ranks_from_environment
from mandapa.run.journal import BeginEntry
from mandapa.run.launch import Launch, join


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return RunDirectory(tmp_path / "net", "net")


class Rank:
    """A rank that is started again and again: its journal remembers how it began."""

    def __init__(self, directory: RunDirectory, world: int = 1) -> None:
        self.directory = directory
        self.world = world
        self.begun: list[BeginEntry] = []

    def start(self, opened: dict[str, Any] | None = None, **known: Any) -> Launch:
        opened = opened or {}
        given: dict[str, Any] = {"settled": dict.fromkeys(opened, False), "local_step": None, "fresh": False, **known}
        found = join(self.directory, self.begun, local_world=self.world, opened=opened, **given)
        common: dict[str, Any] = {"n": len(self.begun) + 1, "time": "", "attempt": found.attempt, "fresh": found.fresh}
        begin = BeginEntry(**common, launch=found.id, local_ranks=[], backends=[], base={})
        self.begun.append(begin)
        return found


def stored(step: int, number: int = 5, **more: Any) -> dict[str, Any]:
    """What a store knows of a run with a checkpoint."""
    checkpoint = {"number": number, "folder": number, "address": f"net:v{number}", "metadata": {"step": step}}
    return {"newest": number + 1, "checkpoint": checkpoint, **more}


# -- attempts ----------------------------------------------------------------------------------------------------------


def test_each_start_is_an_attempt(directory: RunDirectory) -> None:
    rank = Rank(directory)
    found = [rank.start() for _ in range(20)]
    assert [launch.attempt for launch in found] == list(range(1, 21))
    assert len({launch.id for launch in found}) == 20
    assert [launch["attempt"] for launch in read_json(directory.launches)["launches"]] == list(range(5, 21))


def test_attempts_go_on_above_all_that_is_known(directory: RunDirectory) -> None:
    """Of this directory, of the rank's journal, and of the stores, where other machines have gone on."""
    rank = Rank(directory)
    assert rank.start({"a": stored(1, attempt=7), "b": {"attempt": 3}, "c": {}}).attempt == 8
    os.unlink(directory.launches)
    assert rank.start().attempt == 9
    assert rank.start({"a": {"attempt": 2}}).attempt == 10


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"attempt": "x"}', b'{"attempt": 1, "launches": [{}]}'])
def test_a_damaged_note_of_starts_costs_nothing(directory: RunDirectory, content: bytes) -> None:
    rank = Rank(directory)
    rank.start()
    Path(directory.launches).write_bytes(content)
    assert rank.start().attempt == 2


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_ranks_of_one_launch_agree(directory: RunDirectory) -> None:
    """On the attempt and on what they go on from, though the stores know more by the time the last one asks."""
    ranks = [Rank(directory, world=3) for _ in range(3)]
    first = ranks[0].start({"a": stored(10)})
    assert first.store == {"key": "a", **stored(10)["checkpoint"]}
    assert [ranks[1].start({"a": stored(20, 9)}), ranks[2].start(local_step=30, fresh=True)] == [first, first]
    second = [rank.start() for rank in reversed(ranks)]
    assert [launch.attempt for launch in second] == [2, 2, 2]
    assert len({launch.id for launch in second}) == 1


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MASTER_PORT"])
def test_another_launch_is_told_by_its_environment(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A launcher starts all ranks again when one has died: also one that had not begun before."""
    ranks = [Rank(directory, world=2) for _ in range(2)]
    assert ranks[0].start().attempt == 1
    monkeypatch.setenv(name, "1")
    assert [rank.start().attempt for rank in ranks] == [2, 2]


def test_another_launcher_starts_another_launch(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Rank(directory, world=2) for _ in range(2)]
    assert [rank.start().attempt for rank in ranks] == [1, 1]
    monkeypatch.setattr(os, "getppid", lambda: 7)
    assert [rank.start().attempt for rank in ranks] == [2, 2]


def processes(folder: Path, program: str, count: int, **environment: str) -> list[Any]:
    """What so many ranks print, started at once by one launcher."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                **environment,
            },
        )
        for rank in range(count)
    ]
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count
    return [json.loads(out) for out in said]


def test_processes_of_one_launch_agree(directory: RunDirectory, tmp_path: Path) -> None:
    """Real ones, all at once: one attempt, one id; and the next start is the next attempt for all."""
    program = """
        import json
        from mandapa import CheckpointSaver, Run
        found = []
        for _ in range(2):
            with Run("resnet", {"lr": 1}, loggers=[CheckpointSaver(format="safetensors")], dir=".") as run:
                run.save_checkpoint({"n": run.attempt}, step=1)
            found.append([run.attempt, run.rank, run.world_size])
        print(json.dumps(found))
    """
    assert processes(tmp_path, program, 3) == [[[1, rank, 3], [2, rank, 3]] for rank in range(3)]
    assert processes(tmp_path, program, 2, MASTER_PORT="5") == [[[3, rank, 2], [4, rank, 2]] for rank in range(2)]
    assert RunDirectory(tmp_path / "resnet").ranks() == [0, 1, 2]


def test_a_lock_that_is_not_let_go_is_told(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    lock = Lock(os.path.join(directory.inner, "launch.lock"))
    assert lock.take()
    with pytest.raises(StorageError, match=rf"another process \(pid, host: {os.getpid()} .*does not let go of"):
        Rank(directory).start()
    lock.release()
    assert Rank(directory).start().attempt == 1


# -- what to go on from ------------------------------------------------------------------------------------------------


def test_the_checkpoint_of_the_highest_step_is_gone_on_from(directory: RunDirectory) -> None:
    """Of all stores and this directory; what is here is as good as what is there."""
    opened = {"a": stored(10, 3), "b": stored(30, 4), "c": {"newest": 1}, "d": {}}
    rank = Rank(directory)
    found = rank.start(opened)
    assert found.store is not None
    assert (found.store["key"], found.store["number"]) == ("b", 4)
    assert found.base == {"a": 4, "b": 4, "c": 1}
    found = rank.start(opened, local_step=29)
    assert found.store is not None
    for step in (30, 31):
        assert rank.start(opened, local_step=step).store is None
    assert rank.start({"c": {"newest": 1}}).store is None


def test_the_folder_goes_on_where_it_was(directory: RunDirectory) -> None:
    """What this directory has committed is its base; only a backend that it knows nothing of says where it was."""
    rank = Rank(directory)
    opened = {"a": {"newest": 7}, "b": {"newest": 3}, "c": {}}
    found = rank.start(opened, settled={"a": True, "b": False, "c": False}, local_step=5)
    assert found.base == {"b": 3}


def test_a_fresh_start_has_an_empty_folder(directory: RunDirectory) -> None:
    """In every backend, whatever is there."""
    found = Rank(directory).start({"a": stored(10), "b": {}}, settled={"a": True, "b": False}, fresh=True)
    assert (found.store, found.base, found.fresh) == (None, {"a": None, "b": None}, True)


def test_what_was_before_a_fresh_start_is_not_gone_on_from(directory: RunDirectory) -> None:
    """Though nothing of the fresh one is in a store yet, or its uploader looked before it began."""
    rank = Rank(directory)
    assert rank.start({"a": stored(10, attempt=3)}).attempt == 4
    assert rank.start({"a": stored(10, attempt=4)}, fresh=True).attempt == 5
    found = rank.start({"a": stored(10, attempt=4), "b": {"newest": 1}})
    assert (found.attempt, found.store, found.base) == (6, None, {})
    found = rank.start({"a": stored(7, attempt=5)})
    assert found.store is not None
    assert found.store["metadata"] == {"step": 7}


# -- ranks of the environment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 8, 1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8, 3, 8)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, (3, 8, 1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2, 1, 2)),
        ({"RANK": "x", "WORLD_SIZE": ""}, (0, 1, 0, 1)),
        ({"RANK": "x", "OMPI_COMM_WORLD_RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1, 2)),
        ({"RANK": "5"}, (0, 1, 0, 1)),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, (0, 1, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "0"}, (0, 1, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}, (0, 2, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"}, (0, 2, 0, 2)),
    ],
)
def test_what_launchers_say(environment: dict[str, str], expected: tuple[int, ...]) -> None:
    """torchrun, Open MPI, none; what cannot be counts as not said."""
    assert ranks_from_environment(environment) == expected
