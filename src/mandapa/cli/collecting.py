"""The command that frees what nothing needs: ``gc``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from mandapa.cli.money import money, prices_of, prices_option
from mandapa.cli.plans import one_way, plan_options, read_plan, write_plan
from mandapa.cli.progress import Bar
from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import clean, count, ranges, size, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mandapa.repository.garbage import GcPlan, Share
    from mandapa.repository.gc import Collected
    from mandapa.repository.prices import Prices

__all__ = ["COMMANDS"]

_WEEK = 7 * 86_400


@click.command()
@click.option(
    "--grace", type=click.FloatRange(min=0), metavar="SECONDS", help="How long what was deleted stays: 7 days."
)
@plan_options
@prices_option
@common
@pass_session
def gc(
    session: Session,
    grace: float | None,
    plan_file: str | None,
    apply_file: str | None,
    yes: bool,
    prices_file: str | None,
) -> None:
    """Free the bytes that no version needs. Without --apply or --yes: show what would go, and stop.

    Deleted versions can be brought back for 7 days, by the store's clock; after that their bytes go. Everybody may go
    on writing and reading.
    """
    from mandapa.repository.garbage import GcPlan
    from mandapa.repository.prices import Prices

    one_way(plan_file, apply_file, yes)
    plan = None
    if apply_file is not None:
        plan = GcPlan.from_json(read_plan(apply_file))
    seconds = grace if grace is not None else _WEEK if plan is None else plan.grace
    if seconds < _WEEK:
        message = (
            f"a grace of {seconds:g} seconds: what was deleted longer ago than that cannot be brought back any more"
        )
        click.echo(message, err=True)
    repo = session.open()
    if apply_file is not None or yes:
        with Bar("cleaning up", unit="objects") as bar:
            done = repo.gc(plan, grace=grace, progress=bar.counted)
        session.emit(_value(done), lambda: _text(done))
        return
    plan = repo.plan_gc() if grace is None else repo.plan_gc(grace=grace)
    if plan_file is not None:
        write_plan(plan_file, plan)
    words = ["--apply", plan_file] if plan_file else ["--yes", *([] if grace is None else ["--grace", f"{grace:g}"])]
    again = shlex.join(["mandapa", "gc", *words])
    prices = prices_of(prices_file) or Prices.of(repo.url)
    session.emit(_plan_value(plan, prices), lambda: _plan_text(plan, prices, again))


def _plan_value(plan: GcPlan, prices: Prices) -> dict[str, Any]:
    return {
        "grace": plan.grace,
        "objects": len(plan.objects),
        "freed": plan.freed,
        "shares": [_share_value(share) for share in plan.shares],
        "half_dead": len(plan.half_dead),
        "rewritten": plan.rewritten,
        "later": plan.later,
        "waiting": plan.waiting,
        "month": prices.cost(stored=plan.freed).month,
        "currency": prices.currency,
    }


def _share_value(share: Share) -> dict[str, Any]:
    return {"artifact": share.artifact, "objects": share.objects, "bytes": share.bytes, "lost": list(share.lost)}


def _plan_text(plan: GcPlan, prices: Prices, again: str) -> str:
    lately = f"deleted less than {_span(plan.grace)} ago"
    if not plan.objects and not plan.half_dead:
        return f"nothing to free yet: {size(plan.waiting)} were {lately}" if plan.waiting else "nothing to free"
    lines = [_shares_text(plan.shares, "cannot be brought back then")] if plan.shares else []
    month = f", {money(prices.cost(stored=plan.freed).month, prices)} a month" if prices.storage_gb_month else ""
    lines.append(f"{count(len(plan.objects), 'object')}, {size(plan.freed)}{month}, would be freed; nothing was done")
    if plan.half_dead:
        lines.append(
            f"{count(len(plan.half_dead), 'pack')} of {size(plan.later)}, of which little is needed, would be freed by "
            f"a later one; about {size(plan.rewritten)} would be stored anew for that"
        )
    if plan.waiting:
        lines.append(f"{size(plan.waiting)} more were {lately}, and stay")
    return "\n".join([*lines, f"do it: {clean(again)}"])


def _span(seconds: float) -> str:
    return f"{seconds / 86_400:g} days" if seconds >= 86_400 else f"{seconds:g} seconds"


def _shares_text(shares: Sequence[Share], meaning: str) -> str:
    rows = []
    for share in shares:
        lost = f"{ranges(share.lost)} {meaning}" if share.lost else ""
        name = "never committed" if share.artifact is None else clean(share.artifact)
        rows.append((name, count(share.objects, "object"), size(share.bytes), lost))
    return table(rows, right=(1, 2))


def _value(done: Collected) -> dict[str, Any]:
    return {
        "objects": len(done.freed),
        "freed": done.bytes,
        "shares": [_share_value(share) for share in done.shares],
        "skipped": [{"object": key, "why": why} for key, why in done.skipped.items()],
        "rewritten": [{"address": one.address, "put": one.put, "skipped": one.skipped} for one in done.rewritten],
    }


def _text(done: Collected) -> str:
    lines = [_shares_text(done.shares, "cannot be brought back any more")] if done.shares else []
    whys = sorted({*done.skipped.values()})
    for why in whys:
        keys = [key for key, reason in done.skipped.items() if reason == why]
        lines.append(f"{count(len(keys), 'object')} skipped, such as {clean(keys[0])}: {clean(why)}")
    lines += [f"{clean(one.address)} not moved: {clean(one.skipped)}" for one in done.rewritten if one.skipped]
    moved = [one for one in done.rewritten if not one.skipped]
    if moved:
        put = sum([one.put for one in moved])
        lines.append(f"{count(len(moved), 'version')} moved out of half-dead packs, {size(put)} stored anew")
    if not done.freed:
        return "\n".join([*lines, "nothing was freed"])
    return "\n".join([*lines, f"{count(len(done.freed), 'object')}, {size(done.bytes)}, freed"])


COMMANDS = (gc,)
