"""What is true of a run: who started it, when, where, with what code. ``.mandapa/run.json`` in each version."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mandapa.environment import who
from mandapa.run.secrets import redact, redact_arguments

__all__ = ["gather", "ranks_from_environment"]

_GIT_PATIENCE = 5.0  # seconds
_DIRTY_MAX = 200  # files that are named


def ranks_from_environment(environ: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Rank, number of ranks, local rank and number of local ranks, as torchrun (or Open MPI) tells them."""

    def first(*names: str, default: int) -> int:
        for name in names:
            with suppress(ValueError, KeyError):
                return int(environ[name])
        return default

    world = first("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", default=1)
    rank = first("RANK", "OMPI_COMM_WORLD_RANK", default=0)
    local_world = first("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", default=world)
    local_rank = first("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", default=rank % max(local_world, 1))
    if not 0 <= rank < world:
        return 0, 1, 0, 1
    return rank, world, local_rank, min(max(local_world, 1), world)


def gather(*, run: str, attempt: int, started: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The facts of a process, secrets redacted. Takes some ten milliseconds; asks nothing of any network."""
    return {
        "format": 1,
        "run": run,
        "attempt": attempt,
        "started": started,
        "who": who(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": redact_arguments([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git(),
        "packages": _packages(),
        "ranks": dict(ranks),
    }


def _git() -> dict[str, Any] | None:
    """Commit, branch and what is not committed, of the repository around the working directory."""
    commit = _ask("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = (_ask("status", "--porcelain", "--untracked-files=no") or "").splitlines()
    remote = _ask("config", "--get", "remote.origin.url")
    return {
        "commit": commit.strip(),
        "branch": (_ask("rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "remote": redact(remote.strip()) if remote else None,
        "dirty": bool(changed),
        "changed": [line[3:] for line in changed[:_DIRTY_MAX]],
    }


def _ask(*arguments: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(  # noqa: S603 - git, by name
            ["git", "--no-optional-locks", *arguments],  # noqa: S607
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_PATIENCE,
            check=False,
        )
        if found.returncode == 0:
            return found.stdout
    return None


def _packages() -> dict[str, str]:
    """Versions of what is installed, read from the heads of its files: to parse all of them takes ten times as long."""
    from importlib import metadata

    found = {}
    for package in metadata.distributions():
        with suppress(Exception):  # a broken installation is not ours to mend
            text = package.read_text("METADATA") or package.read_text("PKG-INFO") or package.read_text("") or ""
            head = text.partition("\n\n")[0].splitlines()
            fields = dict(line.split(": ", 1) for line in head if line.startswith(("Name: ", "Version: ")))
            found[fields["Name"]] = fields["Version"]
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))
