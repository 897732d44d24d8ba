"""How much a training is slowed down while its checkpoints drain."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import torch
from common import CORES, Place, Sizes, end_uploader, folder, ms, now, s3, table, target
from savers import Composer, installed
from work import Training


@dataclass
class Block:
    """A stretch of training with checkpoints."""

    steps: list[float] = field(default_factory=list)
    cycles: list[tuple[list[float], list[float]]] = field(default_factory=list)
    """From save to save: steps while something waited to be committed, and steps while nothing did."""
    saving: float = 0.0
    total: float = 0.0
    after: float = 0.0
    """Seconds after the last step until all was committed."""


@dataclass
class Hooks:
    """What the loop calls."""

    save: Callable[[int], None] = lambda step: None
    log: Callable[[float, int], None] = lambda loss, step: None
    waits: Callable[[], bool] = lambda: False
    finish: Callable[[], None] = lambda: None


@contextmanager
def nothing(training: Training, home: Path) -> Iterator[Hooks]:
    """Nothing is saved or logged."""
    yield Hooks()


@contextmanager
def torch_save(training: Training, home: Path) -> Iterator[Hooks]:
    """Checkpoints to a file, after which the one before is deleted: as a run does with what is committed."""

    def save(step: int) -> None:
        replace(training, home / "plain.pt")

    yield Hooks(save=save)


@contextmanager
def another_process(training: Training, home: Path) -> Iterator[Hooks]:
    """The least that a drain can cost: boto3 in a process as nice as our uploader, which neither hashes nor syncs."""
    path = home / "plain.pt"
    with s3() as place:
        command = [sys.executable, str(Path(__file__).with_name("upload.py")), place.options["endpoint_url"]]
        uploading = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert uploading.stdin is not None
        assert uploading.stdout is not None
        assert uploading.stdout.readline() == "ready\n"
        sent = 0

        def save(step: int) -> None:
            nonlocal sent
            replace(training, path)
            sent += 1
            copy = home / f"plain-{sent}.pt"
            copy.hardlink_to(path)
            print(copy, file=uploading.stdin, flush=True)

        def finish() -> None:
            uploading.stdin.close()
            uploading.wait()

        yield Hooks(save=save, waits=lambda: any(home.glob("plain-*.pt")), finish=finish)
        uploading.stdout.close()


@contextmanager
def composer(training: Training, home: Path) -> Iterator[Hooks]:
    """Composer's logger that uploads files, with a process of its own, as it is by default."""
    path = home / "plain.pt"
    with s3() as place:
        saver = Composer(home, place)

        def save(step: int) -> None:
            replace(training, path)
            saver.log(path, f"plain-{step}.pt")

        yield Hooks(save=save, log=lambda loss, step: saver.batch_end(), waits=saver.waits, finish=saver.wait)
        saver.close()


def replace(training: Training, path: Path) -> float:
    """Save beside the file that is there, and put the new one in its place; seconds of the saving."""
    new = path.with_suffix(".new")
    at = now()
    torch.save(training.state(), new)
    took = now() - at
    path.unlink(missing_ok=True)  # ext4 would begin to write out what is renamed over another file
    new.rename(path)
    return took


@contextmanager
def to_place(training: Training, home: Path, place: Place) -> Iterator[Hooks]:
    """A run with all loggers."""
    run = place.run("loop", home)
    handles = []

    def save(step: int) -> None:
        handles.append(run.save_checkpoint(training.state(), step=step))

    yield Hooks(
        save=save,
        log=lambda loss, step: run.log_metrics({"train/loss": loss}, step=step),
        waits=lambda: bool(handles) and not handles[-1].done(),
        finish=lambda: None if run.close() else print("not everything was committed"),
    )
    end_uploader(run)
    shutil.rmtree(run.dir, ignore_errors=True)


@contextmanager
def to_folder(training: Training, home: Path) -> Iterator[Hooks]:
    """A run whose versions go to a folder."""
    with folder(home / "store") as place, to_place(training, home, place) as hooks:
        yield hooks
    shutil.rmtree(home / "store")


@contextmanager
def to_s3(training: Training, home: Path) -> Iterator[Hooks]:
    """A run whose versions go to the S3 server."""
    with s3() as place, to_place(training, home, place) as hooks:
        yield hooks


PATIENCE = 75.0
"""Seconds after which no round is begun."""
VARIANTS = {
    "no checkpoints, no logging": nothing,
    "torch.save only": torch_save,
    "torch.save, boto3 in another process": another_process,
    Composer.title: composer,
    "mandapa, a local folder": to_folder,
    "mandapa, S3 on loopback": to_s3,
}


def block(training: Training, hooks: Hooks, saves: int, gap: int) -> Block:
    """Train, with a checkpoint after each ``gap`` steps."""
    found = Block()
    begin = now()
    waited = False
    for number in range(1, saves * gap + 1):
        at = now()
        hooks.log(training.step(), number)
        took = now() - at
        found.steps.append(took)
        waits = hooks.waits()
        if found.cycles and waits == waited:  # a step in which the drain ended is neither
            found.cycles[-1][0 if waits else 1].append(took)
        waited = waits
        if number % gap == 0:
            at = now()
            hooks.save(number)
            found.saving += now() - at
            found.cycles.append(([], []))
            waited = hooks.waits()
    found.total = now() - begin
    at = now()
    hooks.finish()
    found.after = now() - at
    return found


def measure(home: Path, sizes: Sizes, threads: int) -> None:
    """Alternate between all of them, and print the table."""
    training = Training(sizes.mb, threads)
    gap = max(2, round(sizes.seconds / training.seconds()))
    names = [name for name in VARIANTS if name != Composer.title or installed(Composer)]
    blocks: dict[str, list[Block]] = {name: [] for name in names}
    begin = now()
    for number in range(sizes.rounds):
        if number and now() - begin > PATIENCE:
            break  # a machine that others keep busy
        for name in names[number % 2 :] + names[: number % 2]:
            with VARIANTS[name](training, home) as hooks:
                blocks[name].append(block(training, hooks, sizes.saves, gap))
    plain = [block.steps for block in blocks["no checkpoints, no logging"]]
    most = 1.03 if CORES > 2 else 1.10
    rows = []
    for name, found in blocks.items():
        slowed = median(mean(b.steps) / mean(p) for b, p in zip(found, plain, strict=True))
        pairs = [cycle for b in found for cycle in b.cycles if all(cycle)]
        drained = median(median(busy) / median(quiet) for busy, quiet in pairs) if pairs else float("nan")
        share = mean([sum(len(busy) for busy, _ in b.cycles) / len(b.steps) for b in found])
        logged = name.startswith("mandapa")
        drains = logged or "boto3" in name or name == Composer.title
        rows.append(
            [
                name,
                ms(median(mean(b.steps) for b in found)),
                f"{slowed:.3f}",
                f"{drained:.3f}" if pairs else "",
                f"{share:.0%}" if drains else "",
                f"{median(b.saving for b in found):.2f}",
                f"{median(b.total for b in found):.2f}",
                f"{median(b.after for b in found):.2f}" if drains else "",
                target(drained if pairs else slowed, most, f"≤ {most:.2f}") if logged else "",
            ]
        )
    head = [
        "",
        "ms a step",
        "of plain",
        "draining, of not draining",
        "steps draining",
        "s in saves",
        "s in all",
        "s after",
    ]
    table(
        f"Training while {sizes.saves} checkpoints of {sizes.mb} MB drain, a save each {gap} steps, torch with "
        f"{threads} thread{'s' * (threads > 1)}, {len(plain)} rounds",
        [*head, "target"],
        rows,
    )
