"""Records of logs: what each op says, and how records become bytes and back. Source: docs/format.md §4, §8, §9."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any, TypeAlias

import msgspec

from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError
from mandapa.format.keys import may_be_swept
from mandapa.format.strict import (
    BAD_BYTES,
    CONTAINER_MAX,
    FORMAT,
    INT_MAX,
    RECORD_MAX,
    check_label,
    check_name,
    is_id,
    open_frame,
    open_sealed,
    read_json,
    seal,
    told,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = [
    "GC_LIST_BYTES",
    "HEAD_MAX",
    "MARKER_MAX",
    "AliasOp",
    "AnnotateOp",
    "CloseOp",
    "DeleteOp",
    "FenceOp",
    "GcList",
    "Marker",
    "Op",
    "Record",
    "RegisterOp",
    "RemoveOp",
    "RenameOp",
    "RepackOp",
    "Root",
    "SettingsOp",
    "TagOp",
    "UndeleteOp",
    "UnknownOp",
    "VersionOp",
    "decode_gc_list",
    "decode_head",
    "decode_marker",
    "decode_record",
    "encode_gc_list",
    "encode_head",
    "encode_marker",
    "encode_record",
]

HEAD_MAX = 1 << 30
"""Bytes of the records in a head, at most."""

_HEAD_RATIO = 1024
"""Records hold hashes: a frame that grows more than so many times is none of a log's."""

_LINE_MIN = 192
"""Bytes of the shortest record, about: two ids, a seal, and what names them."""

MARKER_MAX = 4096
"""Bytes of ``mandapa.json``, at most."""

GC_LIST_MAX = 65_536
"""Objects in one list under ``gc/``, at most."""

GC_LIST_BYTES = 64 * GC_LIST_MAX
"""Bytes of such a list, at most."""

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=INT_MAX)]

_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ROOT = re.compile(r"meta/[0-9a-f]{32}", re.ASCII)
_EPOCH = re.compile(r"[0-9a-z_-][0-9a-z._-]{0,63}", re.ASCII)


class Root(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Where the root node of a version's manifest is."""

    object: str
    """Key of the container: ``meta/<id>``."""
    offset: Count
    length: Count
    hash: str
    """BLAKE3 of the node's raw bytes, hex."""


class _Op(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="op"):
    pass


class VersionOp(_Op, frozen=True, gc=False, tag="version", kw_only=True):
    """A new version. Before it: ``number`` is one more than the highest there ever was (or 0)."""

    number: Count
    parent: Count | None
    root: Root
    digest: str
    assets: Count
    bytes: Count
    added: Count
    """Bytes that this commit put into the store, its record not counted."""
    message: str = ""
    metadata: dict[str, Any] = {}
    requires: list[str] = []
    """Features that a reader of this version must have."""


class AliasOp(_Op, frozen=True, gc=False, tag="alias"):
    """Move an alias, or drop it (``version`` null). Before it: the version is live, no tag has the name."""

    name: str
    version: Count | None


class TagOp(_Op, frozen=True, gc=False, tag="tag"):
    """Make a tag, or drop it (null). Before it: the version is live, the name never was a tag nor is an alias."""

    name: str
    version: Count | None


class DeleteOp(_Op, frozen=True, gc=False, tag="delete"):
    """Delete versions. Before it: each is live and no alias or tag names it."""

    versions: list[Count]


class UndeleteOp(_Op, frozen=True, gc=False, tag="undelete"):
    """Bring versions back. Before it: each is deleted."""

    versions: list[Count]


class AnnotateOp(_Op, frozen=True, gc=False, tag="annotate"):
    """Add facts to a live version; a null removes one. They stand beside its metadata, which never changes."""

    version: Count
    facts: dict[str, Any]


class RepackOp(_Op, frozen=True, gc=False, tag="repack"):
    """Store a live version's content otherwise: ``root`` replaces ``was``, the digest stays."""

    version: Count
    was: Root
    root: Root
    requires: list[str] = []


class FenceOp(_Op, frozen=True, gc=False, tag="fence"):
    """A gc passed here. Who was about to commit checks its packs against the list ``gc/<epoch>`` again."""

    epoch: str


class CloseOp(_Op, frozen=True, gc=False, tag="close"):
    """The last record of a log: the artifact is removed."""


class RegisterOp(_Op, frozen=True, gc=False, tag="register"):
    """Catalog: an artifact. Before it: no live artifact has the name, case aside, and the id was never used."""

    name: str
    artifact: str


class RenameOp(_Op, frozen=True, gc=False, tag="rename"):
    """Catalog: another name for an artifact. Before it: no other live artifact has that name, case aside."""

    artifact: str
    name: str


class RemoveOp(_Op, frozen=True, gc=False, tag="remove"):
    """Catalog: the artifact is gone and its name free. Its log was closed before."""

    artifact: str


class SettingsOp(_Op, frozen=True, gc=False, tag="settings"):
    """Catalog: settings of the repository; a null drops one."""

    values: dict[str, Any]


class UnknownOp(msgspec.Struct, frozen=True):
    """An op that this mandapa does not know."""

    op: str
    optional: bool


KnownOp: TypeAlias = (
    VersionOp
    | AliasOp
    | TagOp
    | DeleteOp
    | UndeleteOp
    | AnnotateOp
    | RepackOp
    | FenceOp
    | CloseOp
    | RegisterOp
    | RenameOp
    | RemoveOp
    | SettingsOp
)
Op: TypeAlias = KnownOp | UnknownOp


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One commit: ops that happen together and in order."""

    seq: int
    txn: str
    prev: str
    """Seal of the record before; the id of the log (``catalog`` for the catalog's) in the first."""
    at: str
    """UTC, ISO 8601 with ``Z``; for people, never for decisions."""
    by: str
    ops: tuple[Op, ...]
    run: str = ""
    used: tuple[str, ...] = ()
    seal: str = ""
    """BLAKE3 of the line before its last member, hex; set by `decode_record`."""

    def find(self, kind: type[Any]) -> Any | None:
        """The first op of a kind, or None."""
        return next((op for op in self.ops if isinstance(op, kind)), None)


class _Line(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    format: int
    seq: Count
    txn: str
    prev: str
    at: str
    by: str
    run: str = ""
    used: list[str] = []
    ops: list[msgspec.Raw]


class _Peek(msgspec.Struct):
    op: str
    optional: bool = False


_KNOWN = frozenset(
    struct.__struct_config__.tag  # the names that the ops above carry on the wire
    for struct in KnownOp.__args__
)
_line_decoder = msgspec.json.Decoder(_Line)
_op_decoder = msgspec.json.Decoder(KnownOp)
_peek_decoder = msgspec.json.Decoder(_Peek)


def encode_record(record: Record) -> bytes:
    """The bytes of a record.

    Raises:
        InvalidInputError: Larger than 64 KiB, or a record that no reader would take.
    """
    try:
        line = _Line(
            format=FORMAT,
            seq=record.seq,
            txn=record.txn,
            prev=record.prev,
            at=record.at,
            by=record.by,
            run=record.run,
            used=list(record.used),
            ops=[msgspec.Raw(msgspec.json.encode(op)) for op in record.ops],
        )
        data = seal(line)
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"a record holds text that cannot be written as UTF-8: {error}") from None
    if len(data) > RECORD_MAX:
        raise InvalidInputError(
            f"one commit's record would be {len(data):,} bytes, the format allows {RECORD_MAX:,}: "
            "put large facts into assets, or split the command"
        )
    try:
        decode_record(data, key="the record", seq=record.seq)
    except CorruptionError as error:
        raise InvalidInputError(f"a record that no reader would take: {error}") from None
    return data


def decode_record(data: bytes | bytearray | memoryview, *, key: str, seq: int) -> Record:
    """The record in ``data``, which was read from slot ``seq``.

    Raises:
        CorruptionError: The seal, the number or a member is wrong.
        FormatVersionError: Another format, or members that a newer mandapa wrote.
    """
    body, seal_ = open_sealed(data, key=key, limit=RECORD_MAX)
    try:
        line = _line_decoder.decode(body)
        ops: list[Op] = []
        for raw in line.ops:
            peek = _peek_decoder.decode(raw)
            if peek.op in _KNOWN:
                op = _op_decoder.decode(raw)
                _check_op(op)
                ops.append(op)
            else:
                ops.append(UnknownOp(peek.op, peek.optional))
    except msgspec.ValidationError as error:
        if str(error).startswith("Object contains unknown field"):
            raise FormatVersionError(f"{key}: written by a newer mandapa ({told(error)}): upgrade") from None
        raise CorruptionError(f"{key}: {told(error)}", key=key) from None
    except (*BAD_BYTES, InvalidInputError) as error:
        raise CorruptionError(f"{key}: {told(error)}", key=key) from None
    if line.seq != seq or not is_id(line.txn) or not ops:
        raise CorruptionError(
            f"{key}: holds record {line.seq} of transaction {line.txn[:40]!r} with {len(ops)} ops", key=key
        )
    return Record(
        seq=line.seq,
        txn=line.txn,
        prev=line.prev,
        at=line.at,
        by=line.by,
        run=line.run,
        used=tuple(line.used),
        ops=tuple(ops),
        seal=seal_,
    )


def _check_op(op: KnownOp) -> None:
    """Raise `InvalidInputError` for an op that says something no state could make right."""
    match op:
        case VersionOp():
            _check_root(op.root)
            if not _HASH.fullmatch(op.digest):
                raise InvalidInputError(f"v{op.number} has the digest {op.digest[:80]!r}")
        case AliasOp() | TagOp():
            check_label(op.name)
        case RepackOp():
            _check_root(op.was)
            _check_root(op.root)
        case RegisterOp() | RenameOp():
            check_name(op.name)
            if not is_id(op.artifact):
                raise InvalidInputError(f"{op.artifact[:40]!r} is no artifact's id")
        case FenceOp():
            if not _EPOCH.fullmatch(op.epoch):
                raise InvalidInputError(f"{op.epoch[:80]!r} is no epoch")
        case _:
            pass


def _check_root(root: Root) -> None:
    if not (_ROOT.fullmatch(root.object) and _HASH.fullmatch(root.hash)):
        raise InvalidInputError(f"{root.object[:80]!r} with hash {root.hash[:80]!r} is no root of a manifest")
    if root.offset < 16 or root.length < 1 or root.offset + root.length > CONTAINER_MAX:
        raise InvalidInputError(f"{root.object} has no {root.length} bytes at {root.offset}")


def encode_head(lines: list[bytes]) -> bytes:
    """The bytes of a head: the lines of the records from 0 on, in one zstd frame.

    Raises:
        InvalidInputError: More than a head may hold.
    """
    data = b"".join(lines)
    if len(data) > HEAD_MAX:
        raise InvalidInputError(f"a head of {len(data):,} bytes; {HEAD_MAX:,} are allowed")
    return zstd.compress(data, 3)


def decode_head(data: bytes | bytearray | memoryview, *, key: str) -> list[bytes]:
    """The lines of the records that a head holds; nothing about them is checked yet.

    Raises:
        CorruptionError: Not a head.
    """
    raw = open_frame(data, key=key, limit=min(HEAD_MAX, _HEAD_RATIO * len(data)))
    if raw.count(b"\n") * _LINE_MIN > len(raw) or b"\r" in raw:
        raise CorruptionError(f"{key}: a head of lines that are no records", key=key)
    return raw.splitlines(keepends=True)


class Marker(msgspec.Struct, kw_only=True, frozen=True):
    """``mandapa.json``: what makes a prefix a repository."""

    format: int
    id: str
    hash: str


def encode_marker(repository_id: str) -> bytes:
    """The bytes of ``mandapa.json``."""
    if not is_id(repository_id):
        raise InvalidInputError(f"{repository_id!r} is no repository id")
    return msgspec.json.encode(Marker(format=FORMAT, id=repository_id, hash="blake3")) + b"\n"


def decode_marker(data: bytes | bytearray | memoryview, *, key: str) -> Marker:
    """The marker of a repository.

    Raises:
        CorruptionError: Not a marker.
        FormatVersionError: Of another format, or another hash.
    """
    if len(data) > MARKER_MAX:
        raise CorruptionError(f"{key} is not the marker of a repository: {len(data)} bytes", key=key)
    try:
        marker = msgspec.convert(read_json(bytes(data), key=key), Marker)
    except msgspec.ValidationError as error:
        raise CorruptionError(f"{key} is not the marker of a repository: {told(error)}", key=key) from None
    if marker.hash != "blake3":
        raise FormatVersionError(f"{key}: a repository that hashes with {marker.hash[:40]!r}: upgrade mandapa")
    if not is_id(marker.id):
        raise CorruptionError(f"{key}: {marker.id[:40]!r} is no repository id", key=key)
    return marker


class GcList(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """``gc/<epoch>``: objects that a gc may delete once every log is fenced."""

    format: int
    epoch: str
    objects: list[str]


def encode_gc_list(epoch: str, objects: list[str]) -> bytes:
    """The bytes of a list under ``gc/``.

    Raises:
        InvalidInputError: Too many objects, or one that no gc may ever delete.
    """
    if len(objects) > GC_LIST_MAX:
        raise InvalidInputError(f"a list of {len(objects):,} objects; at most {GC_LIST_MAX:,} fit in one")
    data = seal(GcList(format=FORMAT, epoch=epoch, objects=objects))
    try:
        decode_gc_list(data, key="the list")
    except CorruptionError as error:
        raise InvalidInputError(f"a list that no reader would take: {error}") from None
    return data


def decode_gc_list(data: bytes | bytearray | memoryview, *, key: str) -> GcList:
    """A list under ``gc/``.

    Raises:
        CorruptionError: The seal or a member is wrong, or it names an object that no gc may delete.
        FormatVersionError: Another format, or members that a newer mandapa wrote.
    """
    body, _ = open_sealed(data, key=key, limit=GC_LIST_BYTES)
    try:
        found = msgspec.json.decode(body, type=GcList)
    except msgspec.ValidationError as error:
        if str(error).startswith("Object contains unknown field"):
            raise FormatVersionError(f"{key}: written by a newer mandapa ({told(error)}): upgrade") from None
        raise CorruptionError(f"{key}: {told(error)}", key=key) from None
    except BAD_BYTES as error:
        raise CorruptionError(f"{key}: {told(error)}", key=key) from None
    wrong = next((name for name in found.objects if not may_be_swept(name)), None)
    if wrong is not None or not _EPOCH.fullmatch(found.epoch) or len(found.objects) > GC_LIST_MAX:
        raise CorruptionError(f"{key}: no list of a gc: epoch {found.epoch[:80]!r}, {(wrong or '')[:80]!r}", key=key)
    return found
