"""Commands that name versions: ``alias``, ``tag``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import age, clean, table

if TYPE_CHECKING:
    from mandapa.repository.artifact import Artifact

__all__ = ["COMMANDS"]


@click.command()
@click.argument("artifact")
@click.argument("name", required=False)
@click.argument("version", required=False)
@click.option("-d", "--delete", "drop", is_flag=True, help="Drop the alias; its history stays.")
@click.option("--history", is_flag=True, help="Every move: when, by whom, to what.")
@common
@pass_session
def alias(session: Session, artifact: str, name: str | None, version: str | None, drop: bool, history: bool) -> None:
    """Make, move, drop or list movable names. NAME names VERSION (default: the newest) from now on.

    VERSION is v12, an alias, a tag, @digest, with ~N if need be. An alias moves as often as you like.
    """
    found = session.open().artifact(artifact)
    _run(session, found, found.aliases, found.alias, "alias", (name, version, drop, history))


@click.command()
@click.argument("artifact")
@click.argument("name", required=False)
@click.argument("version", required=False)
@click.option("-d", "--delete", "drop", is_flag=True, help="Drop the tag; its name is never used again.")
@click.option("--history", is_flag=True, help="When each was made or dropped, and by whom.")
@common
@pass_session
def tag(session: Session, artifact: str, name: str | None, version: str | None, drop: bool, history: bool) -> None:
    """Make, drop or list names that never move. NAME names VERSION (default: the newest) for ever."""
    found = session.open().artifact(artifact)
    _run(session, found, found.tags, found.tag, "tag", (name, version, drop, history))


def _run(
    session: Session,
    artifact: Artifact,
    names: Callable[[], dict[str, int]],
    move: Callable[[str, str | None], None],
    kind: str,
    given: tuple[str | None, str | None, bool, bool],
) -> None:
    name, version, drop, history = given
    if history:
        if version is not None or drop:
            raise click.UsageError("--history only shows", click.get_current_context())
        _history(session, artifact, name, kind)
    elif name is None:
        if drop:
            raise click.UsageError("name what to drop", click.get_current_context())
        _list(session, names())
    elif drop:
        if version is not None:
            raise click.UsageError("-d takes a name, and no version", click.get_current_context())
        was = names().get(name)
        move(name, None)
        text = f"{artifact.name}:{name} is dropped" + ("" if was is None else f"; it was v{was}")
        session.emit({"artifact": artifact.name, "name": name, "version": None, "was": was}, lambda: text)
    else:
        was = names().get(name)
        number = artifact.version(version or "latest").number
        move(name, f"v{number}")
        text = f"{artifact.name}:{name} is v{number}" + ("" if was in (None, number) else f"; it was v{was}")
        session.emit({"artifact": artifact.name, "name": name, "version": number, "was": was}, lambda: text)


def _list(session: Session, names: dict[str, int]) -> None:
    if session.json:
        for name, number in names.items():
            session.emit({"name": name, "version": number}, str)
        return
    click.echo(table([(clean(name), f"v{number}") for name, number in names.items()]) or "none")


def _history(session: Session, artifact: Artifact, name: str | None, kind: str) -> None:
    from mandapa.cli.values import step_value

    steps = [step for step in artifact.moves(name) if step.kind == kind]
    if session.json:
        for step in steps:
            session.emit(step_value(step), str)
        return
    rows = [
        (clean(step.name), "dropped" if step.version is None else f"v{step.version}", age(step.at), clean(step.by))
        for step in steps
    ]
    click.echo(table(rows) or "none")


COMMANDS = (alias, tag)
