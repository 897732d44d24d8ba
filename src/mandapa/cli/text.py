"""Values as people read them. Whatever comes from a store is made harmless to a terminal first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

__all__ = ["age", "clean", "count", "first_line", "ranges", "size", "table", "time", "value"]

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def clean(text: str) -> str:
    r"""``text`` with each character that could steer a terminal, or hide something on it, written as an escape.

    Example:
        >>> clean("done\x1b[2J")
        'done\\x1b[2J'
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def first_line(text: str, width: int = 60) -> str:
    """The start of a message, for a list."""
    line = text.strip().partition("\n")[0].rstrip()
    more = len(line) > width or "\n" in text.strip()
    return clean(line[:width]) + ("..." if more else "")


def size(number: int | None) -> str:
    """Bytes in decimal units, three digits.

    Example:
        >>> size(38_211), size(999), size(None)
        ('38.2 kB', '999 B', '?')
    """
    if number is None:
        return "?"
    if number < 1000:
        return f"{number} B"
    amount, units = number / 1000, ["kB", "MB", "GB", "TB", "PB"]
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    unit = units[0]
    return f"{amount:.{0 if amount >= 99.95 else 1 if amount >= 9.995 else 2}f} {unit}"


def count(number: int, noun: str) -> str:
    """``1 asset``, ``2,000 assets``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers of versions.

    Example:
        >>> ranges([7, 0, 1, 2])
        'v0-v2, v7'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"v{first}" if first == last else f"v{first}-v{last}" for first, last in runs)


def age(then: datetime, now: datetime | None = None) -> str:
    """How long ago; a date when it is more than a month."""
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    for limit, unit, word in ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h"), (31 * 86400, 86400, "days")):
        if seconds < limit:
            return f"{max(int(seconds // unit), 0)} {word} ago"
    return then.astimezone(UTC).strftime("%Y-%m-%d")


def time(then: datetime) -> str:
    """A time for ``--json``: UTC, ISO 8601, to the microsecond."""
    return then.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def value(item: Any) -> str:
    """A metadata value on one line; of floats six digits."""
    import json

    if isinstance(item, float):
        return f"{item:.6g}"
    return clean(item if isinstance(item, str) else json.dumps(item, ensure_ascii=False))


def table(rows: Iterable[Sequence[str]], *, right: Iterable[int] = (), indent: str = "") -> str:
    """Columns side by side, two blanks apart; those in ``right`` end at one line."""
    rows = [list(row) for row in rows]
    if not rows:
        return ""
    rights = set(right)
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if at in rights else c.ljust(w) for at, (c, w) in enumerate(zip(row, widths, strict=True))]
        # A column that is empty in every row takes no room.
        lines.append(indent + "  ".join(cell for cell, w in zip(cells, widths, strict=True) if w).rstrip())
    return "\n".join(lines)
