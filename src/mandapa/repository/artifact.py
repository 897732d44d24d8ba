"""An artifact: a named, versioned folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from mandapa.address import Address, parse_ref
from mandapa.errors import ConflictError, InvalidInputError, NotFoundError
from mandapa.format.records import (
    AliasOp,
    CloseOp,
    DeleteOp,
    FenceOp,
    Op,
    Record,
    RemoveOp,
    RenameOp,
    RepackOp,
    TagOp,
    UndeleteOp,
)
from mandapa.format.strict import check_label, check_name, is_id, shown
from mandapa.repository.best import Contest, Mode, measures
from mandapa.repository.log import Log
from mandapa.repository.packs import condemned_or_missing
from mandapa.repository.state import ArtifactState, CatalogState, VersionState, parse_time
from mandapa.repository.transaction import Transaction
from mandapa.repository.version import Version

if TYPE_CHECKING:
    from mandapa.content.tree import Tree
    from mandapa.repository.repack import Repacked, RepackPlan
    from mandapa.repository.repository import Repository

__all__ = ["AliasStep", "Artifact"]

NAMED = 20
"""Metrics that one message names, at most."""


@dataclass(frozen=True, slots=True)
class AliasStep:
    """One move in the history of an alias or tag."""

    name: str
    version: int | None
    """None: it was dropped."""
    at: datetime
    by: str
    kind: Literal["alias", "tag"]


class Artifact:
    """A named, versioned folder; it comes into being with its first version.

    Look-ups read the store each time: what another process committed before the call is seen.
    """

    def __init__(self, repository: Repository, name: str, *, run: str = "") -> None:
        self.repository = repository
        self.name = check_name(name)
        self.run = run
        """The run in whose name commits are made; empty outside runs."""

    def __repr__(self) -> str:
        """Name and repository, for people."""
        return f"<Artifact {self.name!r} in {self.repository.url}>"

    # -- versions -----------------------------------------------------------------------------------------------------

    def transaction(
        self,
        message: str = "",
        metadata: Mapping[str, Any] | None = None,
        *,
        base: Literal["latest"] | int | Version | None = "latest",
        on_conflict: Literal["raise", "ours"] = "raise",
        txn_id: str | None = None,
    ) -> Transaction:
        """Gather changes that become one version when the ``with`` block ends, or nothing.

        ``base=None`` starts empty: the version is what is added, and never conflicts. A live version as the base (its
        number, or a `Version`) stays the base: the version is that one with these changes, whatever else is committed
        in between, and conflicts only when the base is deleted. ``txn_id`` (32 hex digits) makes the commit idempotent:
        a second transaction of the same id finds the first one's version.

        Raises:
            InvalidInputError: A message above 4 KiB, or metadata above 16 KiB or that JSON cannot hold.
        """
        if txn_id is not None and not is_id(txn_id):
            raise InvalidInputError(f"txn_id={txn_id!r}: a transaction id is 32 lower-case hex digits")
        return Transaction(
            self,
            message,
            metadata,
            base=base,
            on_conflict=on_conflict,
            txn_id=txn_id or self.repository.author.new_id().hex(),
        )

    def versions(self, path: str | None = None) -> list[Version]:
        """Live versions, oldest first; with a path, only those in which that asset or folder changed.

        Raises:
            NotFoundError: The artifact has no version yet.
        """
        log = self.open_log()
        found = [Version(self, log, log.state.versions[number]) for number in log.state.live()]
        if path is None:
            return found
        changed = []
        before: object = None
        for version in found:
            try:
                now = version.reading(lambda tree: _fingerprint(tree, path))
            except NotFoundError:
                self.check_open(log.state)
                continue  # it was deleted since the log was read
            if now != before:
                changed.append(version)
            before = now
        return changed

    def version(self, ref: int | str | Version = "latest") -> Version:
        """One live version: by number, ``"v12"``, alias, tag, ``"@digest"`` or ``"best~1"``; default the newest.

        Raises:
            NotFoundError: No such version, or it was deleted (the message says so).
            InvalidInputError: Not a reference, or a digest that several versions' digests start with.
        """
        log = self.open_log()
        return Version(self, log, self.look_up(log.state, ref))

    def best(self, by: str, mode: Mode) -> Version:
        """The live version whose ``metadata[by]`` is the least (``"min"``) or greatest (``"max"``) finite number.

        Of several the oldest.

        Raises:
            NotFoundError: No live version has such a number; the message names the metrics that there are.
            InvalidInputError: Another mode.
        """
        contest = Contest.of(by, mode)
        log = self.open_log()
        live = [log.state.versions[number] for number in log.state.live()]
        found = contest.best(live)
        if found is None:
            known = sorted({name for version in live for name in measures(version.op.metadata)})
            more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
            there = (", ".join(map(shown, known[:NAMED])) or "none") + more
            raise NotFoundError(f"no live version of {self.name} has a number for {shown(by)}; there are: {there}")
        return Version(self, log, found)

    def resolve(self, address: Address) -> Version:
        """The version that a parsed address names."""
        log = self.open_log()
        return Version(self, log, self.look_up(log.state, address.ref, address.back), address.path)

    def deleted(self) -> list[Version]:
        """Deleted versions, oldest first; their bytes may be gone."""
        log = self.open_log()
        return [Version(self, log, version) for version in log.state.versions.values() if version.deleted is not None]

    def look_up(self, state: ArtifactState, ref: int | str | Version, back: int = 0) -> VersionState:
        """The live version of ``state`` that a reference names; raises as `version`. For the layers of this package."""
        ref = self._own(state, ref)
        if isinstance(ref, str):
            ref, more = parse_ref(ref)
            back += more
        number = self._number(state, ref)
        version = state.versions.get(number)
        if version is None:
            newest = f"the newest is v{state.next_number - 1}" if state.next_number else "it has none yet"
            raise NotFoundError(f"{self.name} has no v{number}; {newest}")
        if version.deleted is not None:
            raise NotFoundError(
                f"{self.name}:v{number} was deleted ({version.deleted.at}, by {version.deleted.by}); "
                f"'mandapa undelete {self.name}:v{number}' may bring it back"
            )
        if back:
            live = state.live()
            at = live.index(number) - back
            if at < 0:
                raise NotFoundError(f"{self.name}: there are no {back} live versions before v{number}")
            version = state.versions[live[at]]
        return version

    def _own(self, state: ArtifactState, ref: int | str | Version) -> int | str:
        """The number of a version in hand, which must be one of this artifact's; other references as they are."""
        if not isinstance(ref, Version):
            return ref
        if not ref.is_in(state):
            raise InvalidInputError(f"{ref.address} is no version of {self.name}")
        return ref.number

    def _number(self, state: ArtifactState, ref: int | str) -> int:
        if isinstance(ref, int):
            return ref
        number = Address(self.name, ref).number
        if number is not None:
            return number
        if ref == "latest":
            latest = state.latest()
            if latest is None:
                raise NotFoundError(f"{self.name} has no live version")
            return latest.op.number
        if ref.startswith("@"):
            return self._by_digest(state, ref[1:])
        for names in (state.aliases, state.tags):
            if ref in names:
                return names[ref]
        known = ", ".join(sorted({*state.aliases, *state.tags})) or "none"
        raise NotFoundError(f"{self.name} has no alias or tag {ref!r}; it has: {known}")

    def _by_digest(self, state: ArtifactState, prefix: str) -> int:
        found = [n for n, version in state.versions.items() if version.op.digest.startswith(prefix)]
        found = [n for n in found if state.versions[n].deleted is None] or found
        digests = {state.versions[number].op.digest for number in found}
        if len(digests) > 1:
            raise InvalidInputError(f"{self.name}: the digests of {len(digests)} versions start with {prefix}")
        if not found:
            raise NotFoundError(f"{self.name} has no version whose digest starts with {prefix}")
        return found[-1]

    # -- names --------------------------------------------------------------------------------------------------------

    def aliases(self) -> dict[str, int]:
        """Alias -> version number, sorted by name; ``latest`` is not one of them."""
        return dict(sorted(self.state().aliases.items()))

    def tags(self) -> dict[str, int]:
        """Tag -> version number, sorted by name."""
        return dict(sorted(self.state().tags.items()))

    def moves(self, name: str | None = None) -> list[AliasStep]:
        """Every move of aliases and tags (or of one of them), oldest first."""
        return [
            AliasStep(move.name, move.version, parse_time(move.record.at), move.record.by, move.kind)
            for move in self.state().moves
            if name is None or move.name == name
        ]

    def alias(self, name: str, version: int | str | Version | None) -> None:
        """Let an alias name a version from now on; None drops it. Three requests.

        Raises:
            NotFoundError: No such version, or (with None) no such alias.
            ConflictError: The name is, or was, a tag, or is another alias but for case.
        """
        self._name(name, version, AliasOp)

    def tag(self, name: str, version: int | str | Version | None) -> None:
        """Give a version a name that never moves; None drops the tag, whose name is never used again. Three requests.

        Raises:
            NotFoundError: No such version, or (with None) no such tag.
            ConflictError: The name is or was in use.
        """
        self._name(name, version, TagOp)

    def _name(self, name: str, version: int | str | Version | None, op: type[AliasOp | TagOp]) -> None:
        """Give a version a name by an op of that kind, or drop the name."""
        check_label(name)
        kind = "alias" if op is AliasOp else "tag"

        def build(state: ArtifactState) -> Iterable[Op]:
            if version is not None:
                return [op(name, self.look_up(state, version).op.number)]
            if name not in (state.aliases if op is AliasOp else state.tags):
                raise NotFoundError(f"{self.name} has no {kind} {name!r}")
            return [op(name, None)]

        self._command(build)

    # -- deleting -----------------------------------------------------------------------------------------------------

    def delete(self, *versions: int | str | Version) -> list[int]:
        """Delete versions, all or none; gives their numbers. They can be brought back until gc has passed.

        Three requests.

        Raises:
            NotFoundError: One is not there, or was deleted already.
            ConflictError: An alias or a tag names one of them.
        """
        if not versions:
            raise InvalidInputError("name at least one version to delete")
        numbers: list[int] = []

        def build(state: ArtifactState) -> Iterable[Op]:
            # "latest" and "best" mean what they mean at first, not whatever they name after a lost race.
            numbers[:] = sorted({self.look_up(state, version).op.number for version in numbers or versions})
            for number in numbers:
                if names := state.names_of(number):
                    raise ConflictError(f"{self.name}:v{number} is {', '.join(names)}: move or drop that first")
            return [DeleteOp(list(numbers))]

        self._command(build)
        return numbers

    def undelete(self, *versions: int | str | Version) -> list[int]:
        """Bring deleted versions back, all or none; gives their numbers.

        Every object that they need is looked at before, and again after each gc that passes meanwhile.

        Raises:
            NotFoundError: There never was such a version, or a gc has taken or listed bytes of it.
            InvalidInputError: It is not deleted.
        """
        if not versions:
            raise InvalidInputError("name at least one version to bring back")
        log = self.open_log()
        since = len(log.records)
        revival = _Revival(self, log, sorted({self._number_of_deleted(log.state, version) for version in versions}))
        author = self.repository.author
        log.append(author.new_id().hex(), revival.build, author, since=since, on_record=revival.notice)
        return revival.numbers

    def _number_of_deleted(self, state: ArtifactState, version: int | str | Version) -> int:
        version = self._own(state, version)
        if isinstance(version, str):
            ref, back = parse_ref(version)
            if back:
                raise InvalidInputError(f"{version!r}: name a deleted version by its number or digest")
            version = self._number(state, ref)
        if version not in state.versions:
            raise NotFoundError(f"{self.name} has no v{version}")
        if state.versions[version].deleted is None:
            raise InvalidInputError(f"{self.name}:v{version} is not deleted")
        return version

    # -- the artifact itself ------------------------------------------------------------------------------------------

    def plan_repack(self) -> RepackPlan:
        """Which versions `repack` would store in fewer bytes, and about how many of them: nothing is changed.

        Reads the manifests of all live versions and, of each, the bytes of up to eight chunks and of their bases.

        Raises:
            NotFoundError: There is no such artifact, or a version was deleted meanwhile.
            CorruptionError: Stored bytes are not what was written.
        """
        from mandapa.repository.repack import plan_repack

        return plan_repack(self)

    def repack(
        self, plan: RepackPlan | None = None, *, progress: Callable[[int], None] | None = None
    ) -> list[Repacked]:
        """Store versions in as few bytes as there is a way for; what they hold, their numbers and digests stay.

        Each version is read, stored anew in mode ``dense``, verified, and moved by a commit of its own, oldest first;
        readers go on where it moved. The old bytes stay until a clean-up. Killed, it leaves versions whole, some of
        them moved. Safe beside writers, readers and clean-ups. About 5 s of one core for a GB.

        Args:
            plan: What to do; by default what `plan_repack` finds. A version that changed since is skipped.
            progress: Called with the bytes of each container that was put.

        Returns:
            What became of each version of the plan.

        Raises:
            InvalidInputError: The plan is of another artifact or repository.
            NotFoundError: There is no such artifact.
            StorageError: The store failed; what was moved by then stays moved.
        """
        from mandapa.repository.repack import apply_repack

        return list(apply_repack(self, self.plan_repack() if plan is None else plan, progress=progress))

    def rename(self, name: str) -> None:
        """Give the artifact another name; its history stays, the old name becomes free.

        Raises:
            NotFoundError: There is no such artifact.
            ConflictError: Another artifact has that name, case aside.
        """
        check_name(name)
        self._catalog(self._log().id, lambda id_: RenameOp(id_, name))
        self.name = name

    def remove(self) -> None:
        """Remove the artifact with all its versions; its name becomes free. Running transactions on it fail.

        Raises:
            NotFoundError: There is no such artifact.
        """
        repo = self.repository
        log = self._log()
        log.refresh()

        def close(state: ArtifactState) -> Iterable[Op]:
            self.check_open(state)
            return [CloseOp()]

        with suppress(NotFoundError):  # closed already: by another process, or by one that died before the next step
            log.append(repo.author.new_id().hex(), close, repo.author)
        self._catalog(log.id, RemoveOp)

    def _catalog(self, id_: str, op: Callable[[str], Op]) -> None:
        """Commit an op about this artifact to the catalog."""
        repo = self.repository

        def build(state: CatalogState) -> Iterable[Op]:
            if state.name_of(id_) is None:
                raise NotFoundError(f"the artifact {self.name!r} was removed")
            return [op(id_)]

        repo.catalog.append(repo.author.new_id().hex(), build, repo.author)

    # -- the log ------------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether the artifact is registered. One or more requests."""
        return self.find_log() is not None

    def find_log(self) -> Log[ArtifactState] | None:
        """The artifact's log, or None as long as it has none."""
        return self.repository.find_log(self.name)

    def register(self) -> Log[ArtifactState]:
        """The artifact's log; the artifact is put into the catalog if it is not there."""
        return self.repository.register(self.name)

    def open_log(self) -> Log[ArtifactState]:
        """The artifact's log, read to its tail.

        Raises:
            NotFoundError: There is no such artifact, or it was removed.
        """
        log = self._log()
        self.check_open(log.refresh())
        return log

    def state(self) -> ArtifactState:
        """What the log says now; raises as `open_log`."""
        return self.open_log().state

    def _log(self) -> Log[ArtifactState]:
        log = self.find_log()
        if log is None:
            raise self.repository.no_artifact(self.name)
        return log

    def check_open(self, state: ArtifactState) -> None:
        """Raise `NotFoundError` when the log is closed."""
        if state.closed:
            raise NotFoundError(f"the artifact {self.name!r} was removed")

    def _command(self, build: Callable[[ArtifactState], Iterable[Op]]) -> None:
        log = self.open_log()

        def checked(state: ArtifactState) -> Iterable[Op]:
            self.check_open(state)
            return build(state)

        log.append(self.repository.author.new_id().hex(), checked, self.repository.author)


class _Revival:
    """Brings versions back: every object that they need is looked at, and again after each gc that passes."""

    def __init__(self, artifact: Artifact, log: Log[ArtifactState], numbers: list[int]) -> None:
        self._artifact = artifact
        self._log = log
        self.numbers = numbers
        self._looked = False

    def build(self, state: ArtifactState) -> Iterable[Op]:
        """The op for the slot after ``state``."""
        self._artifact.check_open(state)
        for number in self.numbers:
            if state.versions[number].deleted is None:
                raise InvalidInputError(f"{self._artifact.name}:v{number} is not deleted")
        if not self._looked:
            for number in self.numbers:
                self._look(Version(self._artifact, self._log, state.versions[number]))
            self._looked = True
        return [UndeleteOp(self.numbers)]

    def notice(self, record: Record) -> None:
        """After a fence, or when the manifest moved, what was looked at before proves nothing."""
        if any(isinstance(op, FenceOp | RepackOp) for op in record.ops):
            self._looked = False

    def _look(self, version: Version) -> None:
        repo = self._artifact.repository
        try:
            containers = set(version.tree.containers())
        except NotFoundError as error:
            raise NotFoundError(f"{version.address} cannot be brought back: its bytes are gone ({error})") from error
        if condemned_or_missing(repo.store, containers, threads=repo.threads):
            raise NotFoundError(
                f"{version.address} cannot be brought back: a clean-up has taken some of its bytes, or is about to"
            )


def _fingerprint(tree: Tree, path: str) -> object:
    """Something that is equal exactly when the asset, or the folder, at ``path`` is."""
    located = tree.get(path)
    if located is not None:
        row = located.row
        return getattr(row, "digest", row), getattr(row, "mode", 0)
    rows = [item.row for item in tree.under(path)]
    return [(row.path, getattr(row, "digest", row), getattr(row, "mode", 0)) for row in rows] or None
