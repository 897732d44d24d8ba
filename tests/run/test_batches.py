"""What becomes the next version: everything that was handed over, once, whole checkpoints, in an order that holds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mandapa.run.batches import SILENCE, Batch, Feed, complete_checkpoints, next_batch
from mandapa.run.journal import (
    ArtifactEntry,
    AssetEntry,
    BeginEntry,
    CheckpointEntry,
    CommitEntry,
    EndEntry,
    Entry,
    File,
    Intervals,
    UrlEntry,
    UseEntry,
)

KEY = "here"


class World:
    """Ranks that hand things over, and a backend that commits what the planner gives it."""

    def __init__(self, ranks: int = 1, backends: Sequence[str] = (KEY,)) -> None:
        self.ranks = range(ranks)
        self.backends = list(backends)
        self.feed = Feed()
        self.attempt = 0
        self.done = Intervals()
        self.batches: list[Batch] = []
        self.handed: list[tuple[int, Entry]] = []
        self.aged: set[tuple[int, int]] = set()
        self._numbers: Counter[int] = Counter()

    # -- what trainers do

    def launch(self, *ranks: int) -> World:
        self.attempt += 1
        for rank in ranks or self.ranks:
            self.begin(rank)
        return self

    def begin(self, rank: int) -> None:
        self.feed.live[rank] = True
        self._hand(rank, BeginEntry, launch="", local_ranks=list(self.ranks), backends=self.backends, base={})

    def asset(self, path: str, rank: int = 0, **fields: Any) -> int:
        source = fields.pop("source", path)
        return self._hand(rank, AssetEntry, file=File(path=path, source=source, size=1), **fields)

    def url(self, path: str, rank: int = 0) -> int:
        return self._hand(rank, UrlEntry, path=path, url="s3://x/y")

    def checkpoint(self, step: int, rank: int = 0, **fields: Any) -> int:
        place = fields.setdefault("place", "checkpoint")
        file = File(path=f"{place}/state-rank{rank}.pt", source="", size=1)
        return self._hand(rank, CheckpointEntry, step=step, files=[file], **fields)

    def artifact(self, rank: int = 0) -> int:
        return self._hand(rank, ArtifactEntry, name="other", source="", at=None, size=1)

    def use(self, rank: int = 0) -> int:
        return self._hand(rank, UseEntry, address="a:v1")

    def commit(self, rank: int = 0) -> int:
        return self._hand(rank, CommitEntry)

    def end(self, *ranks: int) -> World:
        for rank in ranks or self.ranks:
            self._hand(rank, EndEntry, status="finished")
            self.feed.live[rank] = False
        return self

    def die(self, *ranks: int) -> World:
        for rank in ranks or self.ranks:
            self.feed.live[rank] = False
        return self

    def _hand(self, rank: int, kind: Callable[..., Entry], **fields: Any) -> int:
        self._numbers[rank] += 1
        entry = kind(n=self._numbers[rank], time="", attempt=self.attempt, **fields)
        self.handed.append((rank, entry))
        self.feed.take(rank, entry)
        return entry.n

    # -- what the backend does

    def age(self) -> World:
        """Half a minute passes."""
        self.aged |= {(rank, entry.n) for rank, entry in self.handed}
        return self

    def plan(self, *, urgent: bool = False, key: str = KEY) -> Batch | None:
        waited = lambda rank, n: SILENCE if (rank, n) in self.aged else 0.0  # noqa: E731
        return next_batch(self.feed, key, self.done, urgent=urgent, waited=waited)

    def work(self, *, urgent: bool = False) -> list[list[Any]]:
        """Commit all that is due; gives what each commit had in it, but for those that only answered a request."""
        before = len(self.batches)
        while (batch := self.plan(urgent=urgent)) is not None:
            assert batch.entries, "a commit of nothing"
            check_batch(batch)
            assert not any(pair in self.done for pair in pairs(batch)), "committed twice"
            self.done.add(batch.numbers.stretches())
            self.batches.append(batch)
        return [found for batch in self.batches[before:] if (found := names(batch))]

    def check_all(self) -> None:
        """Everything that was handed over is in exactly one batch."""
        committed = Counter(pair for batch in self.batches for pair in pairs(batch))
        assert committed == Counter((rank, entry.n) for rank, entry in self.handed)
        check_order(self.batches)


def pairs(batch: Batch) -> list[tuple[int, int]]:
    return [(rank, entry.n) for rank, entry in batch.entries]


def path_of(entry: Entry) -> str | None:
    """Where it goes in the version; of what the run itself adds none."""
    if isinstance(entry, AssetEntry):
        return None if entry.reserved else entry.file.path
    return entry.path if isinstance(entry, UrlEntry) else None


def names(batch: Batch) -> list[Any]:
    """The batch in short: paths, and (step, rank) of parts, "!" before those of an incomplete one."""
    found: list[Any] = []
    for rank, entry in batch.entries:
        if isinstance(entry, CheckpointEntry):
            found.append(("!" if batch.incomplete else "", entry.step, rank))
        elif isinstance(entry, ArtifactEntry):
            found.append("artifact")
        elif path := path_of(entry):
            found.append(path)
    return found


def check_batch(batch: Batch) -> None:
    """What holds for each batch by itself."""
    assert {entry.attempt for _, entry in batch.entries} == {batch.attempt}
    artifacts = [entry for _, entry in batch.entries if isinstance(entry, ArtifactEntry)]
    assert (batch.kind == "artifact") == bool(artifacts)
    assert not artifacts or len(batch.entries) == 1
    parts = batch.checkpoint
    assert len({entry.step for _, entry in parts}) <= 1, "two checkpoints"
    assert len({rank for rank, _ in parts}) == len(parts), "two checkpoints"
    growing: dict[str, str] = {}
    for _, entry in batch.entries:
        if (path := path_of(entry)) is not None:
            grows = entry.file.source if isinstance(entry, AssetEntry) and entry.grows else ""
            assert path not in growing or (grows and growing[path] == grows), f"{path} twice"
            growing[path] = grows
    assert not any(other.startswith(f"{path}/") for path in growing for other in growing), "a file and its folder"


def check_order(batches: Iterable[Batch]) -> None:
    """What holds for the history: attempts in order, and of what one rank put in one place the later is later."""
    last_attempt = 0
    newest: dict[tuple[int, str], int] = {}
    for batch in batches:
        if batch.kind == "folder":
            assert batch.attempt >= last_attempt, "an attempt before one that was before it"
            last_attempt = batch.attempt
        for rank, entry in batch.entries:
            if (path := path_of(entry)) is not None:
                assert newest.get((rank, path), 0) < entry.n, f"{path} goes back"
                newest[rank, path] = entry.n


# -- one rank ----------------------------------------------------------------------------------------------------------


def test_nothing_is_due_at_first() -> None:
    assert World().plan(urgent=True) is None
    assert World().launch().plan() is None


def test_a_checkpoint_goes_with_what_was_before_it() -> None:
    world = World().launch()
    world.asset("a")
    world.url("b")
    assert world.plan() is None
    world.checkpoint(1)
    world.asset("c")
    assert world.work() == [["a", "b", ("", 1, 0)]]
    world.asset("a")
    world.checkpoint(2)
    assert world.work() == [["c", "a", ("", 2, 0)]]


def test_each_checkpoint_is_a_version() -> None:
    """Though all of them were there before the first was committed; two of one step are two."""
    world = World().launch()
    for step in (1, 5, 5, 3):
        world.checkpoint(step)
    assert world.work() == [[("", step, 0)] for step in (1, 5, 5, 3)]


@pytest.mark.parametrize("ask", [World.commit, World.end, World.die, World.launch], ids=lambda ask: ask.__name__)
def test_the_rest_is_committed_when_asked_for(ask: Callable[[World], Any]) -> None:
    """By a flush, an end, a death, and by a start that came after a death."""
    world = World().launch()
    world.asset("a")
    assert world.plan() is None
    ask(world)
    assert world.work() == [["a"]]
    assert world.work() == []


def test_what_waits_too_long_is_committed() -> None:
    world = World().launch()
    world.asset("a")
    assert world.work(urgent=True) == [["a"]]


def test_a_file_that_was_handed_over_twice_makes_two_versions() -> None:
    world = World().launch()
    for path in ("a", "b", "a", "c"):
        world.asset(path)
    world.url("c")
    world.checkpoint(1)
    assert world.work() == [["a", "b"], ["a", "c"], ["c", ("", 1, 0)]]
    world.asset("a")
    world.asset("a")
    world.commit()
    assert world.work() == [["a"], ["a"]]


def test_of_a_file_that_grows_the_last_is_enough() -> None:
    """But not when it was something else in between, or another file grows in its place."""
    world = World().launch()
    for _ in range(3):
        world.asset("log", grows=True)
    world.asset("log")
    world.asset("log", grows=True)
    world.asset("log", grows=True, source="rotated")
    world.checkpoint(1)
    assert world.work() == [["log", "log", "log"], ["log"], ["log"], ["log", ("", 1, 0)]]


@pytest.mark.parametrize("paths", [("a/b", "a"), ("a", "a/b"), ("a/b/c", "a"), ("a/b/c", "a/b"), ("a", "a/b/c")])
def test_a_file_and_its_folder_are_never_in_one_version(paths: tuple[str, str]) -> None:
    world = World().launch()
    for path in paths:
        world.asset(path)
    assert world.work(urgent=True) == [[paths[0]], [paths[1]]]


def test_paths_that_only_look_alike_go_together() -> None:
    world = World().launch()
    for path in ("a/b", "a/c", "ab", "a.b", "a/bc"):
        world.asset(path)
    assert world.work(urgent=True) == [["a/b", "a/c", "ab", "a.b", "a/bc"]]


@pytest.mark.parametrize("path", ["checkpoint", "checkpoint/state-rank0.pt", "checkpoint/state-rank0.pt/x"])
def test_what_stands_in_the_way_of_a_checkpoint_is_in_a_version_before_it(path: str) -> None:
    world = World().launch()
    world.asset("a")
    world.asset(path)
    world.asset("b")
    world.checkpoint(1)
    assert world.work() == [["a", path, "b"], [("", 1, 0)]]


def test_what_is_put_beside_a_checkpoint_goes_with_it() -> None:
    world = World().launch()
    world.asset("checkpoint/tokenizer.json")
    world.checkpoint(1)
    assert world.work() == [["checkpoint/tokenizer.json", ("", 1, 0)]]


def test_facts_of_the_run_make_no_version_of_their_own() -> None:
    """The last that are there go with whatever is next."""
    world = World().launch()
    for _ in range(3):
        world.asset(".mandapa/run.json", reserved=True)
    world.checkpoint(1)
    assert world.work() == [[("", 1, 0)]]
    assert len(world.batches[0].entries) == 5


def test_other_artifacts_come_first() -> None:
    """Each by itself, in order, and without being asked for."""
    world = World(2).launch()
    world.asset("a")
    world.artifact()
    world.checkpoint(1)
    world.artifact()
    world.artifact(rank=1)
    assert world.work()[:3] == [["artifact"]] * 3
    assert [pairs(batch) for batch in world.batches[:3]] == [[(0, 3)], [(0, 5)], [(1, 2)]]


def test_requests_alone_are_done_with_in_one_commit() -> None:
    """A flush of nothing is answered, too."""
    world = World().launch()
    world.use()
    world.commit()
    assert world.work() == []
    assert len(world.batches) == 1
    world.check_all()


# -- several ranks -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_waits_for_all_of_its_parts() -> None:
    """In whatever order they come; what other ranks handed over before it goes along."""
    for order in itertools.permutations(range(3)):
        world = World(3).launch()
        for rank in range(3):
            world.asset(f"log-{rank}", rank)
        for rank in order:
            assert world.work() == []
            world.checkpoint(1, rank)
        assert world.work() == [["log-0", "log-1", "log-2", ("", 1, 0), ("", 1, 1), ("", 1, 2)]]


def test_checkpoints_that_overlap_stay_apart() -> None:
    """A rank may be one ahead."""
    world = World(2).launch()
    world.checkpoint(1, 0)
    world.checkpoint(2, 0)
    world.checkpoint(1, 1)
    assert world.work() == [[("", 1, 0), ("", 1, 1)]]
    world.checkpoint(3, 0)
    assert world.work() == []
    world.checkpoint(2, 1)
    world.checkpoint(3, 1)
    assert world.work() == [[("", 2, 0), ("", 2, 1)], [("", 3, 0), ("", 3, 1)]]


def test_one_step_twice_is_two_checkpoints() -> None:
    world = World(2).launch()
    world.checkpoint(1, 0)
    world.checkpoint(1, 0)
    world.checkpoint(1, 1)
    assert world.work() == [[("", 1, 0), ("", 1, 1)]]
    world.checkpoint(1, 1)
    assert world.work() == [[("", 1, 0), ("", 1, 1)]]
    assert [pairs(batch)[-1] for batch in world.batches] == [(1, 2), (1, 3)]


def test_a_silent_rank_is_waited_for_so_long() -> None:
    """For half a minute, until others save a second time, or until it ends; then it takes no part."""

    def saved() -> World:
        world = World(2).launch()
        world.checkpoint(1, 0)
        assert world.work() == []
        return world

    assert saved().age().work() == [[("", 1, 0)]]
    assert saved().end(1).work() == [[("", 1, 0)]]
    world = saved()
    world.checkpoint(2, 0)
    assert world.work() == [[("", 1, 0)], [("", 2, 0)]]
    world.asset("a", 1)
    assert world.work() == []
    assert world.end().work() == [["a"]]


def test_a_silent_rank_is_waited_for_from_the_last_part_on() -> None:
    world = World(3).launch()
    world.checkpoint(1, 0)
    world.age()
    world.checkpoint(1, 2)
    assert world.work() == []
    assert world.age().work() == [[("", 1, 0), ("", 1, 2)]]


def test_what_is_whole_by_itself_waits_for_nobody() -> None:
    """Neither for a rank that has never saved, nor for one that has begun and died, nor for one that saves parts."""
    world = World(3).launch()
    world.die(2)
    world.asset("a")
    world.checkpoint(1, whole=True)
    assert world.work() == [["a", ("", 1, 0)]]
    world.checkpoint(2, rank=1)
    world.checkpoint(2, whole=True)
    assert [[e.step for _, e in parts if e.whole] for parts in complete_checkpoints(world.feed)] == [[1], [2]]
    assert world.work() == [[("", 2, 0)]]
    world.checkpoint(2, rank=0)
    world.age()
    assert world.work() == []  # rank 2 was never heard of: the parts of the two others wait
    world.end(0, 1).work()
    world.check_all()


def test_what_is_whole_says_nothing_of_who_saves_parts() -> None:
    """A rank that saves for all, and has done so twice, does not make one that is about to begin a silent one."""
    world = World(2).launch()
    world.checkpoint(1, whole=True)
    world.checkpoint(2, whole=True)
    assert world.work() == [[("", 1, 0)], [("", 2, 0)]]
    world.checkpoint(3)
    assert world.work() == []
    world.checkpoint(3, rank=1)
    assert world.work() == [[("", 3, 0), ("", 3, 1)]]
    world.end().work()
    world.check_all()


def test_whole_ones_of_one_step_stay_apart() -> None:
    """Two ranks that each save for all, and one that does it twice."""
    world = World(2).launch()
    for rank in (0, 1, 0):
        world.checkpoint(1, rank, whole=True)
    assert world.work() == [[("", 1, 0)], [("", 1, 1)], [("", 1, 0)]]
    assert len(complete_checkpoints(world.feed)) == 3


def test_parts_of_two_places_are_no_one_checkpoint() -> None:
    """Whoever reads it by its place would miss the others."""
    world = World(2).launch()
    world.checkpoint(1, rank=0, place="a")
    world.checkpoint(1, rank=1, place="b")
    assert world.work() == []
    world.checkpoint(1, rank=1, place="a")
    assert world.work() == [[("", 1, 0), ("", 1, 1)]]
    assert [entry.place for _, entry in world.batches[-1].checkpoint] == ["a", "a"]
    world.end().work()
    assert world.batches[-1].incomplete
    world.check_all()


def test_what_a_rank_leaves_when_it_ends_is_committed() -> None:
    """Though others go on."""
    world = World(2).launch()
    world.asset("a", 0)
    assert world.end(0).work() == [["a"]]


def test_a_rank_that_never_began_is_waited_for_as_a_silent_one() -> None:
    world = World(2).launch(0)
    world.checkpoint(1, 0)
    assert world.work() == []
    assert world.age().work() == [[("", 1, 0)]]
    world.begin(1)
    world.checkpoint(2, 0)
    assert world.work() == [[("", 2, 0)]]


def test_ranks_that_save_nothing_do_not_hold_up_the_one_that_does() -> None:
    """Rank 0 saves for all: the others end, or live on."""
    world = World(3).launch()
    for step in (1, 2, 3):
        world.checkpoint(step, 0)
        for rank in (1, 2):
            world.asset(f"log-{rank}-{step}", rank)
    assert [batch[-1] for batch in world.work()] == [("", 1, 0), ("", 2, 0), ("", 3, 0)]
    world.end()
    world.work()
    world.check_all()


def test_a_rank_that_died_before_its_first_leaves_an_incomplete_one() -> None:
    """Nobody knows whether it would have taken part; nothing is committed before that is certain."""
    world = World(2).launch()
    world.checkpoint(1, 0)
    world.die(1)
    assert world.age().work() == []
    world.asset("a", 0)
    assert world.end(0).work() == [["a"], [("!", 1, 0)]]


def test_a_rank_that_has_taken_part_is_not_left_out() -> None:
    """Alive, dead or ended, aged or not: without its part a checkpoint is incomplete."""
    for leave in (World.die, World.end):
        world = World(2).launch()
        for rank in (0, 1):
            world.checkpoint(1, rank)
        world.checkpoint(2, 0)
        assert world.age().work() == [[("", 1, 0), ("", 1, 1)]]
        leave(world, 1)
        assert world.work() == []
        world.checkpoint(3, 0)
        assert world.age().work() == []
        leave(world, 0)
        assert world.work() == [[("!", 2, 0)], [("!", 3, 0)]]
        world.check_all()


def test_a_late_part_of_a_checkpoint_that_went_without_it_is_kept() -> None:
    """It was silent for half a minute, and speaks after all."""
    world = World(2).launch()
    world.checkpoint(1, 0)
    assert world.age().work() == [[("", 1, 0)]]
    world.checkpoint(1, 1)
    assert world.work() == []
    world.checkpoint(2, 1)
    world.checkpoint(2, 0)
    assert world.work() == [[("", 2, 0), ("", 2, 1)]]
    assert world.end().work() == [[("!", 1, 1)]]
    world.check_all()


# -- attempts and backends ---------------------------------------------------------------------------------------------


def test_attempts_are_committed_in_order() -> None:
    """What the first left behind, whole or not, comes before anything of the second."""
    world = World(2).launch()
    world.asset("a", 1)
    world.checkpoint(1, 0)
    world.checkpoint(1, 1)
    world.checkpoint(2, 0)
    world.die()
    world.launch()
    world.checkpoint(2, 0)
    world.checkpoint(2, 1)
    assert world.work() == [["a", ("", 1, 0), ("", 1, 1)], [("!", 2, 0)], [("", 2, 0), ("", 2, 1)]]


def test_an_attempt_is_over_when_a_newer_one_began() -> None:
    """Also for a rank that was not seen to die."""
    world = World(2).launch()
    world.asset("a", 0)
    world.asset("b", 1)
    assert world.work() == []
    world.attempt += 1
    world.begin(0)
    assert world.work() == [["a", "b"]]


def test_a_backend_gets_the_attempts_that_it_was_there_for() -> None:
    world = World(backends=["old"])
    world.launch()
    world.asset("a")
    world.artifact()
    world.die()
    world.backends = ["old", KEY]
    world.launch()
    world.asset("b")
    world.die()
    assert world.work() == [["b"]]
    assert world.work() == []
    assert names(world.plan(key="old") or Batch("folder", 0, [])) == ["artifact"]


def test_what_a_backend_does_not_want_is_done_with() -> None:
    """It is in a batch like everything else: the committer leaves it out."""
    world = World().launch()
    world.asset("a", skip=[KEY])
    world.asset("b")
    world.end()
    world.work()
    world.check_all()


def test_an_attempt_without_a_beginning_is_everybodys() -> None:
    """Its first line was damaged: better committed than lost."""
    feed = Feed()
    feed.take(0, AssetEntry(n=2, time="", attempt=1, file=File(path="a", source="", size=1)))
    feed.take(0, CheckpointEntry(n=3, time="", attempt=1, step=1, files=[]))
    batch = next_batch(feed, KEY, Intervals())
    assert batch is not None
    assert names(batch) == ["a", ("", 1, 0)]


# -- complete checkpoints ----------------------------------------------------------------------------------------------


def test_complete_checkpoints_are_those_to_resume_from() -> None:
    world = World(2).launch()
    for step in (1, 2):
        world.checkpoint(step, 0)
        world.checkpoint(step, 1)
    world.checkpoint(3, 0)
    world.die()
    world.launch()
    world.checkpoint(1, 0)
    world.checkpoint(1, 1)
    world.checkpoint(9, 1)
    world.die()
    found = complete_checkpoints(world.feed)
    assert [(e.attempt, e.step, [rank for rank, _ in parts]) for parts in found for _, e in parts[:1]] == [
        (1, 1, [0, 1]),
        (1, 2, [0, 1]),
        (2, 1, [0, 1]),
    ]


# -- everything --------------------------------------------------------------------------------------------------------

ACTS: dict[str, Callable[[World], Any]] = {
    "a": lambda world: world.asset("a"),
    "ab": lambda world: world.asset("a/b"),
    "log": lambda world: world.asset("log", grows=True),
    "checkpoint": lambda world: world.checkpoint(1),
    "commit": World.commit,
    "artifact": World.artifact,
}


def test_all_short_stories_of_one_rank() -> None:
    """Each story of four acts, committed after any of them: all is committed once, and the folder is the last word."""
    stories = 0
    for acts in itertools.product(ACTS, repeat=4):
        for work in (1, 2, 3, 4):
            world = World().launch()
            for turn, act in enumerate(acts, 1):
                ACTS[act](world)
                if turn % work == 0:
                    world.work()
            world.end().work()
            world.check_all()
            kept = [n for batch in world.batches for n in names(batch) if not isinstance(n, tuple)]
            assert Counter(kept) == Counter(
                {"ab": "a/b"}.get(act, act) for act in acts if act in ("a", "ab", "log", "artifact")
            )
            assert sum(bool(batch.checkpoint) for batch in world.batches) == acts.count("checkpoint")
            stories += 1
    assert stories == 4 * 6**4


def test_all_ways_in_which_two_ranks_meet() -> None:
    """Two ranks save twice, and stop anywhere: by an end or a death, one or both."""
    script = ["begin", "log", "checkpoint", "log", "checkpoint"]
    for stops in itertools.product(range(len(script) + 1), repeat=2):
        for ends in itertools.product((World.end, World.die), repeat=2):
            for order in {(0,) * stops[0] + (1,) * stops[1], (1,) * stops[1] + (0,) * stops[0]}:
                world = World(2)
                world.attempt = 1
                turns = [0, 0]
                saved: Counter[int] = Counter()
                for rank in order:
                    act = script[turns[rank]]
                    if act == "begin":
                        world.begin(rank)
                    elif act == "log":
                        world.asset(f"log-{rank}", rank)
                    else:
                        saved[rank] += 1
                        world.checkpoint(saved[rank], rank)
                    turns[rank] += 1
                for rank, end in enumerate(ends):
                    if stops[rank]:
                        end(world, rank)
                world.work()
                world.check_all()
                whole = [batch for batch in world.batches if batch.checkpoint and not batch.incomplete]
                if saved[0] and saved[1]:
                    assert [len(batch.checkpoint) for batch in whole] == [2] * min(saved.values())
                assert [batch.checkpoint[0][1].step for batch in whole] == list(range(1, len(whole) + 1))


@st.composite
def stories(draw: st.DrawFn) -> tuple[int, set[int], list[tuple[str, int, int]]]:
    ranks = draw(st.integers(1, 3))
    savers = draw(st.sets(st.integers(0, ranks - 1)))
    acts = ["save", "save", "save", "asset", "asset", "grow", "url", "use", "commit", "artifact", "end", "die"]
    acts += ["begin", "work", "urgent", "relaunch"]
    story = draw(st.lists(st.tuples(st.sampled_from(acts), st.integers(0, ranks - 1), st.integers(0, 3)), max_size=60))
    return ranks, savers, story


@settings(max_examples=300)
@given(stories())
def test_any_story(story: tuple[int, set[int], list[tuple[str, int, int]]]) -> None:
    """Ranks come, hand over, save the same checkpoints one after the other, end and die; commits come in between.

    In the end everything is committed once. Parts of one checkpoint are together, whole ones in order, and one that
    lacks the part of a rank which has saved before is never taken for whole.
    """
    ranks, savers, acts = story
    world = World(ranks)
    paths = ["a", "a/b", "c", "log"]
    steps = [1, 2, 2, 3, 5, 4]
    saved: Counter[tuple[int, int]] = Counter()  # (attempt, rank) -> checkpoints
    which: dict[tuple[int, int], tuple[int, int]] = {}  # (rank, number) -> (attempt, which checkpoint of it)
    begun: set[tuple[int, int]] = set()
    for act, rank, choice in [("relaunch", 0, 0), *acts]:
        alive = world.feed.live.get(rank, False)
        if act == "relaunch" and not any(world.feed.live.values()):
            world.attempt += 1
            act = "begin"
        if act == "begin" and not alive and (world.attempt, rank) not in begun:
            begun.add((world.attempt, rank))
            world.begin(rank)
        elif act == "work":
            world.work()
        elif act == "urgent":
            world.work(urgent=True)
        elif alive:
            if act == "save":
                turn = saved[world.attempt, rank]
                # Ranks train together: all that save have begun, and none is more than one checkpoint ahead.
                together = all((world.attempt, o) in begun and saved[world.attempt, o] >= turn for o in savers)
                if rank in savers and turn < len(steps) and together:
                    which[rank, world.checkpoint(steps[turn], rank)] = (world.attempt, turn)
                    saved[world.attempt, rank] += 1
            elif act in ("asset", "grow"):
                world.asset(paths[choice], rank, grows=act == "grow")
            elif act == "url":
                world.url(paths[choice], rank)
            elif act in ("use", "commit", "artifact", "end", "die"):
                getattr(world, act)(rank)
    world.die()
    world.work()
    world.check_all()
    batch_of = {pair: at for at, batch in enumerate(world.batches) for pair in pairs(batch)}
    found: dict[tuple[int, int], set[int]] = {}
    for pair, checkpoint in which.items():
        found.setdefault(checkpoint, set()).add(batch_of[pair])
    whole = []
    for checkpoint, in_batches in sorted(found.items()):
        assert len(in_batches) == 1, "parts of one checkpoint in two batches"
        batch = world.batches[in_batches.pop()]
        assert {which[rank, entry.n] for rank, entry in batch.checkpoint} == {checkpoint}, (
            "two checkpoints in one batch"
        )
        parts = {rank for rank, _ in batch.checkpoint}
        attempt, turn = checkpoint
        savers_here = {rank for rank in savers if saved[attempt, rank]}
        if not batch.incomplete:
            assert parts == savers_here, "one that lacks a part is taken for whole"
            whole.append(world.batches.index(batch))
            for rank, entry in batch.checkpoint:
                before = [pair for pair in batch_of if pair[0] == rank and pair[1] < entry.n]
                assert all(batch_of[pair] <= whole[-1] for pair in before if pair not in which), "something came after"
        elif all(saved[attempt, rank] > turn for rank in savers_here):
            silent = set(range(ranks)) - savers_here
            assert any((attempt, rank) in begun and (rank, attempt) not in world.feed.ended for rank in silent)
    assert whole == sorted(whole), "checkpoints out of order"
