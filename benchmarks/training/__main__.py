"""What a run costs a training: slow-down while checkpoints drain, each call, the uploader; and what people do today.

``make bench-training`` runs it; the tables are Markdown. Variants alternate in one process, so that a machine that
slows down slows all of them; read ratios. The S3 server is a process of the lowest priority on the same cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

PARTS = ("loop", "calls", "today", "drain")


def main() -> None:
    """Print machine facts and all tables."""
    parser = argparse.ArgumentParser(prog="python benchmarks/training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller checkpoints and fewer rounds: under a minute")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; may be given several times")
    parser.add_argument("--mb", type=int, help="megabytes of a checkpoint")
    parser.add_argument("--saves", type=int, help="checkpoints of a stretch of training")
    parser.add_argument("--seconds", type=float, help="seconds of training between two of them")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--calls", type=int, help="times that each cheap call is made")
    parser.add_argument("--idle", type=float, help="seconds for which an idle uploader is watched")
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="a folder on the disk to measure")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(dir=options.disk, prefix="mandapa-bench-"))
    os.environ["MANDAPA_CACHE"] = str(home / "cache")
    # Processes that are started find compiled modules, as those of users do.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(home / "compiled")
    # What W&B keeps goes with all else; it talks to nobody, neither to us nor to its makers.
    os.environ |= {f"WANDB_{kind}_DIR": str(home / "wandb" / kind.lower()) for kind in ("DATA", "CACHE", "CONFIG")}
    os.environ |= {
        "WANDB_DIR": str(home),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
    }
    try:
        measure(home, options)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def measure(home: Path, options: argparse.Namespace) -> None:
    """All parts, or those that were asked for."""
    import torch
    from common import CORES, Sizes, busy, machine

    import mandapa

    usual = (40, 5, 0.4, 1, 200, 2.0) if options.quick else (200, 10, 0.8, 2, 600, 10.0)
    names = ("mb", "saves", "seconds", "rounds", "calls", "idle")
    given = [getattr(options, name) for name in names]
    sizes = Sizes(*[default if value is None else value for value, default in zip(given, usual, strict=True)])
    print(f"{machine()}, torch {torch.__version__}, mandapa {mandapa.__version__}")
    print(f"Others kept {busy(min(1.0, sizes.idle)):.0%} of the cores busy before,", end=" ", flush=True)
    wanted = options.only or PARTS
    print(f"load {os.getloadavg()[0]:.1f}.")
    if "loop" in wanted:
        import loop

        for threads in (1,) if options.quick or CORES == 1 else (1, 2):
            loop.measure(home, sizes, threads)
    if "calls" in wanted:
        import calls

        calls.measure(home, sizes)
    if "today" in wanted:
        import today

        today.measure(home, sizes)
    if "drain" in wanted:
        import drain

        drain.measure(home, sizes)
    print(f"\nOthers kept {busy(min(1.0, sizes.idle)):.0%} of the cores busy afterwards.")


if __name__ == "__main__":
    main()
