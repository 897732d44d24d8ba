"""A bar on stderr for work that takes longer than a second; nothing when nobody watches."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Bar"]

PATIENCE = 1.0
"""Seconds before a bar appears."""


class Bar:
    """Takes numbers of bytes that were done since the last call, from any thread.

    Args:
        title: What is being done.
        total: All there is to do, if that is known.
        unit: ``bytes``, or what is counted.
    """

    def __init__(self, title: str, total: int | None = None, unit: str = "bytes") -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._done = 0
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

    def __call__(self, more: int) -> None:
        """So many more are done."""
        with self._lock:
            self._done += more
            self._update(self._title)

    def counted(self, what: str, done: int) -> None:
        """So many of something are done; what is counted may change from call to call."""
        with self._lock:
            self._done = done
            self._update(f"{self._title}: {what}")

    def _update(self, title: str) -> None:
        if not self._watched or (self._bar is None and time.monotonic() - self._start < PATIENCE):
            return
        if self._bar is None or self._task is None:
            self._show()
        assert self._bar is not None
        assert self._task is not None
        self._bar.update(self._task, completed=self._done, description=title)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns: tuple[ProgressColumn, ...]
        text = TextColumn("{task.description}", markup=False)
        if self._unit != "bytes":
            columns = (text, TextColumn("{task.completed:,}"), TimeElapsedColumn())
        elif self._total:
            columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        else:
            columns = (text, DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._title, total=self._total)
        self._bar.start()
