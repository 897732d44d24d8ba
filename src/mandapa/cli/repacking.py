"""The command that stores versions in fewer bytes: ``repack``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mandapa.cli.plans import one_way, read_plan, write_plan
from mandapa.cli.progress import Bar
from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import clean, count, size, table

if TYPE_CHECKING:
    from mandapa.repository.repack import Repacked, RepackPlan

__all__ = ["COMMANDS"]


@click.command()
@click.argument("artifact")
@click.option("--plan", "plan_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write the plan to FILE.")
@click.option("--apply", "apply_file", type=click.Path(exists=True, dir_okay=False), metavar="FILE", help="Do it.")
@click.option("--yes", is_flag=True, help="Plan, and do it.")
@common
@pass_session
def repack(session: Session, artifact: str, plan_file: str | None, apply_file: str | None, yes: bool) -> None:
    """Store the versions of an artifact in fewer bytes. Without an option: say what that would save.

    Versions keep their numbers, digests and content. The old bytes stay until a clean-up.
    """
    from mandapa.repository.repack import RepackPlan

    one_way(plan_file, apply_file, yes)
    target = session.open().artifact(artifact)
    if apply_file is not None:
        plan = RepackPlan.from_json(read_plan(apply_file))
    else:
        plan = target.plan_repack()
    if apply_file is None and not yes:
        if plan_file is not None:
            write_plan(plan_file, plan)
        session.emit(_plan_value(plan), lambda: _plan_text(plan, plan_file))
        return
    with Bar("storing", sum([step.expected for step in plan.steps])) as bar:
        done = target.repack(plan, progress=bar)
    session.emit({"artifact": artifact, "versions": [_value(one) for one in done]}, lambda: _text(artifact, done))


def _plan_value(plan: RepackPlan) -> dict[str, Any]:
    return {
        "artifact": plan.artifact,
        "versions": [
            {"version": step.version, "stored": step.stored, "expected": step.expected} for step in plan.steps
        ],
    }


def _plan_text(plan: RepackPlan, path: str | None) -> str:
    name = clean(plan.artifact)
    if not plan.steps:
        return f"{name}: nothing would be saved"
    rows = [(f"{name}:v{step.version}", size(step.stored), f"-> about {size(step.expected)}") for step in plan.steps]
    stored, expected = (sum([getattr(step, part) for step in plan.steps]) for part in ("stored", "expected"))
    go_on = f"mandapa repack {name} " + (f"--apply {clean(path)}" if path else "--yes")
    return "\n".join(
        [
            table(rows, right=(1,)),
            f"{count(len(plan.steps), 'version')}, {size(stored)} -> about {size(expected)}; nothing was done",
            f"do it: {go_on}",
        ]
    )


def _value(one: Repacked) -> dict[str, Any]:
    return {"version": one.version, "before": one.before, "after": one.after, "skipped": one.skipped}


def _text(name: str, done: list[Repacked]) -> str:
    rows = [
        (
            f"{clean(name)}:v{one.version}",
            size(one.before),
            f"skipped: {clean(one.skipped)}" if one.skipped else f"-> {size(one.after)}",
        )
        for one in done
    ]
    moved = [one for one in done if not one.skipped]
    before, after = sum([one.before for one in moved]), sum([one.after for one in moved])
    summary = (
        f"{count(len(moved), 'version')} repacked, {size(before)} -> {size(after)}; the old bytes stay until a clean-up"
    )
    return "\n".join([table(rows, right=(1,)), summary] if rows else [f"{clean(name)}: nothing to repack"])


COMMANDS = (repack,)
