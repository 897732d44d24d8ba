"""A small world: a repository on a bad store, and at times another one that follows it, and those who work there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, TypeAlias

from mandapa.content.index import Index
from mandapa.errors import NotFoundError, StorageError
from mandapa.format.keys import CATALOG, MARKER
from mandapa.format.records import SettingsOp, encode_marker
from mandapa.repository.log import Author, Log
from mandapa.repository.repository import Repository
from mandapa.repository.state import CatalogState
from mandapa.testing.faults import Crash, FaultyObjectStore
from prooflib.clocked import ClockedObjectStore
from prooflib.histories import Operation
from prooflib.scheduler import Life, ProcessStore, Scheduler

if TYPE_CHECKING:
    from mandapa.repository.artifact import Artifact
    from mandapa.repository.version import Version

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
    call: int = 0
    """The turn of the first try."""
    answer: int = 0
    """The turn of the acknowledgement."""
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


@dataclass
class Command:
    """Something but a version, that a writer asked for."""

    call: int
    answer: int | None = None
    """The turn of the acknowledgement; None without one."""


class Place:
    """Where a repository is: what is really there, and the way to it."""

    def __init__(self, world: World, id_: int, faults: dict[str, float]) -> None:
        self.memory = ClockedObjectStore(world.store_time)
        self.way = FaultyObjectStore(self.memory, world.random, **faults)
        self.index = Index(None)
        """Of a machine that several processes share."""
        author = Author("init", random=Random(id_), clock=lambda: _NOON)
        self.memory.put(MARKER, encode_marker(author.new_id().hex()))
        settings = [SettingsOp({"writers": "many"})]
        Log(self.memory, CATALOG, CatalogState).append(author.new_id().hex(), lambda _: settings, author)


class World:
    """Everything that one seed decides."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        chance = self.random.choice
        self.names = chance([["a"], ["a", "b"]])
        self.pace = chance([3, 30, 150, 600])
        self.busy = 0
        self.scheduler = Scheduler(self.random, burst=chance([0, 0.5, 0.9, 0.98]), limit=60_000)
        self._epoch = datetime(chance([1999, 2027, 2071]), 1, 1, tzinfo=UTC)
        self.grace = chance([0, 0, 0, 300])
        """Seconds that every gc waits; a second is a turn."""
        faults = {what: chance([0, 0.05, 0.2]) for what in ("lost", "conflicts", "doubled")}
        self.killed = chance([0, 0.002, 0.01])
        self.home = Place(self, 1, faults)
        self.away = Place(self, 2, faults) if self.random.random() < 0.25 else None
        """Another repository, which follows."""
        self.intents: list[Intent] = []
        self.commands: dict[str, Command] = {}
        self.repositories: list[tuple[Place, Repository]] = []
        self.reads: list[tuple[str, int, Content]] = []
        self.looks: list[Operation] = []
        """What was seen of logs."""
        self.removed = False
        self.counts: Counter[str] = Counter()

    def store_time(self) -> datetime:
        """By the clocks of the stores: one for both."""
        return self._epoch + timedelta(seconds=self.scheduler.turns)

    def populate(self) -> None:
        """Some actors of each kind."""
        from prooflib import actors

        draw = self.random
        kinds = {actors.writer: draw.randint(2, 3), actors.gc: draw.randint(1, 2), actors.reader: draw.randint(0, 2)}
        kinds[actors.mover] = draw.randint(0, 1)
        kinds[actors.expirer] = draw.random() < 0.3
        kinds[actors.remover] = draw.random() < 0.25
        if self.away is not None:
            kinds[actors.mirrorer] = draw.randint(1, 2)
            kinds[actors.gc_away] = draw.randint(0, 1)
        for act, count in kinds.items():
            for number in range(count):
                name = f"{act.__name__}{number}"
                actor = Actor(self, name, Random(draw.random()))
                self.scheduler.add(name, lambda act=act, actor=actor: act(actor))

    def run(self) -> None:
        """To the end, late requests included."""
        self.scheduler.run()
        for place in filter(None, (self.home, self.away)):
            place.way.flush()


class Actor:
    """One who works in the world, as one process after the other: whoever is killed comes back with nothing at hand.

    Each process has a clock of its own, years off.
    """

    def __init__(self, world: World, name: str, random: Random) -> None:
        self.world = world
        self.name = name
        self.random = random
        self.number = 0
        self.slow = random.random() < 0.5
        """It rests between the steps of a clean-up, too."""
        # The index outlives the process, and several of one machine share it.
        self._shares_index = random.random() < 0.5
        self._index = {place: Index(None) for place in (world.home, world.away)}
        self._open: dict[Place, Repository] = {}
        self._life = Life(random, world.killed)

    @property
    def repo(self) -> Repository:
        """Of the running process."""
        return self.open(self.world.home)

    def open(self, place: Place) -> Repository:
        """A repository, of the running process."""
        world = self.world
        while place not in self._open:
            off = timedelta(days=365 * self.random.randint(-12, 12))
            author = Author(
                self.name,
                random=Random(self.random.random()),
                clock=lambda off=off: _NOON + off + timedelta(seconds=world.scheduler.turns),
                sleep=lambda _: world.scheduler.switch("sleep"),
            )
            try:
                store = ProcessStore(place.way, world.scheduler, self._life)
                repo = Repository(store, codec="raw", threads=0, author=author)
            except StorageError:
                continue
            except Crash:
                self.died()
                continue
            repo.index = place.index if self._shares_index else self._index[place]
            repo.reader._on_leaf = repo.index.feed
            self._open[place] = repo
            world.repositories.append((place, repo))
        return self._open[place]

    def died(self) -> None:
        self.world.counts["kill"] += 1
        self._open.clear()
        self._life = Life(self.random, self.world.killed)

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
        call = self.world.scheduler.turns
        try:
            found = artifact.deleted() if deleted else artifact.versions()
        except NotFoundError:
            return []
        logs = [self.repo.catalog, *[version._log for version in found[:1]]]
        for log in logs:
            look = Operation(log.id, call, self.world.scheduler.turns, len(log.records), append=False, who=self.name)
            self.world.looks.append(look)
        return found

    def signed(self) -> str:
        """The next command is signed so that its record can be told from all others."""
        self.number += 1
        self.repo.author.by = f"{self.name}.{self.number}"
        return self.repo.author.by
