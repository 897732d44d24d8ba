"""Tensors of a version's files, and what became of them in another version."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from mandapa.content.ranges import RangeReader, Target
from mandapa.content.tensors import Structure, TensorPlace, read_structure
from mandapa.content.tensors.arrays import Frameworks
from mandapa.content.tensors.dtypes import ITEM_SIZES
from mandapa.content.tensors.load import read_tensors
from mandapa.content.tensors.stats import Meter, TensorStat
from mandapa.digest import Hasher
from mandapa.errors import InvalidInputError, NotFoundError
from mandapa.format.strict import RESERVED

if TYPE_CHECKING:
    from mandapa.repository.version import Version

__all__ = ["Tensor", "TensorChange", "Tensors", "compare_tensors", "load_tensors"]

_T = TypeVar("_T")

NAMES = f"{RESERVED}tensors.json"
"""The asset that says how the tensors of ``.distcp`` files are called."""

_NAMES_SIZE = 32 << 20
_BLOCK = 1 << 20  # elements that are compared at a time
_TOGETHER = 32 << 20  # bytes of chunks that are fetched at once to compare small tensors


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
    _digest: Callable[[], str] = field(repr=False, compare=False)

    @property
    def digest(self) -> str:
        """BLAKE3 of its elements' bytes in C order, little-endian; 64 hex digits.

        No request for a tensor that is one chunk: up to 4 MiB, and not grouped with small ones. Others are read.
        """
        return self._digest()


class Tensors(Mapping[str, Tensor]):
    """Name -> tensor of one file, in the order of their bytes.

    Attributes:
        kind: ``safetensors``, ``torch``, ``distcp``, ``npz`` or ``npy``.
        lost: Name -> why that tensor cannot be read by itself: sparse, quantized or expanded ones, and the like.
    """

    def __init__(self, version: Version, path: str) -> None:
        file = _TensorFile(version, path)
        file.forget()
        self.kind = file.structure.kind
        self.lost: Mapping[str, str] = file.structure.lost
        self._tensors = {place.name: file.tensor(place) for place in file.structure.tensors}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name; raises `KeyError`."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the tensors' bytes."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._tensors)

    def __repr__(self) -> str:
        """All of them, for people."""
        return f"Tensors({list(self._tensors.values())})"


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A tensor that is not the same in two versions of a file."""

    name: str
    before: Tensor | None
    """None: it was added."""
    after: Tensor | None
    """None: it was removed."""
    stat: TensorStat | None = None
    """By how much it changed, where that was asked for, and dtype and shape are as they were."""

    @property
    def kind(self) -> str:
        """``added``, ``removed``, ``dtype``, ``shape`` or ``values``."""
        if self.before is None or self.after is None:
            return "added" if self.before is None else "removed"
        if self.before.dtype != self.after.dtype:
            return "dtype"
        return "shape" if self.before.shape != self.after.shape else "values"


def load_tensors(
    version: Version,
    path: str,
    names: str | Sequence[str] | None,
    framework: Frameworks,
    into: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Values of tensors by name; see `Version.load_tensors`."""
    if names is None and into is not None:
        names = list(into)
    wanted = None if names is None else [names] if isinstance(names, str) else list(dict.fromkeys(names))
    file = _TensorFile(version, path, wanted)
    places = file.chosen(wanted)
    return file.again(lambda reader: read_tensors(reader, places, framework, into))


def compare_tensors(before: Version, after: Version, path: str, *, stat: bool) -> list[TensorChange]:
    """What became of the tensors of a file; see `Version.diff_tensors`."""
    old, new = _TensorFile(before, path), _TensorFile(after, path)
    old_places = {place.name: place for place in old.structure.tensors}
    new_places = {place.name: place for place in new.structure.tensors}
    changes = []
    to_read = []
    for name in old_places.keys() | new_places.keys():
        a, b = old_places.get(name), new_places.get(name)
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            changes.append(TensorChange(name, a and old.tensor(a), b and new.tensor(b)))
            continue
        equal = _equal_by_hashes(old.segments(a), new.segments(b), a.strides, b.strides)
        if equal is False and not stat:
            changes.append(TensorChange(name, old.tensor(a), new.tensor(b)))
        elif not equal:
            to_read.append((a, b))
    for a, b in _fetched(sorted(to_read), old, new):
        meter = Meter(a.dtype) if stat else None
        differs = False
        for x, y in zip(old.blocks(a), new.blocks(b), strict=True):
            if x != y:
                differs = True
                if meter is None:
                    break
            if meter is not None:
                meter.add(x, y)
        if differs:
            changes.append(TensorChange(a.name, old.tensor(a), new.tensor(b), meter.stat() if meter else None))
    return sorted(changes, key=lambda change: change.name)


class _Segment(NamedTuple):
    """What a tensor has of a chunk."""

    hash: bytes
    begin: int
    end: int
    raw: int
    """Bytes of the chunk."""


def _equal_by_hashes(
    a: list[_Segment], b: list[_Segment], a_strides: tuple[int, ...] | None, b_strides: tuple[int, ...] | None
) -> bool | None:
    """Whether two tensors of one dtype and shape are equal, as far as the hashes of their chunks tell."""
    if a_strides == b_strides and a == b:
        return True
    for x, y in zip_longest(a, b):
        if x is None or y is None or x.raw != y.raw or not (x.begin == y.begin == 0 and x.end == y.end == x.raw):
            return None  # cut differently, or in chunks that hold something else, too
    # Between strided elements there may be bytes that are not the tensor's.
    return False if a_strides is None and b_strides is None else None


def _fetched(
    pairs: Iterable[tuple[TensorPlace, TensorPlace]], old: _TensorFile, new: _TensorFile
) -> Iterator[tuple[TensorPlace, TensorPlace]]:
    """The pairs in order; before several small ones their chunks are fetched together."""
    group: list[tuple[TensorPlace, TensorPlace]] = []
    total = 0
    for a, b in pairs:
        size = sum([segment.raw for segment in (*old.segments(a), *new.segments(b))])
        if group and total + size > _TOGETHER:
            yield from _together(group, old, new)
            group, total = [], 0
        group.append((a, b))
        total += size
    yield from _together(group, old, new)


def _together(
    group: list[tuple[TensorPlace, TensorPlace]], old: _TensorFile, new: _TensorFile
) -> list[tuple[TensorPlace, TensorPlace]]:
    if len(group) > 1:
        old.want([a for a, _ in group])
        new.want([b for _, b in group])
    return group


class _TensorFile:
    """One tensor file of one version, and its chunks as far as they were read."""

    def __init__(self, version: Version, path: str, names: Sequence[str] | None = None) -> None:
        self._version = version
        self._path = path
        self._where = f"{version.address}/{path}"
        self._reader = version.ranges(path)
        self.structure = self.again(lambda reader: _structure(reader, self._where, names))
        if self.structure.kind == "distcp":
            self.structure = _named(version, path, self.structure)

    def again(self, work: Callable[[RangeReader], _T]) -> _T:
        """What ``work`` makes of the file; from the start where a repack moved it meanwhile."""
        while True:
            try:
                return work(self._reader)
            except NotFoundError as error:
                self._version.follow(error)
                self._reader = self._version.ranges(self._path)

    def forget(self) -> None:
        """Keep no chunks, only where they are."""
        self._reader.forget()

    def chosen(self, names: Sequence[str] | None) -> list[TensorPlace]:
        """The tensors of these names, in that order; or all.

        Raises:
            NotFoundError: There is no such tensor.
            InvalidInputError: It cannot be read by itself.
        """
        lost = self.structure.lost
        if names is None:
            for name, why in lost.items():
                raise InvalidInputError(f"{self._where}: tensor {name!r} cannot be read: {why}; name those you want")
            return self.structure.tensors
        by_name = {place.name: place for place in self.structure.tensors}
        for name in names:
            if name in lost:
                raise InvalidInputError(f"{self._where}: tensor {name!r} cannot be read: {lost[name]}")
            if name not in by_name:
                near = difflib.get_close_matches(name, by_name, 3)
                hint = f"; there is {', '.join(map(repr, near))}" if near else ""
                raise NotFoundError(f"{self._where} has no tensor {name!r}{hint}")
        return [by_name[name] for name in names]

    def tensor(self, place: TensorPlace) -> Tensor:
        """What users see of it."""
        return Tensor(place.name, place.dtype, place.shape, place.size, lambda: self._digest(place))

    def segments(self, place: TensorPlace) -> list[_Segment]:
        """What the tensor has of each chunk that holds some of it."""
        return self.again(lambda reader: _segments(reader, place))

    def want(self, places: Iterable[TensorPlace]) -> None:
        """Have the chunks of these tensors at hand."""
        ranges = [(place.start, place.end) for place in places]
        self.again(lambda reader: reader.want(ranges))

    def blocks(self, place: TensorPlace) -> Iterator[bytearray | memoryview]:
        """The elements in C order, about a million of them at a time; a tensor that is not in that order as a whole."""
        step = _BLOCK * ITEM_SIZES[place.dtype]
        if place.strides is not None:
            bits = place._replace(dtype=_BITS[ITEM_SIZES[place.dtype]])
            array = self.again(lambda reader: read_tensors(reader, [bits], "numpy", None))[place.name]
            whole = memoryview(array.reshape(-1).view("uint8"))
            yield from (whole[at : at + step] for at in range(0, len(whole), step))
            return
        for start in range(place.start, place.end, step):
            block = bytearray(min(step, place.end - start))
            targets = [Target(start, memoryview(block))]
            self.again(lambda reader, targets=targets: reader.fill(targets))  # type: ignore[misc]
            yield block

    def _digest(self, place: TensorPlace) -> str:
        segments = self.segments(place)
        if len(segments) == 1 and place.strides is None and segments[0].end - segments[0].begin == segments[0].raw:
            return segments[0].hash.hex()
        hasher = Hasher()
        for block in self.blocks(place):
            hasher.update(block)
        return hasher.digest().hex()


_BITS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64", 16: "complex128"}
"""Bytes of an element -> what NumPy holds them as, whatever they mean."""


def _structure(reader: RangeReader, where: str, names: Sequence[str] | None) -> Structure:
    reader.want_ends()
    return read_structure(reader, where, names)


def _segments(reader: RangeReader, place: TensorPlace) -> list[_Segment]:
    return [
        _Segment(
            span.piece.hash,
            max(place.start, span.start) - span.start,
            min(place.end, span.end) - span.start,
            span.piece.raw,
        )
        for span in reader.layout.chunks(place.start, place.end)
    ]


class _Names(msgspec.Struct):
    names: dict[str, dict[str, str]] = {}
    """Path of a .distcp file -> number of a tensor in it -> its name."""


_decode_names = msgspec.json.Decoder(_Names).decode


def _named(version: Version, path: str, structure: Structure) -> Structure:
    """The tensors of a .distcp file by their names, where the version has them."""
    asset = version.assets.get(NAMES)
    if asset is None or asset.kind != "file":
        return structure
    if (asset.size or 0) > _NAMES_SIZE:
        raise InvalidInputError(f"{version.address}/{NAMES} has more than {_NAMES_SIZE} bytes")
    with version.open(NAMES) as file:
        data = file.read(_NAMES_SIZE)
    try:
        names = _decode_names(data).names.get(path, {})
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{version.address}/{NAMES} does not name tensors: {error}") from None
    found = [place._replace(name=names.get(place.name, place.name)) for place in structure.tensors]
    if len({place.name for place in found}) < len(found):
        raise InvalidInputError(f"{version.address}/{NAMES} gives one name to several tensors of {path}")
    return structure._replace(tensors=found, lost={names.get(name, name): why for name, why in structure.lost.items()})
