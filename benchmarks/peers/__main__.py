"""Versions of real training series in mandapa and in other tools; ``make bench-peers`` runs it.

Writes results as JSON, and from all results the tables of the page and the plots. ``--quick`` prints only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:1] = [str(HERE), str(HERE.parent)]


def main() -> None:
    """Make the series, measure, print, write."""
    if sys.platform != "linux":
        raise SystemExit("these benchmarks look into /proc: they need Linux")
    import machine
    import plots
    import report
    import targets
    from measure import Options
    from series import Plan, default_data, make
    from tables import TABLES
    from worker import TOOLS

    parser = argparse.ArgumentParser(prog="python benchmarks/peers", description=__doc__)
    parser.add_argument("--table", choices=TABLES, action="append", help="this one; may be given several times")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="this one; may be given several times")
    parser.add_argument("--quick", action="store_true", help="next to nothing, in a minute; says nothing of speed")
    parser.add_argument("--rounds", type=int, help="of each tool that is not slow")
    parser.add_argument("--data", type=Path, default=default_data(), help="where the series are kept")
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, help="a folder for results, page and plots")
    parser.add_argument("--draw", action="store_true", help="measure nothing: page and plots of what is there")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 3)
    out = options.out or (None if options.quick else HERE.parent)
    if not options.draw:
        make(options.data, Plan.quick() if options.quick else Plan())
        for name in options.table or TABLES:
            disk = "/dev/shm" if name == "folder" and os.path.isdir("/dev/shm") else options.disk
            facts = machine.facts(Path(disk))
            asked = Options(options.data, Path(disk), options.quick, rounds, tuple(options.tool or TOOLS))
            found = TABLES[name].measure(asked)
            result = {"facts": facts, **found}
            print(f"\n{report.markdown(name, result)}", flush=True)
            if out is not None:
                report.write(out / "results", name, result)
    if out is not None:
        results = report.read(out / "results")
        parts = {name: report.markdown(name, result) for name, result in results.items()}
        report.fill(out / "README.md", parts | {"targets": targets.markdown(results)})
        plots.draw(out / "plots", results)


def worker(job: str, *arguments: str) -> None:
    """One measurement, in this process, which prints its result as JSON."""
    if job == "tool":
        import worker

        print(json.dumps(worker.work(*arguments)))
        return
    from series import Plan, load

    series_name, data, quick = arguments
    series = load(Path(data), Plan.quick() if quick else Plan())[series_name]
    import alone
    import anchors

    jobs = {
        "read": lambda: alone.read_rates(series),
        "anchors": lambda: anchors.measure(list(series.paths)),
        "changed": lambda: anchors.changed(list(series.paths)),
    }
    print(json.dumps(jobs[job]()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
