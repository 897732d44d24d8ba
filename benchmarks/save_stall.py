"""How long a training stands still for a checkpoint: milliseconds a GB, of tensors on the CPU.

``make bench`` runs it. In each round, in turns: `Run.save_checkpoint`, ``torch.save`` to the same disk, a copy into
fresh memory, and a bare copy into memory whose pages are there, which nothing that copies can be faster than. Between
rounds the uploader works until it has nothing left to do; the first save, which takes the memory, is told apart.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch

from mandapa import Run
from mandapa.loggers import ObjectStoreLogger


def state_of(mb: int) -> dict[str, dict[str, torch.Tensor]]:
    """As many tensors of a few MB as a model and its optimizer have."""
    count = max(1, mb // 8)
    return {"model": {f"layer.{n}": torch.randn((mb << 20) // count // 4) for n in range(count)}}


def memory(tensors: list[torch.Tensor]) -> torch.Tensor:
    """As much as they take; none of its pages is there yet."""
    return torch.frombuffer(mmap.mmap(-1, sum(tensor.nbytes for tensor in tensors)), dtype=torch.float32)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    state = state_of(options.mb)
    tensors = list(state["model"].values())
    gigabytes = sum(tensor.nbytes for tensor in tensors) / (1 << 30)
    there = memory(tensors).fill_(1)
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        before = time.perf_counter()
        made = work()
        times.setdefault(name, []).append((time.perf_counter() - before) * 1000 / gigabytes)
        del made

    def copy(target: torch.Tensor) -> None:
        at = 0
        for tensor in tensors:
            target[at : at + tensor.numel()].copy_(tensor)
            at += tensor.numel()

    with tempfile.TemporaryDirectory(prefix="mandapa-bench-") as folder:
        path = os.path.join(folder, "state.pt")
        with Run("bench", loggers=[ObjectStoreLogger(f"{folder}/store")], dir=f"{folder}/runs") as run:
            for step in range(options.rounds + 1):
                state["model"]["layer.0"][0] = step
                name = "save_checkpoint" if step else "save_checkpoint, the first"
                timed(name, partial(run.save_checkpoint, state, step=step))
                assert run.flush()
                timed("torch.save", lambda: torch.save(state, path))
                timed("copy into fresh memory", lambda: copy(memory(tensors)))
                timed("copy into memory that is there", lambda: copy(there))
    bare = statistics.median(times["copy into memory that is there"])
    print(f"| {gigabytes:.2f} GiB of tensors, {options.rounds} rounds | ms a GiB: median | worst | of a bare copy |")
    print("|---|---|---|---|")
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"| {name} | {middle:.0f} | {max(found):.0f} | {middle / bare:.2f} |")


if __name__ == "__main__":
    main()
