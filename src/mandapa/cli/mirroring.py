"""The command that copies repositories elsewhere: ``mirror``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mandapa.cli.failure import exit_code
from mandapa.cli.progress import Bar
from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import clean, count, size, table

if TYPE_CHECKING:
    from mandapa.repository.mirror import Mirrored, MirroredArtifact

__all__ = ["COMMANDS"]


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only artifacts of such names, as in 'llama-*'. Repeat.")
@common
@pass_session
def mirror(session: Session, source: str, destination: str, only: tuple[str, ...]) -> int:
    """Copy a repository, and later what is new.

    DST is made if nothing is there. Versions keep their numbers, digests, messages and names. May be stopped at any
    time, and run again. Ends with 4 when DST has something of its own under a name of SRC: that artifact is left alone,
    the others are mirrored.
    """
    import mandapa

    there = mandapa.open(source)
    here = mandapa.open(destination, create=True)
    with Bar("mirroring") as bar:
        done = there.mirror(here, only=only, progress=bar)
    value = {
        "source": there.url,
        "destination": here.url,
        "ok": done.ok,
        "added": done.added,
        "artifacts": [_value(one) for one in done.artifacts],
    }
    session.emit(value, lambda: _text(done))
    return max([exit_code(one.error) for one in done.artifacts if one.error is not None], default=0)


def _value(one: MirroredArtifact) -> dict[str, Any]:
    return {
        "artifact": one.artifact,
        "versions": one.versions,
        "records": one.records,
        "added": one.added,
        "removed": one.removed,
        "error": None if one.error is None else str(one.error),
    }


def _text(done: Mirrored) -> str:
    rows = [
        (clean(one.artifact), f"{count(one.versions, 'version')}, {size(one.added)}, {count(one.records, 'commit')}")
        for one in done.artifacts
        if one.records
    ]
    lines = [table(rows)] if rows else []
    lines += [f"{clean(one.artifact)}: removed in the source, kept here" for one in done.artifacts if one.removed]
    failed = [one for one in done.artifacts if one.error is not None]
    lines += [f"{click.style('not mirrored', fg='red')}: {clean(str(one.error))}" for one in failed]
    same = len(done.artifacts) - len(rows) - len([one for one in done.artifacts if one.error and not one.records])
    lines.append(
        f"{count(len(rows), 'artifact')} brought up to date, {size(done.added)} sent, {same} had nothing new"
        + (f", {len(failed)} not mirrored" if failed else "")
    )
    return "\n".join(lines)


COMMANDS = (mirror,)
