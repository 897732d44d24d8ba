"""Errors as people and scripts see them: one or two lines, and an exit code by what to do next."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from mandapa.cli.text import clean
from mandapa.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    InvalidInputError,
    MandapaError,
    NotFoundError,
    SecurityError,
    StoreNotFoundError,
)

__all__ = ["exit_code", "report"]

_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (click.UsageError, 2),
    (InvalidInputError, 2),
    (SecurityError, 2),
    (NotFoundError, 3),
    (StoreNotFoundError, 3),
    (ConflictError, 4),
    (AlreadyExistsError, 4),
    (CorruptionError, 5),
    (AccessDeniedError, 6),
    (FileNotFoundError, 3),
    (PermissionError, 6),
)

FAILED = 7
"""Anything else: the store or the disk failed, a newer mandapa is needed, or a bug."""


def exit_code(error: BaseException) -> int:
    """0 and 1 are never an error's: they are answers."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAILED)


def report(error: Exception, *, as_json: bool) -> int:
    """Print an error to stderr and give its exit code; with ``MANDAPA_DEBUG`` set, with the traceback."""
    if os.environ.get("MANDAPA_DEBUG"):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    code = exit_code(error)
    message = _message(error)
    if as_json:
        import json

        value: dict[str, Any] = {"error": type(error).__name__, "message": message, "exit_code": code}
        if isinstance(error, ConflictError):
            value["paths"] = list(error.paths)
        click.echo(json.dumps(value), err=True)
    else:
        click.echo(f"mandapa: error: {clean(message)}", err=True)
    return code


def _message(error: Exception) -> str:
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx is not None else "mandapa"
        return f"{error.format_message()} See '{command} --help'."
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, MandapaError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return (
        f"{type(error).__name__}: {error}. This is a bug in mandapa: please report it, "
        "with what MANDAPA_DEBUG=1 prints before this line"
    )
