"""A process that dies, or a request that is lost, at any store call of any command: all of it happened, or nothing."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial

import pytest
from prooflib.crashpoints import COMMANDS, FATES, Command, OneFault, Rehearsal, author, process

from mandapa.errors import AlreadyExistsError, NotFoundError
from mandapa.object_store.base import ObjectStore
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.object_store.probe import ProbeResult
from mandapa.repository import repository
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository
from mandapa.testing.faults import Crash, CrashingObjectStore

POINTS = 2_000
TIMES = 10 if os.environ.get("MANDAPA_SOAK") else 1


@pytest.mark.timeout(3600 if TIMES > 1 else 300)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_all_or_nothing(command: Command) -> None:
    """Whichever store call is the one: earlier versions stay byte for byte, the new state is seen whole or not at all.

    Run again, with the same transaction id where there is one, the command is done exactly once. A lost request or
    reply is not even noticed. A clean-up that died leaves nothing that the next one does not take.
    """
    for time in range(TIMES):
        rehearsal = Rehearsal(command, 1000 * time)
        for fate in FATES:
            for at in range(1, rehearsal.calls + 1):
                rehearsal.play(fate, at)


def test_there_are_as_many_points_as_we_say() -> None:
    """All store calls of all commands, each with each fate."""
    assert sum(Rehearsal(command).calls for command in COMMANDS) * len(FATES) >= POINTS


@pytest.mark.parametrize("single_writer", [False, True])
@pytest.mark.parametrize("fate", [fate for fate in FATES if fate != "torn"])
def test_a_repository_that_is_half_made_is_made_again(
    fate: str, single_writer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no repository, or all of it, its single-writer promise included; making it again ends well."""

    def probe(store: ObjectStore) -> ProbeResult:
        store.put("probe/left/behind", b"")
        return ProbeResult("refused" if single_writer else "ok", (), 1, 0, 1)

    monkeypatch.setattr(repository, "probe", probe)
    make = partial(Repository.create, threads=0, single_writer=single_writer)
    smooth = CrashingObjectStore(MemoryObjectStore())
    make(smooth, author=author(1))
    for at in range(1, smooth.calls + 1):
        store = MemoryObjectStore()
        if fate.startswith("crash"):
            with suppress(Crash):
                make(CrashingObjectStore(store, at=at, mode=fate.removeprefix("crash ")), author=author(1))
            with suppress(NotFoundError):
                assert process(store, 2).settings()["writers"] == ("single" if single_writer else "many")
        else:
            faulty = OneFault(store, at, fate)
            make(faulty, author=author(1))
            with suppress(AlreadyExistsError):
                faulty.late()
        repo = make(store, author=author(5))
        assert repo.settings()["writers"] == ("single" if single_writer else "many")
        assert fsck(repo, deep=True).findings == []
