"""Tensors of a version's files, and what became of them in another version."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mandapa.content.ranges import RangeReader, Target
from mandapa.content.tensors import Structure, TensorPlace, read_structure
from mandapa.content.tensors.arrays import Frameworks
from mandapa.content.tensors.dtypes import ITEM_SIZES
from mandapa.content.tensors.load import read_tensors
from mandapa.digest import Hasher
from mandapa.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from mandapa.repository.version import Version

__all__ = ["Tensor", "TensorChange", "TensorStat", "compare_tensors", "list_tensors", "load_tensors"]

_BLOCK = 1 << 20  # elements that are compared at a time
_FP8 = {"float8_e4m3fn": (4, 3, 7), "float8_e5m2": (5, 2, 15)}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file in a version."""

    name: str
    """In a nested state the keys on the way, joined by dots: ``optim.state.0.exp_avg``."""
    dtype: str
    """As torch calls it: ``float32``, ``bfloat16``."""
    shape: tuple[int, ...]
    size: int
    """Bytes of its elements."""
    hash: Callable[[], str] = field(repr=False, compare=False)

    @property
    def digest(self) -> str:
        """BLAKE3 of its bytes as they stand in the file, hex.

        No request for a tensor that is one chunk (up to 4 MiB, and not grouped with small ones); others are read.
        """
        return self.hash()


@dataclass(frozen=True, slots=True)
class TensorStat:
    """By how much a tensor changed; complex numbers count as pairs. Elements that are NaN or infinite are left out."""

    l2: float
    """Of the difference."""
    relative: float
    """`l2` by that of the tensor before; infinite where that is 0 and the difference is not."""
    max: float
    """The largest absolute difference of an element."""
    cosine: float
    """Of the angle between before and after; NaN where one of them is 0."""
    changed: int
    """Elements of which any bit changed."""
    nan: tuple[int, int]
    """Elements that are NaN, before and after."""
    inf: tuple[int, int]
    """Elements that are infinite, before and after."""


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A tensor that is not the same in two versions of a file."""

    name: str
    before: Tensor | None
    """None: it was added."""
    after: Tensor | None
    """None: it was removed."""
    stat: TensorStat | None = None
    """Where it was asked for, and dtype and shape are as they were."""

    @property
    def kind(self) -> str:
        """``added``, ``removed``, ``dtype``, ``shape`` or ``values``."""
        if self.before is None or self.after is None:
            return "added" if self.before is None else "removed"
        if self.before.dtype != self.after.dtype:
            return "dtype"
        return "shape" if self.before.shape != self.after.shape else "values"


def list_tensors(version: Version, path: str) -> dict[str, Tensor]:
    """The tensors of a file by name; see `Version.tensors`."""
    structure = version.with_file(path, _structure)
    return {place.name: _tensor(version, path, place) for place in structure.tensors}


def load_tensors(
    version: Version,
    path: str,
    names: str | Sequence[str] | None,
    framework: Frameworks,
    into: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Values of tensors by name; see `Version.load_tensors`."""
    wanted = None if names is None else [names] if isinstance(names, str) else list(dict.fromkeys(names))
    problem: list[NotFoundError] = []

    def read(reader: RangeReader) -> dict[str, Any]:
        reader.want_ends()
        structure = read_structure(reader, path, wanted)
        try:
            places = _chosen(structure, wanted, f"{version.address}/{path}")
        except NotFoundError as error:  # a name, not an object of the store, so nothing to try again
            problem.append(error)
            return {}
        return read_tensors(reader, places, framework, into)

    found = version.with_file(path, read)
    if problem:
        raise problem[0]
    return found


def compare_tensors(before: Version, after: Version, path: str, *, stat: bool) -> list[TensorChange]:
    """What became of the tensors of a file; see `Version.diff_tensors`."""
    old = {place.name: place for place in before.with_file(path, _structure).tensors}
    new = {place.name: place for place in after.with_file(path, _structure).tensors}
    changes = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        x = None if a is None else _tensor(before, path, a)
        y = None if b is None else _tensor(after, path, b)
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            changes.append(TensorChange(name, x, y))
            continue
        hashes = before.with_file(path, lambda reader, a=a: _hashes(reader, a))  # type: ignore[misc]
        if hashes is not None and hashes == after.with_file(path, lambda reader, b=b: _hashes(reader, b)):  # type: ignore[misc]
            continue
        measured = _measure(before, after, path, a, b)
        if measured.changed:
            changes.append(TensorChange(name, x, y, measured if stat else None))
    return changes


def _structure(reader: RangeReader) -> Structure:
    reader.want_ends()
    return read_structure(reader, reader.path)


def _chosen(structure: Structure, names: Sequence[str] | None, where: str) -> list[TensorPlace]:
    if names is None:
        if structure.lost:
            name, why = next(iter(structure.lost.items()))
            raise InvalidInputError(f"{where}: tensor {name!r} cannot be read alone ({why}): name those you want")
        return structure.tensors
    by_name = {place.name: place for place in structure.tensors}
    for name in names:
        if name in structure.lost:
            raise InvalidInputError(f"{where}: tensor {name!r} cannot be read alone: {structure.lost[name]}")
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 3)
            hint = f"; there is {', '.join(map(repr, near))}" if near else ""
            raise NotFoundError(f"{where} has no tensor {name!r}{hint}")
    return [by_name[name] for name in names]


def _tensor(version: Version, path: str, place: TensorPlace) -> Tensor:
    def hash_() -> str:
        return version.with_file(path, lambda reader: _digest(reader, place))

    return Tensor(place.name, place.dtype, place.shape, place.size, hash_)


def _digest(reader: RangeReader, place: TensorPlace) -> str:
    hashes = _hashes(reader, place)
    if hashes is not None and len(hashes) == 1:
        return hashes[0].hex()
    hasher = Hasher()
    for start in range(place.start, place.end, 16 << 20):
        block = bytearray(min(16 << 20, place.end - start))
        reader.fill([Target(start, memoryview(block))])
        hasher.update(block)
    return hasher.digest().hex()


def _hashes(reader: RangeReader, place: TensorPlace) -> list[bytes] | None:
    """The hashes of a tensor's chunks, where they hold nothing else; else None."""
    spans = reader.layout.chunks(place.start, place.end)
    if spans and (spans[0].start, spans[-1].end) == (place.start, place.end):
        return [span.piece.hash for span in spans]
    return None if spans else []


def _measure(before: Version, after: Version, path: str, a: TensorPlace, b: TensorPlace) -> TensorStat:
    """The two tensors block by block; both are read."""
    import numpy as np

    square = old_square = new_square = product = largest = 0.0
    changed = 0
    nan, inf = [0, 0], [0, 0]
    for one, two in zip(_blocks(before, path, a), _blocks(after, path, b), strict=True):
        bits = (np.frombuffer(one, np.uint8) != np.frombuffer(two, np.uint8)).reshape(-1, ITEM_SIZES[a.dtype]).any(1)
        changed += int(bits.sum())
        x, y = _floats(one, a.dtype), _floats(two, b.dtype)
        for i, values in enumerate((x, y)):
            nan[i] += int(np.isnan(values).sum())
            inf[i] += int(np.isinf(values).sum())
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = np.where(finite, x, 0), np.where(finite, y, 0)
        difference = y - x
        square += float(difference @ difference)
        old_square += float(x @ x)
        new_square += float(y @ y)
        product += float(x @ y)
        largest = max(largest, float(np.abs(difference).max(initial=0)))
    norms = math.sqrt(old_square) * math.sqrt(new_square)
    return TensorStat(
        l2=math.sqrt(square),
        relative=math.sqrt(square / old_square) if old_square else math.inf if square else 0.0,
        max=largest,
        cosine=product / norms if norms else math.nan,
        changed=changed,
        nan=(nan[0], nan[1]),
        inf=(inf[0], inf[1]),
    )


def _blocks(version: Version, path: str, place: TensorPlace) -> Iterator[bytes | bytearray]:
    """A tensor's elements in C order, a block of them at a time."""
    if place.strides is not None:  # its elements are strewn: all of it at once
        array = version.with_file(path, lambda reader: read_tensors(reader, [_as_bits(place)], "numpy", None))
        data = array[place.name].tobytes()
        step = _BLOCK * ITEM_SIZES[place.dtype]
        yield from (data[at : at + step] for at in range(0, len(data), step))
        return
    step = _BLOCK * ITEM_SIZES[place.dtype]
    for start in range(place.start, place.end, step):
        block = bytearray(min(step, place.end - start))
        version.with_file(path, lambda reader, s=start, b=block: reader.fill([Target(s, memoryview(b))]))  # type: ignore[misc]
        yield block


def _as_bits(place: TensorPlace) -> TensorPlace:
    """The tensor as NumPy can hold it, whatever its type: elements of as many bytes."""
    kinds = {1: "uint8", 2: "int16", 4: "int32", 8: "int64", 16: "complex128"}
    return place._replace(dtype=kinds[ITEM_SIZES[place.dtype]])


def _floats(raw: bytes | bytearray, dtype: str) -> Any:
    """The elements as float64; integers above 2**53 lose their last bits."""
    import numpy as np

    if dtype == "bfloat16":
        wide: Any = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).astype(np.float64)
    if dtype in _FP8:
        return _fp8_table(*_FP8[dtype])[np.frombuffer(raw, np.uint8)]
    if dtype.startswith("float8"):
        raise InvalidInputError(f"how {dtype} tensors differ cannot be measured yet: load and compare them")
    if dtype == "complex32":
        return np.frombuffer(raw, np.float16).astype(np.float64)
    values = np.frombuffer(raw, dtype)
    return values.view(values.real.dtype).astype(np.float64) if values.dtype.kind == "c" else values.astype(np.float64)


def _fp8_table(exponent_bits: int, mantissa_bits: int, bias: int) -> Any:
    """The 256 values of an eight-bit float. Source: OCP 8-bit floating point specification 1.0."""
    import numpy as np

    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    steps = float(1 << mantissa_bits)
    normal = (1 + mantissa / steps) * 2.0 ** (exponent - bias)
    values = np.where(exponent == 0, mantissa / steps * 2.0 ** (1 - bias), normal)
    if exponent_bits == 5:
        values[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    else:  # e4m3fn has no infinities, and one NaN of each sign
        values[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes >= 128, -values, values)
