"""One random history: who works in it, how the store behaves, and what must be true in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from random import Random

from model.log import PACKS, Steps, View
from model.store import Store

RULES = {
    "inherit_nocheck": "what was inherited is looked at again when its version is not live where it was",
    "inherit_oldroot": "a version that is live, but elsewhere, lends nothing",
    "nohead": "what is named is looked for",
    "nohead_own": "our own new packs are looked for, too",
    "noprecond": "preconditions hold at the slot that is won",
    "reg_late": "an artifact is registered before anything of it is put",
    "restart_noscan": "who takes a transaction up again looks for it first",
    "undelete_headonly": "what is brought back is in no list",
    "undelete_nofence": "a fence makes an undelete look again",
    "resume_nofence": "a gc that crashed is never resumed",
    "takeover_inmem": "a gc deletes what its own list names, nothing else",
    "mark_beyond_fence": "what was live at the fence stays, whatever is deleted later",
    "catalog_unfenced": "an artifact that is registered meanwhile is fenced and marked, too",
    "list_after_fences": "gc tells what it may delete before it fences",
    "remove_others": "another's list goes only when none of its objects exists",
}
"""What each switched-off rule is about."""

LIMIT = 30_000


@dataclass
class Outcome:
    """What became of one history."""

    violations: list[str]
    counts: Counter[str]
    stuck: bool


@dataclass
class World:
    """Everything that one seed decides.

    Args:
        seed: Decides.
        off: Rules that are switched off.
        reads_on: Whether gc marks, besides what was live at the fence of a log, what came after it, too.
    """

    seed: int
    off: Collection[str] = ()
    reads_on: bool = False
    acknowledged: list[tuple[str, int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.logs = self.pick([["a"], ["a", "b"]])
        self.rest = self.pick([0, 5, 40, 150])
        self.store = Store(self.random, lost=self.pick([0, 0.05, 0.2]), refused=self.pick([0, 0.05, 0.2]))
        self._used = 0
        self.busy = 0
        """Writers at work."""

    def pick(self, choices: list) -> object:
        """One of them."""
        return choices[int(self.random.random() * len(choices))]

    def between(self, least: int, most: int) -> int:
        """A number, both ends included; what `Random.randint` gives takes five times as long."""
        return least + int(self.random.random() * (most - least + 1))

    def stall(self) -> int:
        """Turns in which an actor does nothing though it could: few, and now and then many."""
        return int(2 * self.rest * self.random.random() ** 4)

    def some(self, choices: Collection[int], count: int) -> set[int]:
        """So many of them, or all there are."""
        left, found = sorted(choices), set()
        while left and len(found) < count:
            found.add(left.pop(int(self.random.random() * len(left))))
        return found

    def new(self) -> int:
        """An id that was never used."""
        self._used += 1
        return self._used

    def run(self) -> Outcome:
        """Let everybody work to the end, or their death; late requests land; look."""
        from model.others import collector, reader, repacker
        from model.writers import Writer

        self.busy = self.between(2, 4)
        actors: list[Steps[None]] = [Writer(self).work() for _ in range(self.busy)]
        actors += [collector(self) for _ in range(self.between(1, 2))]
        actors += [reader(self) for _ in range(self.between(0, 2))]
        actors += [repacker(self) for _ in range(self.between(0, 1))]
        stuck = self._turns(actors)
        self.store.flush()
        self._check()
        return Outcome(self.errors, self.counts, stuck)

    def _turns(self, actors: list[Steps[None]]) -> bool:
        """One actor after the other, by lot; one in a thousand turns is somebody's last."""
        draw = self.random.random
        stay = self.pick([0, 0.5, 0.8, 0.9])
        wakes = [0] * len(actors)
        writers = self.busy
        turn = steps = 0
        next_death = self._turns_to_live()
        while actors and steps < LIMIT:
            at = int(draw() * len(actors))
            if wakes[at] > turn:
                turn = max(turn, min(wakes))  # when all of them rest, time flies
                awake = [one for one, until in enumerate(wakes) if until <= turn]
                at = awake[int(draw() * len(awake))]
            actor = actors[at]
            rest: int | None = 0
            while not rest:
                steps += 1
                turn += 1
                rest = None if steps == next_death else next(actor, None)
                if rest is None:
                    if steps == next_death:
                        next_death += self._turns_to_live()
                        self.counts["killed"] += 1
                    del actors[at], wakes[at]
                    if at < writers:
                        writers -= 1
                        self.busy = writers
                    break
                if draw() >= stay:
                    break
            if rest:
                wakes[at] = turn + rest * len(actors)
        return bool(actors)

    def _turns_to_live(self) -> int:
        """Until somebody dies: one turn in a thousand is somebody's last."""
        return 1 + int(self.random.expovariate(0.001))

    def _check(self) -> None:
        packs = self.store.folder(PACKS)
        for log in self.logs:
            records = self.store.folder(log)
            view = View(log)
            while len(view.records) in records:
                view.take(records[len(view.records)])
            if len(view.records) != len(records):
                self.errors.append("a log has a gap")
            txns = [record.txn for record in view.records]
            if len(txns) != len(set(txns)):
                self.errors.append("a transaction stands twice")
            if not {txn for where, txn in self.acknowledged if where == log} <= set(txns):
                self.errors.append("an acknowledged commit is lost")
            if view.best in view.deleted:
                self.errors.append("an alias names a deleted version")
            if not view.live_packs() <= packs.keys():
                self.errors.append("a live version needs a pack that is gone")
        self.counts["acknowledged"] += len(self.acknowledged)


def run(seed: int, off: Collection[str] = (), *, reads_on: bool = False) -> Outcome:
    """One history, to its end."""
    return World(seed, off, reads_on).run()
