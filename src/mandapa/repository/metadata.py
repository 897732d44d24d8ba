"""Metadata and messages as a record can keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from mandapa.errors import InvalidInputError
from mandapa.format.strict import MESSAGE_MAX, METADATA_MAX

__all__ = ["clean_message", "clean_metadata"]

_DEPTH = 16


def clean_message(message: str) -> str:
    """``message`` if a record can keep it.

    Raises:
        InvalidInputError: Not a string, not encodable as UTF-8, or above 4 KiB.
    """
    if not isinstance(message, str):
        raise InvalidInputError(f"a message is a string, not {type(message).__name__}")
    size = len(_utf8(message, "the message"))
    if size > MESSAGE_MAX:
        raise InvalidInputError(f"a message of {size:,} bytes; {MESSAGE_MAX:,} at most: put long texts into an asset")
    return message


def clean_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metadata as JSON keeps it: NaN and infinities become strings, tuples lists, and numpy or torch scalars numbers.

    Raises:
        InvalidInputError: A value that JSON has no word for (the message names its key), or above 16 KiB.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise InvalidInputError(f"metadata is a mapping of names to values, not {type(metadata).__name__}")
    clean = _object(metadata, "metadata", 0)
    size = len(msgspec.json.encode(clean))
    if size > METADATA_MAX:
        raise InvalidInputError(f"metadata of {size:,} bytes; {METADATA_MAX:,} at most: put large facts into an asset")
    return clean


def _object(value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
    result = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise InvalidInputError(f"{where}: the key {key!r} is not a string")
        _utf8(key, where)
        result[key] = _value(item, f"{where}[{key!r}]", depth + 1)
    return result


def _value(value: Any, where: str, depth: int) -> Any:
    if depth > _DEPTH:
        raise InvalidInputError(f"{where}: nested more than {_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _utf8(value, where)
        return str(value)
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise InvalidInputError(f"{where}: {value} does not fit 64 bits; store it as a string")
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return _object(value, where, depth)
    if isinstance(value, list | tuple):
        return [_value(item, f"{where}[{at}]", depth + 1) for at, item in enumerate(value)]
    item = getattr(value, "item", None)
    if callable(item):
        try:
            scalar = item()
        except (TypeError, ValueError, RuntimeError):
            scalar = value
        if isinstance(scalar, bool | int | float | str):
            return _value(scalar, where, depth)
    raise InvalidInputError(f"{where}: JSON cannot hold {type(value).__name__}; use numbers, strings, lists, mappings")


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(f"{where}: {text[:40]!r} cannot be written as UTF-8") from None
