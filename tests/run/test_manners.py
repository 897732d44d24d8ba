"""What the uploader leaves to the training program."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mandapa import Run
from mandapa.loggers import ObjectStoreLogger
from mandapa.run.uploader import Uploader


def autogroup(pid: int | str) -> str:
    """How Linux treats the session of a process; empty where it makes no difference between sessions."""
    try:
        return Path(f"/proc/{pid}/autogroup").read_text()
    except OSError:
        return ""


def test_the_uploader_takes_of_the_cpu_what_training_leaves(tmp_path: Path) -> None:
    """It is nicer than the trainer, by thread and, where Linux shares the CPU out among sessions, by session."""
    own = autogroup("self")
    with Run("net", loggers=[ObjectStoreLogger(tmp_path / "store")], dir=tmp_path) as run:
        pid = int(Path(run.dir, ".run", "uploader.lock").read_text().split()[0])
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
        if own and os.geteuid() == 0:  # others may set it ten times a second, all of them together
            give_up = time.monotonic() + 10
            while not autogroup(pid).endswith("nice 10\n") and time.monotonic() < give_up:
                time.sleep(0.02)
            assert autogroup(pid).endswith("nice 10\n")
    assert autogroup("self") == own


def test_a_sync_does_not_slow_down_the_shell_that_it_runs_in(tmp_path: Path) -> None:
    """Only the uploader that a run has started, which has a session of its own, steps back."""
    own = autogroup("self"), os.getpriority(os.PRIO_PROCESS, 0)
    with Run("net", loggers=[ObjectStoreLogger(tmp_path / "store")], dir=tmp_path) as run:
        run.log_bytes("a", b"a")
    lock = run._directory.uploader_lock()
    assert lock.take(patience=10)
    try:
        assert Uploader(run._directory, {}, once=True).run()
    finally:
        lock.release()
    assert (autogroup("self"), os.getpriority(os.PRIO_PROCESS, 0)) == own
