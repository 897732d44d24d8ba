"""What mandapa wants to reach, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Results = dict[str, dict[str, Any]]

ENOUGH = 0.85
"""Of what XOR leaves: an integer delta is to be 15% smaller at least."""


class Target(NamedTuple):
    """One of them; ``figure`` raises `KeyError` where nothing was measured."""

    work: str
    most: float
    figure: Callable[[Results], float]
    least: bool = False
    """The figure is to be at least that, instead of at most."""


def row(results: Results, table: str, key: str, value: str) -> dict[str, Any]:
    """The first row of a table in which ``key`` is ``value``."""
    found = [row for row in results[table]["rows"] if row.get(key) == value]
    if not found:
        raise KeyError(value)
    return found[0]


def ours(table: str, what: str, tool: str = "mandapa") -> Callable[[Results], float]:
    """A figure of ours beside the peers."""
    return lambda results: row(results, table, "tool", tool)[what]


def left(series: str, beside: str = "") -> Callable[[Results], float]:
    """What dense leaves of a later version: of raw, or of what another way leaves."""

    def figure(results: Results) -> float:
        found = row(results, "codecs", "series", series)
        return found["mandapa, dense"] / (found[beside] if beside else 1)

    return figure


def rate(series: str) -> Callable[[Results], float]:
    """GB a second and core at which dense comes back."""

    def figure(results: Results) -> float:
        rows = [row for row in results["decode"]["rows"] if row["series"] == series and "dense" in row["what"]]
        return rows[0]["decode"] / 1e9

    return figure


def beyond_changed(results: Results) -> float:
    """Bytes that a version adds, without 200 for each tensor, of those that changed."""
    found = results["frozen"]
    return (row(results, "frozen", "tool", "mandapa, raw")["added"] - 200 * found["tensors"]) / found["changed"]


def over_link(series: str) -> Callable[[Results], float]:
    """How fast the default codec is over the slow link, of codec raw."""

    def figure(results: Results) -> float:
        seconds = {row["codec"]: row["seconds"] for row in results["link"]["rows"] if row["series"] == series}
        return seconds["raw"] / seconds["auto"]

    return figure


def sent(series: str) -> Callable[[Results], float]:
    """What the default codec sends over the slow link, of raw."""

    def figure(results: Results) -> float:
        rows = [row for row in results["link"]["rows"] if (row["series"], row["codec"]) == (series, "auto")]
        return rows[0]["sent"]

    return figure


XOR = "XOR, planes, zstd"
TARGETS = (
    Target("fp32 and Adam, 100 steps apart, dense: added, of raw", 0.78, ours("adam", "of_raw", "mandapa, dense")),
    Target("an EMA, 100 steps apart, dense: of raw", 0.70, left("ema")),
    Target("bf16 export, 1e-5, 20 steps apart, dense: of raw", 0.16, left("bf16-1e-5")),
    Target("bf16 export, 1e-4, 20 steps apart, dense: of raw", 0.32, left("bf16-1e-4")),
    Target("bf16 export, 1e-5: dense of XOR, planes, zstd", ENOUGH, left("bf16-1e-5", XOR)),
    Target("bf16 export, 1e-4: dense of XOR, planes, zstd", ENOUGH, left("bf16-1e-4", XOR)),
    Target("frozen backbone, codec raw: added less 200 B a tensor, of what changed", 1.005, beyond_changed),
    Target("log grown by 50 MB: a later commit, s", 0.15, ours("log", "later")),
    Target("10,000 files: first commit, s", 0.6, ours("folder", "first")),
    Target("10,000 files, 1% changed: a later commit, s", 0.2, ours("folder", "later")),
    Target("10,000 files: restore, s", 0.5, ours("folder", "restore")),
    Target("default codec over 100 Mbit/s, fp32: as fast as raw", 0.9, over_link("adam"), least=True),
    Target("default codec over 100 Mbit/s, bf16: as fast as raw", 0.9, over_link("bf16-1e-5"), least=True),
    Target("default codec over 100 Mbit/s, fp32: sent, of raw", 0.78, sent("adam")),
    Target("default codec over 100 Mbit/s, bf16: sent, of raw", 0.16, sent("bf16-1e-5")),
    Target("dense read by one core, fp32, GB/s", 1.5, rate("adam"), least=True),
    Target("dense read by one core, bf16, GB/s", 1.1, rate("bf16-1e-5"), least=True),
)


def markdown(results: Results) -> str:
    """All that were measured."""
    lines = ["| work | figure | target | |", "|---|---|---|---|"]
    for target in TARGETS:
        try:
            figure = target.figure(results)
        except (KeyError, IndexError):
            continue
        met = figure >= target.most if target.least else figure <= target.most
        sign = "at least" if target.least else "at most"
        lines.append(f"| {target.work} | {figure:.3f} | {sign} {target.most:g} | {'met' if met else 'not met'} |")
    return "\n".join(lines)
