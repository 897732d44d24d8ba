"""Makes the series: ``python benchmarks/series --data FOLDER``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])

from series import Plan, default_data, load, make  # noqa: E402 - found only now


def main() -> None:
    """Make what is not there yet, and say what there is."""
    parser = argparse.ArgumentParser(prog="python benchmarks/series", description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data(), help="the folder to keep them in")
    parser.add_argument("--quick", action="store_true", help="next to nothing, in seconds")
    options = parser.parse_args()
    plan = Plan.quick() if options.quick else Plan()
    make(options.data, plan)
    for series in load(options.data, plan).values():
        print(f"{series.name:10} {series.versions} versions, {series.size / 1e6:.1f} MB: {series.title}")


if __name__ == "__main__":
    main()
