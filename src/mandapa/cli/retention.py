"""Commands that clean up by policy: ``expire``, ``policy``."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mandapa.cli.money import money, prices_of, prices_option
from mandapa.cli.plans import one_way, plan_options, read_plan, write_plan
from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import clean, count, ranges, size, table, time

if TYPE_CHECKING:
    from mandapa.repository.policy import Policy
    from mandapa.repository.prices import Prices
    from mandapa.repository.retention import ArtifactPlan, Expired, ExpirePlan

__all__ = ["COMMANDS"]

_F = TypeVar("_F", bound=Callable[..., Any])

_SHOWN = 20  # versions that stay, and addresses to undelete, before the rest is counted


def _rules(function: _F) -> _F:
    """The options that say what stays."""
    for name, text in (
        ("used", "Those that a version of another artifact used; on unless told."),
        ("tagged", "Those that a tag names; on unless told. If off, the tag goes too."),
        ("aliased", "Those that an alias names; on unless told. If off, the alias goes too."),
    ):
        function = click.option(f"--keep-{name}/--no-keep-{name}", default=None, help=text)(function)
    for option in (
        click.option("--newer-than", metavar="TIME", help="Those made less than 14d, 12h, 90m, 2w ago."),
        click.option("--keep-every", type=click.IntRange(min=1), metavar="N", help="Those of every Nth step."),
        click.option("--keep-best", multiple=True, metavar="K:METRIC:min|max", help="The K best. Repeatable."),
        click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="The N newest."),
    ):
        function = option(function)
    return function


def _policy(rules: dict[str, Any]) -> Policy | None:
    """The policy that options say; None when there are none."""
    from mandapa.repository.policy import Policy

    given = {name: value for name, value in rules.items() if value not in (None, ())}
    return Policy(**given) if given else None


@click.command()
@click.argument("artifacts", nargs=-1, metavar="[ARTIFACT]...")
@click.option("--all", "every", is_flag=True, help="All artifacts; without rules, those that have a policy.")
@_rules
@plan_options
@prices_option
@common
@pass_session
def expire(
    session: Session,
    /,
    artifacts: tuple[str, ...],
    every: bool,
    plan_file: str | None,
    apply_file: str | None,
    yes: bool,
    prices_file: str | None,
    **rules: Any,
) -> None:
    """Delete versions that no rule keeps. Without --apply or --yes: show what would go, and stop.

    Rules are those given, else the stored policy; what a stored policy keeps stays in any case. The newest version, and
    the checkpoint that a run would go on from, always stay. 'undelete' brings back what went.
    """
    from mandapa.repository.prices import Prices
    from mandapa.repository.retention import ExpirePlan, apply_expire

    context = click.get_current_context()
    one_way(plan_file, apply_file, yes)
    policy = _policy(rules)
    if apply_file is not None:
        if artifacts or every or policy is not None:
            raise click.UsageError("--apply takes a plan, and nothing else", context)
        plan = ExpirePlan.from_json(read_plan(apply_file))
        repo = session.open()
    else:
        if bool(artifacts) == every:
            raise click.UsageError("name artifacts, or say --all", context)
        repo = session.open()
        plan = repo.plan_expire(*artifacts, policy=policy, measure=not yes)
    if apply_file is not None or yes:
        done: list[Expired] = []
        whole = False
        try:
            done.extend(apply_expire(repo, plan))
            whole = True
        finally:  # when something fails, what was deleted until then is told before
            if whole or done:
                session.emit({"versions": [_value(one) for one in done]}, lambda: _text(done))
        return
    if plan_file is not None:
        write_plan(plan_file, plan)
    words = ["--all"] if every else list(artifacts)
    words += [] if policy is None else policy.words()
    go_on = shlex.join(["mandapa", "expire", *(["--apply", plan_file] if plan_file else [*words, "--yes"])])
    prices = prices_of(prices_file) or Prices.of(repo.url)
    others = len(repo.catalog.state.names) - len(plan.artifacts) if every else 0
    session.emit(_plan_value(plan, prices), lambda: _plan_text(plan, prices, others, go_on))


def _plan_value(plan: ExpirePlan, prices: Prices) -> dict[str, Any]:
    import msgspec

    month = prices.cost(stored=plan.freed or 0).month
    return {**msgspec.to_builtins(plan), "requests": plan.requests, "month": month, "currency": prices.currency}


def _plan_text(plan: ExpirePlan, prices: Prices, others: int, go_on: str) -> str:
    lines = [_part_text(part) for part in plan.artifacts if part.goes]
    goes, stays = (sum([len(getattr(part, what)) for part in plan.artifacts]) for what in ("goes", "stays"))
    if goes:
        lines.append(f"{count(goes, 'version')} would go, {stays:,} stay; nothing was done")
        lines.append(_freed_text(plan, plan.freed or 0, prices))
    else:
        lines.append(f"nothing to delete: a rule keeps {'the version' if stays == 1 else f'all {stays:,} versions'}")
    if others:
        lines.append(f"{count(others, 'artifact')} without a policy: left alone")
    return "\n".join([*lines, f"do it: {clean(go_on)}"] if goes else lines)


def _freed_text(plan: ExpirePlan, freed: int, prices: Prices) -> str:
    """What the store would be rid of, and when."""
    text = f"{size(freed)} are theirs alone"
    if prices.storage_gb_month:
        text += f", {money(prices.cost(stored=freed).month, prices)} a month"
    if plan.object_bytes is not None and plan.object_bytes < freed:
        text += f" ({size(plan.object_bytes)} in objects that nothing else needs)"
    if plan.shared:
        text += f"; {size(plan.shared)} others need too"
    if plan.unread:
        text += f"; {count(len(plan.unread), 'version')} cannot be read ('mandapa fsck'): about right at best"
    return text


def _part_text(part: ArtifactPlan) -> str:
    rows = [("  goes", _few([one.version for one in part.goes]), "")]
    for one in part.goes:
        rows += [("  drops", clean(name), f"an alias, with v{one.version}") for name in one.aliases]
        rows += [("  drops", clean(name), f"a tag, for ever, with v{one.version}") for name in one.tags]
    shown = part.stays[-_SHOWN:]
    rows += [("  stays", f"v{one.version}", clean(", ".join(one.by))) for one in reversed(shown)]
    more = len(part.stays) - len(shown)
    lines = [clean(part.name), table(rows)]
    return "\n".join([*lines, f"  ... and {more:,} more stay: --json lists them"] if more else lines)


def _few(numbers: list[int]) -> str:
    """Numbers of versions, the first of them when there are many with gaps."""
    runs = ranges(numbers).split(", ")
    return ", ".join(runs) if len(runs) <= _SHOWN else f"{', '.join(runs[:_SHOWN])}, ... ({len(numbers):,} in all)"


def _value(one: Expired) -> dict[str, Any]:
    return {
        "address": f"{one.artifact}:v{one.version}",
        "deleted": not one.skipped,
        "aliases": list(one.aliases),
        "tags": list(one.tags),
        "until": None if one.until is None else time(one.until),
        "skipped": one.skipped,
    }


def _text(done: list[Expired]) -> str:
    gone = [one for one in done if not one.skipped]
    lines = [f"skipped {clean(one.artifact)}:v{one.version}: {clean(one.skipped)}" for one in done if one.skipped]
    for name in dict.fromkeys([one.artifact for one in gone]):
        own = [one for one in gone if one.artifact == name]
        dropped = [f"{label} (v{one.version})" for one in own for label in (*one.aliases, *one.tags)]
        also = f", and dropped {clean(', '.join(dropped))}" if dropped else ""
        numbers = _few([one.version for one in own])
        lines.append(f"deleted {count(len(own), 'version')} of {clean(name)}: {numbers}{also}")
    if not gone:
        return "\n".join([*lines, "nothing was deleted"])
    undo = [f"{clean(one.artifact)}:v{one.version}" for one in gone]
    if len(undo) <= _SHOWN:
        lines.append(f"undo: mandapa undelete {' '.join(undo)}")
    else:
        lines.append(f"undo: mandapa undelete {undo[0]} ... ('mandapa log --deleted ARTIFACT' lists them)")
    lines += [
        f"then: mandapa alias {clean(one.artifact)} {clean(name)} v{one.version}"
        for one in gone
        for name in one.aliases
    ][:_SHOWN]
    until = min([one.until for one in gone if one.until is not None], default=None)
    lines.append(
        f"{f'until {until:%Y-%m-%d %H:%M} UTC at least' if until else 'for 7 days at least'}; "
        "'mandapa gc' frees their bytes after that"
    )
    return "\n".join(lines)


@click.group()
@common
def policy() -> None:
    """Keep in the repository what stays when it is cleaned up: set, show, drop."""


@policy.command("set")
@click.argument("artifact", required=False)
@click.option("--default", is_flag=True, help="For all artifacts that have no policy of their own.")
@_rules
@common
@pass_session
def set_(session: Session, /, artifact: str | None, default: bool, **rules: Any) -> None:
    """Store what stays of an artifact. Takes the place of what was stored before; deletes nothing.

    'mandapa expire' goes by it, and keeps what it keeps whatever else it is told.
    """
    name = _whose(artifact, default)
    found = _policy(rules)
    if found is None:
        raise click.UsageError("give a rule, such as --keep-last 5", click.get_current_context())
    session.open().set_policy(name, found)
    session.emit({"artifact": name, "policy": found.as_setting()}, lambda: f"{_called(name)}: {clean(str(found))}")


@policy.command()
@click.argument("artifact", required=False)
@common
@pass_session
def show(session: Session, artifact: str | None) -> None:
    """Show stored policies, or the one that holds for ARTIFACT."""
    repo = session.open()
    stored = repo.policies()
    if artifact is None:
        for name, found in stored.items():
            value = {"artifact": name, "policy": found.as_setting()}
            session.emit(value, lambda: "")
        if not session.json:
            rows = [(_called(name), clean(str(found))) for name, found in stored.items()]
            click.echo(table(rows) or "none is stored: 'mandapa policy set --default --keep-last 5' would store one")
        return
    if not repo.artifact(artifact).exists():
        raise repo.no_artifact(artifact)
    held = stored.get(artifact, stored.get(None))
    source = "own" if artifact in stored else "default" if held is not None else None
    session.emit(
        {"artifact": artifact, "policy": None if held is None else held.as_setting(), "source": source},
        lambda: (
            f"{artifact}: {'none' if held is None else clean(str(held))}"
            + (" (the default)" if source == "default" else "")
        ),
    )


@policy.command()
@click.argument("artifact", required=False)
@click.option("--default", is_flag=True, help="That of all artifacts that have no policy of their own.")
@common
@pass_session
def drop(session: Session, artifact: str | None, default: bool) -> None:
    """Drop a stored policy. Deletes no version."""
    name = _whose(artifact, default)
    session.open().set_policy(name, None)
    session.emit({"artifact": name, "policy": None}, lambda: f"{_called(name)}: no policy is stored any more")


def _whose(artifact: str | None, default: bool) -> str | None:
    if (artifact is None) != default:
        raise click.UsageError("name an artifact, or say --default", click.get_current_context())
    return artifact


def _called(name: str | None) -> str:
    return "--default" if name is None else clean(name)


COMMANDS = (expire, policy)
