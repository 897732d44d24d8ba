"""Any history, and any calls of mirror and clean-ups in between: the destination says what the source says."""

from __future__ import annotations

import os
import sys

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mandapa.errors import ConflictError, InvalidInputError, NotFoundError
from mandapa.repository.repository import Repository

sys.path.insert(0, os.path.dirname(__file__))
from mirroring import annotate, check, reopened, repository, says, sweep

SOAK = bool(os.environ.get("MANDAPA_SOAK"))
NAMES = st.sampled_from(["a", "a", "a", "b"])
LABELS = st.sampled_from(["best", "Best", "prod", "paper"])
NUMBERS = st.integers(0, 6)
FILES = st.dictionaries(
    st.sampled_from(["x", "y", "d/z"]), st.sampled_from([b"", b"1", b"two" * 50, bytes(range(256)) * 400]), max_size=3
)

STEPS = st.one_of(
    st.tuples(st.just("commit"), NAMES, FILES, st.none() | LABELS),
    st.tuples(st.just("commit"), NAMES, FILES, st.none() | LABELS),
    st.tuples(st.just("alias"), NAMES, LABELS, st.none() | NUMBERS),
    st.tuples(st.just("tag"), NAMES, LABELS, st.none() | NUMBERS),
    st.tuples(st.just("delete"), NAMES, st.lists(NUMBERS, min_size=1, max_size=3, unique=True)),
    st.tuples(st.just("undelete"), NAMES, NUMBERS),
    st.tuples(st.just("annotate"), NAMES, NUMBERS, st.sampled_from([1, None, "x"])),
    st.tuples(st.just("rename"), NAMES, st.sampled_from(["a", "b", "c"])),
    st.tuples(st.just("repack"), st.booleans(), NAMES),
    st.tuples(st.just("gc"), st.booleans()),
    st.tuples(st.just("mirror"), st.booleans()),
)


class World:
    def __init__(self) -> None:
        self.source = repository(codec="raw")
        self.destination = repository()

    def commit(self, name, files, alias):
        with self.source.artifact(name).transaction(message="m", base=None if len(files) == 3 else "latest") as txn:
            for path, data in files.items():
                txn.add_bytes(path, data)
            txn.add_url("url", "s3://elsewhere/x", size=len(files))
            if alias is not None:
                txn.alias(alias)

    def alias(self, name, label, number):
        self.source.artifact(name).alias(label, number)

    def tag(self, name, label, number):
        self.source.artifact(name).tag(label, number)

    def delete(self, name, numbers):
        self.source.artifact(name).delete(*numbers)

    def undelete(self, name, number):
        self.source.artifact(name).undelete(number)

    def annotate(self, name, number, value):
        annotate(self.source, name, number, fact=value)

    def rename(self, name, other):
        self.source.artifact(name).rename(other)

    def repack(self, here, name):
        (self.destination if here else self.source).artifact(name).repack()

    def gc(self, here):
        sweep(self.destination if here else self.source)

    def mirror(self, elsewhere):
        if elsewhere:
            self.source, self.destination = reopened(self.source, codec="raw"), reopened(self.destination)
        assert self.source.mirror(self.destination).ok


@settings(
    max_examples=600 if SOAK else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(STEPS, min_size=3, max_size=25))
def test_any_history(steps):
    """Versions, names, facts, digests, contents; then nothing is left to do."""
    world = World()
    for what, *arguments in steps:
        try:
            getattr(world, what)(*arguments)
        except (ConflictError, InvalidInputError, NotFoundError):
            continue  # such a thing cannot be done now
    world.mirror(True)
    check(world.source, world.destination)
    done = Repository(world.source.place).mirror(Repository(world.destination.place))
    assert [one.records for one in done.artifacts if one.records] == []
    assert says(world.destination) == says(world.source)
