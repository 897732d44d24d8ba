"""A run's reads, in a short-lived process: the trainer holds no client of a cloud, which a fork would break.

::

    python -m mandapa.run.reader        # started by a run; one JSON object on standard input, one on standard output
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from mandapa import errors
from mandapa.errors import MandapaError, StorageError
from mandapa.run.backend import open_repository, spec_from
from mandapa.run.process import environment

__all__ = ["error_from", "fetch", "main"]


def fetch(
    backend: Mapping[str, Any], address: str, dest: str, *, folder: str = "", only: list[str] | None = None
) -> dict[str, Any]:
    """Download a version, in another process; gives ``address`` (by number), ``files``, ``skipped``, ``size``.

    Args:
        backend: What `value_of` gave.
        address: Of the version.
        dest: Where its files go.
        folder: Only the files of this folder, without its name; or only this file, under its last name.
        only: Patterns over whole paths.

    Raises:
        MandapaError: As `Version.download` and `Repository.__getitem__`.
    """
    asked = {"backend": backend, "address": address, "dest": dest, "folder": folder, "only": only}
    found = subprocess.run(
        [sys.executable, "-m", "mandapa.run.reader"],
        input=msgspec.json.encode(asked),
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
        version = open_repository(spec_from(asked["backend"]), create=False)[asked["address"]]
        top = asked["folder"] or version.path
        inside = f"{top}/" if top else ""
        only = asked["only"]

        def keep(path: str) -> bool:
            wanted = path == top or path.startswith(inside)
            return wanted and (only is None or any(fnmatchcase(path, pattern) for pattern in only))

        def rename(path: str) -> str:
            return path.rpartition("/")[2] if path == top else path.removeprefix(inside)

        result = version.restore(asked["dest"], keep=keep, rename=rename if asked["folder"] else None)
        answer = {"address": version.address, "files": result.files, "skipped": result.skipped, "size": result.bytes}
    except (MandapaError, OSError) as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.buffer.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    main()
