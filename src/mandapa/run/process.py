"""The uploader as a trainer sees it: started when there is none, found when there is, replaced when it differs."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from mandapa.digest import hexdigest
from mandapa.errors import ConflictError, StorageError
from mandapa.run.directory import RunDirectory, read_json

__all__ = ["UploaderProcess", "end_uploader", "environment", "fingerprint"]

_TICK = 0.01
_KILLED = 5.0  # seconds until a killed process must be gone
_RESTART = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds between starts of one that keeps dying

_children: list[subprocess.Popen[bytes]] = []
"""Uploaders outlive the run that started them; whoever drops the last reference would be warned of that."""


@atexit.register
def _let_go() -> None:
    """Uploaders outlive the program, too: the interpreter drops the list at its end, and would warn."""
    for child in _children:
        if child.poll() is None:
            child.returncode = 0


class UploaderProcess:
    """Keeps one uploader at work for a run's directory.

    It has a session and standard streams of its own: nobody who reads the trainer's output waits for it, and no signal
    to the trainer's group reaches it.

    Args:
        directory: The run's.
        config: What the uploader gets on its standard input, secrets included.
    """

    def __init__(self, directory: RunDirectory, config: bytes) -> None:
        self._directory = directory
        self._config = config
        self._child: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._started = 0.0

    def ensure(self) -> None:
        """Start an uploader if none is at work; one that keeps dying is started less and less often.

        Raises:
            StorageError: It cannot be started.
        """
        if self._child is not None and self._child.poll() is None:
            return
        if self._directory.uploader_lock().held():
            return
        if time.monotonic() - self._started < _RESTART[min(self._starts, len(_RESTART) - 1)]:
            return
        self._start()

    def begin(self, patience: float, keys: Collection[str]) -> dict[str, Any]:
        """An uploader with this configuration; its status once it knows of these backends, or as it is after that time.

        Raises:
            ConflictError: One with another configuration is at work and cannot be ended from here.
            StorageError: It cannot be started.
        """
        give_up = time.monotonic() + patience
        while True:
            status = self.status()
            ours = fingerprint(self._config, str(status.get("salt", ""))) == status.get("config")
            child = self._child
            if child is not None and child.poll() in (1, 2):
                raise StorageError(f"the uploader ended at once; {self._directory.log} says why")
            lock = self._directory.uploader_lock()
            pid = int(status.get("pid", 0))
            # Until the one that is at work has told of itself, this is what one said that was killed.
            current = status.get("running") and lock.holder().partition(" ")[0] == str(pid)
            if lock.held():
                if current and ours:
                    backends = status.get("backends", {})
                    if (
                        all(backends.get(key, {}).get("state", "opening") != "opening" for key in keys)
                        or time.monotonic() > give_up
                    ):
                        return status
                elif current and (child is None or pid != child.pid):
                    end_uploader(self._directory)
            elif child is None or child.poll() is not None:
                self._start()
            if time.monotonic() > give_up:
                return status if current else {}
            time.sleep(_TICK)

    def status(self) -> dict[str, Any]:
        """What the uploader last said of itself."""
        return read_json(self._directory.status)

    def _start(self) -> None:
        self._starts += 1
        self._started = time.monotonic()
        command = [sys.executable, "-m", "mandapa.run.uploader", self._directory.path]
        try:
            log = os.open(self._directory.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                child = subprocess.Popen(  # noqa: S603 - this interpreter, this module
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=environment(),
                    cwd=self._directory.path,
                )
            finally:
                os.close(log)
        except OSError as error:
            raise StorageError(f"the uploader cannot be started: {error.strerror}", retryable=True) from error
        _children.append(child)
        self._child = child
        assert child.stdin is not None
        with suppress(BrokenPipeError), child.stdin as pipe:
            pipe.write(self._config)


def end_uploader(directory: RunDirectory) -> None:
    """Kill the uploader that is at work, if one is: one may be killed at any moment, no byte is lost.

    Raises:
        ConflictError: It runs on another machine.
    """
    lock = directory.uploader_lock()
    pid, _, host = lock.holder().partition(" ")
    if host and host != os.uname().nodename:
        raise ConflictError(
            f"the uploader of {directory.path} runs on {host}: a run's directory serves one machine; use another dir="
        )
    if not pid.isdigit() or not _is_uploader(int(pid)):
        return  # between two uploaders: whoever calls looks again
    with suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)
    give_up = time.monotonic() + _KILLED
    while lock.held() and time.monotonic() < give_up:
        time.sleep(_TICK)


def _is_uploader(pid: int) -> bool:
    """Whether that process is one of ours, as far as the system tells."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"mandapa.run.uploader" in file.read(4096)
    except OSError:
        return not os.path.isdir("/proc/self")  # no such file system (macOS): the lock has to do


def environment() -> dict[str, str]:
    """For a child that imports what this process can import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def fingerprint(config: bytes, salt: str) -> str:
    """Tells whether two configurations are the same without showing either."""
    return hexdigest(salt.encode() + config)
