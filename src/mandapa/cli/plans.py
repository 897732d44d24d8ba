"""Plans in files: what a command would do, to be looked at and applied later."""

from __future__ import annotations

import os

from mandapa.errors import InvalidInputError

__all__ = ["read_plan"]

_PLAN_MAX = 256 << 20
"""Bytes of a plan, at most: two million lines."""


def read_plan(path: str | os.PathLike[str]) -> bytes:
    """What the file of a plan holds, which is nobody's until it was checked.

    Raises:
        InvalidInputError: It is too large for one.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(_PLAN_MAX + 1)
    if len(data) > _PLAN_MAX:
        raise InvalidInputError(f"{os.fspath(path)} has more than {_PLAN_MAX >> 20} MiB and is no plan")
    return data
