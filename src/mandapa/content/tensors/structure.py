"""Where the tensors of a file are: of safetensors, torch and NumPy files, by their headers, which nothing executes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Annotated, NamedTuple

import msgspec

from mandapa.content.cutters.archive import Archive, Entry, Refused, archives_of
from mandapa.content.cutters.layout import HEADER_MAX
from mandapa.content.cutters.safetensors import Placed, safetensors_entries
from mandapa.content.cutters.source import Source, read_some
from mandapa.content.ranges import RangeReader
from mandapa.content.tensors.dtypes import ITEM_SIZES, NUMPY_KINDS, SAFETENSORS
from mandapa.content.tensors.pickles import (
    DIMENSIONS_MAX,
    Allowance,
    BadPickle,
    Opaque,
    View,
    named_tensors,
    read_pickle,
)
from mandapa.errors import InvalidInputError

__all__ = ["Structure", "TensorPlace", "read_structure", "tensors_of"]

_ARCHIVES_MAX = 16_384  # tensors of a .distcp file
_NUMPY_MAGIC = b"\x93NUMPY"
_NUMPY_HEADER = re.compile(
    rb"\{'descr': '([<>|=])([a-zA-Z]\d+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n"
)
_NUMPY_HEADER_MAX = 4096
_NUMPY_AHEAD = 16  # arrays whose first chunks, of up to 4 MiB, are at hand at a time


class TensorPlace(NamedTuple):
    """A tensor, and which bytes of the file are its own."""

    name: str
    dtype: str
    """As torch calls it: ``float32``, ``bfloat16``, ``bool``."""
    shape: tuple[int, ...]
    start: int
    end: int
    """Bytes of the file ``[start, end)`` that hold it, little-endian."""
    strides: tuple[int, ...] | None = None
    """In elements, when they are not those of C order; elements of others may lie between."""
    member: tuple[int, int] | None = None
    """Of an archive: where its local header starts, and where the bytes after that header should."""

    @property
    def size(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


class Structure(NamedTuple):
    """The tensors of one file."""

    kind: str
    """``safetensors``, ``torch``, ``distcp``, ``npz`` or ``npy``."""
    tensors: list[TensorPlace]
    """In the order of their bytes. Ranges are equal, or overlap, where tensors share memory."""
    lost: dict[str, str]
    """Name -> why that tensor cannot be read alone."""


def tensors_of(source: Source) -> list[TensorPlace] | None:
    """The tensors in a file, in the order of their bytes; None when it is no tensor file that can be read by tensors.

    For those who write: cheap, reads headers only (torch's ``data.pkl``, never executed; the first bytes of each array
    of an archive of NumPy). Tensors whose elements do not have bytes of their own are left out. Names are unique.
    Ranges of tensors that share memory are equal or overlap; ``strides`` is None for all that are in C order.
    Where the members of an archive start is concluded from its directory, not read at each of them, so it is a hint
    until the bytes say so. Never raises for what the bytes say; within 1 second and 256 MB.

    Raises:
        OSError: The source cannot be read.

    Example:
        >>> from mandapa.content.cutters import BytesSource
        >>> header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        >>> data = len(header).to_bytes(8, "little") + header + bytes(8)
        >>> [(t.name, t.dtype, t.shape, t.start, t.end) for t in tensors_of(BytesSource(data))]
        [('w', 'float32', (2,), 62, 70)]
    """
    try:
        return _read(source).tensors
    except _Unreadable:
        return None


def read_structure(source: Source, path: str, names: Collection[str] | None = None) -> Structure:
    """The same with what cannot be read, for messages that call the file ``path``.

    With ``names``, tensors that are not among them may be missing, where that saves a look at each of them.

    Raises:
        InvalidInputError: It is no tensor file, or its header lies; says what is wrong.
    """
    try:
        return _read(source, names)
    except _Unreadable as error:
        raise InvalidInputError(f"{path} cannot be read by tensors: {error}") from error


class _Unreadable(ValueError):  # noqa: N818 - not an error: it never leaves this file
    """No tensor file, and why."""


def _read(source: Source, names: Collection[str] | None = None) -> Structure:
    head = bytes(read_some(source, 0, 9))
    lost: dict[str, str] = {}
    try:
        if head[:4] == b"PK\x03\x04":
            kind, found = _archives(source, names, lost)
        elif head[:6] == _NUMPY_MAGIC:
            kind, found = "npy", _one(_array(source, "0", 0, source.size, None), lost)
        elif head[8:] == b"{":
            kind, found = "safetensors", list(_safetensors(source, 8 + int.from_bytes(head[:8], "little"), lost))
        else:
            raise _Unreadable("it is neither safetensors, nor a zip of torch or NumPy, nor .npy")
    except (Refused, BadPickle) as error:
        raise _Unreadable(str(error)) from error
    if len({tensor.name for tensor in found}) < len(found) or lost:
        for name, count in Counter([tensor.name for tensor in found]).items():
            if count > 1 or name in lost:
                lost[name] = "several tensors have this name"
        found = [tensor for tensor in found if tensor.name not in lost]
    found.sort(key=lambda tensor: (tensor.start, tensor.end, tensor.name))
    return Structure(kind, found, lost)


def _one(found: TensorPlace | str, lost: dict[str, str]) -> list[TensorPlace]:
    if isinstance(found, str):
        lost["0"] = found
        return []
    return [found]


# -- safetensors -------------------------------------------------------------------------------------------------------

_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Described(Placed, gc=False):
    dtype: str = ""
    shape: tuple[_Size, ...] = ()


_SAFETENSORS = msgspec.json.Decoder(dict[str, _Described])


def _safetensors(source: Source, start: int, lost: dict[str, str]) -> Iterator[TensorPlace]:
    entries = safetensors_entries(source, start, _SAFETENSORS)
    if entries is None:
        raise _Unreadable("its safetensors header is broken, too large, or does not fit the file")
    position = start
    for begin, end, name, described in entries:
        # The format has no gaps; where one name stands twice, the first one's bytes are such a gap.
        if begin != position:
            raise _Unreadable(f"bytes {position} to {begin} belong to no tensor")
        position = end
        dtype = SAFETENSORS.get(described.dtype)
        if dtype is None:
            lost[name] = f"its dtype {described.dtype[:40]!r} is not known"
            continue
        if len(described.shape) > DIMENSIONS_MAX:
            raise _Unreadable(f"tensor {name[:200]!r} has {len(described.shape)} dimensions")
        tensor = TensorPlace(name, dtype, described.shape, begin, end)
        if tensor.size != end - begin:
            raise _Unreadable(f"tensor {name[:200]!r} has {end - begin} bytes, which its dtype and shape do not give")
        yield tensor
    if position != source.size:
        raise _Unreadable(f"bytes {position} to {source.size} belong to no tensor")


# -- archives ----------------------------------------------------------------------------------------------------------


def _archives(source: Source, names: Collection[str] | None, lost: dict[str, str]) -> tuple[str, list[TensorPlace]]:
    archives: list[Archive] = []
    for archive in archives_of(source):
        if not archives and archive.start and isinstance(source, RangeReader):
            source.want_small()
        archives.append(archive)
        if len(archives) > _ARCHIVES_MAX:
            raise _Unreadable(f"it consists of more than {_ARCHIVES_MAX} archives")
    archives.reverse()
    allowance = Allowance()
    if len(archives) == 1:
        members = _Members(source, archives[0])
        if members.pickle is None:
            return "npz", list(_npz(source, members, names, lost))
        return "torch", list(_torch(source, members, "", "0", allowance, lost))
    found: list[TensorPlace] = []
    for number, archive in enumerate(archives):
        members = _Members(source, archive)
        if members.pickle is None:
            raise _Unreadable("it has archives that are not torch's")
        found += _torch(source, members, f"{number}.", f"{number}", allowance, lost)
    return "distcp", found


class _Members:
    """The members of one archive by name."""

    def __init__(self, source: Source, archive: Archive) -> None:
        entries = list(archive.entries())
        starts = archive.data_starts(entries)
        self.places = {entry.name: (entry, start) for entry, start in zip(entries, starts, strict=True)}
        if len(self.places) < len(entries):
            raise _Unreadable("its archive has two members of one name")
        self._source = source
        pickles = [name for name in self.places if name.endswith(b"/data.pkl") and name.count(b"/") == 1]
        self.pickle = pickles[0] if len(pickles) == 1 else None

    def range(self, name: bytes) -> tuple[int, int]:
        """The bytes of a member, none if there is no such member."""
        entry, start = self.places.get(name, (None, 0))
        return start, start + (entry.size if entry else 0)

    def read(self, name: bytes, most: int) -> bytes | bytearray | None:
        """A member that is a header of at most so many bytes."""
        place = self.places.get(name)
        if place is None:
            return None
        entry, start = place
        if entry.size > most:
            raise _Unreadable(f"its {name.decode(errors='replace')[:200]} is too large: {entry.size} bytes")
        return read_some(self._source, start, entry.size)


def _torch(
    source: Source, members: _Members, prefix: str, alone: str, allowance: Allowance, lost: dict[str, str]
) -> Iterator[TensorPlace]:
    assert members.pickle is not None
    root = members.pickle[: -len(b"data.pkl")]
    order = root + b"byteorder"
    if isinstance(source, RangeReader):
        source.want([members.range(name) for name in (members.pickle, order)])
    if members.read(order, 16) not in (None, b"little"):
        raise _Unreadable("it was written on a big-endian machine: load it with torch.load")
    data = members.read(members.pickle, HEADER_MAX)
    assert data is not None
    for below, value in named_tensors(read_pickle(data, allowance), allowance):
        name = f"{prefix}{below}" if below else alone
        if isinstance(value, Opaque):
            lost[name] = value.lost
            continue
        place = members.places.get(root + b"data/" + value.storage.key.encode())
        if place is None or place[0].size != value.storage.count * ITEM_SIZES[value.storage.dtype]:
            lost[name] = "its storage is not in the file, or of another size than the tensor says"
            continue
        tensor = _viewed(name, value, *place)
        if isinstance(tensor, str):
            lost[name] = tensor
        else:
            yield tensor


def _viewed(name: str, view: View, entry: Entry, start: int) -> TensorPlace | str:
    """Where the elements of a view are in the storage's bytes; or why they cannot be read."""
    item = ITEM_SIZES[view.dtype]
    count = math.prod(view.shape)
    span = 1 + sum([(size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)]) if count else 0
    if (view.offset + span) * item > entry.size:
        return "it reaches beyond its storage"
    if span < count:
        return "it is an expanded view, whose elements share memory"
    begin = start + view.offset * item if count else start
    strides = None if _is_c_order(view.shape, view.strides) else view.strides
    return TensorPlace(name, view.dtype, view.shape, begin, begin + span * item, strides, (entry.record, start))


def _is_c_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected and expected:
            return False
        expected *= size
    return True


# -- NumPy -------------------------------------------------------------------------------------------------------------


def _npz(
    source: Source, members: _Members, names: Collection[str] | None, lost: dict[str, str]
) -> Iterator[TensorPlace]:
    if not all(name.endswith(b".npy") for name in members.places):
        raise _Unreadable("it is an archive that neither torch nor NumPy writes")
    try:
        places = {name[:-4].decode("utf-8"): place for name, place in members.places.items()}
    except UnicodeDecodeError:
        raise _Unreadable("its archive has a name that is not UTF-8") from None
    if names is not None and all(name in places for name in names):
        places = {name: places[name] for name in names}
    items = list(places.items())
    for at in range(0, len(items), _NUMPY_AHEAD):
        group = items[at : at + _NUMPY_AHEAD]
        if isinstance(source, RangeReader):
            source.want([(start, start + min(entry.size, _NUMPY_HEADER_MAX)) for _, (entry, start) in group])
        for name, (entry, start) in group:
            found = _array(source, name, start, start + entry.size, (entry.record, start))
            if isinstance(found, str):
                lost[name] = found
            else:
                yield found


def _array(source: Source, name: str, start: int, end: int, member: tuple[int, int] | None) -> TensorPlace | str:
    """The array of one .npy file that is in ``[start, end)``; or why it cannot be read."""
    head = bytes(read_some(source, start, min(_NUMPY_HEADER_MAX, end - start)))
    wide = head[6:7] in (b"\x02", b"\x03")
    if head[:6] != _NUMPY_MAGIC or (not wide and head[6:7] != b"\x01") or len(head) < 12:
        raise _Unreadable("it has an array without the header that NumPy writes")
    begin = 12 if wide else 10
    length = int.from_bytes(head[8:begin], "little")
    found = _NUMPY_HEADER.fullmatch(head[begin : begin + length])
    if found is None or length > _NUMPY_HEADER_MAX - 12:
        return "it is an array of records or objects"
    order, kind, fortran, sizes = found.groups()
    dtype = NUMPY_KINDS.get(kind.decode())
    if dtype is None:
        return f"its dtype {kind.decode()!r} is not known"
    if order == b">":
        return "it is big-endian: load it with numpy.load"
    shape = tuple([int(size) for size in sizes.replace(b" ", b"").split(b",") if size])
    if len(shape) > DIMENSIONS_MAX:
        raise _Unreadable(f"an array has {len(shape)} dimensions")
    strides = None
    if fortran == b"True" and len(shape) > 1:
        strides = tuple([math.prod(shape[:at]) for at in range(len(shape))])
    tensor = TensorPlace(name, dtype, shape, start + begin + length, end, strides, member)
    if tensor.size != tensor.end - tensor.start:
        raise _Unreadable(f"an array has {tensor.end - tensor.start} bytes, which its dtype and shape do not give")
    return tensor
