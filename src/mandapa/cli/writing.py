"""Commands that make things: ``init``, ``add``, ``rm``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from mandapa.cli.progress import Bar
from mandapa.cli.session import EMBEDDED, Session, common, pass_session
from mandapa.cli.text import clean, count
from mandapa.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from mandapa.repository.transaction import Transaction

__all__ = ["COMMANDS"]


@click.command()
@click.argument("url", required=False)
@click.option("--single-writer", is_flag=True, help="Promise that never two processes write at once; it is recorded.")
@common
@pass_session
def init(session: Session, url: str | None, single_writer: bool) -> None:
    """Make a repository, at URL or in ./.mandapa. One that is there stays as it is.

    URL is s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or a folder. The store is asked first whether
    it keeps create-if-absent, on which commits rest; one that does not is refused, unless --single-writer is given.
    """
    import mandapa

    url = url or session.named() or EMBEDDED
    made = False
    try:
        repo = mandapa.open(url)
    except NotFoundError:
        repo = mandapa.open(url, create=True, single_writer=single_writer)
        made = True
    single = repo.settings().get("writers") == "single"
    if single_writer and not single:
        raise InvalidInputError(f"{repo.url} is there already, and is for many writers: that cannot be taken back")

    def text() -> str:
        done = "made a repository" if made else "there is a repository already"
        note = "\none writer at a time: nothing guards against a second one" if single else ""
        return f"{done} at {clean(repo.url)}{note}"

    session.emit({"url": repo.url, "id": repo.id, "made": made, "writers": "single" if single else "many"}, text)


def _meta(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> dict[str, Any]:
    return parse_metadata(given)


def parse_metadata(given: Sequence[str]) -> dict[str, Any]:
    """``K=V`` pairs; V is JSON when it parses as JSON, else a string.

    Raises:
        InvalidInputError: No ``=``, no key, or a key twice.
    """
    import json

    found: dict[str, Any] = {}
    for pair in given:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InvalidInputError(f"--meta {pair!r}: write KEY=VALUE, as in --meta val/loss=1.98")
        if key in found:
            raise InvalidInputError(f"--meta names {key!r} twice")
        found[key] = text
        with suppress(ValueError, RecursionError):
            found[key] = json.loads(text)
    return found


_message = click.option("-m", "--message", default="", metavar="MSG", help="What this version is.")
_metadata = click.option(
    "--meta", "metadata", multiple=True, metavar="K=V", callback=_meta, help="A fact; V is JSON, else text. Repeatable."
)


@click.command()
@click.argument("artifact")
@click.argument("paths", nargs=-1, type=click.Path(), metavar="[PATH]...")
@click.option("--at", metavar="P", help="Where in the artifact: a file's path, or the folder that things go under.")
@_message
@_metadata
@click.option("--replace", is_flag=True, help="Start from nothing: the version is exactly what is added here.")
@click.option("--skip-special", is_flag=True, help="Leave out dangling links, sockets, pipes and devices.")
@click.option("--alias", "aliases", multiple=True, metavar="NAME", help="Let NAME name the new version. Repeatable.")
@click.option("--url", "urls", multiple=True, metavar="AT=URL", help="Record URL at AT; nothing is copied. Repeatable.")
@common
@pass_session
def add(
    session: Session,
    artifact: str,
    paths: tuple[str, ...],
    at: str | None,
    message: str,
    metadata: dict[str, Any],
    replace: bool,
    skip_special: bool,
    aliases: tuple[str, ...],
    urls: tuple[str, ...],
) -> None:
    """Make a version with files or folders in it. What else is in the newest version of ARTIFACT stays.

    One folder gives its contents, so that 'get' gives the same folder back; --at puts them under a folder. One file
    keeps its name, or gets the path that --at says. Several PATHs keep their names, folders too, below --at. What a
    folder replaces, and has no more, is gone from the new version. The artifact comes into being with its first one.
    """
    if not (paths or urls or message or metadata or aliases):
        raise click.UsageError("nothing to add: name a PATH, or --url AT=URL", click.get_current_context())
    pairs = [_url_pair(url) for url in urls]
    places = _places(paths, at)
    repo = session.open()
    transaction = repo.artifact(artifact).transaction(message, metadata, base=None if replace else "latest")
    with Bar("adding, new bytes stored") as bar, transaction as txn:
        txn.progress = bar
        for path, place in places:
            txn.add(path, place, skip_special=skip_special)
        for place, url in pairs:
            txn.add_url(place, url)
        for alias in aliases:
            txn.alias(alias)
    _tell(session, transaction, artifact)


def _places(paths: Sequence[str], at: str | None) -> list[tuple[str, str | None]]:
    """Each path and where it goes."""
    for path in paths:
        if not os.path.exists(path):
            raise NotFoundError(f"there is no file or folder {path!r}" + (": a dangling link" * os.path.islink(path)))
    folder = at is not None and at.endswith("/")
    at = at.rstrip("/") if at else at
    if len(paths) == 1 and (os.path.isdir(paths[0]) or not folder):
        return [(paths[0], at)]
    places: dict[str, str] = {}
    for path in paths:
        name = os.path.basename(os.path.abspath(path))
        place = f"{at}/{name}" if at else name
        if place in places:
            raise InvalidInputError(f"{places[place]!r} and {path!r} would both be at {place!r}: add them one by one")
        places[place] = path
    return [(path, place) for place, path in places.items()]


def _url_pair(text: str) -> tuple[str, str]:
    at, equals, url = text.partition("=")
    if not equals or not at or "://" not in url:
        raise InvalidInputError(
            f"--url {at!r}...: write AT=URL, as in --url data/train.parquet=s3://bucket/train.parquet"
        )
    return at, url


@click.command()
@click.argument("artifact")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@_message
@_metadata
@common
@pass_session
def rm(session: Session, artifact: str, paths: tuple[str, ...], message: str, metadata: dict[str, Any]) -> None:
    """Make a version without these files or folders. Older versions keep them."""
    repo = session.open()
    if not repo.artifact(artifact).exists():
        raise repo.no_artifact(artifact)
    transaction = repo.artifact(artifact).transaction(message, metadata)
    with transaction as txn:
        for path in paths:
            txn.remove(path.rstrip("/") or path)
    _tell(session, transaction, artifact)


def _tell(session: Session, txn: Transaction, artifact: str) -> None:
    from mandapa.cli.values import counts_of, counts_text, from_parent, summary, version_value

    version = txn.version
    if version is None:
        session.emit({"artifact": artifact, "made": False}, lambda: "nothing to add: no version was made")
        return
    made = txn.made
    changes = from_parent(version) if made else None

    def text() -> str:
        if not made:
            return f"nothing changed: {version.address} stays the newest"
        told = "" if changes is None else f": {counts_text(changes)}"
        return f"{version.address}  {count(version.asset_count, 'asset')}{told}; {summary(version)}"

    session.emit(
        {**version_value(version), "made": made, "changes": None if changes is None else counts_of(changes)}, text
    )


COMMANDS = (init, add, rm)
