"""Plans in files: what a command would do, to be looked at and applied later."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

from mandapa.errors import InvalidInputError

if TYPE_CHECKING:
    from mandapa.repository.plan import Plan

__all__ = ["one_way", "plan_options", "read_plan", "write_plan"]

_F = TypeVar("_F", bound=Callable[..., object])

_PLAN_MAX = 256 << 20
"""Bytes of a plan, at most: two million lines."""


def plan_options(command: _F) -> _F:
    """The options of a command that plans."""
    file = click.Path(dir_okay=False)
    for option in (
        click.option("--yes", is_flag=True, help="Plan, and do it."),
        click.option("--apply", "apply_file", type=file, metavar="FILE", help="Do it."),
        click.option("--plan", "plan_file", type=file, metavar="FILE", help="Write the plan to FILE."),
    ):
        command = option(command)
    return command


def one_way(plan_file: str | None, apply_file: str | None, yes: bool) -> None:
    """Refuse more than one of them."""
    if sum([plan_file is not None, apply_file is not None, yes]) > 1:
        raise click.UsageError("one of --plan, --apply, --yes", click.get_current_context())


def write_plan(path: str, plan: Plan) -> None:
    """Keep a plan in a file; raises OSError."""
    with open(path, "wb") as file:
        file.write(plan.to_json())


def read_plan(path: str | os.PathLike[str]) -> bytes:
    """What the file of a plan holds, which is nobody's until it was checked.

    Raises:
        InvalidInputError: It is too large for one.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(_PLAN_MAX + 1)
    if len(data) > _PLAN_MAX:
        raise InvalidInputError(f"{os.fspath(path)} has more than {_PLAN_MAX >> 20} MiB and is no plan")
    return data
