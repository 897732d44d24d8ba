"""A repository: one prefix of one object store, with a marker; it holds artifacts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, get_args

from mandapa.address import parse_address
from mandapa.content.cache import ChunkCache
from mandapa.content.codecs import FEATURES
from mandapa.content.index import Index
from mandapa.content.link import Link, Mode
from mandapa.content.tree import NodeReader
from mandapa.errors import (
    ConflictError,
    FormatVersionError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from mandapa.format.keys import CATALOG, MARKER, head_key, log_key
from mandapa.format.records import MARKER_MAX, Op, RegisterOp, SettingsOp, decode_marker, encode_marker
from mandapa.format.strict import check_name
from mandapa.object_store.base import ObjectStore
from mandapa.object_store.local import LocalObjectStore
from mandapa.object_store.probe import probe
from mandapa.object_store.retry import RetryingObjectStore
from mandapa.object_store.single_writer import SingleWriterObjectStore
from mandapa.repository.artifact import Artifact
from mandapa.repository.log import Author, Log, create_once
from mandapa.repository.shelf import Shelf
from mandapa.repository.state import ArtifactState, CatalogState
from mandapa.repository.version import Version

if TYPE_CHECKING:
    from mandapa.repository.garbage import GcPlan
    from mandapa.repository.gc import Collected
    from mandapa.repository.mirror import Mirrored
    from mandapa.repository.policy import Policy
    from mandapa.repository.prices import Prices
    from mandapa.repository.retention import Expired, ExpirePlan
    from mandapa.repository.usage import By, Usage

__all__ = ["Repository"]


class Repository:
    """Artifacts and their histories under one prefix of one object store. No server, no lock: any number may write.

    Args:
        store: Where it is.
        cache_dir: A folder for the local index (what chunks the repository has, which files did not change); None keeps
            the index in memory. It is only ever a help: losing it costs time, not data.
        cache_size: Bytes of chunks that are kept there, in ``chunks``, shared by all repositories; 0 for none, and none
            for a store that is on this machine.
        codec: ``auto``, ``raw`` or ``dense``: how new chunks are stored.
        threads: For transfers; 0 does everything in the caller's thread.
        author: Who commits, and with which clock and dice.

    Raises:
        NotFoundError: There is no repository at that place.
        FormatVersionError: It is of a format that this mandapa does not read.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int = 0,
        codec: Mode = "auto",
        threads: int = 4,
        author: Author | None = None,
    ) -> None:
        if codec not in get_args(Mode):
            raise InvalidInputError(f"codec={codec!r}: use one of {', '.join(get_args(Mode))}")
        self.author = author or Author()
        self.codec = codec
        self.threads = threads
        self.url = store.url
        self.place = store
        """The store as it was given, without retries."""
        patient = RetryingObjectStore(store, sleep=self.author.sleep)
        try:
            self.id = decode_marker(patient.get(MARKER, limit=MARKER_MAX), key=MARKER).id
        except NotFoundError:
            raise NotFoundError(
                f"there is no repository at {store.url}: make one with 'mandapa init' or open(..., create=True)"
            ) from None
        self.store: ObjectStore = patient
        self._logs: dict[str, Log[ArtifactState]] = {}
        self.catalog = Log(self.store, CATALOG, CatalogState, threads=threads)
        if self.catalog.refresh().settings.get("writers") == "single":
            self.store = SingleWriterObjectStore(patient)
            self.catalog = Log(self.store, CATALOG, CatalogState, threads=threads)
        self.index = Index(cache_dir, repository=self.id, url=store.url)
        self.kept_logs = Shelf(cache_dir, "logs", repository=self.id, url=store.url)
        """What this machine knows of the logs; see `read_logs`."""
        self.kept_nodes = Shelf(cache_dir, "nodes", repository=self.id, url=store.url)
        """What this machine knows of manifests; see `Reach`."""
        near = store.url.startswith(("file:", "memory:"))
        self.link = Link(near=near)
        """What was measured of the way to the store."""
        self.cache: ChunkCache | None = None
        """What this machine has of the chunks of far stores."""
        if cache_dir is not None and cache_size > 0 and not near:
            self.cache = ChunkCache(os.path.join(cache_dir, "chunks"), cache_size)
        self.reader = NodeReader(self.store, on_leaf=self.index.feed)

    @classmethod
    def create(cls, store: ObjectStore, *, single_writer: bool = False, **options: Any) -> Repository:
        """Make a repository where nothing is, or open the one that is there.

        The store is probed first: one that does not keep create-if-absent is refused, unless ``single_writer`` promises
        that never two processes write at once; that promise is recorded, and holds for everybody.

        Raises:
            InvalidInputError: Something else is under the prefix.
            StorageError: The store cannot be trusted with several writers, or failed.
        """
        author: Author = options.get("author") or Author()
        patient = RetryingObjectStore(store, sleep=author.sleep)
        try:
            patient.get(MARKER, limit=MARKER_MAX)
        except NotFoundError:
            cls._make(store, patient, author, single_writer)
        return cls(store, **options)

    @staticmethod
    def _make(store: ObjectStore, patient: ObjectStore, author: Author, single_writer: bool) -> None:
        """Settings first, marker last: what is half made is no repository, and can be made again."""
        marker = encode_marker(author.new_id().hex())
        leftovers = ("probe/", log_key(CATALOG, 0), head_key(CATALOG))
        stranger = next((info.key for info in patient.list("") if not info.key.startswith(leftovers)), None)
        if stranger is None and isinstance(store, LocalObjectStore):
            stranger = store.foreign()
        if stranger not in (None, MARKER):
            raise InvalidInputError(
                f"{store.url} holds other things (such as {stranger!r}) and no repository: choose an empty prefix"
            )
        result = probe(patient)
        if single_writer:
            patient = SingleWriterObjectStore(patient)
        elif result.verdict != "ok":
            raise StorageError(
                f"{store.url} cannot be trusted with several writers: {'; '.join(result.reasons)}. If only one process "
                "will ever write at a time, say so with 'mandapa init --single-writer'"
            )
        settings = {
            "writers": "single" if single_writer else "many",
            "probe": {
                "verdict": result.verdict,
                "reasons": list(result.reasons),
                "spurious_conflicts": result.spurious_conflicts,
                "at": author.now(),
            },
        }

        def build(state: CatalogState) -> Iterable[Op]:
            if state.settings:
                raise _DoneError  # by another process, now or before it died
            return [SettingsOp(settings)]

        with suppress(_DoneError):
            Log(patient, CATALOG, CatalogState).append(author.new_id().hex(), build, author)
        create_once(patient, MARKER, marker, author)

    def __repr__(self) -> str:
        """Where it is, for people."""
        return f"<Repository {self.url}>"

    def __getitem__(self, address: str) -> Version:
        """The version that an address names: ``name[:ref[~N]][/path]``.

        Two requests when nothing is new since the last look.

        Raises:
            InvalidInputError: Not an address.
            NotFoundError: No such artifact or version, or it was deleted; the message says which.
        """
        parsed = parse_address(address)
        return self.artifact(parsed.name).resolve(parsed)

    def artifact(self, name: str) -> Artifact:
        """The artifact of that name, which need not exist yet. No request.

        Raises:
            InvalidInputError: No artifact can have that name.
        """
        return Artifact(self, name)

    def artifacts(self) -> list[Artifact]:
        """All artifacts, sorted by name. One request or more."""
        return [Artifact(self, name) for name in sorted(self.catalog.refresh().names)]

    def settings(self) -> dict[str, Any]:
        """What is set for the whole repository. One request or more."""
        return dict(self.catalog.refresh().settings)

    # -- clean-up by policy -------------------------------------------------------------------------------------------

    def policies(self) -> dict[str | None, Policy]:
        """Stored policies by the name of their artifact; under None that of all that have none of their own.

        One request or more.

        Raises:
            FormatVersionError: A newer mandapa has written one.
            CorruptionError: One is no policy.
        """
        from mandapa.repository.policy import stored_policies

        state = self.catalog.refresh()
        return stored_policies(state.settings, state.names)

    def set_policy(self, artifact: str | None, policy: Policy | None) -> None:
        """Store what stays of an artifact when it is cleaned up; None for all that have none of their own.

        It follows the artifact when that is renamed. ``policy=None`` drops what is stored. Nothing is deleted until
        `expire`. One commit.

        Raises:
            NotFoundError: There is no such artifact; or nothing is stored that could be dropped.
        """
        from mandapa.repository.policy import setting_of

        def build(state: CatalogState) -> Iterable[Op]:
            if artifact is not None and artifact not in state.names:
                raise self.no_artifact(artifact)
            key = setting_of(None if artifact is None else state.names[artifact])
            if policy is None and key not in state.settings:
                raise NotFoundError(f"no policy is stored for {artifact or 'all artifacts'}")
            return [SettingsOp({key: None if policy is None else policy.as_setting()})]

        self.catalog.refresh()
        self.catalog.append(self.author.new_id().hex(), build, self.author)

    def plan_expire(self, *artifacts: str, policy: Policy | None = None, measure: bool = True) -> ExpirePlan:
        """Which versions `expire` would delete, and why the others stay. Nothing is deleted, nothing is committed.

        Args:
            artifacts: Names; without any, all that a policy holds for.
            policy: What stays; by default the stored policy of each artifact. What a stored policy keeps stays in any
                case.
            measure: Tell the bytes that only these versions need, too.

        Cost: what `read_logs` costs, and with ``newer_than`` three requests to learn the store's time. To measure, one
        for each manifest node that this machine has not seen, of all live versions of the repository.

        Raises:
            NotFoundError: There is no such artifact.
            InvalidInputError: No policy was given, and none is stored: nearly all would go.
            FormatVersionError: A log, or a stored policy, needs a newer mandapa.
            CorruptionError: A log is not what was written, or what is stored as a policy is none.
        """
        from mandapa.repository.retention import plan_expire

        return plan_expire(self, artifacts, policy, measure=measure)

    def expire(self, plan: ExpirePlan) -> list[Expired]:
        """Delete what a plan names, as far as it may go by then: one commit an artifact, all of it or nothing.

        Looked at again, before each try at a slot of the log: the policy of the plan and the stored one, names, and
        what was brought back. A version that came after the plan is never deleted. What was deleted can be brought back
        with `Artifact.undelete` until a gc that comes more than its grace later.

        Cost: what `read_logs` costs, and two or three requests an artifact. More than about 5,000 versions of one
        artifact take more commits than one.

        Returns:
            What became of each version that the plan names.

        Raises:
            InvalidInputError: The plan is of another repository, or of another history.
            StorageError: The store failed; what was deleted by then stays deleted, and the plan can be applied again.
        """
        from mandapa.repository.retention import apply_expire

        return list(apply_expire(self, plan))

    def plan_gc(self, *, grace: float = 7 * 86_400.0) -> GcPlan:
        """What `gc` would delete now, whose it was, and which versions could not be brought back after that.

        Nothing is written but an object that tells the store's time, and nothing is deleted but that one.

        Args:
            grace: Seconds that deleted versions, and objects that nothing uses yet, stay; by the store's clock.

        Cost: three requests for the time; one for each 1,000 containers and each 1,000 records; one for each new record
        and each manifest node that this machine has not seen.

        Raises:
            InvalidInputError: ``grace`` is negative.
            CorruptionError: A log, or the manifest of a live version, is not whole: what is needed cannot be told.
            FormatVersionError: The catalog, a log, or a live version needs a newer mandapa.
            StorageError: The store failed.
        """
        from mandapa.repository.garbage import plan_gc

        return plan_gc(self, grace)

    def gc(
        self,
        plan: GcPlan | None = None,
        *,
        grace: float | None = None,
        progress: Callable[[str, int], None] | None = None,
    ) -> Collected:
        """Delete what nothing reaches, and store anew what is needed of packs that are half dead.

        Safe beside writers, readers, and other clean-ups: what comes into use while it runs stays. Nothing is written
        when nothing can go. Killed, it leaves a valid repository; the next one starts over. Emptied packs are a later
        clean-up's to free.

        Cost: that of `plan_gc`; then, for each 65,536 objects that go, one put for each artifact, a few more requests
        for each whose log moved meanwhile, and one for each 1,000 objects (or each, where a store deletes one by one).

        Args:
            plan: What may go, at most; by default all that nothing reaches. What it names and is in use again stays.
            grace: Seconds that deleted versions, and objects that nothing uses yet, stay; by default those of the plan,
                else 7 days. Deleted versions that are older cannot be brought back afterwards.
            progress: Called with what is being counted, and the count so far.

        Raises:
            InvalidInputError: ``grace`` is negative, or the plan is of another repository.
            CorruptionError, FormatVersionError: As `plan_gc`; nothing was deleted.
            StorageError: The store failed. What was deleted by then was garbage.
        """
        from mandapa.repository.gc import collect

        return collect(self, plan, grace, progress)

    # -- copies elsewhere ---------------------------------------------------------------------------------------------

    def mirror(
        self,
        destination: Repository,
        *,
        only: str | Sequence[str] = (),
        progress: Callable[[int], None] | None = None,
    ) -> Mirrored:
        """Let another repository say of artifacts what this one says: versions with their numbers, names, facts.

        Each commit is told again by one commit, in order, once all that it names is there: whatever stops it, the
        destination shows a state that this repository was in, and the next call goes on from there. Bytes that are
        there already are not sent again. Every chunk is decoded and compared with its hash on its way, every version's
        digest with the record. Any number may mirror at once, beside writers and clean-ups on both sides.

        A version that was deleted before it could be copied is there as a deleted version without content. Artifacts
        that are removed here stay there. What the destination has of its own under a mirrored name is never touched:
        that artifact is left alone, with the error in the result.

        Costs one request and one for each 1,000 records on each side when nothing is new. Up to four artifacts are
        mirrored at once, but of versions of more than 1 MB one after the other, each by as many threads as the
        repositories have: memory is that of one upload and one download.

        Args:
            destination: Another repository.
            only: Patterns (fnmatch) of the artifacts to mirror; default all.
            progress: Called, from any thread, with the bytes of each object that was put.

        Raises:
            InvalidInputError: The destination is this repository, or a copy of its bytes.
            NotFoundError: A pattern names no artifact.
            StorageError: A store failed; what was done by then stays.
        """
        from mandapa.repository.mirror import mirror

        return mirror(self, destination, only=only, progress=progress)

    def usage(
        self,
        by: By = "artifact",
        prices: Prices | None = None,
        *,
        progress: Callable[[str, int], None] | None = None,
    ) -> Usage:
        """What every artifact, run or month takes: plain, stored, shared, alone its own, and what could go; the cost.

        A version of which nothing can be read is named in the result, and not counted. What others commit meanwhile
        may be seen or not.

        Costs one request for each 1,000 records and each 1,000 objects, and one for the catalog, when nothing is new;
        what this machine has not seen as `read_logs` and `Reach` say.

        Args:
            by: What a row stands for: ``artifact``, ``run`` or ``month`` (in which a version was made, UTC, by the
                clock of who made it).
            prices: What the store charges; default: list prices of its kind.
            progress: Called with what is being read, and how many of it were.

        Raises:
            InvalidInputError: Another ``by``.
            CorruptionError: A log is broken.
            FormatVersionError: A log needs a newer mandapa.
        """
        from mandapa.repository.usage import usage

        return usage(self, by, prices, progress)

    # -- for the layers of this package -------------------------------------------------------------------------------

    def find_log(self, name: str) -> Log[ArtifactState] | None:
        """The log of the artifact of that name, read as far as it was read before."""
        id_ = self.catalog.refresh().names.get(name)
        return None if id_ is None else self.log(id_)

    def log(self, artifact_id: str) -> Log[ArtifactState]:
        """The log of an artifact id; one object for each, so that its records are read once."""
        log = self._logs.get(artifact_id)
        if log is None:  # one atomic call and no lock, which a fork could inherit held
            new = Log(self.store, artifact_id, ArtifactState, threads=self.threads)
            log = self._logs.setdefault(artifact_id, new)
        return log

    def register(self, name: str) -> Log[ArtifactState]:
        """The log of the artifact of that name, which is put into the catalog if it is not there."""
        check_name(name)
        id_ = self.author.new_id().hex()

        def build(state: CatalogState) -> Iterable[Op]:
            if name in state.names:
                raise _DoneError
            for other in state.names:
                if other.lower() == name.lower():
                    raise ConflictError(f"there is an artifact {other!r}; names differ by more than case")
            return [RegisterOp(name, id_)]

        with suppress(_DoneError):
            self.catalog.append(id_, build, self.author)
        found = self.catalog.state.names.get(name)
        if found is None:
            raise NotFoundError(f"the artifact {name!r} was removed meanwhile")
        return self.log(found)

    def no_artifact(self, name: str) -> NotFoundError:
        """The error for a name that no artifact has, with the nearest that there is."""
        names = list(self.catalog.state.names)
        near = difflib.get_close_matches(name, names, 1) or [other for other in names if other.lower() == name.lower()]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return NotFoundError(f"{self.url} has no artifact {name!r}{hint}")

    @staticmethod
    def check_features(requires: Collection[str], address: str) -> None:
        """Refuse a version that needs what this mandapa lacks.

        Raises:
            FormatVersionError: Names the features.
        """
        lacking = sorted(set(requires) - set(FEATURES.values()))
        if lacking:
            raise FormatVersionError(f"{address} needs {', '.join(lacking)}, which this mandapa lacks: upgrade it")


class _DoneError(Exception):
    pass
