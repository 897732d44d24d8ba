"""A checkpoint as people save it today, and by a run: how long it holds training up, and when it is in the store."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from common import GB, MB, Sizes, cpu_seconds, ms, now, peak_mib, quantile, s3, table, warm
from savers import SAVERS, Mandapa, Saver, TorchSave, installed
from work import Training

GROUP = 10
"""Small files that one saver is handed before the next one's turn."""


@dataclass
class Found:
    """What was measured of a saver; one value a checkpoint, but for ``calls``."""

    held: list[float] = field(default_factory=list)
    safe: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    """CPU seconds of the training process."""
    others: list[float] = field(default_factory=list)
    """CPU seconds of the saver's own processes."""
    calls: list[float] = field(default_factory=list)
    peak: float = 0.0


def measure(home: Path, sizes: Sizes) -> None:
    """Print the table."""
    training = Training(sizes.mb, 1)
    small = home / "small-file"
    small.write_bytes(torch.randint(0, 256, (10_000,), dtype=torch.uint8).numpy().tobytes())
    found: dict[type[Saver], Found] = {saver: Found() for saver in SAVERS if installed(saver)}
    with s3() as place, ExitStack() as stack:
        savers = []
        for saver in found:
            savers.append(saver(home, place))
            stack.callback(savers[-1].close)
        for number in range(-1, 2 * sizes.rounds):  # the first is not counted
            for saver in turns(savers, number):
                training.step()
                warm(home, sizes.mb)
                checkpoint(saver, training, number + 1, Found() if number < 0 else found[type(saver)])
        for number in range(-1, max(1, sizes.calls // 3 // GROUP)):
            for saver in turns(savers, number):
                files(saver, small, number + 1, Found() if number < 0 else found[type(saver)])
        for saver in savers:
            found[type(saver)].peak = sum(peak_mib(pid) for pid in saver.processes())
    show(found, sizes)
    for saver in SAVERS:
        if not installed(saver):
            print(f"Left out, since {saver.needs} is not installed: {saver.title}.")


def turns(savers: list[Saver], number: int) -> list[Saver]:
    """Each time another one begins."""
    first = number % len(savers)
    return savers[first:] + savers[:first]


def checkpoint(saver: Saver, training: Training, step: int, found: Found) -> None:
    """Save one, and wait until it is safe."""
    saver.begin()
    own = saver.processes()
    before = [cpu_seconds(pid) for pid in own]
    cpu = time.process_time()
    at = now()
    saver.save(training, step)
    found.held.append(now() - at)
    waiting = time.thread_time()
    saver.wait()
    found.safe.append(now() - at)
    found.training.append(time.process_time() - cpu - (time.thread_time() - waiting))
    time.sleep(0.2)  # what comes after that, such as mandapa's head
    found.others.append(sum(cpu_seconds(pid) - b for pid, b in zip(own, before, strict=True)))
    saver.end(step)


def files(saver: Saver, small: Path, number: int, found: Found) -> None:
    """Hand over small files, and wait until they are safe: nothing but their own drain is under way."""
    saver.begin()
    for each in range(GROUP):
        name = f"{type(saver).__name__}-{number}-{each}"
        at = now()
        saver.log(small, name)
        found.calls.append(now() - at)
    saver.wait()
    saver.end(number)


def show(found: dict[type[Saver], Found], sizes: Sizes) -> None:
    """Print what was found."""
    base = found[TorchSave].held
    size = sizes.mb * MB / GB
    rows = []
    for saver, of in found.items():
        ratio = median(held / b for held, b in zip(of.held, base, strict=True))
        safe = f"{median(of.safe):.3f}"
        rows.append(
            [
                saver.title,
                f"{median(of.held):.3f}",
                f"{ratio:.2f}",
                safe if saver.stores else f"never; on this disk {safe}",
                f"{ms(median(of.calls))} / {ms(quantile(of.calls, 0.99))}",
                f"{median(of.training) / size:.2f}",
                f"{median(of.others) / size:.2f}" if of.peak else "",
                f"{of.peak:.0f}" if of.peak else "",
                f"≤ 1.1 of torch.save: {'met' if ratio <= 1.1 else 'not met'}" if saver is Mandapa else "",
            ]
        )
    head = ["", "s that training is held up", "of torch.save", "s until it is in the store"]
    more = ["ms to hand over 10 KB, p50 / p99", "CPU s a GB, training", "own processes", "their memory, MiB", "target"]
    table(f"A checkpoint of {sizes.mb} MB, to S3 on loopback", [*head, *more], rows)
