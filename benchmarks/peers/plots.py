"""Plots as SVG, readable on a light page and on a dark one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

BAR, GAP, LABEL, WIDE, TOP = 15, 5, 180, 490, 44
STYLE = """text{font:12px system-ui,sans-serif;fill:#57606a}.title{font-size:13px;font-weight:600;fill:#24292f}
.bar{fill:#8c959f}.ours{fill:#1f7a5c}.mine{font-weight:600;fill:#24292f}.axis{stroke:#8c959f;stroke-width:1}
@media(prefers-color-scheme:dark){text{fill:#9198a1}.title,.mine{fill:#e6edf3}.bar{fill:#656c76}.ours{fill:#3fb98b}}"""


class Bars(NamedTuple):
    """One panel: a bar a name, short is good."""

    title: str
    values: dict[str, float]
    digits: int


def panel(bars: Bars, x: int, y: int) -> str:
    """Bars from the shortest to the longest, each with its number."""
    most = max(bars.values.values())
    room = WIDE - LABEL - 60
    parts = [f'<text class="title" x="{x}" y="{y + 14}">{escape(bars.title)}</text>']
    for number, (name, value) in enumerate(sorted(bars.values.items(), key=lambda found: found[1])):
        at = y + 26 + number * (BAR + GAP)
        mine = name.startswith("mandapa")
        label, kind = (' class="mine"', "ours") if mine else ("", "bar")
        place = f'x="{x + LABEL}" y="{at}" width="{max(1.0, room * value / most):.1f}" height="{BAR}" rx="2"'
        parts += [
            f'<text{label} text-anchor="end" x="{x + LABEL - 6}" y="{at + 12}">{escape(name)}</text>',
            f'<rect class="{kind}" {place}/>',
            f'<text{label} x="{x + LABEL + room * value / most + 5:.1f}" y="{at + 12}">{value:,.{bars.digits}f}</text>',
        ]
    bottom = y + 24 + len(bars.values) * (BAR + GAP)
    parts.append(f'<line class="axis" x1="{x + LABEL}" x2="{x + LABEL}" y1="{y + 22}" y2="{bottom}"/>')
    return "\n".join(parts)


def page(title: str, panels: list[Bars]) -> str:
    """Two panels a row."""
    high = max(len(bars.values) for bars in panels) * (BAR + GAP) + 46
    rows = (len(panels) + 1) // 2
    width, height = 2 * WIDE + 20, TOP + rows * high
    drawn = [panel(bars, 10 + i % 2 * WIDE, TOP + i // 2 * high) for i, bars in enumerate(panels)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>\n'
        f'<text class="title" x="10" y="22" style="font-size:15px">{escape(title)}</text>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def column(result: dict[str, Any], key: str) -> dict[str, float]:
    """One figure of every tool that has it."""
    return {row["tool"]: row[key] for row in result["rows"] if row.get(key) is not None}


PANELS = {
    "adam": "fp32 weights and Adam, 100 steps apart",
    "bf16": "bf16 fine-tuning at 1e-5, 20 steps apart",
    "frozen": "frozen backbone",
    "log": "a log that grows by 50 MB",
}
SERIES = {
    "adam": "fp32 weights and Adam",
    "ema": "an EMA of the weights",
    "bf16-1e-5": "bf16 export, 1e-5",
    "bf16-1e-4": "bf16 export, 1e-4",
    "pure-1e-5": "trained in bf16, 1e-5",
    "pure-1e-4": "trained in bf16, 1e-4",
}


def draw(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """All plots of which there are results."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: title for name, title in PANELS.items() if name in results}
    kinds = {
        "bytes": ("What a later version adds, of its size", "of_raw", 3),
        "commits": ("Seconds of a later commit", "later", 2),
        "restores": ("Seconds of the restore of the last version", "restore", 2),
    }
    for name, (title, key, digits) in kinds.items():
        panels = [Bars(shown[table], column(results[table], key), digits) for table in shown]
        if panels:
            (folder / f"{name}.svg").write_text(page(title, panels))
    if "codecs" in results:
        panels = []
        for row in results["codecs"]["rows"]:
            if row["series"] in SERIES:
                numbers = {
                    key: value for key, value in row.items() if isinstance(value, float) and not key.endswith(": s")
                }
                panels.append(Bars(SERIES[row["series"]], numbers, 3))
        (folder / "codecs.svg").write_text(page("What is left of a later version", panels))
