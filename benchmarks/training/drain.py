"""What the uploader takes: memory, CPU, requests, and time until a checkpoint is committed."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path
from statistics import median

from common import GB, Sizes, cpu_seconds, end_uploader, now, peak_mib, s3, table, target, uploader_of, wait_for
from counting import CountingS3
from work import Training


def measure(home: Path, sizes: Sizes) -> None:
    """Print the table."""
    training = Training(sizes.mb, 1)
    log = home / "requests"
    log.touch()
    after, requests, step = [], [], 0
    with s3(CountingS3, log=str(log)) as place:
        run = place.run("drain", home)
        pid = uploader_of(run)
        size = 0
        for step in range(1, 2 * sizes.rounds + 2):
            training.step()
            state = training.state()
            seen = len(log.read_text())
            handle = run.save_checkpoint(state, step=step)
            at = now()
            committed = wait_for(handle.done)
            time.sleep(min(0.5, sizes.idle))  # the head comes after the commit
            if step > 1:  # the first registers the artifact
                after.append(committed - at)
                requests.append(Counter(log.read_text()[seen:].split()))
        size = sum(path.stat().st_size for path in Path(run.dir, "checkpoints").rglob("*.pt"))
        before = cpu_seconds(pid), cpu_seconds(place.server)
        begin, at = step + 1, now()
        for step in range(begin, begin + sizes.saves):
            training.step()
            handle = run.save_checkpoint(training.state(), step=step)
        wait_for(handle.done)
        rate = sizes.saves * size / GB / (now() - at)
        drained = [
            (cpu_seconds(of) - b) / (sizes.saves * size / GB) for of, b in zip((pid, place.server), before, strict=True)
        ]
        peak = peak_mib(pid)
        time.sleep(min(1.0, sizes.idle))
        idle = cpu_seconds(pid)
        time.sleep(sizes.idle)
        idle = (cpu_seconds(pid) - idle) * 3600 / sizes.idle
        run.close()
        end_uploader(run)
        shutil.rmtree(run.dir, ignore_errors=True)
    usual = sorted(requests, key=Counter.total)[len(requests) // 2]
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(usual.items()))
    rows = [
        ["from the return of save_checkpoint to committed, s", f"{median(after):.3f}", ""],
        [f"requests of its commit ({kinds})", f"{usual.total()}", ""],
        [f"the most memory while {sizes.saves} of them drain, MiB", f"{peak:.0f}", target(peak, 200, "≤ 200")],
        ["GB/s from the first save to the last commit, training between", f"{rate:.2f}", ""],
        ["CPU seconds a GB, uploader", f"{drained[0]:.2f}", ""],
        ["CPU seconds a GB, server, for comparison", f"{drained[1]:.2f}", ""],
        ["CPU seconds an hour when idle", f"{idle:.1f}", target(idle, 36, "≤ 36, 1% of a core")],
    ]
    table(f"The uploader, with checkpoints of {sizes.mb} MB, S3 on loopback", ["", "", "target"], rows)
