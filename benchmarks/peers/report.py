"""Results as Markdown, and into the page that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import machine
from tables import TABLES


def write(folder: Path, name: str, result: dict[str, Any]) -> None:
    """One result as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """All results that there are, by the name of the table, in the order of the page."""
    return {
        name: json.loads((folder / f"{name}.json").read_text()) for name in TABLES if (folder / f"{name}.json").exists()
    }


def markdown(name: str, result: dict[str, Any]) -> str:
    """The table, and what could not be had."""
    table = TABLES[name]
    rows = [[column(row) for column in table.columns.values()] for row in result["rows"]]
    lines = [f"| {' | '.join(cells)} |" for cells in ([*table.columns], ["---"] * len(table.columns), *rows)]
    left_out = [f"Left out: {tool} ({why})." for tool, why in result["left_out"].items()]
    facts = f"Measured on {machine.line(result['facts'])}."
    return "\n\n".join([f"### {table.title}", "\n".join(lines), *left_out, facts])


def fill(page: Path, parts: dict[str, str]) -> None:
    """Put each part between its markers in the page."""
    text = page.read_text()
    for name, part in parts.items():
        mark = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(mark, lambda match, part=part: f"{match[1]}{part}\n{match[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise RuntimeError(f"{page} has {count} places for {name}, not one")
    page.write_text(text)
