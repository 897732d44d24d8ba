"""What the records of a log say together. Folding knows every op of the format. Source: docs/format.md §8."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, Self

from mandapa.errors import CorruptionError, FormatVersionError
from mandapa.format.records import (
    AliasOp,
    AnnotateOp,
    CloseOp,
    DeleteOp,
    FenceOp,
    Op,
    Record,
    RegisterOp,
    RemoveOp,
    RenameOp,
    RepackOp,
    Root,
    SettingsOp,
    TagOp,
    UndeleteOp,
    UnknownOp,
    VersionOp,
)

__all__ = ["AliasMove", "ArtifactState", "CatalogState", "LogState", "PreconditionError", "VersionState", "parse_time"]


class PreconditionError(Exception):
    """An op does not fit the state before it; the message says why, as a person would."""


@dataclass(frozen=True, slots=True)
class VersionState:
    """One version, as the log tells it so far."""

    op: VersionOp
    record: Record
    root: Root
    """Where its manifest is now; a repack moves it."""
    requires: tuple[str, ...]
    deleted: Record | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One step in the history of an alias or a tag."""

    name: str
    version: int | None
    """None: it was dropped."""
    record: Record
    kind: Literal["alias", "tag"]


class LogState(Protocol):
    """Folded records of one log."""

    read_only: bool
    """An optional op that this mandapa does not know was seen: it may read, and must not append."""

    def apply(self, op: Op, record: Record) -> None:
        """Take one more op in; raises `PreconditionError` without any effect when it does not fit."""
        ...

    def copy(self) -> Self:
        """A state that can be changed without changing this one."""
        ...


def fold(state: LogState, record: Record, *, key: str) -> None:
    """Take a record in.

    Raises:
        CorruptionError: An op does not fit the state before it.
        FormatVersionError: An op of a newer mandapa that readers must understand.
    """
    unknown = [op for op in record.ops if isinstance(op, UnknownOp)]
    if needed := [op.op for op in unknown if not op.optional]:
        raise FormatVersionError(f"{key} holds the op {needed[0]!r}, which this mandapa does not know: upgrade")
    for op in record.ops:
        try:
            if not isinstance(op, UnknownOp):
                state.apply(op, record)
        except PreconditionError as error:
            raise CorruptionError(f"{key}: {error}", key=key) from None
    state.read_only = state.read_only or bool(unknown)


@dataclass(slots=True)
class ArtifactState:
    """The versions, aliases and tags of one artifact."""

    versions: dict[int, VersionState] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    moves: list[AliasMove] = field(default_factory=list)
    closed: bool = False
    read_only: bool = False
    _burned: set[str] = field(default_factory=set)
    """Lower-case names that were tags: they are never used again."""
    _live: list[int] | None = None

    def copy(self) -> ArtifactState:
        """A shallow copy: values are immutable."""
        return replace(
            self,
            versions=dict(self.versions),
            aliases=dict(self.aliases),
            tags=dict(self.tags),
            moves=list(self.moves),
            _burned=set(self._burned),
            _live=None,
        )

    @property
    def next_number(self) -> int:
        """The number of the next version: one more than any ever used."""
        return len(self.versions)

    def live(self) -> list[int]:
        """Numbers of the versions that are not deleted, ascending."""
        if self._live is None:
            self._live = [number for number, version in self.versions.items() if version.deleted is None]
        return self._live

    def latest(self) -> VersionState | None:
        """The live version with the highest number."""
        live = self.live()
        return self.versions[live[-1]] if live else None

    def is_live(self, number: int, root: Root) -> bool:
        """Whether a version is live and its manifest still where ``root`` says."""
        version = self.versions.get(number)
        return version is not None and version.deleted is None and version.root == root

    def names_of(self, number: int) -> list[str]:
        """Aliases and tags of a version, sorted."""
        return sorted(name for names in (self.aliases, self.tags) for name, at in names.items() if at == number)

    def apply(self, op: Op, record: Record) -> None:
        """Take one op in."""
        if self.closed and not isinstance(op, FenceOp):
            raise PreconditionError("the artifact was removed: nothing follows the end of its log")
        match op:
            case VersionOp():
                self._version(op, record)
            case AliasOp():
                self._alias(op, record)
            case TagOp():
                self._tag(op, record)
            case DeleteOp():
                self._delete(op, record)
            case UndeleteOp():
                for number in self._each(op.versions):
                    version = self._known(number)
                    if version.deleted is None:
                        raise PreconditionError(f"v{number} is not deleted")
                    self.versions[number] = replace(version, deleted=None)
                self._live = None
            case AnnotateOp():
                version = self._known_live(op.version)
                facts = {k: v for k, v in {**version.facts, **op.facts}.items() if v is not None}
                self.versions[op.version] = replace(version, facts=facts)
            case RepackOp():
                version = self._known_live(op.version)
                if version.root != op.was:
                    raise PreconditionError(f"the manifest of v{op.version} was moved meanwhile")
                self.versions[op.version] = replace(version, root=op.root, requires=tuple(op.requires))
            case CloseOp():
                self.closed = True
            case FenceOp():
                pass
            case _:
                raise PreconditionError(f"{type(op).__name__} has no place in an artifact's log")

    def _version(self, op: VersionOp, record: Record) -> None:
        if op.number != self.next_number:
            raise PreconditionError(f"the next version is v{self.next_number}, not v{op.number}")
        if op.parent is not None and op.parent not in self.versions:
            raise PreconditionError(f"there is no v{op.parent} that v{op.number} could come from")
        self.versions[op.number] = VersionState(op, record, op.root, tuple(op.requires))
        if self._live is not None:
            self._live.append(op.number)

    def _alias(self, op: AliasOp, record: Record) -> None:
        if op.version is None:
            if op.name not in self.aliases:
                raise PreconditionError(f"there is no alias {op.name!r}")
            del self.aliases[op.name]
        else:
            self._known_live(op.version)
            self._check_free(op.name, self.aliases)
            self.aliases[op.name] = op.version
        self.moves.append(AliasMove(op.name, op.version, record, "alias"))

    def _tag(self, op: TagOp, record: Record) -> None:
        if op.version is None:
            if op.name not in self.tags:
                raise PreconditionError(f"there is no tag {op.name!r}")
            del self.tags[op.name]
        else:
            self._known_live(op.version)
            if op.name in self.tags:
                raise PreconditionError(f"{op.name!r} is a tag of v{self.tags[op.name]}, and a tag never moves")
            self._check_free(op.name, {})
            self.tags[op.name] = op.version
            self._burned.add(op.name.lower())
        self.moves.append(AliasMove(op.name, op.version, record, "tag"))

    def _check_free(self, name: str, own: dict[str, int]) -> None:
        if name in own:
            return
        low = name.lower()
        if low in self._burned:
            raise PreconditionError(f"{name!r} is or was a tag, and such a name is never used again")
        for other in self.aliases:
            if other.lower() == low:
                kind = "an alias" if other == name else f"the alias {other!r} but for case"
                raise PreconditionError(f"{name!r} is {kind}")

    def _delete(self, op: DeleteOp, record: Record) -> None:
        numbers = set(self._each(op.versions))
        for names, kind in ((self.aliases, "alias"), (self.tags, "tag")):
            for name, number in names.items():
                if number in numbers:
                    raise PreconditionError(f"the {kind} {name!r} names v{number}: move or drop it first")
        versions = [self._known_live(number) for number in numbers]
        for version in versions:
            self.versions[version.op.number] = replace(version, deleted=record)
        self._live = None

    @staticmethod
    def _each(numbers: list[int]) -> list[int]:
        if not numbers or len(set(numbers)) != len(numbers):
            raise PreconditionError("a list of versions is empty or names one twice")
        return numbers

    def _known(self, number: int) -> VersionState:
        try:
            return self.versions[number]
        except KeyError:
            raise PreconditionError(f"there is no v{number}") from None

    def _known_live(self, number: int) -> VersionState:
        version = self._known(number)
        if version.deleted is not None:
            raise PreconditionError(f"v{number} was deleted")
        return version


@dataclass(slots=True)
class CatalogState:
    """The artifacts of a repository by id and by name, and its settings."""

    names: dict[str, str] = field(default_factory=dict)
    """Name -> artifact id, of artifacts that are not removed."""
    removed: dict[str, str] = field(default_factory=dict)
    """Artifact id -> its last name."""
    settings: dict[str, Any] = field(default_factory=dict)
    read_only: bool = False
    _by_id: dict[str, str] = field(default_factory=dict)
    """Artifact id -> name, of those in ``names``."""
    _by_low: dict[str, str] = field(default_factory=dict)
    """Lower-case name -> name, of those in ``names``."""

    def copy(self) -> CatalogState:
        """A shallow copy: values are immutable."""
        return replace(
            self,
            names=dict(self.names),
            removed=dict(self.removed),
            settings=dict(self.settings),
            _by_id=dict(self._by_id),
            _by_low=dict(self._by_low),
        )

    def name_of(self, artifact: str) -> str | None:
        """The name of an artifact that is not removed."""
        return self._by_id.get(artifact)

    def apply(self, op: Op, record: Record) -> None:
        """Take one op in."""
        match op:
            case RegisterOp():
                if op.artifact in self.removed or op.artifact in self._by_id:
                    raise PreconditionError(f"the artifact id {op.artifact} was used before")
                self._check_free(op.name, None)
                self._add(op.name, op.artifact)
            case RenameOp():
                old = self._registered(op.artifact)
                self._check_free(op.name, op.artifact)
                self._drop(old)
                self._add(op.name, op.artifact)
            case RemoveOp():
                self.removed[op.artifact] = self._registered(op.artifact)
                self._drop(self.removed[op.artifact])
            case SettingsOp():
                merged = {**self.settings, **op.values}
                self.settings = {key: value for key, value in merged.items() if value is not None}
            case FenceOp():
                pass
            case _:
                raise PreconditionError(f"{type(op).__name__} has no place in the catalog")

    def _registered(self, artifact: str) -> str:
        name = self.name_of(artifact)
        if name is None:
            raise PreconditionError(f"no artifact of id {artifact} is registered")
        return name

    def _check_free(self, name: str, own: str | None) -> None:
        other = self._by_low.get(name.lower())
        if other is not None and self.names[other] != own:
            raise PreconditionError(f"there is an artifact {other!r} already, and names differ by more than case")

    def _add(self, name: str, artifact: str) -> None:
        self.names[name] = artifact
        self._by_id[artifact] = self._by_low[name.lower()] = name

    def _drop(self, name: str) -> None:
        del self._by_id[self.names.pop(name)]
        del self._by_low[name.lower()]


def parse_time(text: str) -> datetime:
    """The time of a record, aware, UTC; times of records are shown, never relied on."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.fromtimestamp(0, UTC)
