"""Hyperparameters: of any kind as plain values, as YAML, and what differs between two of them."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import Enum
from types import SimpleNamespace
from typing import Any

from mandapa.errors import InvalidInputError

__all__ = ["diff", "from_yaml", "plain", "to_yaml"]

_DEPTH = 32
_YAML_DEPTH = 100
_YAML_MAX = 1 << 20
_KEY_MAX = 1000
"""Characters of a written key: YAML reads 1,024 at most."""
_VALUES_MAX = 100_000
_TEXT_MAX = 200
_ARRAY_MAX = 100

# -- plain values ------------------------------------------------------------------------------------------------------


def plain(value: Any) -> dict[str, Any]:
    """Hyperparameters as plain JSON values (NaN and infinities allowed), the same for the same ones in every process.

    ``value`` is a mapping, a dataclass, attrs or msgspec object, a Namespace, a pydantic model, an OmegaConf container,
    a named tuple, or anything with ``to_dict()``; ``None`` is ``{}``. Below it the same become mappings; sequences and
    small arrays (100 elements at most) lists, sets sorted lists, scalars of any framework numbers, enum members their
    names, paths strings, and everything else a text of 200 characters at most without memory addresses.

    >>> from types import SimpleNamespace
    >>> plain(SimpleNamespace(lr=0.1, betas=(0.9, 0.99), init=len, mode={"b", "a"}))
    {'lr': 0.1, 'betas': [0.9, 0.99], 'init': 'builtins.len', 'mode': ['a', 'b']}

    Raises:
        InvalidInputError: Not one of these, nested more than 32 deep, something inside itself, more than 100,000
            values, two keys of one name, a key that is too long, or an object that fails to give its values. It says
            where.
    """
    if value is None:
        return {}
    result = _Plain().of(value, "hparams", 0)
    if not isinstance(result, dict):
        raise InvalidInputError(
            f"hparams are no {type(value).__name__}: give a mapping, a dataclass, attrs or pydantic object, a "
            "Namespace, an OmegaConf container, or an object with to_dict()"
        )
    return result


class _Plain:
    """One conversion: what it is inside of, and how many values it has made."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._count = 0

    def of(self, value: Any, where: str, depth: int) -> Any:
        self._count += 1
        if self._count > _VALUES_MAX:
            raise InvalidInputError(f"hparams of more than {_VALUES_MAX:,} values: put large facts into an asset")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, Enum):
            return _clean(value.name or str(value))
        if isinstance(value, str):
            return _clean(value)
        if isinstance(value, int):
            return int(value) if abs(value).bit_length() <= 4096 else f"<int {abs(value).bit_length()} bits>"
        if isinstance(value, float):
            return float(value)
        if id(value) in self._open:
            raise InvalidInputError(f"{where}: contains itself")
        if depth > _DEPTH:
            raise InvalidInputError(f"{where}: nested more than {_DEPTH} deep")
        self._open.add(id(value))
        try:
            return self._other(value, where, depth)
        except InvalidInputError:
            raise
        except Exception as error:  # an object's own code may raise anything
            raise InvalidInputError(
                f"{where}: a {type(value).__qualname__} that fails to give its values: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:_TEXT_MAX]}"
            ) from error
        finally:
            self._open.discard(id(value))

    def _other(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, type):
            return _text(value)
        if isinstance(value, os.PathLike):
            return _clean(str(value))
        if isinstance(value, bytes | bytearray | memoryview):
            return f"<{type(value).__name__} {len(value)}>"
        shape = _shape(value)
        if shape is not None:
            return self._array(value, shape, where, depth)
        inner = _unpacked(value)
        if isinstance(inner, Mapping):
            return self._mapping(inner, where, depth)
        if isinstance(inner, Set):
            return _sorted(self.of(item, f"{where}{{}}", depth + 1) for item in inner)
        if isinstance(inner, Sequence) and not isinstance(inner, str | range):
            return [self.of(item, f"{where}[{at}]", depth + 1) for at, item in enumerate(inner)]
        return _text(value) if inner is value else self.of(inner, where, depth + 1)

    def _mapping(self, value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, item in value.items():
            name = _clean(key) if isinstance(key, str) and not isinstance(key, Enum) else _key(key)
            if len(_scalar(name)) > _KEY_MAX:
                raise InvalidInputError(f"{where}: the key {name[:40]!r}... is longer than {_KEY_MAX} characters")
            if name in result:
                raise InvalidInputError(f"{where}: two keys are called {name!r}")
            result[name] = self.of(item, f"{where}.{name}", depth + 1)
        return result

    def _array(self, value: Any, shape: list[int], where: str, depth: int) -> Any:
        if not shape and hasattr(type(value), "item"):
            scalar = value.item()
            return _text(value) if isinstance(scalar, type(value)) else self.of(scalar, where, depth + 1)
        if shape and math.prod(shape) <= _ARRAY_MAX and hasattr(type(value), "tolist"):
            return self.of(value.tolist(), where, depth + 1)
        dtype = getattr(value, "dtype", "")
        name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
        return f"<{type(value).__name__}{' ' if name else ''}{name} {shape}>"


_RECORDS = ("__dataclass_fields__", "__attrs_attrs__", "__struct_fields__", "_fields")


def _shape(value: Any) -> list[int] | None:
    """Of an array, a tensor, a scalar of their kind, or a data frame; None of anything else, such as their config."""
    kind = type(value)
    if not (hasattr(kind, "shape") and (hasattr(kind, "dtype") or hasattr(kind, "dtypes"))):
        return None
    if not hasattr(kind.shape, "__get__") or any(hasattr(kind, mark) for mark in _RECORDS):
        return None
    return [int(size) for size in value.shape]


def _unpacked(value: Any) -> Any:
    """The mapping or sequence that ``value`` says it stands for, or ``value``. No library is imported for it."""
    kind = type(value)
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and omegaconf.OmegaConf.is_config(value):
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return value
    if callable(getattr(kind, "model_dump", None)):  # pydantic 2
        return value.model_dump()
    if hasattr(kind, "__fields__") and callable(getattr(kind, "dict", None)):  # pydantic 1
        return value.dict()
    if callable(getattr(kind, "to_dict", None)):  # before dataclass: it may leave out what is private
        return value.to_dict()
    if hasattr(kind, "__dataclass_fields__"):
        from dataclasses import fields

        return {field.name: getattr(value, field.name) for field in fields(value)}
    if hasattr(kind, "__attrs_attrs__"):
        return {field.name: getattr(value, field.name) for field in kind.__attrs_attrs__}
    if hasattr(kind, "__struct_fields__"):  # msgspec
        return {name: getattr(value, name) for name in kind.__struct_fields__}
    argparse = sys.modules.get("argparse")
    if isinstance(value, SimpleNamespace) or (argparse is not None and isinstance(value, argparse.Namespace)):
        return vars(value)
    if isinstance(value, tuple) and hasattr(kind, "_asdict"):
        return value._asdict()  # type: ignore[attr-defined]
    return value


_ADDRESS = re.compile(r"0x[0-9a-fA-F]{7,}")


def _text(value: Any) -> str:
    """What ``value`` is called, or what it says of itself: 200 characters at most, no memory address."""
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):
        module = getattr(value, "__module__", None)
        text = f"{module}.{name}" if isinstance(module, str) else name
    else:
        text = str(value)
        if _ADDRESS.search(text):
            text = f"{type(value).__module__}.{type(value).__qualname__}"
    return _clean(text if len(text) <= _TEXT_MAX else f"{text[: _TEXT_MAX - 3]}...")


def _key(key: Any) -> str:
    return _clean(key.name or str(key)) if isinstance(key, Enum) else _text(key)


def _clean(text: str) -> str:
    """``text`` as a ``str`` that UTF-8 can hold."""
    text = str.__str__(text)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _sorted(items: Iterable[Any]) -> list[Any]:
    values = list(items)
    try:
        return sorted(values)
    except TypeError:
        return sorted(values, key=lambda value: (type(value).__name__, repr(value)))


# -- YAML --------------------------------------------------------------------------------------------------------------


def to_yaml(value: dict[str, Any]) -> str:
    """Plain values as block YAML in ASCII that readers of YAML 1.1 and 1.2 give back equal; keys in their order.

    >>> print(to_yaml({"lr": 1e-05, "on": ["yes", True], "model": {"layers": 12}}), end="")
    lr: 1.0e-05
    "on":
      - "yes"
      - true
    model:
      layers: 12

    Raises:
        InvalidInputError: No dict, a value that is not plain, a key of more than 1,000 characters, or nested more than
            100 deep: `plain` makes values that can be written.
    """
    if not isinstance(value, dict):
        raise InvalidInputError(f"hparams are written from a dict, not {type(value).__name__}: see plain()")
    lines: list[str] = []
    if value:
        _write(value, "", "", lines)
    return "\n".join(lines) + "\n" if lines else "{}\n"


def _write(value: dict[str, Any] | list[Any], indent: str, lead: str, lines: list[str]) -> None:
    """Add the lines of a container that is not empty, the first of them led by ``lead`` instead of ``indent``."""
    if len(indent) > 2 * _YAML_DEPTH:
        raise InvalidInputError(f"hparams nested more than {_YAML_DEPTH} deep")
    inner = indent + "  "
    if isinstance(value, dict):
        for key, item in value.items():
            name = _scalar(key) if isinstance(key, str) else ""
            if not name or len(name) > _KEY_MAX:
                raise InvalidInputError(f"the key {str(key)[:40]!r} is no string of at most {_KEY_MAX} characters")
            if isinstance(item, dict | list) and item:
                lines.append(f"{lead}{name}:")
                _write(item, inner, inner, lines)
            else:
                lines.append(f"{lead}{name}: {_scalar(item)}")
            lead = indent
    else:
        for item in value:
            if isinstance(item, dict | list) and item:
                _write(item, inner, f"{lead}- ", lines)
            else:
                lines.append(f"{lead}- {_scalar(item)}")
            lead = indent


# No reader takes what begins like a name, and is none of the words below, for anything but a string.
_BARE = re.compile(r"[A-Za-z_/][\w./@+()-]*(?::[\w./@+()-]+)*(?: [\w./@+()-]+)*", re.ASCII)
_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf", "infinity"))
_SPECIAL = re.compile(r"[^ !#-\[\]-~]")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if _BARE.fullmatch(value) and value.lower() not in _WORDS:
            return value
        return f'"{_SPECIAL.sub(_escaped, value)}"'
    if isinstance(value, int):
        try:
            return str(int(value))
        except ValueError as error:
            raise InvalidInputError(f"an integer in hparams is too long: {error}") from None
    if isinstance(value, float):
        return _float(float(value))
    if isinstance(value, dict | list) and not value:
        return "{}" if isinstance(value, dict) else "[]"
    raise InvalidInputError(f"a {type(value).__name__} in hparams is no plain value: see plain()")


def _escaped(found: re.Match[str]) -> str:
    char = found[0]
    code = ord(char)
    return _ESCAPES.get(char) or (f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


def _float(value: float) -> str:
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = repr(value)
    return text if "." in text else text.replace("e", ".0e")


def from_yaml(text: str) -> dict[str, Any] | None:
    """What `to_yaml` wrote as ``text``; None when it is anything else, or more than 1 MiB. Never raises.

    >>> from_yaml(to_yaml({"lr": 0.1, "tags": ["a", "b"]}))
    {'lr': 0.1, 'tags': ['a', 'b']}
    >>> from_yaml("lr: !!float 0.1")
    """
    if not isinstance(text, str) or len(text) > _YAML_MAX or not text.endswith("\n"):
        return None
    try:
        if text == "{}\n":
            return {}
        value, _ = _read(_tokens(text), 0, 0)
        # The same text comes out of exactly the values that it was written from: nothing else needs to be checked.
        return value if isinstance(value, dict) and to_yaml(value) == text else None
    except (ValueError, LookupError, OverflowError, RecursionError):
        return None


_Token = tuple[int, str | None, str | None]
"""Its column; a key, ``""`` for a dash, None for a value alone; the value, None where it is a block that follows."""

_MEMBER = re.compile(r'("(?:[^"\\]|\\.)*+"|[^" ](?:[^:]|:(?! |$))*+):(?: (.+))?')


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    for line in text[:-1].split("\n"):
        rest = line.lstrip(" ")
        column = len(line) - len(rest)
        while rest.startswith("- "):
            tokens.append((column, "", None))
            rest = rest[2:]
            column += 2
            if column > 2 * _YAML_DEPTH + 2:
                raise ValueError
        member = _MEMBER.fullmatch(rest)
        tokens.append((column, member[1], member[2]) if member else (column, None, rest))
    return tokens


def _read(tokens: list[_Token], at: int, column: int) -> tuple[Any, int]:
    """The value that begins with token ``at``, which stands in ``column``, and the token after it."""
    if column > 2 * _YAML_DEPTH + 2 or tokens[at][0] != column:
        raise ValueError
    if tokens[at][1] is None:
        return _value(tokens[at][2] or ""), at + 1
    if tokens[at][1] == "":
        items = []
        while at < len(tokens) and tokens[at][:2] == (column, ""):
            item, at = _read(tokens, at + 1, column + 2)
            items.append(item)
        return items, at
    members = {}
    while at < len(tokens) and tokens[at][0] == column and tokens[at][1]:
        _, key, written = tokens[at]
        if written is None:
            item, at = _read(tokens, at + 1, column + 2)
        else:
            item, at = _value(written), at + 1
        members[_string(key or "")] = item
    return members, at


_INT = re.compile(r"-?[0-9]+")
_FLOAT = re.compile(r"-?[0-9]+\.[0-9]+(?:e[+-][0-9]+)?")
_CONSTANTS: dict[str, Any] = {
    "null": None, "true": True, "false": False, ".nan": math.nan, ".inf": math.inf, "-.inf": -math.inf
}  # fmt: skip
_ESCAPE = re.compile(r"\\(?:u([0-9a-f]{4})|U([0-9a-f]{8})|(.))")
_UNESCAPES = {escape[1]: char for char, escape in _ESCAPES.items()}


def _value(text: str) -> Any:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text in ("{}", "[]"):
        return {} if text == "{}" else []
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return _string(text)


def _string(text: str) -> str:
    return _ESCAPE.sub(_unescaped, text[1:-1]) if text.startswith('"') else text


def _unescaped(found: re.Match[str]) -> str:
    code = found[1] or found[2]
    return chr(int(code, 16)) if code else _UNESCAPES[found[3]]


# -- differences -------------------------------------------------------------------------------------------------------

_ABSENT = object()
_SHOWN = 60


def diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each plain value that differs, by dotted path, sorted; NaN is equal to NaN, 1 to 1.0 but not to True.

    >>> diff({"lr": 3e-4, "model": {"layers": 2}}, {"lr": 1e-4, "model": {"layers": 2}, "warmup": 100})
    ['lr: 0.0003 -> 0.0001', 'warmup: (not there) -> 100']
    """
    lines: list[tuple[str, str]] = []
    _compare(before, after, "", lines)
    return [f"{path}: {change}" for path, change in sorted(lines)]


def _compare(before: Any, after: Any, path: str, lines: list[tuple[str, str]]) -> None:
    dot = f"{path}." if path else ""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in before.keys() | after.keys():
            _compare(before.get(key, _ABSENT), after.get(key, _ABSENT), dot + _printable(str(key)), lines)
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple):
        if _same(before, after):
            return
        if max(len(_dumped(before)), len(_dumped(after))) <= _SHOWN:
            lines.append((path, f"{_dumped(before)} -> {_dumped(after)}"))
            return
        for at in range(max(len(before), len(after))):
            was, now = (side[at] if at < len(side) else _ABSENT for side in (before, after))
            _compare(was, now, f"{dot}{at}", lines)
    elif not _same(before, after):
        was, now = _dumped(before), _dumped(after)
        alike = next((at for at, (one, other) in enumerate(zip(was, now, strict=False)) if one != other), 0)
        skipped = alike - _SHOWN // 3 if alike > _SHOWN // 2 else 0  # else two long texts would look the same
        lines.append((path, f"{_short(was, skipped)} -> {_short(now, skipped)}"))


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return before.keys() == after.keys() and all(_same(item, after[key]) for key, item in before.items())
    if isinstance(before, list | tuple) and isinstance(after, list | tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, bool) is not isinstance(after, bool):
        return False
    return bool(before == after) or (before != before and after != after)  # NaN


def _dumped(value: Any) -> str:
    return "(not there)" if value is _ABSENT else _printable(json.dumps(value, ensure_ascii=False, default=str))


def _short(text: str, skipped: int) -> str:
    if len(text) <= _SHOWN:
        return text
    text = f"...{text[skipped + 3 :]}" if skipped else text
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _printable(text: str) -> str:
    """``text`` with nothing in it that a terminal would obey."""
    return text if text.isprintable() else ascii(text)[1:-1]
