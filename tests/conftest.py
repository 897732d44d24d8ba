"""What all tests share: nothing of the user's own reaches a test, and no process of a test outlives it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No repository from the environment, and a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MANDAPA_REPO", raising=False)
        patch.delenv("MANDAPA_DEBUG", raising=False)
        patch.setenv("MANDAPA_CACHE", str(tmp_path_factory.mktemp("mandapa-cache")))
        yield


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
    memory = "/dev/shm"
    folder = Path(tempfile.mkdtemp(prefix="mandapa-test-", dir=memory if os.access(memory, os.W_OK) else None))
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
