"""One log told again in another repository: what its records say there, and whether that is all that is said there.

Pure functions of states and records. Source: docs/format.md §10.10.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from mandapa.digest import digest
from mandapa.format.records import (
    AliasOp,
    AnnotateOp,
    CloseOp,
    DeleteOp,
    FenceOp,
    Op,
    Record,
    RepackOp,
    Root,
    TagOp,
    UndeleteOp,
    VersionOp,
)
from mandapa.format.strict import RECORD_MAX, shown
from mandapa.repository.state import ArtifactState, VersionState

__all__ = ["ORIGIN", "Content", "artifact_id", "difference", "follows", "is_upkeep", "origin_of", "replay", "txn_id"]

ORIGIN = "mandapa/origin"
"""The fact of a mirrored version that says where it comes from."""

_LOCAL = "mandapa/"
"""Facts whose names begin so speak of the bytes here: a mirror neither tells nor compares them."""

_ROOM = 2048  # bytes of a record that are not its ops
_NESTED = 2048  # bytes of the origin of an origin


@dataclass(frozen=True, slots=True)
class Content:
    """A version's manifest in the destination, all of it put."""

    root: Root
    requires: tuple[str, ...]
    added: int
    """Bytes that were put for it."""


def artifact_id(source: str, artifact: str, destination: str, generation: int) -> str:
    """The id of an artifact's mirror: the same for everyone who mirrors, and after a removal another one."""
    return _id(b"artifact", source, artifact, destination, str(generation))


def txn_id(source: str, artifact: str, record: Record, mirror: str) -> str:
    """The transaction that tells a record again in the log ``mirror``. A record's seal says what all before it say."""
    return _id(b"record", source, artifact, record.seal, mirror)


def _id(what: bytes, *parts: str) -> str:
    return digest(b"mandapa mirror 1 " + what + b"\n" + "\n".join(parts).encode()).hex()[:32]


def is_upkeep(record: Record) -> bool:
    """Whether a record says nothing of what versions are, only of where they are."""
    return all(_is_local(op) for op in record.ops)


def follows(record: Record) -> bool:
    """Whether a mirror has anything to tell of a record."""
    return not all(isinstance(op, CloseOp) or _is_local(op) for op in record.ops)


def _is_local(op: Op) -> bool:
    if isinstance(op, AnnotateOp):
        return all(name.startswith(_LOCAL) for name in op.facts)
    return isinstance(op, FenceOp | RepackOp)


def origin_of(version: VersionState, repository: str, url: str, artifact: str) -> dict[str, Any]:
    """What a mirror notes of where a version comes from: the repository, and who made it there, and when."""
    origin: dict[str, Any] = {
        "repository": repository,
        "url": url,
        "artifact": artifact,
        "version": version.op.number,
        "at": version.record.at,
        "by": version.record.by,
    }
    before = version.facts.get(ORIGIN)
    if isinstance(before, dict) and len(msgspec.json.encode(before)) <= _NESTED:
        origin["origin"] = before
    return origin


def replay(
    record: Record, here: ArtifactState, contents: Mapping[int, Content], origins: Mapping[int, dict[str, Any]]
) -> list[Op]:
    """The ops that tell a record again.

    A version without content (it was deleted in the source before it could be copied) is *hidden*: made and deleted by
    one record, with the root that it has in the source, which names nothing here. What the source says of it later is
    said in records that bring it back and delete it again; but no alias ever names it.

    Args:
        record: Of the source.
        here: The state of the mirror before it; is changed.
        contents: Of the versions that the record makes, or brings back, if they are not deleted by now.
        origins: What to note of the versions that it makes.
    """
    replay_ = _Replay(record, here, contents, origins)
    for op in record.ops:
        replay_.tell(op)
    return replay_.end()


class _Replay:
    def __init__(
        self,
        record: Record,
        here: ArtifactState,
        contents: Mapping[int, Content],
        origins: Mapping[int, dict[str, Any]],
    ) -> None:
        self._record = record
        self._here = here
        self._contents = contents
        self._origins = origins
        self._open: dict[int, None] = {}
        """Hidden versions that are live within this record."""
        self._ops: list[Op] = []

    def end(self) -> list[Op]:
        if self._open:
            self._say(DeleteOp(list(self._open)))
        room = RECORD_MAX - _ROOM - len(msgspec.json.encode([self._record.used, self._record.run]))
        if len(msgspec.json.encode([op for op in self._ops if isinstance(op, msgspec.Struct)])) > room:
            self._ops = [op for op in self._ops if not (isinstance(op, AnnotateOp) and ORIGIN in op.facts)]
        return self._ops

    def tell(self, op: Op) -> None:
        match op:
            case VersionOp():
                self._version(op)
            case AliasOp(name, None):
                if name in self._here.aliases:
                    self._say(op)
            case AliasOp(_, int(number)):
                if not self._hidden(number):
                    self._say(op)
            case TagOp(name, None):
                if name in self._here.tags:
                    self._say(op)
            case TagOp(name, int(number)):
                hidden = self._hidden(number)
                self._bring(number)
                self._say(op)
                if hidden:  # the name is never used again, here either
                    self._say(TagOp(name, None))
            case DeleteOp():
                self._delete(op.versions)
            case UndeleteOp():
                for number in op.versions:
                    content = self._contents.get(number)
                    if content is not None:
                        self._say(UndeleteOp([number]))
                        was = self._here.versions[number].root
                        self._say(RepackOp(number, was, content.root, list(content.requires)))
            case AnnotateOp():
                facts = {name: value for name, value in op.facts.items() if not name.startswith(_LOCAL)}
                if facts:
                    self._bring(op.version)
                    self._say(AnnotateOp(op.version, facts))
            case _:
                pass

    def _say(self, op: Op) -> None:
        self._here.apply(op, self._record)
        self._ops.append(op)

    def _hidden(self, number: int) -> bool:
        return number in self._open or self._here.versions[number].deleted is not None

    def _bring(self, number: int) -> None:
        """Let ops of this record speak of a version, hidden or not."""
        if self._here.versions[number].deleted is not None:
            self._say(UndeleteOp([number]))
            self._open[number] = None

    def _version(self, op: VersionOp) -> None:
        content = self._contents.get(op.number)
        if content is None:
            content = Content(op.root, tuple(op.requires), 0)
            self._open[op.number] = None
        self._say(
            VersionOp(
                number=op.number,
                parent=op.parent,
                root=content.root,
                digest=op.digest,
                assets=op.assets,
                bytes=op.bytes,
                added=content.added,
                message=op.message,
                metadata=op.metadata,
                requires=list(content.requires),
            )
        )
        self._say(AnnotateOp(op.number, {ORIGIN: self._origins[op.number]}))

    def _delete(self, numbers: list[int]) -> None:
        rest = [number for number in numbers if not self._hidden(number)]
        for name, number in sorted(self._here.aliases.items()):
            if number in rest:  # in the source it names a hidden version by now
                self._say(AliasOp(name, None))
        if rest:
            self._say(DeleteOp(rest))


def difference(source: ArtifactState, here: ArtifactState, ours: Container[str]) -> str:
    """Where a mirror says something else than its source, as of the same record; empty if it does not.

    Args:
        source: Its state at the last record that was told again.
        here: The state of the mirror.
        ours: Transactions that mirror this source.
    """
    for number, version in here.versions.items():
        origin = source.versions.get(number)
        if origin is None or origin.op.digest != version.op.digest:
            return f"v{number} was made here by {_who(version.record)}"
        deleted = version.deleted
        if origin.deleted is None and deleted is not None and deleted.txn not in ours:
            return f"v{number} was deleted here by {_who(deleted)}"
        if origin.deleted is not None and deleted is None:
            return f"v{number} was deleted in the source, and brought back here"
        if deleted is None and _facts(origin) != _facts(version):
            names = {name for name, _ in {*_facts(origin).items()} ^ {*_facts(version).items()}}
            return f"v{number} has other facts here: {', '.join(map(shown, sorted(names)))}"
    if missing := source.versions.keys() - here.versions.keys():
        return f"v{min(missing)} is not here, but what came after it is"
    for kind, there, mine in (("alias", source.aliases, here.aliases), ("tag", source.tags, here.tags)):
        for name in sorted({*there, *mine}):
            wanted, found = there.get(name), mine.get(name)
            hidden = wanted is not None and here.versions[wanted].deleted is not None
            if found != wanted and not hidden:
                says = "dropped" if wanted is None else f"v{wanted}"
                return f"the {kind} {shown(name)} is {says} in the source, and {_named(found)} here"
    return ""


def _facts(version: VersionState) -> dict[str, bytes]:
    """Comparable, as JSON, without those that are of one repository alone."""
    return {name: msgspec.json.encode(fact) for name, fact in version.facts.items() if not name.startswith(_LOCAL)}


def _named(version: int | None) -> str:
    return "dropped" if version is None else f"v{version}"


def _who(record: Record) -> str:
    return f"{shown(record.by or 'someone')} at {shown(record.at)}"
