"""Series of versions to store: checkpoints of real trainings, a log that grows, a folder of small files.

``python benchmarks/series --data FOLDER`` makes them, once; `load` finds them. The trainings are of a small GPT on the
text of the standard library of the Python that runs: a series is the same again on the same machine with the same
releases, and alike elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Plan", "Series", "default_data", "load", "make"]

QUICK = "quick"


@dataclass(frozen=True, slots=True)
class Plan:
    """How large a model is trained, and for how long."""

    width: int = 256
    layers: int = 6
    vocabulary: int = 4096
    context: int = 128
    batch: int = 8
    text: int = 100_000_000
    """Bytes of text, of the library and of its tests; more than either has, unless for tests."""
    saves: tuple[int, ...] = (400, 500, 600, 700)
    """Steps after which the training saves; the last one ends it."""
    tunes: tuple[int, ...] = (0, 20, 40, 60, 80, 100)
    """The same for each fine-tuning."""
    log: tuple[int, ...] = tuple(range(300, 501, 50))
    """Megabytes of the log, version by version."""
    files: int = 10_000
    rounds: int = 4
    """Versions of the folder after the first one."""

    @classmethod
    def quick(cls) -> Plan:
        """Next to nothing, for tests: seconds."""
        return cls(32, 2, 512, 32, 4, 500_000, (4, 8), (0, 2, 4), (3, 4), 300, 1)


@dataclass(frozen=True, slots=True)
class Series:
    """Versions of one file or folder."""

    name: str
    title: str
    file: str
    """What the file is called in each version; empty for a folder."""
    versions: int
    size: int
    """Bytes of the last version."""
    advance: Callable[[int, Path], None]
    """Makes the folder that is given hold version ``i``, out of version ``i - 1``, as whoever writes it would."""
    paths: tuple[Path, ...] = ()
    """The files, where each version has one of its own."""


def default_data() -> Path:
    """Where the series are kept when nobody says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mandapa-benchmarks"


def make(data: Path, plan: Plan) -> None:
    """Train and save, unless that was done with this plan before; about six minutes on two idle cores."""
    home = data / (QUICK if plan == Plan.quick() else "series")
    facts = home / "made.json"
    wanted = json.dumps(repr(plan))
    if facts.exists() and facts.read_text() == wanted:
        return
    from . import growing, train

    if home.exists():
        shutil.rmtree(home)
    home.mkdir(parents=True)
    train.make(home, plan)
    growing.make_log(home / "train.log", plan.log[-1])
    facts.write_text(wanted)


def load(data: Path, plan: Plan) -> dict[str, Series]:
    """All series by name, after `make`."""
    from . import growing

    home = data / (QUICK if plan == Plan.quick() else "series")
    found: dict[str, Series] = {}
    for name, (title, suffix) in CHECKPOINTS.items():
        paths = tuple(sorted((home / name).glob(f"*{suffix}")))

        def advance(number: int, dest: Path, paths: tuple[Path, ...] = paths, suffix: str = suffix) -> None:
            shutil.copyfile(paths[number], dest / f"new{suffix}")
            os.replace(dest / f"new{suffix}", dest / f"model{suffix}")

        size = paths[-1].stat().st_size
        found[name] = Series(name, title, f"model{suffix}", len(paths), size, advance, paths)
    log = home / "train.log"
    found["log"] = Series(
        "log",
        f"a log that grows from {plan.log[0]} to {plan.log[-1]} MB",
        "train.log",
        len(plan.log),
        plan.log[-1] * 1_000_000,
        lambda number, dest: growing.grow(log, dest / "train.log", plan.log[number]),
    )
    found["folder"] = Series(
        "folder",
        f"{plan.files:,} files of 10 KiB of which 1% change",
        "",
        1 + plan.rounds,
        plan.files * growing.FILE,
        lambda number, dest: growing.change(dest, plan.files, number),
    )
    return found


CHECKPOINTS = {
    "adam": ("fp32 weights and Adam, 100 steps apart", ".safetensors"),
    "adam-pt": ("fp32 weights and Adam, 100 steps apart, by torch.save", ".pt"),
    "ema": ("EMA(.999) of fp32 weights, 100 steps apart", ".safetensors"),
    "bf16-1e-5": ("bf16 export of an fp32 fine-tuning at 1e-5, 20 steps apart", ".safetensors"),
    "bf16-1e-4": ("bf16 export of an fp32 fine-tuning at 1e-4, 20 steps apart", ".safetensors"),
    "pure-1e-5": ("fine-tuning in bf16 at 1e-5, 20 steps apart", ".safetensors"),
    "pure-1e-4": ("fine-tuning in bf16 at 1e-4, 20 steps apart", ".safetensors"),
    "frozen": ("frozen backbone, low-rank adapters and their Adam", ".safetensors"),
    "frozen-pt": ("frozen backbone, low-rank adapters and their Adam, by torch.save", ".pt"),
}
"""Name of a series of checkpoints -> what it is, and the ending of its files."""
