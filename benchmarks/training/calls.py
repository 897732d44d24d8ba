"""How long each call of a run keeps the training program, while nothing drains and while checkpoints do."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import GB, MB, Place, Sizes, end_uploader, ms, now, quantile, s3, table, target, warm
from loop import replace
from work import Training

from mandapa import Run

COPY = "a copy of 10 MB, no run"
ORDER = (
    "log_metrics of 5",
    "log_url",
    "log_bytes of 1 KB",
    "log_asset of 10 KB",
    "a copy of 10 KB, no run",
    "log_asset of 10 MB",
    COPY,
    "save_checkpoint, a GB",
    "torch.save, a GB, no run",
    "flush of 1 KB",
    "Run(...)",
    "close",
    "import mandapa",
)


class Calls:
    """Makes calls and keeps what each took."""

    def __init__(self) -> None:
        self.took: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        """Make one call."""
        at = now()
        found = call()
        self.took.setdefault(name, []).append(now() - at)
        return found


def round_of_calls(calls: Calls, run: Run, home: Path, number: int) -> None:
    """Some calls of each cheap kind; the taking of bytes without any run is timed beside them."""
    small, large = home / "small", home / "large"
    for each in range(10):
        calls.time("a copy of 10 KB, no run", lambda: shutil.copyfile(small, home / "copies" / f"{number}-{each}"))  # noqa: B023
        step = 10 * number + each
        calls.time("log_metrics of 5", lambda: run.log_metrics({f"train/m{i}": i / 3 for i in range(5)}, step=step))  # noqa: B023
        calls.time("log_asset of 10 KB", lambda: run.log_asset(small, f"assets/small-{step}"))  # noqa: B023
        calls.time("log_bytes of 1 KB", lambda: run.log_bytes(f"bytes/{step}", bytes(1000)))  # noqa: B023
        calls.time("log_url", lambda: run.log_url(f"urls/{step}", f"https://example.org/{step}", size=step))  # noqa: B023
    calls.time(COPY, lambda: shutil.copyfile(large, home / "copies" / "large"))
    (home / "copies" / "large").unlink()
    calls.time("log_asset of 10 MB", lambda: run.log_asset(large, f"assets/large-{number}"))


def measure(home: Path, sizes: Sizes) -> None:
    """Print the table."""
    training = Training(sizes.mb, 1)
    (home / "small").write_bytes(bytes(range(250)) * 40)
    (home / "large").write_bytes(torch.randint(0, 256, (10 * MB,), dtype=torch.uint8).numpy().tobytes())
    (home / "copies").mkdir()
    quiet, busy = Calls(), Calls()
    with s3() as place:
        once(home, place)  # whatever is loaded at first
        for number in range(2 * sizes.rounds):
            run = quiet.time("Run(...)", lambda: place.run(f"opened-{number}", home))  # noqa: B023
            run.log_bytes("note", b"x")
            quiet.time("close", run.close)
            end_uploader(run)
    rounds = max(1, sizes.calls // 10)
    with s3() as place:
        run = place.run("quiet", home)
        for number in range(rounds):
            round_of_calls(quiet, run, home, number)
        for step in range(2 * sizes.rounds):
            training.step()
            state = training.state()
            time.sleep(min(1.5, sizes.idle))  # what was committed is still brought to the disk, and let go
            warm(home, sizes.mb)
            handle = quiet.time("save_checkpoint", lambda: run.save_checkpoint(state, step=step))  # noqa: B023
            handle.wait()
            run.log_bytes(f"flushed/{step}", b"x")
            quiet.time("flush of 1 KB", run.flush)
        run.close()
        end_uploader(run)
    with s3() as place:
        run = place.run("busy", home)
        handle = None
        for number in range(rounds):
            if handle is None or handle.done():
                training.step()
                state = training.state()
                warm(home, sizes.mb)
                handle = busy.time("save_checkpoint", lambda: run.save_checkpoint(state, step=number))  # noqa: B023
            round_of_calls(busy, run, home, number)
        while handle is not None and not handle.done():
            round_of_calls(busy, run, home, number := number + 1)
        busy.time("close", run.close)
        end_uploader(run)
    plain = []
    for number in range(-1, 2 * sizes.rounds):
        warm(home, sizes.mb)
        took = replace(training, home / "plain.pt")
        if number >= 0:  # before, there is no file that one puts another in the place of
            plain.append(took)
    size = (home / "plain.pt").stat().st_size / GB
    for kind in (quiet, busy):
        kind.took["save_checkpoint, a GB"] = [took / size for took in kind.took.pop("save_checkpoint")]
    quiet.took["torch.save, a GB, no run"] = [took / size for took in plain]
    quiet.took["import mandapa"] = imports()
    show(quiet, busy, sizes)


def once(home: Path, place: Place) -> None:
    """A run that does a little of everything."""
    run = place.run("once", home)
    run.log_asset(home / "small")
    run.save_checkpoint({"a": torch.zeros(4)}, step=1)
    run.close()
    end_uploader(run)


def imports() -> list[float]:
    """Seconds of ``import mandapa`` in a fresh interpreter."""
    code = "import time; a = time.perf_counter(); import mandapa; print(time.perf_counter() - a)"
    return [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]


def show(quiet: Calls, busy: Calls, sizes: Sizes) -> None:
    """Print what was found."""
    rows = []
    for name in ORDER:
        cells = []
        for calls in (quiet, busy):
            took = calls.took.get(name, [])
            cells += [ms(median(took)), ms(quantile(took, 0.99)), ms(max(took))] if took else ["", "", ""]
        both = [*quiet.took.get(name, []), *busy.took.get(name, [])]
        copies = quiet.took[COPY] + busy.took[COPY]
        rows.append([name, str(len(both)), *cells, verdict(name, both, copies)])
    table(
        f"Milliseconds of each call: nothing drains | checkpoints of {sizes.mb} MB drain",
        ["", "calls", "p50", "p99", "max", "p50", "p99", "max", "target"],
        rows,
    )


def verdict(name: str, took: list[float], copies: list[float]) -> str:
    """Whether a budget is kept, where there is one."""
    if name in ("log_asset of 10 KB", "log_bytes of 1 KB", "log_url", "log_metrics of 5"):
        return target(quantile(took, 0.99), 0.010, "p99 ≤ 10")
    if name == "log_asset of 10 MB":
        return target(quantile(took, 0.99) - quantile(copies, 0.99), 0.010, "p99 ≤ 10 besides the copy")
    if name == "save_checkpoint, a GB":
        return target(median(took), 0.080, "p50 ≤ 80")
    if name == "Run(...)":
        return target(median(took), 0.5, "p50 ≤ 500")
    return target(median(took), 0.1, "p50 ≤ 100") if name == "import mandapa" else ""
