"""What all tests share: nothing of the user's own reaches a test, and no process of a test outlives it."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from mandapa.object_store.probe import probe

MEMORY = "/dev/shm"


def pytest_configure() -> None:
    """Tests write thousands of files, and fsync them: in memory, where there is room for the few that are kept."""
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)


@pytest.fixture(autouse=True, scope="session")
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No repository from the environment, and a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MANDAPA_REPO", raising=False)
        patch.delenv("MANDAPA_DEBUG", raising=False)
        patch.setenv("MANDAPA_CACHE", str(tmp_path_factory.mktemp("mandapa-cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def short_probes() -> Iterator[None]:
    """Tests make thousands of repositories: to each store a few questions, of all that a probe asks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mandapa.repository.repository.probe", partial(probe, racers=2, rounds=1))
        yield


class Door:
    """A door before object stores in folders: while it is shut, they refuse everything.

    `store` is their class, which uploaders import by themselves; `kwargs` are its arguments.
    """

    MODULE = """
import os
from mandapa.errors import AccessDeniedError
from mandapa.object_store import LocalObjectStore


class DoorObjectStore(LocalObjectStore):
    def __init__(self, path, shut, secret_key=""):
        super().__init__(path)
        self._shut = shut

    def __getattribute__(self, name):
        if name in ("get", "get_ranges", "head", "list", "put", "create", "delete"):
            if os.path.exists(object.__getattribute__(self, "_shut")):
                raise AccessDeniedError(f"the door is shut: {name} is refused")
        return super().__getattribute__(name)
"""

    def __init__(self, folder: Path) -> None:
        self._shut = folder / "shut"
        self.repo = folder / "door-repo"
        module = f"door_stores_{folder.name.replace('-', '_')}"
        (folder / f"{module}.py").write_text(self.MODULE)
        self.store = importlib.import_module(module).DoorObjectStore
        self.kwargs = {"path": str(self.repo), "shut": str(self._shut)}

    def shut(self) -> None:
        self._shut.touch()

    def open(self) -> None:
        self._shut.unlink(missing_ok=True)


@pytest.fixture
def door(place: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    """An open one, before a store below ``place``."""
    monkeypatch.syspath_prepend(str(place))
    return Door(place)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder that is not in shared memory, unless the system keeps all temporary files there."""
    with tempfile.TemporaryDirectory(prefix="mandapa-test-") as folder:
        yield Path(folder)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder for runs, where fsync costs nothing if there is such a place; gone at the end, with its uploaders."""
    with _place() as folder:
        yield folder


@pytest.fixture(scope="module")
def shared_place() -> Iterator[Path]:
    """The same for all tests of a module."""
    with _place() as folder:
        yield folder


@contextmanager
def _place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="mandapa-test-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    try:
        yield folder
    finally:
        _end_uploaders(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _end_uploaders(folder: Path) -> None:
    """Kill the uploaders of runs below that folder, and see them gone."""
    give_up = time.monotonic() + 10
    while pids := _uploaders(folder):
        assert time.monotonic() < give_up, f"uploaders of {folder} do not end: {pids}"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    process = sys.modules.get("mandapa.run.process")
    for child in process._children if process else ():  # those of this process leave their exit codes behind
        child.poll()


def _uploaders(folder: Path) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc/self") else ()):
        with suppress(OSError):
            command = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
            if b"mandapa.run.uploader" in command and any(word.startswith(os.fsencode(folder)) for word in command):
                found.append(int(pid))
    return found


def pytest_collection_finish() -> None:
    """Thousands of tests are not looked through at each garbage collection."""
    gc.collect()
    gc.freeze()
