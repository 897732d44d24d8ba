"""The proof for as long as you like: ``python tests/proof/soak.py --seconds 3600`` goes on with new seeds for an hour.

Histories of the model, seeds of the simulation, crashes at every call, processes that are killed: in turn, on as many
processes as there are cores. A broken promise is printed with what repeats it, and does not end the hour. At the end
come the figures, and exit code 1 if there was any.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import TypeAlias

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

Found: TypeAlias = tuple[Counter[str], list[str], int]
"""What was counted, what was broken, and the most memory that the process had, in KiB."""

HISTORIES, SEEDS, KILLS = 500, 10, 50
"""Of the model, of the simulation, and SIGKILLs in one task: each takes seconds."""


def _memory() -> int:
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def model(first: int) -> Found:
    """Histories of the model."""
    from model.world import run

    counts, broken = Counter[str](), list[str]()
    for seed in range(first * HISTORIES, (first + 1) * HISTORIES):
        outcome = run(seed)
        counts["seeds of the model"] += 1
        counts["commits acknowledged in the model"] += outcome.counts["acknowledged"]
        if outcome.violations or outcome.stuck:
            broken.append(f"model, seed {seed}: {outcome.violations or 'no end'}")
    return counts, broken, _memory()


def simulation(first: int) -> Found:
    """Seeds of the real code under the scheduler."""
    from prooflib.truth import check
    from prooflib.world import World

    counts, broken = Counter[str](), list[str]()
    for seed in range(first * SEEDS, (first + 1) * SEEDS):
        world = World(seed)
        world.populate()
        try:
            world.run()
            check(world)
        except BaseException as error:
            broken.append(f"simulation, seed {seed}: {error!r}")
        counts["seeds of the simulation"] += 1
        counts["commits acknowledged in the simulation"] += sum(one.version is not None for one in world.intents)
        counts["turns of the simulation"] += world.scheduler.turns
        counts.update({f"  {what}": count for what, count in world.counts.items()})
    return counts, broken, _memory()


def crashes(first: int) -> Found:
    """One command with other dice, with each fate at every call."""
    from prooflib.crashpoints import COMMANDS, FATES, Rehearsal

    counts, broken = Counter[str](), list[str]()
    command, seed = COMMANDS[first % len(COMMANDS)], 1000 * (first // len(COMMANDS))
    rehearsal = Rehearsal(command, seed)
    for fate, at in itertools.product(FATES, range(1, rehearsal.calls + 1)):
        try:
            rehearsal.play(fate, at)
        except BaseException as error:
            broken.append(f"crash, {command.name} with seed {seed}, {fate} at call {at}: {error!r}")
        counts["kill points"] += 1
    return counts, broken, _memory()


def kills(first: int) -> Found:
    """Real processes and SIGKILL."""
    counts, broken = Counter[str](), list[str]()
    folder = tempfile.mkdtemp(prefix="mandapa-kills-")
    done = subprocess.run(
        [sys.executable, "-m", "prooflib.killing", folder, str(first), str(KILLS)],
        env={**os.environ, "PYTHONPATH": str(HERE), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode or done.stderr:
        broken.append(f"SIGKILLs, seed {first}, left in {folder}: {done.stderr[-3000:]}")
    else:
        told = json.loads(done.stdout)
        counts["SIGKILLs"] += told.pop("SIGKILLs")
        counts["commits acknowledged beside SIGKILLs"] += told.pop("made", 0)
        shutil.rmtree(folder)
    return counts, broken, _memory()


SHARES: list[tuple[Callable[[int], Found], int]] = [(simulation, 6), (model, 3), (crashes, 4), (kills, 1)]
"""How often each comes in a round."""


def tasks(first: int) -> Iterator[tuple[Callable[[int], Found], int]]:
    """For ever; each kind of work with numbers of its own."""
    numbers = {work: itertools.count(first) for work, _ in SHARES}
    while True:
        for work, share in SHARES:
            for _ in range(share):
                yield work, next(numbers[work])


def main() -> int:
    """Go on until the time is over, then finish what has begun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("MANDAPA_SOAK_SECONDS", 3600)))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--first", type=int, default=int(time.time()) // 60, help="number of the first task")
    asked = parser.parse_args()
    counts, broken, memory = Counter[str](), list[str](), 0
    start = told = time.monotonic()
    work = tasks(asked.first)
    print(f"{asked.seconds:.0f} s on {asked.processes} processes, from --first {asked.first}", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.processes, mp_context=context) as pool:
        running: set[Future[Found]] = set()
        while running or time.monotonic() - start < asked.seconds:
            while len(running) < asked.processes and time.monotonic() - start < asked.seconds:
                running.add(pool.submit(*next(work)))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for task in finished:
                found, wrong, most = task.result()
                counts.update(found)
                memory = max(memory, most)
                for one in wrong:
                    broken.append(one)
                    print(f"BROKEN: {one}", flush=True)
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"{told - start:6.0f} s: {summary(counts, broken, memory)}", flush=True)
    print(f"after {time.monotonic() - start:.0f} s:")
    for what, count in counts.items():
        print(f"{count:14,}  {what}")
    print(f"{memory // 1024:14,}  MiB of memory at most, in one process")
    print(f"{len(broken):14,}  violations")
    return bool(broken)


def summary(counts: Counter[str], broken: list[str], memory: int) -> str:
    """The figures so far in one line."""
    main_ones = ("seeds of the model", "seeds of the simulation", "kill points", "SIGKILLs")
    figures = ", ".join(f"{counts[what]:,} {what}" for what in main_ones)
    return f"{figures}, {len(broken)} violations, {memory // 1024} MiB"


if __name__ == "__main__":
    sys.exit(main())
