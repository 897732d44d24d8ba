"""A bar on stderr for work that takes longer than a second; nothing when nobody watches."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Bar"]

PATIENCE = 1.0
"""Seconds before a bar appears."""


class Bar:
    """Takes the number of bytes, or of things, done so far, from any thread.

    Args:
        title: What is being done.
        total: All there is to do, if that is known; a function is asked only when a bar is shown.
        unit: ``bytes``, or what is counted.
    """

    def __init__(self, title: str, total: int | Callable[[], int | None] | None = None, unit: str = "bytes") -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._watched = sys.stderr.isatty()

    def __enter__(self) -> Bar:
        """The bar itself; nothing is shown yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        with self._lock:
            self._watched = False
            if self._bar is not None:
                self._bar.stop()

    def __call__(self, done: int) -> None:
        """So much is done."""
        if not self._watched:
            return
        with self._lock:
            if self._bar is None:
                if time.monotonic() - self._start < PATIENCE:
                    return
                self._show()
            assert self._bar is not None
            assert self._task is not None
            self._bar.update(self._task, completed=done)

    def counted(self, what: str, done: int) -> None:
        """So many of something are done; what is counted may change."""
        if self._watched:
            with self._lock:
                if self._bar is not None and self._task is not None:
                    self._bar.update(self._task, description=f"{self._title}: {what}")
            self(done)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        total = self._total() if callable(self._total) else self._total
        text = TextColumn("{task.description}", markup=False)
        if self._unit != "bytes":
            columns = (text, MofNCompleteColumn(), TimeElapsedColumn())
        elif total:
            columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        else:
            columns = (text, DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._title, total=total)
        self._bar.start()
