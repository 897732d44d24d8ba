"""A small world of writers, readers, repackers and gcs over one bad store, and what must be true of it in the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import TypeAlias

from mandapa.content.index import Index
from mandapa.errors import ConflictError, InvalidInputError, NotFoundError, StorageError
from mandapa.format.keys import CATALOG, MARKER
from mandapa.format.records import Record, RegisterOp, SettingsOp, VersionOp, encode_marker
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.repository.artifact import Artifact
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author, Log
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState, CatalogState, fold
from mandapa.repository.transaction import Transaction
from mandapa.repository.version import Version
from mandapa.testing.faults import Crash, FaultyObjectStore
from prooflib.collector import collect
from prooflib.repacking import GiveUpError, repack
from prooflib.scheduler import ProcessStore, Scheduler

Content: TypeAlias = dict[str, bytes]
Action: TypeAlias = tuple[str, ...] | tuple[str, str, bytes]

PATHS = ["a", "b", "c", "d/x", "d/y"]
LARGE = Random(0).randbytes(66_000)  # more than goes beside the nodes: it makes a pack
POOL = [b"", LARGE, *[f"content {number}".encode() * 5 for number in range(10)]]
_NOON = datetime(2027, 1, 1, 12, tzinfo=UTC)


class Violation(AssertionError):
    """The protocol broke one of its promises."""


@dataclass
class Intent:
    """A transaction as its writer means it, whatever becomes of it."""

    artifact: str
    txn: str
    base: str | int | None
    """``fixed`` until a version is chosen, then its number."""
    ours: bool
    plan: list[Action]
    tries: list[list[Action]] = field(default_factory=list)
    """What each try has really asked for: one of them is what the version means."""
    version: int | None = None
    """As acknowledged."""
    over: bool = False
    unknown: bool = False
    """A try ended without an answer: its record may land at any time."""
    refused: bool = False
    """It was told that nothing was made, and nothing is on its way."""

    def refuse(self) -> None:
        self.over = True
        self.refused = not self.unknown


class World:
    """Everything that one seed decides."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.memory = MemoryObjectStore()
        self.names = self.random.choice([["a"], ["a", "b"]])
        chance = self.random.choice
        self.pace = chance([3, 30, 150, 600])
        self.busy = 0
        self.scheduler = Scheduler(self.random, burst=chance([0, 0.5, 0.9, 0.98]), limit=40_000)
        self.store = FaultyObjectStore(
            self.memory,
            self.random,
            lost=chance([0, 0.05, 0.2]),
            conflicts=chance([0, 0.05, 0.2]),
            doubled=chance([0, 0.05, 0.2]),
        )
        self.killed = chance([0, 0.002, 0.01])
        self.index = Index(None)
        self.intents: list[Intent] = []
        self.commands: dict[str, bool] = {}
        self.repositories: list[Repository] = []
        self.reads: list[tuple[str, int, Content]] = []
        self.counts = {"kill": 0, "gc": 0, "conflict": 0, "repack": 0, "undelete": 0, "read": 0, "gone": 0, "remove": 0}
        self._make()

    def _make(self) -> None:
        author = Author("init", random=Random(1), clock=lambda: _NOON)
        self.memory.put(MARKER, encode_marker(author.new_id().hex()))
        settings = [SettingsOp({"writers": "many"})]
        Log(self.memory, CATALOG, CatalogState).append(author.new_id().hex(), lambda _: settings, author)

    def populate(self) -> None:
        """Some actors of each kind."""
        draw = self.random
        kinds = {writer: draw.randint(2, 3), gc: draw.randint(1, 2), reader: draw.randint(0, 2)}
        kinds[repacker] = draw.randint(0, 1)
        kinds[remover] = draw.random() < 0.25
        for act, count in kinds.items():
            for number in range(count):
                name = f"{act.__name__}{number}"
                actor = Actor(self, name, Random(draw.random()))
                self.scheduler.add(name, lambda act=act, actor=actor: act(actor))

    def run(self) -> None:
        """To the end, late requests included."""
        self.scheduler.run()
        self.store.flush()


class Actor:
    """One who works in the world, as one process after the other: whoever is killed comes back with nothing at hand."""

    def __init__(self, world: World, name: str, random: Random) -> None:
        self.world = world
        self.name = name
        self.random = random
        self.number = 0
        # The index outlives the process, and several of one machine share it.
        self.index = world.index if random.random() < 0.5 else Index(None)
        self._repo: Repository | None = None

    @property
    def repo(self) -> Repository:
        """Of the running process."""
        world = self.world
        while self._repo is None:
            store = ProcessStore(world.store, world.scheduler, Random(self.random.random()), killed=world.killed)
            author = Author(
                self.name,
                random=Random(self.random.random()),
                clock=lambda: _NOON,
                sleep=lambda _: world.scheduler.switch("sleep"),
            )
            try:
                self._repo = Repository(store, codec="raw", threads=0, author=author)
            except StorageError:
                continue
            except Crash:
                self.died()
                continue
            self._repo.index, self._repo.reader._on_leaf = self.index, self.index.feed
            world.repositories.append(self._repo)
        return self._repo

    def died(self) -> None:
        self.world.counts["kill"] += 1
        self._repo = None

    def work(self, task: Callable[[Actor], object]) -> None:
        """Try a task; the process may be killed by it, or the store fail it."""
        try:
            task(self)
        except StorageError:
            return
        except Crash:
            self.died()

    def pause(self) -> None:
        """Let others go on for a while, or not."""
        if self.random.random() < 0.5:
            self.world.scheduler.sleep(self.random.randint(0, self.world.pace))

    def artifact(self) -> Artifact:
        return self.repo.artifact(self.random.choice(self.world.names))

    def versions(self, *, deleted: bool = False) -> list[Version]:
        artifact = self.artifact()
        try:
            return artifact.deleted() if deleted else artifact.versions()
        except NotFoundError:
            return []

    def signed(self) -> str:
        """The next command is signed so that its record can be told from all others."""
        self.number += 1
        self.repo.author.by = f"{self.name}.{self.number}"
        return self.repo.author.by


# -- who works there --------------------------------------------------------------------------------------------------


def writer(me: Actor) -> None:
    """Makes versions, with the same transaction id again when it was killed, and moves, deletes and undeletes."""
    random, world = me.random, me.world
    world.busy += 1
    me.work(_look_around)
    for _ in range(random.randint(2, 4)):
        intent = _intent(me)
        world.intents.append(intent)
        for _ in range(4):
            me.work(lambda me, intent=intent: _transact(me, intent))
            if intent.over or random.random() < 0.1:
                break  # or nobody takes it up again
            intent.unknown = True
        if random.random() < 0.3:
            me.work(_look_around)
        for _ in range(random.randint(0, 2)):
            me.work(_command)
    world.busy -= 1


def _look_around(me: Actor) -> None:
    """What others have stored is remembered, and soon out of date."""
    for version in me.versions():
        try:
            list(version.rows())
        except NotFoundError:
            continue


def _intent(me: Actor) -> Intent:
    random = me.random
    plan: list[Action] = []
    for _ in range(random.randint(1, 3)):
        kind = random.random()
        if kind < 0.7:
            data = random.choice(POOL) if random.random() < 0.85 else f"{me.name} {random.random()}".encode()
            plan.append(("put", random.choice(PATHS), data))
        elif kind < 0.85:
            plan.append(("copy", random.choice(me.world.names), random.choice([*PATHS, "d"])))
        else:
            plan.append(("remove", random.choice([*PATHS, "d"])))
    return Intent(
        artifact=random.choice(me.world.names),
        txn=random.getrandbits(128).to_bytes(16, "big").hex(),
        base=random.choices(["latest", "fixed", None], [0.7, 0.15, 0.15])[0],
        ours=random.random() < 0.5,
        plan=plan,
    )


def _transact(me: Actor, intent: Intent) -> None:
    done: list[Action] = []
    me.signed()
    artifact = me.repo.artifact(intent.artifact)
    how = "ours" if intent.ours else "raise"
    if intent.base == "fixed":
        intent.base = _choose(me, artifact)
    try:
        with artifact.transaction("m", base=intent.base, on_conflict=how, txn_id=intent.txn) as txn:
            me.pause()
            for action in intent.plan:
                _act(me, txn, action, done)
                me.pause()
            if txn.version is None:
                intent.tries.append(done)
    except ConflictError:
        me.world.counts["conflict"] += 1
        intent.refuse()
    except NotFoundError as error:
        if "was removed" not in str(error) and not isinstance(intent.base, int):
            raise
        intent.refuse()
    else:
        assert txn.version is not None
        intent.over, intent.version = True, txn.version.number


def _choose(me: Actor, artifact: Artifact) -> int | str:
    """A version to start from, if there is one."""
    try:
        return me.random.choice(artifact.versions()).number
    except (NotFoundError, IndexError):
        return "latest"


def _act(me: Actor, txn: Transaction, action: Action, done: list[Action]) -> None:
    if action[0] == "put":
        _, path, data = action
        txn.add_bytes(path, data)
        done.append(action)
    elif action[0] == "remove":
        try:
            txn.remove(action[1])
        except NotFoundError:
            return
        done.append(action)
    else:
        _, name, path = action
        try:
            version = me.random.choice(me.repo.artifact(name).versions())
            txn.copy(version.address, path)
        except (NotFoundError, IndexError):
            return
        done.append(("copy", version._log.id, str(version.number), path))


def _command(me: Actor) -> None:
    """Something but a version."""
    random, world = me.random, me.world
    kind = random.random()
    versions = me.versions(deleted=kind > 0.75)
    me.pause()
    if not versions:
        return
    version = random.choice(versions[-3:])
    artifact = version.artifact
    by = me.signed()
    world.commands[by] = False
    try:
        if kind < 0.6:
            artifact.delete(version)
        elif kind < 0.67:
            artifact.alias("best", version)
        elif kind < 0.72:
            artifact.alias("best", None)
        elif kind < 0.75:
            artifact.tag(f"t{random.randint(0, 3)}", version)
        elif kind > 0.75:
            artifact.undelete(version)
            world.counts["undelete"] += 1
        else:
            return
    except (ConflictError, NotFoundError, InvalidInputError):
        return
    world.commands[by] = True


def reader(me: Actor) -> None:
    """Reads whole versions: gets the bytes, or is told that the version was deleted; nothing else."""
    for _ in range(me.random.randint(3, 6)):
        me.pause()
        me.work(_read)


def _read(me: Actor) -> None:
    versions = me.versions()
    if not versions:
        return
    me.pause()
    version = me.random.choice(versions)
    content = {}
    try:
        for path in version.assets:
            me.pause()
            with version.open(path) as file:
                content[path] = file.read()
    except NotFoundError as error:
        if not re.search("was (deleted|removed)", str(error)):
            raise
        me.world.counts["gone"] += 1
        return
    me.world.counts["read"] += 1
    me.world.reads.append((version._log.id, version.number, content))


def gc(me: Actor) -> None:
    """Collects as long as there are writers; is killed at times and never resumed."""
    for _ in range(12):
        me.world.scheduler.sleep(me.random.randint(0, 60))
        me.work(_collect)
        if not me.world.busy:
            return


def _collect(me: Actor) -> None:
    for step in collect(me.repo):
        me.world.counts["gc"] += step == "done"


def repacker(me: Actor) -> None:
    """Stores versions otherwise."""
    for _ in range(6):
        me.pause()
        me.work(_repack)
        if not me.world.busy:
            return


def _repack(me: Actor) -> None:
    random, versions = me.random, me.versions()
    if not versions:
        return
    log = me.repo.log(random.choice(versions)._log.id)
    live = log.refresh().live()
    if not live:
        return
    me.signed()
    try:
        repack(me.repo, log, random.choice(live), moves=lambda _: random.random() < 0.6, pause=me.pause)
    except (NotFoundError, GiveUpError):
        return
    me.world.counts["repack"] += 1


def remover(me: Actor) -> None:
    """Removes an artifact; who comes later makes a new one of that name."""
    me.world.scheduler.sleep(me.random.randint(0, 400))
    me.work(_remove)


def _remove(me: Actor) -> None:
    try:
        me.artifact().remove()
    except NotFoundError:
        return
    me.world.counts["remove"] += 1


# -- what must be true in the end -------------------------------------------------------------------------------------


def check(world: World) -> None:
    """Raise `Violation` unless every promise was kept."""
    repo = Repository(world.memory, threads=0)
    report = fsck(repo, deep=True)
    if not report.ok:
        raise Violation(f"fsck: {report.findings}")
    truth = Truth(world, repo)
    truth.check_history()
    truth.check_acknowledged()
    truth.check_versions()
    truth.check_readers()


class Truth:
    """What the records say, and what every version must hold according to those who made them."""

    def __init__(self, world: World, repo: Repository) -> None:
        self.world = world
        self.repo = repo
        self.ids = dict(repo.catalog.state.names)
        registered = [op for record in repo.catalog.records for op in record.ops if isinstance(op, RegisterOp)]
        self.names = {op.artifact: op.name for op in registered}
        self.logs = {id_: repo.log(id_) for id_ in self.names}
        for log in self.logs.values():
            log.refresh()
        self.intents = {intent.txn: intent for intent in world.intents}
        self.contents: dict[tuple[str, int], Content] = {}

    def records(self) -> Iterator[tuple[str, Record]]:
        for id_, log in self.logs.items():
            for record in log.records:
                yield id_, record

    def check_history(self) -> None:
        """One record a transaction, no gap; a version comes from the newest, or the fixed, one that was live before."""
        for id_, log in self.logs.items():
            if len({record.txn for record in log.records}) != len(log.records):
                raise Violation(f"a transaction stands twice in {id_}")
            state = ArtifactState()
            for record in log.records:
                op = record.find(VersionOp)
                if op is not None:
                    intent = self.intents[record.txn]
                    if self.names[id_] != intent.artifact:
                        raise Violation(f"{record.txn} was meant for another artifact")
                    latest = state.latest()
                    parent = latest.op.number if latest is not None and intent.base == "latest" else None
                    if isinstance(intent.base, int):
                        parent = intent.base
                    if op.parent != parent:
                        raise Violation(f"v{op.number} comes from v{op.parent}, not from v{parent}")
                    if parent is not None and parent not in state.live():
                        raise Violation(f"v{op.number} comes from v{parent}, which was deleted before")
                fold(state, record, key="")
            for names in (state.aliases, state.tags):
                if not set(names.values()) <= set(state.live()):
                    raise Violation(f"{names} name deleted versions")

    def check_acknowledged(self) -> None:
        """What was acknowledged is there, once; what was refused is not."""
        made: dict[str, list[int]] = {}  # several when the artifact was removed, and made again, between two tries
        for _, record in self.records():
            if (op := record.find(VersionOp)) is not None:
                made.setdefault(record.txn, []).append(op.number)
        for intent in self.world.intents:
            if intent.version is not None and intent.version not in made.get(intent.txn, []):
                raise Violation(f"acknowledged as v{intent.version}, but there is {made.get(intent.txn)}")
            if intent.refused and intent.txn in made:
                raise Violation("refused, and made all the same")
        signed = [record.by for _, record in self.records()]
        for by, acknowledged in self.world.commands.items():
            if signed.count(by) > 1 or (acknowledged and by not in signed):
                raise Violation(f"the command {by} stands {signed.count(by)} times")

    def check_versions(self) -> None:
        """Every live version reads back as what its transaction meant."""
        for name, id_ in self.ids.items():
            if self.logs[id_].state.closed:
                continue  # whoever removed it died before the catalog knew
            for version in self.repo.artifact(name).versions():
                expected = self.content(id_, version.number)
                found = {}
                for path in version.assets:
                    with version.open(path) as file:
                        found[path] = file.read()
                if found not in expected:
                    raise Violation(f"{version.address} holds {_short(found)}, meant was {_short(expected)}")

    def check_readers(self) -> None:
        """Every process saw a prefix of the one history, and every reader the bytes that were meant."""
        for repo in self.world.repositories:
            if repo.catalog.lines != self.repo.catalog.lines[: len(repo.catalog.lines)]:
                raise Violation("a process saw another catalog")
            for id_, log in repo._logs.items():
                if log.lines != self.logs[id_].lines[: len(log.lines)]:
                    raise Violation("a process saw another history")
        for id_, number, content in self.world.reads:
            if content not in self.content(id_, number):
                raise Violation(f"a reader got {_short(content)} for v{number}")

    def content(self, id_: str, number: int) -> list[Content]:
        """What a version may hold: what one of its transaction's tries means, on top of its parent."""
        known = self.contents.get((id_, number))
        if known is None:
            version = self.logs[id_].state.versions[number]
            parents = [{}] if version.op.parent is None else self.content(id_, version.op.parent)
            known = []
            for done in self.intents[version.record.txn].tries:
                for content in self._apply(parents, done):
                    if content not in known:
                        known.append(content)
            self.contents[id_, number] = known
        return known

    def _apply(self, parents: list[Content], done: list[Action]) -> Iterator[Content]:
        """The parent without what is claimed, and what is put, whichever of the parents it is."""
        puts: list[Content] = [{}]
        claims: list[str] = []
        for action in done:
            if action[0] == "put":
                _, path, data = action
                puts = [{**put, path: data} for put in puts]
            elif action[0] == "remove":
                claims.append(action[1])
                puts = [{path: data for path, data in put.items() if not _below(path, action[1])} for put in puts]
            else:
                _, id_, number, at = action
                claims.append(at)
                puts = [
                    {**put, **{path: data for path, data in source.items() if _below(path, at)}}
                    for put in puts
                    for source in self.content(id_, int(number))
                ]
        for parent in parents:
            kept = {p: data for p, data in parent.items() if not any(_below(p, claim) for claim in claims)}
            for put in puts:
                yield {**kept, **put}


def _below(path: str, at: str) -> bool:
    return path == at or path.startswith(f"{at}/")


def _short(content: object) -> str:
    return repr(content)[:400]
