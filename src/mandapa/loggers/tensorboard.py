"""Numbers of a run as TensorBoard event files, written without TensorBoard."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import threading
from collections.abc import Mapping
from time import time
from typing import Any

from mandapa.errors import InvalidInputError
from mandapa.run.logger import Logger, RunContext

__all__ = ["TensorboardLogger", "crc32c", "event", "record", "scalar", "text"]

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.([0-9]{1,12})\.", re.ASCII)
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]", re.ASCII)


class TensorboardLogger(Logger):
    """Writes one event file an attempt, on rank 0 only, and hands it over to the run; bytes are only ever appended.

    Metrics appear under their own names, hyperparameters in the Text tab. When the run goes on after it was killed,
    TensorBoard drops what earlier attempts logged at the first step of this one and later. Safe to call from several
    threads.

    Args:
        log_dir: Where event files go, made when it is not there; ``tensorboard`` in the run's directory if None.
        flush_interval: After so many calls of `log_metrics` what is buffered is written and handed over.

    Raises:
        InvalidInputError: ``flush_interval`` is not a number above 0.

    Example:
        >>> logger = TensorboardLogger(flush_interval=20)
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None = None, *, flush_interval: int = 100) -> None:
        if not isinstance(flush_interval, int) or flush_interval < 1:
            raise InvalidInputError(f"flush_interval counts calls of log_metrics: 1 or more, not {flush_interval!r}")
        self._log_dir = None if log_dir is None else os.path.abspath(os.fspath(log_dir))
        self._flush_interval = flush_interval
        self._lock = threading.RLock()  # held for the buffer and the file, never while the run is called
        self._run: RunContext | None = None
        self._folder = self._path = ""
        self._fd = -1
        self._buffer = bytearray()
        self._size = self._handed = self._calls = 0
        self._hparams = b""
        self._attempt = 1
        self._purge = False  # whether the next metrics begin with the marker of a restart

    def open(self, run: RunContext) -> None:
        """Makes the folder; the file comes with the first bytes."""
        if run.rank != 0:
            return
        self._folder = self._log_dir or os.path.join(run.dir, "tensorboard")
        os.makedirs(self._folder, exist_ok=True)
        self._attempt = run.attempt
        self._purge = run.attempt > 1
        self._run = run

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One event with all of them; values are kept as 32-bit floats, too large ones as infinities."""
        if self._run is None:
            return
        values = b"".join([scalar(name, value) for name, value in metrics.items()])
        with self._lock:
            if self._purge:
                self._purge = False
                self._add(step, _SESSION_START)
                if self._hparams and step <= 0:  # the marker covers those of this attempt too
                    self._add(0, self._hparams)
            if values:
                self._add(step, _field(5, values))
            self._calls += 1
            due = self._calls >= self._flush_interval
        if due:
            self.flush()

    def log_hparams(self, hparams: Mapping[str, Any]) -> None:
        """A text of that name: JSON, indented, which Markdown shows as it is."""
        if self._run is None:
            return
        lines = json.dumps(hparams, indent=2, ensure_ascii=False).split("\n")
        with self._lock:
            self._hparams = _field(5, text("hparams", "".join([f"    {line}\n" for line in lines])))
            self._add(0, self._hparams)

    def flush(self) -> None:
        """Writes what is buffered, and hands the file over if it grew."""
        run = self._run
        if run is None:
            return
        with self._lock:
            self._calls = 0
            self._write()
            size = self._size
        if size > self._handed:
            run.log_asset(self._path, at=f"tensorboard/{os.path.basename(self._path)}", take="grow")
            self._handed = size

    def close(self) -> None:
        """Hands over the rest and closes the file."""
        try:
            self.flush()
        finally:
            with self._lock:
                self._run = None
                if self._fd >= 0:
                    os.close(self._fd)
                    self._fd = -1

    def _add(self, step: int, content: bytes) -> None:
        now = time()
        if not self._buffer and self._fd < 0:
            self._buffer += record(event(now, 0, _FILE_VERSION))
            if self._attempt == 1:  # TensorBoard takes only the second marker that it meets for a restart
                self._buffer += record(event(now, 0, _SESSION_START))
        self._buffer += record(event(now, step, content))

    def _write(self) -> None:
        if self._buffer and self._fd < 0:
            self._create()
        while self._buffer:  # what was written leaves the buffer, so that a retry after an error goes on exactly there
            written = os.write(self._fd, self._buffer)
            del self._buffer[:written]
            self._size += written

    def _create(self) -> None:
        # TensorBoard reads files in the order of their names: a new one has to follow those that are there, though
        # the clock may say otherwise.
        others = [int(match[1]) for match in map(_EVENT_FILE.match, os.listdir(self._folder)) if match]
        seconds = max([int(time()), *[other + 1 for other in others]])
        host = _NOT_IN_NAMES.sub("-", socket.gethostname())[:64]
        while True:
            name = f"events.out.tfevents.{seconds:010}.{host}.{os.getpid()}.{self._attempt}"
            path = os.path.join(self._folder, name)
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            except FileExistsError:
                seconds += 1
            else:
                self._path = path
                return


# -- records: TFRecord framing -----------------------------------------------------------------------------------------


def record(data: bytes) -> bytes:
    """``data`` framed: its length, the length's checksum, itself, its checksum.

    Source: tensorflow/core/lib/io/record_writer.h
    """
    length = len(data).to_bytes(8, "little")
    return b"".join([length, _masked(length), data, _masked(data)])


def crc32c(data: bytes) -> int:
    """CRC-32 with the Castagnoli polynomial; some 10 MB/s.

    Source: RFC 3720 section 12.1.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _make_table() -> tuple[int, ...]:
    table = list(range(256))
    for _ in range(8):
        table = [(value >> 1) ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return tuple(table)


_TABLE = _make_table()


def _masked(data: bytes) -> bytes:
    # Rotated and moved, since a checksum of bytes that hold their own checksum is a constant.
    crc = crc32c(data)
    return ((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


# -- events: protocol buffers ------------------------------------------------------------------------------------------
# Source: tensorflow/core/util/event.proto, framework/summary.proto, framework/tensor.proto; the numbers are theirs.


def event(wall_time: float, step: int, content: bytes) -> bytes:
    """An ``Event`` at that time in seconds since 1970; ``content`` is the one of its other fields that it has."""
    at = b"\x10" + _varint(step & 0xFFFF_FFFF_FFFF_FFFF) if step else b""
    return b"".join([b"\x09", struct.pack("<d", wall_time), at, content])


def scalar(name: str, value: float) -> bytes:
    """A number as a value of a ``Summary``."""
    value = float(value)
    try:
        number = struct.pack("<f", value)
    except OverflowError:
        number = struct.pack("<f", float("inf") if value > 0 else float("-inf"))
    return _field(1, _field(1, _utf8(name)) + b"\x15" + number)


def text(name: str, markdown: str) -> bytes:
    """A text as a value of a ``Summary``: a tensor of one string, of the plugin ``text``."""
    tensor = b"\x08\x07" + _field(2, b"") + _field(8, _utf8(markdown))  # DT_STRING, no dimensions
    metadata = _field(1, _field(1, b"text")) + b"\x20\x02"  # DATA_CLASS_TENSOR
    return _field(1, _field(1, _utf8(name)) + _field(8, tensor) + _field(9, metadata))


def _field(number: int, data: bytes) -> bytes:
    return b"".join([bytes([number << 3 | 2]), _varint(len(data)), data])


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes([value])
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _utf8(value: str) -> bytes:
    return value.encode("utf-8", "backslashreplace")


_FILE_VERSION = _field(3, b"brain.Event:2")
_SESSION_START = _field(7, b"\x08\x01")
