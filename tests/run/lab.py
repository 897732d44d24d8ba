"""A bench for runs: trainers, uploaders and servers as processes of their own, and what they left in a store."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mandapa.run.run
from mandapa import Repository, Version
from mandapa.loggers import ObjectStoreLogger
from mandapa.object_store import S3ObjectStore
from mandapa.run.directory import RunDirectory
from mandapa.run.status import look
from mandapa.testing.server import Server

__all__ = ["Gate", "Lab", "contents", "give_back", "remove", "steps", "until"]


def until(true: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What ``true`` gives as soon as it is true; polled, with a deadline."""
    give_up = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < give_up, "it did not become true in time"
        time.sleep(0.02)
    return found


class Gate:
    """An address that accepts connections and never answers, until it is opened: then it leads to a server.

    Args:
        refuses: Until then it accepts no connections.

    Attributes:
        received: Bytes that came back from the server.
    """

    def __init__(self, *, refuses: bool = False) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))  # nobody else gets the port, and nobody is let in without `listen`
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.received = 0
        self._target: tuple[str, int] | None = None
        self._waiting: list[socket.socket] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        if not refuses:
            self._listen()

    def open(self, server: Server) -> None:
        """Lead there from now on; who has waited until now is hung up on."""
        host, _, port = server.url.removeprefix("http://").partition(":")
        with self._lock:
            self._target = host, int(port)
        self._hang_up()
        if not self._threads:
            self._listen()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._hang_up()
        for thread in self._threads:
            thread.join(10)

    def _listen(self) -> None:
        self._listener.listen(128)
        self._threads.append(threading.Thread(target=self._accept, daemon=True))
        self._threads[0].start()

    def _hang_up(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for connection in waiting:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._target is None:
                    self._waiting.append(connection)
                    continue
                thread = threading.Thread(target=self._forward, args=(connection, self._target), daemon=True)
                self._threads.append(thread)
            thread.start()

    def _forward(self, client: socket.socket, target: tuple[str, int]) -> None:
        with client, socket.create_connection(target) as server:
            there = threading.Thread(target=self._pump, args=(client, server), daemon=True)
            there.start()
            self._pump(server, client, count=True)
            there.join()

    def _pump(self, source: socket.socket, sink: socket.socket, *, count: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if count:
                    with self._lock:
                        self.received += len(data)
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def commands() -> dict[int, list[str]]:
    """Process id -> its arguments, of all live processes that can be looked at."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                found[int(name)] = file.read().decode(errors="replace").split("\0")[:-1]
    return found


class Lab:
    """A folder for runs, a bucket, and the processes that have to do with them."""

    def __init__(self, folder: Path, server: Server, bucket: str) -> None:
        self.folder = folder
        self.server = server
        self.bucket = bucket
        self.runs = folder / "runs"
        self._started: list[subprocess.Popen[str]] = []

    # -- processes

    def write(self, code: str) -> Path:
        """A program in a file of its own."""
        path = self.folder / f"program-{len(list(self.folder.glob('program-*')))}.py"
        path.write_text(PROLOGUE + textwrap.dedent(code))
        return path

    def start(self, *command: Any, **options: Any) -> subprocess.Popen[str]:
        """Begin a program; its streams are pipes unless they are said."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen([str(word) for word in command], text=True, **(pipes | options))
        self._started.append(process)
        return process

    def python(self, code: str, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
        """Begin a trainer, whose warnings are errors; it finds where its runs and its store are in ``RUNS`` and so."""
        return self.start(sys.executable, "-W", "error", self.write(code), *arguments, **options)

    def finish(self, process: subprocess.Popen[str], code: int = 0, seconds: float = 60.0) -> str:
        """What it has printed when it has ended as it should, without complaining."""
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == code, f"{process.returncode}: {out[-2000:]} {err[-4000:]}"
        assert code or not err, err
        return out

    def mandapa(self, *arguments: Any, code: int = 0) -> str:
        """A command in a process of its own."""
        return self.finish(self.start(sys.executable, "-m", "mandapa.cli", *arguments), code)

    def kill(self, process: subprocess.Popen[str]) -> None:
        """As the kernel does when memory is short."""
        process.kill()
        process.communicate(timeout=10)

    def at_work(self) -> dict[int, list[str]]:
        """The processes that speak of the folder in their arguments."""
        return {pid: words for pid, words in commands().items() if any(str(self.folder) in word for word in words)}

    def uploaders(self) -> list[int]:
        return [pid for pid, words in self.at_work().items() if "mandapa.run.uploader" in words]

    def end(self) -> None:
        """Nothing that was started here lives on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for run in list(mandapa.run.run._open_runs.values()):  # of a test that failed
                run.close(timeout=0)
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        for pid in self.at_work():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self.at_work())
        give_back(self.folder)

    # -- what is stored

    def logger(self, url: str = "", **options: Any) -> ObjectStoreLogger:
        place = {"bucket": self.bucket, "endpoint_url": url or self.server.url}
        return ObjectStoreLogger(S3ObjectStore, {**place, **options})

    def versions(self, bucket: str = "", artifact: str = "net") -> list[Version]:
        return Repository(self.server.s3(bucket or self.bucket)).artifact(artifact).versions()

    def status(self, name: str = "net") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.runs / name / ".run/status.json").read_bytes())
        return found

    def is_safe(self, name: str = "net") -> bool:
        """Whether all that was handed over is committed, as ``mandapa status`` finds it."""
        return look(RunDirectory(self.runs / name)).safe


PROLOGUE = """\
import itertools, json, os, signal, sys, threading, time
import numpy
import mandapa.run.run
from mandapa import CheckpointSaver, Limits, Run
from mandapa.errors import ClosedError, InvalidInputError
from mandapa.loggers import FileLogger, ObjectStoreLogger, TensorboardLogger
from mandapa.object_store import S3ObjectStore

RUNS, BUCKET, URL = (os.environ.get(f"LAB_{name}") for name in ("RUNS", "BUCKET", "URL"))
mandapa.run.run.ACCESS_PATIENCE = float(os.environ.get("LAB_PATIENCE", "10"))
SAVER = CheckpointSaver(format="safetensors")

def logger(url=URL, **options):
    return ObjectStoreLogger(S3ObjectStore, {"bucket": BUCKET, "endpoint_url": url, **options})

def state(step, rank=0, size=1 << 20):
    made = numpy.random.default_rng([step, rank]).integers(0, 256, size, numpy.uint8)
    return {"at": numpy.array([step, rank]), "w": made}

def say(*words):
    print(*words, flush=True)

"""


def give_back(folder: Path) -> None:
    """The memory of runs that nobody goes on with."""
    for known in folder.rglob("rank*.slots"):
        for slot in json.loads(known.read_bytes())["slots"]:
            with contextlib.suppress(OSError):
                os.unlink(slot)


def remove(folder: Path) -> None:
    """Take a folder away though somebody may be writing into it."""

    def gone() -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()

    until(gone)


def contents(version: Version) -> dict[str, bytes]:
    """Every file of a version, but the facts about the run."""
    return {
        path: version.open(path).read()
        for path, asset in version.assets.items()
        if asset.kind == "file" and not path.startswith(".mandapa/")
    }


def steps(version: Version, folder: str = "checkpoint") -> dict[str, tuple[int, int]]:
    """The step and the rank that stand inside each checkpoint file of a version."""
    from safetensors.numpy import load

    files = {path: data for path, data in contents(version).items() if path.startswith(f"{folder}/")}
    return {path: tuple(load(data)["at"].tolist()) for path, data in files.items()}
