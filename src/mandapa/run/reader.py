"""A run's reads, in a short-lived process: the trainer holds no client of a cloud, which a fork would break.

::

    python -m mandapa.run.reader        # started by a run; one JSON object on standard input, one on standard output
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from mandapa import errors
from mandapa.address import parse_address
from mandapa.errors import MandapaError, NotFoundError, StorageError
from mandapa.repository.repository import Repository
from mandapa.repository.version import Version
from mandapa.run.backend import checkpoint_place, name_below, open_repository, spec_from
from mandapa.run.process import environment
from mandapa.run.repository_backend import newest_checkpoint as newest_of

__all__ = ["error_from", "fetch", "main", "newest_checkpoint"]


def fetch(
    backend: Mapping[str, Any],
    address: str,
    dest: str,
    *,
    folder: str = "",
    only: list[str] | None = None,
    newest: bool = False,
) -> dict[str, Any]:
    """Download a version, in another process; gives ``address`` (by number), ``files``, ``skipped``, ``size``.

    Args:
        backend: What `value_of` gave.
        address: Of the version.
        dest: Where its files go.
        folder: Only the files of this folder, without its name; or only this file, under its last name.
        only: Patterns over whole paths.
        newest: Of the newest version of the artifact that was made for the checkpoint ``folder``, or else has such a
            file; which version the address names does not count.

    Raises:
        MandapaError: As `Version.download` and `Repository.__getitem__`.
    """
    return _ask(address, backend=backend, dest=dest, folder=folder, only=only, newest=newest)


def newest_checkpoint(backend: Mapping[str, Any], address: str) -> tuple[str, str]:
    """A version and the place of the checkpoint that it has, asked in another process.

    Args:
        backend: What `value_of` gave.
        address: Of an artifact: its newest checkpoint, by step; or of a version, if it names one.

    Raises:
        MandapaError: As `Repository.__getitem__`; `NotFoundError` when there is no checkpoint.
    """
    found = _ask(address, backend=backend, dest=None)
    return found["address"], found["place"]


def _ask(address: str, **asked: Any) -> dict[str, Any]:
    found = subprocess.run(
        [sys.executable, "-m", "mandapa.run.reader"],
        input=msgspec.json.encode({"address": address, **asked}),
        capture_output=True,
        env=environment(),
        check=False,
    )
    try:
        answer: dict[str, Any] = msgspec.json.decode(found.stdout)
    except msgspec.DecodeError:
        said = found.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise StorageError(f"{address} could not be fetched: {said or f'exit code {found.returncode}'}") from None
    if "error" in answer:
        raise error_from(answer["error"], answer["message"])
    return answer


def error_from(name: str, message: str) -> MandapaError:
    """The error that another process had."""
    kind = getattr(errors, name, StorageError) if name in errors.__all__ else StorageError
    made: MandapaError = kind(message)
    return made


def main() -> None:
    """Answer one question."""
    asked = msgspec.json.decode(sys.stdin.buffer.read())
    try:
        repo = open_repository(spec_from(asked["backend"]), create=False)
        answer = _find(repo, asked["address"]) if asked["dest"] is None else _fetch(repo, **asked)
    except (MandapaError, OSError) as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.buffer.write(msgspec.json.encode(answer))


def _fetch(
    repo: Repository, *, address: str, dest: str, folder: str, only: list[str] | None, newest: bool, **_: Any
) -> dict[str, Any]:
    version = _newest_with(repo, parse_address(address).name, folder) if newest else repo[address]
    top = folder or version.path
    inside = f"{top}/" if top else ""

    def keep(path: str) -> bool:
        wanted = path == top or path.startswith(inside)
        return wanted and (only is None or any(fnmatchcase(path, pattern) for pattern in only))

    result = version.restore(dest, keep=keep, rename=(lambda path: name_below(path, top)) if folder else None)
    return {"address": version.address, "files": result.files, "skipped": result.skipped, "size": result.bytes}


def _newest_with(repo: Repository, name: str, path: str) -> Version:
    versions = repo.artifact(name).versions()[::-1]
    for version in versions:  # all that it needs is in the log
        place = checkpoint_place(version.metadata)
        if place and (path == place or path.startswith(f"{place}/")) and path in version.assets:
            return version
    for version in versions:
        if path in version.assets:
            return version
    raise NotFoundError(f"no version of {name} has {path!r}")


def _find(repo: Repository, address: str) -> dict[str, Any]:
    parsed = parse_address(address)
    named = ":" in address.partition("/")[0]
    version = repo[str(replace(parsed, path=""))] if named else None
    found = [one for one in repo.artifact(parsed.name).versions() if checkpoint_place(one.metadata)]
    if version is not None:
        found = [one for one in found if one.number <= version.number][-1:]
    best = newest_of(found)
    if best is None:
        raise NotFoundError(f"{address} has no checkpoint")
    return {"address": (version or best).address, "place": checkpoint_place(best.metadata)}


if __name__ == "__main__":
    main()
