"""The tree of a version's assets: rows, nodes, their bytes and their logical digests. Source: docs/format.md §6, §7."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, TypeAlias

import msgspec

from mandapa.digest import DIGEST_SIZE, digest
from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError
from mandapa.format.strict import (
    BAD_BYTES,
    CHUNK_MAX,
    CONTAINER_MAX,
    INT_MAX,
    RESERVED,
    check_prefix,
    check_url,
    open_frame,
    told,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = [
    "BASES_MAX",
    "INLINE_CHUNKS",
    "PART_CHUNKS",
    "Branch",
    "ChildRow",
    "Chunk",
    "FileRow",
    "LargeFileRow",
    "Leaf",
    "Node",
    "NodeAddress",
    "NodeCutter",
    "Part",
    "PartAddress",
    "Row",
    "UrlRow",
    "decode_node",
    "encode_node",
    "node_digest",
]

NODE_MAX = 16 << 20
"""Raw bytes of a node, at most."""

INLINE_CHUNKS = 64
"""A file of more chunks keeps their list in parts, nodes of their own; so a full leaf stays below `NODE_MAX`."""

PART_CHUNKS = 1024
"""Chunks in a part, at most."""

BASES_MAX = 2
"""A chunk may have a base, and that one a base of its own, which has none."""

PARTS_MAX = 16_384
"""Parts of a file, at most: 64 TiB in chunks of 4 MiB."""

LEAF_LIMITS = (128, 1024, 512)
"""Least and most rows of a leaf; in between a row ends it when the hash of its path is below 2**32 / 512."""

BRANCH_LIMITS = (64, 512, 256)
"""The same for branches."""

_ADDRESS_SIZE = 17
_CODEC_MAX = (1 << 16) - 1
_PART_MAX = PART_CHUNKS * CHUNK_MAX

# Limits that the decoder keeps itself, so that a node of many tiny rows does not become many objects first.
Container: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=_ADDRESS_SIZE, max_length=_ADDRESS_SIZE)]
Hash: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=DIGEST_SIZE, max_length=DIGEST_SIZE)]


class Chunk(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Where one contiguous range of an asset's bytes is."""

    container: int
    """Index in the leaf's table of containers."""
    offset: int
    """Bytes from the container's start."""
    stored: int
    raw: int
    codec: int
    hash: bytes = b""
    """BLAKE3 of the raw bytes; empty where the asset has one chunk: its digest is the chunk's."""
    base: Chunk | None = None
    """For codecs that need one: the chunk that this is a delta to, which carries its hash; see `BASES_MAX`."""

    def numbers(self) -> tuple[int, ...]:
        """The containers of the chunk, of its base, and of the base of that, as indices in the leaf's table."""
        return (self.container,) if self.base is None else (self.container, *self.base.numbers())

    def moved(self, table: Sequence[bytes], number: Callable[[bytes], int]) -> Chunk:
        """The chunk with its container numbers, which are those of ``table``, as ``number`` gives them."""
        base = None if self.base is None else self.base.moved(table, number)
        return Chunk(number(table[self.container]), self.offset, self.stored, self.raw, self.codec, self.hash, base)


class FileRow(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=0, gc=False):
    """An asset whose bytes are in the repository."""

    path: str
    size: int
    mode: int
    """1 when the file is executable, else 0."""
    digest: Hash
    """BLAKE3 of the whole content."""
    chunks: Annotated[tuple[Chunk, ...], msgspec.Meta(max_length=INLINE_CHUNKS)]


class UrlRow(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1, gc=False):
    """An asset that stays where it is."""

    path: str
    url: str
    size: int | None
    checksum: str
    """``scheme:value`` as its store reports it (``sha256:``, ``md5:``, ``etag:`` ...), or empty."""


class PartAddress(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Where one part of a large file's list of chunks is."""

    container: int
    offset: int
    stored: int
    hash: Hash
    raw: int
    """Bytes of the asset that the part's chunks hold together."""


class LargeFileRow(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=2, gc=False):
    """A file of more than 64 chunks: like `FileRow`, but the chunks stand in parts."""

    path: str
    size: int
    mode: int
    digest: Hash
    parts: Annotated[tuple[PartAddress, ...], msgspec.Meta(max_length=PARTS_MAX)]


Row: TypeAlias = FileRow | UrlRow | LargeFileRow


class NodeAddress(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Where a node is: a container, a range of it, and the BLAKE3 of the node's raw bytes."""

    container: bytes
    offset: int
    stored: int
    hash: bytes


class ChildRow(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """One child of a branch."""

    path: str
    """The first path below."""
    container: int
    offset: int
    stored: int
    hash: Hash
    digest: Hash
    """The child's logical digest."""
    assets: int
    size: int
    """Bytes of all assets below; a URL of unknown size counts 0."""


class Leaf(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=0):
    """A node that holds assets."""

    containers: list[Container]
    """Every container that the rows need, bases of deltas included; 17 bytes each."""
    rows: Annotated[list[Row], msgspec.Meta(max_length=LEAF_LIMITS[1])]


class Branch(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """A node that holds nodes."""

    containers: list[Container]
    level: int
    """1 above leaves, one more than its children otherwise."""
    rows: Annotated[list[ChildRow], msgspec.Meta(max_length=BRANCH_LIMITS[1])]


class Part(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=2):
    """A node that holds a range of one large file's chunks."""

    containers: list[Container]
    rows: list[Chunk]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], table: Sequence[bytes]) -> Part:
        """A part of these chunks, which name their containers by their places in ``table``."""
        numbers: dict[bytes, int] = {}
        rows = [chunk.moved(table, lambda container: numbers.setdefault(container, len(numbers))) for chunk in chunks]
        return cls(list(numbers), rows)


Node: TypeAlias = Leaf | Branch | Part

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Node)
_HEAD = struct.Struct("<BBq")
_CHILD = struct.Struct("<QQ")


def encode_node(node: Node) -> tuple[bytes, bytes]:
    """The raw bytes of a node and the zstd frame that is stored.

    Raises:
        InvalidInputError: A node that no reader would take.
    """
    try:
        _check_node(node)
    except _BrokenError as error:
        raise InvalidInputError(f"a manifest cannot hold {error}") from None
    raw = _encoder.encode(node)
    if len(raw) > NODE_MAX:
        raise InvalidInputError(f"a manifest node of {len(raw)} bytes: more than the format's {NODE_MAX}")
    return raw, zstd.compress(raw, 3)


def decode_node(stored: bytes | bytearray | memoryview, hash_: bytes, *, key: str) -> Node:
    """The node in a stored frame, after every check that does not need another node.

    Raises:
        CorruptionError: The bytes are not those of the address, or break a rule of the format.
        FormatVersionError: A kind of row that this mandapa does not know.
    """
    raw = open_frame(stored, key=key, limit=NODE_MAX)
    if digest(raw) != hash_:
        raise CorruptionError(f"{key}: a manifest node is not the one that its address names", key=key)
    try:
        node: Node = _decoder.decode(raw)
    except msgspec.ValidationError as error:
        text = str(error)
        if text.startswith("Invalid value") or "of at most length" in text:
            raise FormatVersionError(f"{key}: a manifest node that needs a newer mandapa: {told(error)}") from None
        raise CorruptionError(f"{key}: a manifest node breaks the format: {told(error)}", key=key) from None
    except BAD_BYTES as error:
        raise CorruptionError(f"{key}: a manifest node is not msgpack: {told(error)}", key=key) from None
    try:
        _check_node(node)
    except (_BrokenError, InvalidInputError) as error:
        raise CorruptionError(f"{key}: a manifest node breaks the format: {told(error)}", key=key) from None
    return node


def _check_node(node: Node) -> None:
    most = {Leaf: LEAF_LIMITS[1], Branch: BRANCH_LIMITS[1], Part: PART_CHUNKS}
    if len(node.rows) > most[type(node)]:
        raise _BrokenError(f"{len(node.rows)} rows")
    for container in node.containers:
        if len(container) != _ADDRESS_SIZE or container[:1] not in (b"p", b"m"):
            raise _BrokenError("a container's address")
    count = len(node.containers)
    if isinstance(node, Part):
        if not node.rows:
            raise _BrokenError("a part without chunks")
        for chunk in node.rows:
            _check_chunk(chunk, count, DIGEST_SIZE)
        return
    if isinstance(node, Branch) and not (1 <= node.level <= 16 and node.rows):
        raise _BrokenError("a branch without a level or children")
    last = ""
    for row in node.rows:
        path = row.path
        if path <= last or path == RESERVED:
            raise _BrokenError(f"the order of {path!r}" if path <= last else "a file where a reserved folder is")
        last = path
        check_prefix(path)
        if isinstance(row, FileRow):
            _check_file(row, count)
        elif isinstance(row, ChildRow):
            _check_range(row.container, row.offset, row.stored, count)
            if len(row.hash) != DIGEST_SIZE or len(row.digest) != DIGEST_SIZE:
                raise _BrokenError(f"the child at {path!r}")
            if not (1 <= row.assets <= INT_MAX and 0 <= row.size <= INT_MAX):
                raise _BrokenError(f"the numbers of the child at {path!r}")
        elif isinstance(row, LargeFileRow):
            _check_large(row, count)
        else:
            check_url(row.url, row.checksum)
            if row.size is not None and not 0 <= row.size <= INT_MAX:
                raise _BrokenError(f"the size of {path!r}")


class _BrokenError(Exception):
    pass


def _check_range(container: int, offset: int, stored: int, count: int) -> None:
    if not 0 <= container < count or offset < 16 or stored < 0 or offset + stored > CONTAINER_MAX:
        raise _BrokenError("a range outside its container")


def _check_chunk(chunk: Chunk, count: int, hash_size: int, bases_left: int = BASES_MAX) -> None:
    _check_range(chunk.container, chunk.offset, chunk.stored, count)
    _check_coding(chunk.stored, chunk.raw, chunk.codec)
    if len(chunk.hash) != hash_size:
        raise _BrokenError("the hash of a chunk")
    if chunk.base is not None:
        if bases_left == 0:
            raise _BrokenError("a chunk with more than two bases, one below the other")
        _check_chunk(chunk.base, count, DIGEST_SIZE, bases_left - 1)


def _check_coding(stored: int, raw: int, codec: int) -> None:
    if not (0 < raw <= CHUNK_MAX and 0 <= codec <= _CODEC_MAX) or (codec == 0 and stored != raw):
        raise _BrokenError("a chunk")


def _check_file(row: FileRow, count: int) -> None:
    chunks = row.chunks
    if len(row.digest) != DIGEST_SIZE or row.mode not in (0, 1) or len(chunks) > INLINE_CHUNKS:
        raise _BrokenError(f"the row of {row.path!r}")
    total = 0
    hash_size = 0 if len(chunks) == 1 else DIGEST_SIZE
    for chunk in chunks:
        _check_chunk(chunk, count, hash_size)
        total += chunk.raw
    if total != row.size:
        raise _BrokenError(f"the chunks of {row.path!r} hold {total} bytes, not {row.size}")


def _check_large(row: LargeFileRow, count: int) -> None:
    if len(row.digest) != DIGEST_SIZE or row.mode not in (0, 1) or not 0 < len(row.parts) <= PARTS_MAX:
        raise _BrokenError(f"the row of {row.path!r}")
    total = 0
    for part in row.parts:
        _check_range(part.container, part.offset, part.stored, count)
        if not 0 < part.raw <= _PART_MAX or len(part.hash) != DIGEST_SIZE:
            raise _BrokenError(f"a part of {row.path!r}")
        total += part.raw
    if total != row.size:
        raise _BrokenError(f"the parts of {row.path!r} hold {total} bytes, not {row.size}")


def node_digest(node: Leaf | Branch) -> bytes:
    """The logical digest of a node: what it holds, whatever way it is stored. Source: docs/format.md §7."""
    parts = [b"mandapa leaf 1\n" if isinstance(node, Leaf) else b"mandapa branch 1\n"]
    add = parts.append
    for row in node.rows:
        if isinstance(row, (FileRow, LargeFileRow)):
            add(row.path.encode())
            add(b"\0")
            add(_HEAD.pack(0, row.mode, row.size))
            add(row.digest)
        elif isinstance(row, ChildRow):
            add(_CHILD.pack(row.assets, row.size))
            add(row.digest)
        else:
            add(row.path.encode())
            add(b"\0")
            add(_HEAD.pack(1, 0, -1 if row.size is None else row.size))
            add(digest(row.url.encode() + b"\0" + row.checksum.encode()))
    return digest(b"".join(parts))


class NodeCutter:
    """Decides, row after row, where a node ends; a function of the rows' paths alone. Source: docs/format.md §6.3."""

    def __init__(self, level: int, limits: tuple[int, int, int] | None = None) -> None:
        self._least, self._most, target = limits or (LEAF_LIMITS if level == 0 else BRANCH_LIMITS)
        self._below = (1 << 32) // target
        self._start = 0 if level == 0 else 4
        self.count = 0

    def ends_after(self, path: str) -> bool:
        """Count one more row, and say whether the node ends with it."""
        self.count += 1
        if self.count < self._least:
            return False
        at = self._start
        if self.count >= self._most or int.from_bytes(digest(path.encode())[at : at + 4], "little") < self._below:
            self.count = 0
            return True
        return False
