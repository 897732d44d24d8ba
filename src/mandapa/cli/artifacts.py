"""Commands on an artifact as a whole: ``artifact rename``, ``artifact remove``."""

from __future__ import annotations

import click

from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import clean, count, size

__all__ = ["COMMANDS"]


@click.group()
@common
def artifact() -> None:
    """Rename or remove a whole artifact."""


@artifact.command()
@click.argument("old")
@click.argument("new")
@common
@pass_session
def rename(session: Session, old: str, new: str) -> None:
    """Give artifact OLD the name NEW. Its history stays, and OLD becomes free."""
    session.open().artifact(old).rename(new)
    session.emit({"artifact": new, "was": old}, lambda: f"{old} is now {new}")


@artifact.command()
@click.argument("name", metavar="ARTIFACT")
@click.option("--yes", is_flag=True, help="Do it; without, only what would go is printed.")
@common
@pass_session
def remove(session: Session, name: str, yes: bool) -> int:
    """Remove ARTIFACT with all its versions, aliases and tags. This cannot be undone.

    Without --yes it prints what would go, and ends with 1.
    """
    found = session.open().artifact(name)
    live = found.versions()
    names = [*found.aliases(), *found.tags()]
    if yes:
        found.remove()
    value = {
        "artifact": name,
        "removed": yes,
        "versions": len(live),
        "names": names,
        "size": live[-1].size if live else 0,
        "stored": sum(version.added for version in live),
    }

    def text() -> str:
        newest = f", the newest of {size(live[-1].size)}" if live else ""
        also = f", with its names {', '.join(map(clean, names))}" if names else ""
        what = f"{name}: {count(len(live), 'version')}{newest}{also}"
        if yes:
            return f"removed {what}"
        return f"would remove {what}\nnothing was done: add --yes to remove it for good"

    session.emit(value, text)
    return 0 if yes else 1


COMMANDS = (artifact,)
