"""The command that tells what a repository takes: ``du``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mandapa.cli.money import money, prices_of, prices_option
from mandapa.cli.progress import Bar
from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import clean, count, size, table

if TYPE_CHECKING:
    from mandapa.repository.usage import By, Row, Usage

__all__ = ["COMMANDS"]

_LINES = 40
_WORTH = 100
"""Bytes inside of objects are worth a word when they are more than a hundredth of what is stored."""

_NUMBERS = ("versions", "deleted", "logical", "stored", "shared", "exclusive", "reclaimable", "objects", "writes")


@click.command()
@click.option(
    "--by", type=click.Choice(["artifact", "run", "month"]), default="artifact", help="What a row stands for."
)
@click.option("--all", "all_", is_flag=True, help=f"Every row, not only the {_LINES} largest.")
@prices_option
@common
@pass_session
def du(session: Session, by: By, all_: bool, prices_file: str | None) -> None:
    """Tell what is stored, and what it costs. Also what is shared, and what could go; nothing is changed."""
    repo = session.open()
    with Bar("reading", unit="things") as bar:
        usage = repo.usage(by, prices_of(prices_file), progress=bar.counted)
    session.emit(_value(usage), lambda: _text(usage, None if all_ else _LINES))


def _value(usage: Usage) -> dict[str, Any]:
    import msgspec

    return {
        "by": usage.by,
        "rows": [_row_value(row) for row in usage.rows],
        "total": _row_value(usage.total),
        "unreached": {"objects": usage.unreached, "bytes": usage.unreached_bytes},
        "unreadable": [{"address": one.address, "problem": one.problem} for one in usage.unreadable],
        "prices": msgspec.to_builtins(usage.prices),
    }


def _row_value(row: Row) -> dict[str, Any]:
    import msgspec

    return {
        "name": row.name,
        **{name: getattr(row, name) for name in _NUMBERS},
        "cost": msgspec.to_builtins(row.cost),
    }


def _text(usage: Usage, most: int | None) -> str:
    priced = usage.prices.storage_gb_month > 0
    head = [usage.by, "versions", "logical", "stored", "shared", "exclusive", "reclaimable", "objects"]
    rows = usage.rows[:most]
    cells = [_cells(row, clean(row.name)) for row in rows]
    left = usage.rows[len(rows) :]
    if left:
        cells.append([f"{len(left):,} more", "", "", "", "", "", "", ""])
    cells.append(_cells(usage.total, "total"))
    if priced:
        head.append("a month")
        for line, row in zip(cells, [*rows, *[None] * bool(left), usage.total], strict=True):
            line.append("" if row is None else money(row.cost.month, usage.prices))
    lines = [table([head, *cells], right=range(1, len(head)))]
    lines += [
        f"cannot be read, and is not counted: {clean(one.address)}: {clean(one.problem)}" for one in usage.unreadable
    ]
    if priced:
        lines.append(_priced(usage))
    lines += _advice(usage)
    return "\n".join(lines)


def _cells(row: Row, name: str) -> list[str]:
    sizes = [row.logical, row.stored, row.shared, row.exclusive, row.reclaimable]
    return [name, f"{row.versions:,}", *map(size, sizes), f"{row.objects:,}"]


def _priced(usage: Usage) -> str:
    total, prices = usage.total, usage.prices
    whose = ", ".join([clean(word) for word in (prices.source, prices.date) if word])
    parts = [
        f"about {total.writes:,} writes were needed: {money(total.cost.writes, prices)}",
        f"to read it all once: {money(total.cost.read, prices)}",
        *([f"prices: {whose}"] if whose else []),
    ]
    return "; ".join(parts)


def _advice(usage: Usage) -> list[str]:
    """What to run next, when something can go."""
    if not usage.unreached and usage.total.reclaimable * _WORTH < usage.total.stored:
        return []
    whole = f"{count(usage.unreached, 'object')} ({size(usage.unreached_bytes)}) that no live version needs"
    return [
        f"{size(usage.total.reclaimable)} can go: {whole}, the rest inside of others",
        "see what a clean-up would free: mandapa gc; which versions could be deleted before: mandapa expire",
    ]


COMMANDS = (du,)
