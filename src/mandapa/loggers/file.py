"""What a run says, as text: metrics, hyperparameters, and what the program prints."""

from __future__ import annotations

import contextlib
import json
import os
import string
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from time import gmtime, strftime
from typing import Any

from mandapa.errors import InvalidInputError
from mandapa.format.strict import check_path
from mandapa.run.logger import Logger, RunContext

__all__ = ["FileLogger"]

_LONGEST = 1 << 16  # characters of a line that does not end; what is longer is broken


class FileLogger(Logger):
    """Writes one text file a rank and an attempt in the run's directory; nothing in it is ever changed.

    ::

        2026-11-24T22:01:02Z step 20  train/loss: 0.125  lr: 0.001
        hparams  optimizer.lr: 0.001
        [stdout] what was printed
        [stderr] and what was warned of
        [failed] the traceback that ended the attempt

    Times are UTC, hyperparameters JSON. Each line is in the file when the call returns, so it outlives the process. A
    printed line is written when it ends; of one that is drawn again and again, as progress bars are, the last state.
    What does not go through `sys.stdout` and `sys.stderr` (other processes, C libraries, ``sys.stdout.buffer``) is not
    captured, and neither is what a forked child prints. When the file cannot be written any more (disk full) a
    `RuntimeWarning` says so, once, and printing goes on. Safe to call, and to print, from several threads.

    Args:
        filename: Relative to the run's directory; ``{run_name}``, ``{rank}``, ``{world_size}`` and ``{attempt}`` are
            filled in. Without ``{attempt}`` later attempts get ``.attempt-2`` before the suffix.
        capture_stdout: Keep what is written to `sys.stdout`, which gets it as before.
        capture_stderr: The same of `sys.stderr`.
        flush_interval: After so many calls of `log_metrics` the file is handed over.

    Raises:
        InvalidInputError: ``flush_interval`` is not a number above 0.

    Example:
        >>> logger = FileLogger("logs/rank{rank}.txt", capture_stderr=False)
    """

    def __init__(
        self,
        filename: str = "logs-rank{rank}.txt",
        *,
        capture_stdout: bool = True,
        capture_stderr: bool = True,
        flush_interval: int = 100,
    ) -> None:
        if not isinstance(flush_interval, int) or flush_interval < 1:
            raise InvalidInputError(f"flush_interval counts calls of log_metrics: 1 or more, not {flush_interval!r}")
        self._filename = filename
        self._names = ["stdout"] * capture_stdout + ["stderr"] * capture_stderr
        self._flush_interval = flush_interval
        self._run: RunContext | None = None
        self._log: _TextLog | None = None
        self._at = ""
        self._handed = self._calls = 0
        self._tees: list[_Tee] = []

    def open(self, run: RunContext) -> None:
        """Opens the file, at its end when it is there, and begins to capture.

        Raises:
            InvalidInputError: The file's name can never work, or another rank writes the same; the message says why.
            OSError: It cannot be opened.
        """
        self._at = _file_name(self._filename, run)
        self._log = _TextLog(os.path.join(run.dir, self._at))
        self._run = run
        for name in self._names:
            if getattr(sys, name) is not None:  # a program without a console has none
                self._tees.append(_Tee(name, self._log))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One line with all of them, each number as exactly as `repr` has it."""
        if self._log is None:
            return
        if metrics:
            values = "".join([f"  {name}: {float(value)!r}" for name, value in metrics.items()])
            self._write(f"{strftime('%Y-%m-%dT%H:%M:%SZ', gmtime())} step {step}{values}\n")
        self._calls += 1
        if self._calls >= self._flush_interval:
            self.flush()

    def log_hparams(self, hparams: Mapping[str, Any]) -> None:
        """One line each."""
        self._write("".join([f"hparams  {name}: {value}\n" for name, value in _dotted(hparams)]))

    def log_failure(self, text: str) -> None:
        """The traceback, line by line."""
        self._write("".join([f"[failed] {line}\n" for line in text.splitlines()]))

    def flush(self) -> None:
        """Hands the file over if it grew."""
        self._calls = 0
        if self._run is None or self._log is None:
            return
        size = self._log.size()
        if size > self._handed:
            self._run.log_asset(self._log.path, at=self._at, take="grow")
            self._handed = size

    def close(self) -> None:
        """Ends the capture, writes lines that have not ended, hands over the rest and closes the file."""
        rests = [self._tees.pop().end() for _ in range(len(self._tees))]
        try:
            self._write("".join(rests))
            self.flush()
        finally:
            if self._log is not None:
                self._log.close()
            self._run = self._log = None

    def _write(self, lines: str) -> None:
        if self._log is not None:
            with self._log.appending():
                self._log.write(lines)


class _TextLog:
    """A file that text is appended to, by any thread, until its disk is full."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.RLock()  # re-entered by signal handlers that print
        self._failed = False
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = self.size()
        if size and os.pread(self._fd, 1, size - 1) != b"\n":  # a line was torn when the machine went down
            with self.appending():
                self.write("\n")

    @contextlib.contextmanager
    def appending(self) -> Iterator[None]:
        """Holds the lock; a failure of `write` inside ends the log, and is told of when the lock is free again."""
        try:
            with self._lock:
                yield
        except OSError as error:
            warnings.warn(
                f"{self.path} cannot be written ({error.strerror}): this log ends here, training goes on",
                category=RuntimeWarning,
                stacklevel=3,
            )

    def write(self, lines: str) -> None:
        data = lines.encode("utf-8", "backslashreplace")
        try:
            while data and self._fd is not None and not self._failed:
                data = data[os.write(self._fd, data) :]
        except OSError:
            self._failed = True
            raise

    def size(self) -> int:
        with self._lock:
            return 0 if self._fd is None else os.fstat(self._fd).st_size

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


class _Tee:
    """Stands in for a stream of `sys`: the stream gets everything first and as before, then the log, line by line."""

    def __init__(self, name: str, log: _TextLog) -> None:
        self._name = name
        self._stream = getattr(sys, name)
        self._log: _TextLog | None = log
        self._pid = os.getpid()
        self._rest = ""  # of a line that has not ended
        setattr(sys, name, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_stream"), name)

    def write(self, text: str) -> int:
        count: int = self._stream.write(text)
        log = self._log
        # A forked child keeps out: a thread that it does not have may hold the lock, and the file is its parent's.
        if log is not None and os.getpid() == self._pid and isinstance(text, str):
            # Told of is enough: where warnings are errors, print() goes on all the same.
            with contextlib.suppress(RuntimeWarning), log.appending():
                self._take(log, text)
        return count

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def end(self) -> str:
        """Lets go: from now on this is only another name of the stream. Returns the line that has not ended."""
        self._log = None
        if getattr(sys, self._name) is self:
            setattr(sys, self._name, self.under())
        rest = _last_state(self._rest)
        return f"[{self._name}] {rest}\n" if rest else ""

    def under(self) -> Any:
        """The stream, or the one under it when it is such a stand-in that has let go."""
        stream = self._stream
        return stream.under() if isinstance(stream, _Tee) and stream.let_go else stream

    @property
    def let_go(self) -> bool:
        return self._log is None

    def _take(self, log: _TextLog, text: str) -> None:
        *lines, rest = (self._rest + text).split("\n")
        if "\r" in rest:  # only its last state counts; a return at its end says that something else may follow
            rest = _last_state(rest) + "\r" * rest.endswith("\r")
        if len(rest) > _LONGEST:
            lines.append(rest)
            rest = ""
        self._rest = rest
        if lines:
            log.write("".join([f"[{self._name}] {_last_state(line)}\n" for line in lines]))


def _last_state(line: str) -> str:
    """What a line shows at last, when carriage returns began it again."""
    return line.rstrip("\r").rpartition("\r")[2]


def _file_name(filename: str, run: RunContext) -> str:
    """The file's path relative to the run's directory."""
    values = {"run_name": run.name, "rank": run.rank, "world_size": run.world_size, "attempt": run.attempt}
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(filename) if field is not None}
        if unknown := sorted(fields - values.keys()):
            raise InvalidInputError(
                f"the file name {filename!r} has the placeholder {{{unknown[0]}}}: there are {{run_name}}, {{rank}}, "
                "{world_size} and {attempt}"
            )
        name = check_path(filename.format(**values))
    except InvalidInputError:
        raise
    except (ValueError, LookupError, AttributeError) as error:
        raise InvalidInputError(f"the file name {filename!r} cannot be filled in: {error}") from None
    if name == ".run" or name.startswith(".run/"):
        raise InvalidInputError(f"the file name {name!r}: the folder '.run' is the run's own")
    if run.rank > 0 and run.world_size > 1 and "rank" not in fields:
        raise InvalidInputError(f"every rank would write {name!r}: add {{rank}} to the file name {filename!r}")
    if run.attempt > 1 and "attempt" not in fields:
        stem, suffix = os.path.splitext(name)
        name = check_path(f"{stem}.attempt-{run.attempt}{suffix}")
    return name


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)
