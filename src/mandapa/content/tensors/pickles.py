"""The structure of a checkpoint from torch's ``data.pkl``, by an interpreter that imports and calls nothing.

A pickle is a program for a stack machine. This machine knows containers, numbers, texts and the few names that torch
writes for tensors; every other name, and whatever would be made by calling it, is an `Opaque`. Bounded in time and
memory by the number of instructions and the bytes of the program. Source: CPython, Lib/pickletools.py;
torch/_utils.py and torch/serialization.py for what a tensor is made of.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import msgspec

from mandapa.content.tensors.dtypes import ITEM_SIZES, TORCH_STORAGES

__all__ = ["DIMENSIONS_MAX", "Allowance", "BadPickle", "Opaque", "Storage", "View", "named_tensors", "read_pickle"]

DIMENSIONS_MAX = 64

_DEPTH_MAX = 64
_NAME_MAX = 2048  # characters


class BadPickle(ValueError):  # noqa: N818 - not an error: whoever reads structures catches it
    """Not a pickle, or one that torch does not write; the message says why."""


class Allowance:
    """What the pickles of one file may cost together.

    Attributes:
        steps: Instructions; about 33 make a tensor.
        items: Values that containers hold, each counted as often as it is reached.
        named: Tensors and containers, the same.
        characters: Of all their names.
    """

    def __init__(self) -> None:
        self.steps = 1_500_000
        self.items = 1_500_000
        self.named = 200_000
        self.characters = 16 << 20


class Storage(msgspec.Struct, frozen=True, gc=False):
    """A persistent id: where the bytes of tensors are."""

    dtype: str
    key: str
    count: int
    """Elements of ``dtype``."""


class View(msgspec.Struct, frozen=True, gc=False):
    """A tensor: which elements of a storage it shows, counted in elements of ``dtype``."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Opaque(msgspec.Struct, frozen=True, gc=False):
    """Something that is not looked into; ``lost`` says why, where it was made of tensors."""

    lost: str = ""


class _Global(msgspec.Struct, frozen=True, gc=False):
    module: str
    name: str


class _Pairs(list[Any]):
    """The keys and values of a dict, in turn; never hashed, as keys can be made to collide."""

    __slots__ = ()


class _Mark:
    pass


_MARK = _Mark()
_OPAQUE = Opaque()
_Stack: TypeAlias = list[Any]


def read_pickle(data: bytes | bytearray, allowance: Allowance) -> Any:
    """What a pickle of torch describes: lists, tuples, `_Pairs`, plain values, `View`, `Storage` and `Opaque`.

    Takes from ``allowance`` what it costs.

    Raises:
        BadPickle: It is broken, too long, or uses what torch does not.
    """
    machine = _Machine(data)
    try:
        return machine.run(allowance)
    except (IndexError, struct.error, TypeError, UnicodeDecodeError) as error:
        raise BadPickle(f"its pickle is broken near byte {machine.at}") from error


def named_tensors(root: Any, allowance: Allowance) -> Iterator[tuple[str, View | Opaque]]:
    """The tensors of a structure with their dotted names, and in the place of lost ones why; the root itself is "".

    Raises:
        BadPickle: It is nested deeper than 64, or larger than it looks because it contains itself.
    """
    stack: list[tuple[str, int, Any]] = [("", 0, root)]
    while stack:
        name, depth, value = stack.pop()
        if isinstance(value, (View, Opaque)):
            if isinstance(value, View) or value.lost:
                yield name, value
            continue
        below: Iterable[tuple[Any, Any]]
        if isinstance(value, _Pairs):
            below = zip(value[::2], value[1::2], strict=True)
        elif isinstance(value, (list, tuple)):
            below = enumerate(value)
        else:
            continue
        if depth == _DEPTH_MAX:
            raise BadPickle(f"its structure is nested deeper than {_DEPTH_MAX}")
        for key, item in below:
            allowance.items -= 1
            if isinstance(item, (View, Opaque, list, tuple)):
                text = _key(key)
                path = f"{name}.{text}" if depth else text
                allowance.named -= 1
                allowance.characters -= len(path)
                if len(path) > _NAME_MAX or allowance.characters < 0 or allowance.named < 0:
                    raise BadPickle("its structure is too large, or its names too long")
                stack.append((path, depth + 1, item))
            if allowance.items < 0:
                raise BadPickle("its structure is too large")


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, (int, float)) or key is None else "?"


class _Machine:
    """One run over one pickle."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.at = 0
        self.stack: _Stack = []
        self.memo: dict[int, Any] = {}

    def run(self, allowance: Allowance) -> Any:
        data = self.data
        steps = _STEPS
        for left in range(allowance.steps - 1, -1, -1):
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                allowance.steps = left
                return self.stack[-1]
            step = steps[code]
            if step is None:
                raise BadPickle(f"its pickle has an instruction that torch does not write, {chr(code)!r}")
            step(self)
        raise BadPickle("its structure is too large")

    def take(self, length: int) -> bytes | bytearray:
        start = self.at
        end = start + length
        if end > len(self.data):
            raise BadPickle("its pickle is cut off")
        self.at = end
        return self.data[start:end]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self, length: int) -> str:
        return self.take(length).decode("utf-8")

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1024)
        if end < 0:
            raise BadPickle("its pickle has a name without an end")
        line = self.take(end + 1 - self.at)
        return line[:-1].decode("utf-8")

    def to_mark(self) -> _Stack:
        """What was pushed since the last mark, which goes too."""
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise BadPickle("its pickle is broken: a mark is missing")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def persistent(self) -> None:
        """A storage: ("storage", class, key, device, elements)."""
        id_ = self.stack.pop()
        if isinstance(id_, tuple) and len(id_) == 5 and id_[0] == "storage":
            _, class_, key, _, count = id_
            if isinstance(class_, _Global) and class_.module in ("torch", "torch.storage"):
                dtype = TORCH_STORAGES.get(class_.name)
                if dtype is not None and isinstance(key, str) and _is_size(count):
                    self.push(Storage(dtype, key, count))
                    return
        self.push(_OPAQUE)

    def reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], args)

    def new(self, arguments: int) -> None:
        del self.stack[-arguments:]
        self.stack[-1] = _OPAQUE

    def build(self) -> None:
        """State of an object: what torch gives a dict is no tensor, and other objects are not looked into."""
        self.stack.pop()

    def append(self, items: _Stack) -> None:
        target = self.stack[-1]
        if isinstance(target, list) and not isinstance(target, _Pairs):
            target += items

    def set_items(self, items: _Stack) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise BadPickle("its pickle is broken: a key without a value")
        if isinstance(target, _Pairs):
            target += items

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise BadPickle("its pickle is broken: it takes what it has not put")
        self.stack.append(self.memo[place])

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise BadPickle("its pickle is broken: the stack is empty")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def stack_global(self) -> _Global | Opaque:
        module, name = self.last(2)
        return _Global(module, name) if isinstance(module, str) and isinstance(name, str) else _OPAQUE


def _made(function: Any, args: Any) -> Any:
    """What calling ``function`` with ``args`` would make, as far as torch makes tensors of it."""
    if not isinstance(function, _Global) or not isinstance(args, tuple):
        return _OPAQUE
    module, name = function.module, function.name
    if module == "collections" and name in ("OrderedDict", "defaultdict"):
        return _Pairs()
    if (module, name) == ("torch", "Size") and len(args) == 1 and isinstance(args[0], tuple):
        return args[0]
    if module not in ("torch._utils", "torch._tensor"):
        return Opaque(f"{module}.{name} makes it") if module.startswith("torch") and "rebuild" in name else _OPAQUE
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and args:
        return args[0]
    if name == "_rebuild_from_type_v2" and len(args) == 4:
        kind = args[1]
        if isinstance(kind, _Global) and (kind.module, kind.name) in _PLAIN_TYPES:
            return _made(args[0], args[2])
        return Opaque("it is of a class of its own")
    if name == "_rebuild_tensor_v2" and 6 <= len(args) <= 7:
        return _view(args, None, args[6] if len(args) == 7 else None)
    if name == "_rebuild_tensor_v3" and 7 <= len(args) <= 8:
        return _view(args, args[6], args[7] if len(args) == 8 else None)
    return Opaque(f"{name} makes it") if "rebuild" in name else _OPAQUE


def _view(args: tuple[Any, ...], kind: Any, metadata: Any) -> View | Opaque:
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, Storage):
        return Opaque("its storage is not in the file")
    dtype = storage.dtype
    if kind is not None:
        if not isinstance(kind, _Global) or kind.module != "torch" or kind.name not in ITEM_SIZES:
            return Opaque("its dtype is not known")
        dtype = kind.name
    if isinstance(metadata, _Pairs) and metadata:
        return Opaque("it is a conjugated or negated view")
    if not (
        _is_size(offset)
        and isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides) <= DIMENSIONS_MAX
        and all(map(_is_size, shape))
        and all(map(_is_size, strides))
    ):
        return Opaque("its shape or its strides cannot be")
    return View(storage, dtype, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


_PLAIN_TYPES = (
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
)

_Step: TypeAlias = Callable[[_Machine], object]


def _long(machine: _Machine) -> None:
    machine.push(int.from_bytes(machine.take(machine.number(1)), "little", signed=True))


def _frozen_set(machine: _Machine) -> None:
    machine.to_mark()
    machine.push(_OPAQUE)


def _skip(width: int) -> _Step:
    """Bytes in any form: never part of a tensor's description."""

    def step(machine: _Machine) -> None:
        machine.take(machine.number(width))
        machine.push(_OPAQUE)

    return step


_INSTRUCTIONS: dict[bytes, _Step] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.push(_MARK),
    b"0": lambda m: m.stack.pop(),
    b"1": lambda m: m.to_mark(),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"J": lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    b"\x8a": _long,
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"\x8c": lambda m: m.push(m.text(m.number(1))),
    b"X": lambda m: m.push(m.text(m.number(4))),
    b"\x8d": lambda m: m.push(m.text(m.number(8))),
    b"U": lambda m: m.push(m.take(m.number(1)).decode("latin-1")),
    b"T": lambda m: m.push(m.take(m.number(4)).decode("latin-1")),
    b"C": _skip(1),
    b"B": _skip(4),
    b"\x8e": _skip(8),
    b"\x96": _skip(8),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push(_Pairs()),
    b"\x8f": lambda m: m.push(_OPAQUE),  # a set
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.to_mark())),
    b"l": lambda m: m.push(m.to_mark()),
    b"\x85": lambda m: m.push(m.last(1)),
    b"\x86": lambda m: m.push(m.last(2)),
    b"\x87": lambda m: m.push(m.last(3)),
    b"a": lambda m: m.append([m.stack.pop()]),
    b"e": lambda m: m.append(m.to_mark()),
    b"\x90": lambda m: m.to_mark(),  # into a set
    b"\x91": _frozen_set,
    b"s": lambda m: m.set_items(list(m.last(2))),
    b"u": lambda m: m.set_items(m.to_mark()),
    b"q": lambda m: m.put(m.number(1)),
    b"r": lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.get(m.number(1)),
    b"j": lambda m: m.get(m.number(4)),
    b"c": lambda m: m.push(_Global(m.line(), m.line())),
    b"\x93": lambda m: m.push(m.stack_global()),
    b"R": lambda m: m.reduce(),
    b"\x81": lambda m: m.new(1),
    b"\x92": lambda m: m.new(2),
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.persistent(),
}
_STOP = ord(".")
_STEPS: list[_Step | None] = [_INSTRUCTIONS.get(bytes([code])) for code in range(256)]
