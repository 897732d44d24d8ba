"""Commands that delete versions and bring them back: ``delete``, ``undelete``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from mandapa.cli.session import Session, common, pass_session
from mandapa.errors import InvalidInputError

if TYPE_CHECKING:
    from mandapa.repository.artifact import Artifact

__all__ = ["COMMANDS"]


def _grouped(addresses: tuple[str, ...], verb: str) -> dict[str, list[str]]:
    """References by artifact; each address must say which version."""
    from mandapa.address import parse_address

    found: dict[str, list[str]] = {}
    for text in addresses:
        parsed = parse_address(text)
        if parsed.path:
            raise InvalidInputError(f"{text!r}: '{verb}' takes versions; 'mandapa rm' makes a version without a file")
        if ":" not in text:
            raise InvalidInputError(f"{text!r} names no version: say which, as in '{verb} {text}:v3'")
        found.setdefault(parsed.name, []).append(text.partition(":")[2])
    return found


@click.command()
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS...")
@common
@pass_session
def delete(session: Session, addresses: tuple[str, ...]) -> None:
    """Delete versions; 'undelete' brings them back. It can as long as their bytes are there.

    All of one artifact go together or not at all. One that an alias or a tag names is refused.
    """
    groups = _grouped(addresses, "delete")
    repo = session.open()
    for name, refs in groups.items():  # a mistake in one address stops all before anything is done
        for ref in refs:
            repo.artifact(name).version(ref)
    done = _each(groups, repo.artifact, lambda artifact, refs: artifact.delete(*refs))
    undo = f"undo: mandapa undelete {' '.join(done)}"
    session.emit({"deleted": done}, lambda: f"deleted {' '.join(done)}\n{undo}")


@click.command()
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS...")
@common
@pass_session
def undelete(session: Session, addresses: tuple[str, ...]) -> None:
    """Bring deleted versions back. 'log --deleted ARTIFACT' lists them.

    ADDRESS names one by its number or digest. It is looked at first whether all of its bytes are still there.
    """
    groups = _grouped(addresses, "undelete")
    repo = session.open()
    done = _each(groups, repo.artifact, lambda artifact, refs: artifact.undelete(*refs))
    session.emit({"undeleted": done}, lambda: f"brought back {' '.join(done)}")


def _each(
    groups: dict[str, list[str]],
    artifact: Callable[[str], Artifact],
    act: Callable[[Artifact, list[str]], list[int]],
) -> list[str]:
    return [f"{name}:v{number}" for name, refs in groups.items() for number in act(artifact(name), refs)]


COMMANDS = (delete, undelete)
