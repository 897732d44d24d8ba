"""Commands that take things out: ``get``, ``cat``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import click

from mandapa.cli.progress import Bar
from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import clean, count, size
from mandapa.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from mandapa.repository.version import Asset, Version

__all__ = ["COMMANDS"]

_PIECE = 4 << 20
_JSON_MAX = 256 << 20  # bytes of a file that is given as one string


@click.command()
@click.argument("address")
@click.argument("dest", type=click.Path())
@click.option("--only", multiple=True, metavar="PATTERN", help="Only paths that match (* matches / too). Repeatable.")
@common
@pass_session
def get(session: Session, address: str, dest: str, only: tuple[str, ...]) -> None:
    """Restore a version, a folder or a file.

    A version or a folder becomes the contents of DEST; a file becomes DEST, or goes into it when it is a folder.
    Files that are there and equal stay, different ones are replaced, others are left alone. A second 'get' goes on
    where the first was stopped. PATTERN is matched against the whole path in the version.
    """
    version = session.open()[address]
    place = version.path
    asset = version.assets.get(place) if place else None
    rename: Callable[[str], str] | None = None
    if asset is not None:
        folder, name = _file_target(asset, dest)
        keep = _keeps(only, place)
        rename = lambda _: name  # noqa: E731
    else:
        folder = dest
        keep = _keeps(only, f"{place}/" if place else "")
        if place:
            rename = lambda path: path[len(place) + 1 :]  # noqa: E731
    wanted = [found for found in version.assets.values() if keep(found.path)]
    if not wanted and (place or only):
        raise NotFoundError(f"{version.address} has nothing that matches {' '.join(only) or place!r}")
    total = sum(found.size or 0 for found in wanted if found.kind == "file")
    with Bar(f"getting {clean(address)}", total) as bar:
        result = version.restore(folder, keep=keep, rename=rename, progress=bar)
    urls = [found for found in wanted if found.kind == "url"]
    value = {
        "address": version.address,
        "dest": os.path.abspath(dest),
        "files": len(wanted) - len(urls),
        "size": total,
        "written": result.files,
        "skipped": result.skipped,
        "urls": [{"path": found.path, "url": found.url} for found in urls],
    }
    session.emit(value, lambda: _got(version, wanted, urls, dest, total))


def _keeps(only: tuple[str, ...], place: str) -> Callable[[str], bool]:
    def keep(path: str) -> bool:
        inside = path.startswith(place) if place.endswith("/") or not place else path == place
        return inside and (not only or any(fnmatchcase(path, pattern) for pattern in only))

    return keep


def _file_target(asset: Asset, dest: str) -> tuple[str, str]:
    """The folder and the name that one file goes to, as ``cp`` has it."""
    name = asset.path.rpartition("/")[2]
    if os.path.isdir(dest) or dest.endswith("/"):
        return dest, name
    return os.path.dirname(dest) or ".", os.path.basename(dest)


def _got(version: Version, wanted: list[Asset], urls: list[Asset], dest: str, total: int) -> str:
    lines = [f"{version.address}  {count(len(wanted) - len(urls), 'file')}, {size(total)} -> {clean(dest)}"]
    lines += [f"not fetched: {clean(found.path)} is at {clean(found.url)}" for found in urls]
    return "\n".join(lines)


@click.command()
@click.argument("address", metavar="ADDRESS/PATH")
@common
@pass_session
def cat(session: Session, address: str) -> None:
    """Print one file of a version, byte for byte."""
    version = session.open()[address]
    if not version.path:
        raise InvalidInputError(f"name a file in {version.address}, as in 'mandapa cat {version.address}/hparams.yaml'")
    with version.open(version.path) as file:
        if session.json:
            if (version.assets[version.path].size or 0) > _JSON_MAX:
                raise InvalidInputError(f"{version.path} has more than {_JSON_MAX >> 20} MiB: take it without --json")
            session.emit(_content(version, file.read(_JSON_MAX)), str)
            return
        out = sys.stdout.buffer
        first = True
        while piece := file.read(_PIECE):
            if first and sys.stdout.isatty() and b"\0" in piece[:8192]:
                raise InvalidInputError(
                    f"{version.path} is not text: send it to a file, as in 'mandapa cat ... > file'"
                )
            first = False
            out.write(piece)
        out.flush()


def _content(version: Version, data: bytes) -> dict[str, str]:
    import base64

    found = {"address": f"{version.address}/{version.path}"}
    try:
        return {**found, "encoding": "utf-8", "content": data.decode()}
    except UnicodeDecodeError:
        return {**found, "encoding": "base64", "content": base64.b64encode(data).decode()}


COMMANDS = (get, cat)
