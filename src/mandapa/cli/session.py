"""What all commands share: which repository is meant, and how results are printed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mandapa.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from mandapa.repository.repository import Repository

__all__ = ["EMBEDDED", "Session", "common", "pass_session"]

_F = TypeVar("_F", bound=Callable[..., Any])

EMBEDDED = ".mandapa"
"""The folder of a repository that lives beside the work."""


@dataclass
class Session:
    """One call of the command line."""

    repo: str | None = None
    json: bool = False

    def url(self) -> str:
        """The repository that is meant: ``--repo``, else ``MANDAPA_REPO``, else ``.mandapa`` here or above.

        Raises:
            NotFoundError: None of them names one.
        """
        named = self.named()
        if named is not None:
            return named
        here = folder = os.getcwd()
        while True:
            candidate = os.path.join(folder, EMBEDDED)
            if os.path.isfile(os.path.join(candidate, "mandapa.json")):
                return candidate
            folder, last = os.path.dirname(folder), folder
            if folder == last:
                raise NotFoundError(
                    f"no repository: there is no {EMBEDDED} in {here} or above it. "
                    "Make one with 'mandapa init', or name one with --repo URL or MANDAPA_REPO"
                )

    def named(self) -> str | None:
        """``--repo``, else ``MANDAPA_REPO``."""
        if self.repo is not None:
            if not self.repo:
                raise InvalidInputError("--repo is empty: give the URL or the folder of a repository")
            return self.repo
        return os.environ.get("MANDAPA_REPO") or None

    def open(self) -> Repository:
        """The repository that is meant."""
        import mandapa

        return mandapa.open(self.url())

    def emit(self, value: Mapping[str, Any], text: Callable[[], str]) -> None:
        """Print one result: ``value`` with ``--json``, else what ``text`` gives, if anything."""
        if self.json:
            import json

            # ASCII only: control and bidi characters of foreign names cannot reach the terminal.
            click.echo(json.dumps(value))
        elif line := text():
            click.echo(line)


pass_session = click.make_pass_decorator(Session, ensure=True)


def common(function: _F) -> _F:
    """``--repo`` and ``--json``, which every command takes, before or after its name."""

    def keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        session = ctx.ensure_object(Session)
        if value is not None and value is not False:
            setattr(session, "json" if param.name == "as_json" else "repo", value)

    function = click.option(
        "--json", "as_json", is_flag=True, expose_value=False, callback=keep, help="Print JSON: one object a line."
    )(function)
    return click.option(
        "--repo", metavar="URL", expose_value=False, callback=keep, help="The repository (else MANDAPA_REPO, .mandapa)."
    )(function)
