"""Every rule of the commit is needed: switched off on the real code, a schedule that needs it breaks a promise.

Each story is one written order of events. With the rule it ends well; with the rule switched off, the same story must
end with a broken promise - else the story proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest
from prooflib.collector import collect, collect_all
from prooflib.hooks import HookedObjectStore
from prooflib.repacking import repack

from mandapa.errors import AlreadyExistsError, ConflictError, NotFoundError, StorageError
from mandapa.format.records import decode_record, encode_record
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.repository import artifact, transaction
from mandapa.repository.artifact import Artifact
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author, Log
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState
from mandapa.repository.transaction import Transaction
from mandapa.testing.faults import Crash

TXN = "ab" * 16
OLD = b"what an old version held"
KEPT = b"what stays"


class BrokenPromise(AssertionError):
    """What the rule is there to prevent."""


class Stage:
    """One store; the writer of the story sees it through hooks, others as it is."""

    def __init__(self, folder: Path) -> None:
        self.memory = MemoryObjectStore()
        self.store = HookedObjectStore(self.memory)
        self.random = Random(1)
        self.file = folder / "file"
        self.file.write_bytes(OLD)
        self.others = Repository.create(self.memory, threads=0, author=self.author("others"))
        self.told: list[tuple[str, str, dict[str, bytes]]] = []
        self.epilogue: list[Callable[[], object]] = []

    def author(self, by: str) -> Author:
        noon = datetime(2027, 1, 1, tzinfo=UTC)
        return Author(by, random=Random(self.random.random()), clock=lambda: noon, sleep=lambda _: None)

    def process(self) -> Repository:
        """A new process of the writer."""
        return Repository(self.store, threads=0, author=self.author("writer"))

    def has(self, name: str, **content: bytes) -> None:
        """Others make a version that holds exactly this."""
        with self.others.artifact(name).transaction("by others", base=None) as txn:
            for path, data in content.items():
                txn.add_bytes(path, data)

    def commit(self, repo: Repository, name: str = "a", **files: bytes) -> None:
        """The writer adds the file (as ``new``) on top of the base, and is told that it is done."""
        with repo.artifact(name).transaction("by the writer", txn_id=TXN) as txn:
            txn.add(self.file, at="new")
        self.told.append((name, TXN, {"new": OLD, **files}))

    def gc(self) -> None:
        collect_all(self.others)

    def gc_until(self, step: str) -> Callable[[], None]:
        """A gc that pauses after a step; gives what makes it go on to its end."""
        steps = collect(self.others)
        assert step in steps
        return lambda: [*steps].clear()

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
            if {path: version.open(path).read() for path in version.assets} != content:
                raise BrokenPromise("a version holds something else than was meant")


@dataclass
class Rule:
    """A rule, the story that needs it, and what the code would be without it."""

    name: str
    story: Callable[[Stage], None]
    switch_off: Callable[[pytest.MonkeyPatch], None]


RULES: list[Rule] = []


def needed_by(story: Callable[[Stage], None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a function that switches off a rule that ``story`` needs."""

    def note(switch_off: Callable[..., None]) -> Callable[..., None]:
        RULES.append(Rule(switch_off.__name__, story, switch_off))
        return switch_off

    return note


@pytest.mark.parametrize("rule", RULES_LATER := RULES, ids=lambda rule: rule.name)
def test_with_the_rule_the_story_ends_well(rule: Rule) -> None:
    """Placeholder."""
