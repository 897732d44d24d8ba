"""The command line: ``mandapa``, an edge over the public API. It prints; the library below never does.

Nothing heavier than click is loaded before a command runs, so that ``mandapa --help`` is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from mandapa import __version__
from mandapa.cli import (
    artifacts,
    checking,
    collecting,
    deleting,
    listing,
    mirroring,
    names,
    reading,
    repacking,
    retention,
    running,
    usage,
    writing,
)
from mandapa.cli.demo.command import command as demo
from mandapa.cli.failure import report
from mandapa.cli.session import common

__all__ = ["main"]

SECTIONS = {
    "Make": ("init", "add", "rm"),
    "Look": ("log", "show", "ls", "diff", "best", "du"),
    "Take": ("get", "cat"),
    "Name": ("alias", "tag", "artifact"),
    "Delete": ("delete", "undelete", "expire", "policy", "gc"),
    "Train": ("status", "sync"),
    "Check": ("fsck", "drill", "doctor"),
    "Store": ("repack", "mirror"),
    "Try": ("demo",),
}


class _Main(click.Group):
    """A group whose errors are one or two lines and an exit code, and whose help is grouped by task."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        if not extra.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **extra)
        given = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(given, prog_name, standalone_mode=False, **extra)
            sys.stdout.flush()
        except BrokenPipeError:
            code = _pipe_closed()
        except (KeyboardInterrupt, click.Abort):
            code = 130
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a line and a code
            code = report(error, as_json="--json" in given)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Before click sees it, which would end with 1: for us that means "differs".
            ctx.exit(_pipe_closed())

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, members in SECTIONS.items():
            rows = [(name.ljust(width), self.commands[name].get_short_help_str(80)) for name in members]
            with formatter.section(title):
                formatter.write_dl(rows)


def _pipe_closed() -> int:
    """The reader went away, as in ``| head``: no noise, and the code that a shell gives for it."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, sys.stdout.fileno())
    except (OSError, ValueError):  # not a real file: nothing to keep quiet
        return 141
    finally:
        os.close(devnull)
    return 141


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", message="mandapa %(version)s")
@common
def main() -> None:
    """Git-like history for everything a training run makes or reads, in your own bucket.

    An ADDRESS is name[:ref[~N]][/path]; ref is v12, latest (the default), an alias, a tag or @digest; ~N goes N live
    versions back. The repository is --repo, else MANDAPA_REPO, else the folder .mandapa here or above.
    """


for _module in (
    writing,
    listing,
    reading,
    mirroring,
    names,
    artifacts,
    deleting,
    running,
    checking,
    repacking,
    retention,
    collecting,
    usage,
):
    for _command in _module.COMMANDS:
        main.add_command(_command)
main.add_command(demo)
