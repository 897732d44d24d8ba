"""Directed schedules: a stage, stories told upon it, and rules without which they end badly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest

from mandapa.repository.fsck import fsck
from mandapa.repository.gc import Collection
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository
from mandapa.repository.version import Version
from prooflib.clocked import ClockedObjectStore
from prooflib.hooks import HookedObjectStore

TXN = "ab" * 16
KEPT = b"what stays"


def many_tensors() -> bytes:
    """A safetensors file of so many chunks that their list stands in parts, nodes of their own."""
    size = 65_536
    at = [(n * size, n * size + size) for n in range(80)]
    tensors = {f"t{n:02}": {"dtype": "U8", "shape": [size], "data_offsets": at[n]} for n in range(80)}
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(bytes([n % 3]) * size for n in range(80))


OLD = {"small": b"what an old version held", "large": many_tensors()}


class BrokenPromise(AssertionError):
    """What the rule is there to prevent."""


class Cleaning:
    """A gc, step by step."""

    def __init__(self, repo: Repository) -> None:
        self._steps: Iterator[str] = Collection(repo, grace=0).steps()

    def go_on(self, until: str) -> None:
        while (done := next(self._steps)) != until:
            assert done != "nothing to do"

    def finish(self) -> None:
        for _ in self._steps:
            pass


class Stage:
    """One store; the writer of the story sees it through hooks, others as it is."""

    def __init__(self, folder: Path, old: bytes) -> None:
        self.old = old
        """What an old version held, and the writer puts again."""
        self.time = datetime(2031, 1, 1, tzinfo=UTC)
        """By the store's clock; stands still unless `days_pass`."""
        self.memory = ClockedObjectStore(lambda: self.time)
        self.store = HookedObjectStore(self.memory)
        self.random = Random(1)
        self.file = folder / "file"
        self.file.write_bytes(old)
        self.others = Repository.create(self.memory, threads=0, author=self.author("others"))
        self.told: list[tuple[str, str, dict[str, bytes]]] = []
        self.epilogue: list[Callable[[], object]] = []

    def author(self, by: str) -> Author:
        noon = datetime(2027, 1, 1, tzinfo=UTC)
        return Author(by, random=Random(self.random.random()), clock=lambda: noon, sleep=lambda _: None)

    def process(self, cache: Path | None = None) -> Repository:
        """A new process of the writer."""
        return Repository(self.store, cache_dir=cache, threads=0, author=self.author("writer"))

    def has(self, name: str, **content: bytes) -> None:
        """Another process, that knows nothing of what is stored, makes a version that holds exactly this."""
        repo = Repository(self.memory, threads=0, author=self.author("another"))
        with repo.artifact(name).transaction("by others", base=None) as txn:
            for path, data in content.items():
                txn.add_bytes(path, data)

    def commit(self, repo: Repository, name: str = "a", **files: bytes) -> None:
        """The writer adds the file (as ``new``) on top of the base, and is told that it is done."""
        with repo.artifact(name).transaction("by the writer", txn_id=TXN) as txn:
            txn.add(self.file, at="new")
        self.told.append((name, TXN, {"new": self.old, **files}))

    def days_pass(self, days: float) -> None:
        self.time += timedelta(days=days)

    def gc(self) -> None:
        self.others.gc(grace=0)

    def begin_gc(self, until: str) -> Cleaning:
        """A gc that pauses after a step."""
        cleaning = Cleaning(self.others)
        cleaning.go_on(until)
        return cleaning

    def gc_until(self, step: str) -> Callable[[], None]:
        """A gc that pauses after a step; gives what makes it go on to its end."""
        return self.begin_gc(step).finish

    def check(self) -> None:
        """The repository is whole, and what the writer was told is true."""
        assert not self.store.waiting, "the story did not come to its point"
        for event in self.epilogue:
            event()
        repo = Repository(self.memory, threads=0)
        report = fsck(repo, deep=True)
        if not report.ok:
            raise BrokenPromise(str(report.findings))
        for name, txn, content in self.told:
            log = repo.artifact(name).open_log()
            made = log.find(txn)
            if made is None:
                raise BrokenPromise("an acknowledged version is not there")
            version = repo.artifact(name).version(made.ops[0].number)
            if contents(version) != content:
                raise BrokenPromise("a version holds something else than was meant")


def contents(version: Version) -> dict[str, bytes]:
    found = {}
    for path in version.assets:
        with version.open(path) as file:
            found[path] = file.read()
    return found


@dataclass
class Rule:
    """A rule, the story that needs it, and what the code would be without it."""

    name: str
    story: Callable[[Stage], None]
    size: str
    switch_off: Callable[[pytest.MonkeyPatch], None]


class Rules:
    """Rules and their stories; as a decorator it notes a function that switches a rule off."""

    def __init__(self) -> None:
        self.all: list[Rule] = []

    def __call__(
        self, story: Callable[[Stage], None], *sizes: str
    ) -> Callable[[Callable[[pytest.MonkeyPatch], None]], Callable[[pytest.MonkeyPatch], None]]:
        """A rule that ``story`` needs, whether what it is about is small or large."""

        def note(switch_off: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
            self.all.extend(Rule(switch_off.__name__, story, size, switch_off) for size in sizes or OLD)
            return switch_off

        return note

    def each(self) -> pytest.MarkDecorator:
        """All of them, as parameters of a test."""
        names = [f"{rule.name}-{rule.story.__name__}-{rule.size}" for rule in self.all]
        return pytest.mark.parametrize("rule", self.all, ids=names)


def ends_well(rule: Rule, folder: Path) -> None:
    """The story as it is."""
    stage = Stage(folder, OLD[rule.size])
    rule.story(stage)
    stage.check()


def ends_badly(rule: Rule, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The same without the rule."""
    stage = Stage(folder, OLD[rule.size])
    rule.switch_off(patch)
    rule.story(stage)
    with pytest.raises(BrokenPromise):
        stage.check()
