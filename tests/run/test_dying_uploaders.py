"""An uploader dies at any call of its store and at any byte of a journal: the next one finishes what was begun."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from mandapa.digest import hexdigest
from mandapa.errors import ConflictError, CorruptionError, StorageError
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository
from mandapa.run import committer as committer_module
from mandapa.run import repository_backend
from mandapa.run import uploader as uploader_module
from mandapa.run.committer import Committer, Hub
from mandapa.run.directory import RunDirectory
from mandapa.run.journal import (
    ENTRIES,
    OUTCOMES,
    ArtifactEntry,
    AssetEntry,
    CheckpointEntry,
    CommitEntry,
    File,
    Journal,
    JournalReader,
    Made,
    Started,
    UrlEntry,
)
from mandapa.run.launch import join
from mandapa.run.limits import Limits
from mandapa.run.logger import BackendSpec
from mandapa.run.outbox import Outbox
from mandapa.run.repository_backend import RepositoryBackend
from mandapa.run.resume import newest_local
from mandapa.run.troubles import Troubles
from mandapa.run.uploader import Uploader
from mandapa.testing.faults import Crash, CrashingObjectStore, FaultyObjectStore

NAME = "resnet-7"
SOAK = bool(os.environ.get("MANDAPA_SOAK"))
KEY, OTHER = "0123456789abcdef", "fedcba9876543210"


class Stores:
    """The object stores of backends, by what their specs say."""

    def __init__(self):
        self.stores = {}

    def __call__(self, spec, *, create):
        return Repository.create(self.stores[spec.store], threads=0, author=Author("test", sleep=lambda seconds: None))

    def spec(self, store, name="store"):
        self.stores[name] = store
        return BackendSpec(name, {}, NAME)


@pytest.fixture
def stores(monkeypatch):
    """Committers of this process find their stores here, and uploaders lose no time."""
    found = Stores()
    monkeypatch.setattr(repository_backend, "open_repository", found)
    monkeypatch.setattr(committer_module, "_PAUSE_FIRST", 0.0)
    monkeypatch.setattr(uploader_module, "_TICK", 0.001)
    monkeypatch.setattr(uploader_module, "_LIVENESS", 0.001)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # that is for the machine's death: here only processes die
    return found


class Trainer:
    """What a training process does, without a process: it hands over, and then it is dead."""

    def __init__(self, path, *, attempt=1, keys=(KEY,), specs=None):
        self.specs = specs or {}
        self.directory = RunDirectory(path, NAME)
        self.directory.rank_lock(0).take()
        self.directory.rank_lock(0).release()  # it has been here, and is dead
        self.keys = list(keys)
        self.outbox = Outbox(
            self.directory, 0, self.keys, uploader=None, limits=Limits(), troubles=Troubles(strict=True)
        )
        base = {} if attempt == 1 else self.join().base
        self.outbox.begin(attempt, launch=f"launch-{attempt}", local_ranks=[0], base=base, fresh=False)
        self._work = Path(path, "work")
        self._work.mkdir(exist_ok=True)

    def join(self):
        """What this life goes on from, when its uploader has just asked the store."""
        specs = {key: self.specs[key] for key in self.keys if key in self.specs}
        opened = {}
        for key, spec in specs.items():
            backend = RepositoryBackend(spec, self.directory, lambda line: None)
            backend.open()
            opened[key] = backend.facts["opened"]
        settled = {key: progress.look().any for key, progress in self.outbox.progress.items()}
        found = newest_local(self.directory, 0, ())
        return join(
            self.directory,
            self.outbox.begun,
            local_world=1,
            opened=opened,
            settled=settled,
            local_step=found and found.step,
            fresh=False,
        )

    def bytes(self, at, data):
        return self.outbox.bytes(at, data, self.keys)

    def file(self, at, data, take="copy"):
        source = self._work / at
        source.write_bytes(data)
        return self.outbox.file(at, str(source), self.keys, take)

    def checkpoint(self, step):
        path = Path(self.directory.checkpoints, f"step-{step}", "state.bin")
        path.parent.mkdir(parents=True)
        path.write_bytes(state(step))
        file = File(path="checkpoint/state.bin", source=self.directory.relative(str(path)), size=len(state(step)))
        return self.outbox.hand_over(self.keys, file.size, CheckpointEntry, step=step, files=[file])

    def die(self):
        self.outbox._journal.close()


def state(step):
    return f"the state after step {step}".encode() * 50


def hand_over(path):
    """A life with all that a run can hand over; six versions of the run, and one of another artifact."""
    trainer = Trainer(path)
    trainer.bytes("hparams.yaml", b"rate: 0.1\n")
    trainer.file("curve.csv", b"1,0.5\n", take="grow")
    trainer.file("latest.txt", b"step 1")
    trainer.file("latest.txt", b"step 2")
    trainer.checkpoint(2)
    url = {"path": "data.parquet", "url": "https://example.com/data.parquet", "size": 7, "checksum": "sha256:00"}
    trainer.outbox.hand_over(trainer.keys, 0, UrlEntry, **url, skip=[])
    source = trainer.directory.source(f"{trainer.directory.relative(trainer.directory.staged)}/evaluation")
    Path(source).write_bytes(b"accuracy: 1.0")
    fields = {"name": "evaluation", "source": trainer.directory.relative(source), "at": "result.txt", "size": 13}
    trainer.outbox.hand_over(trainer.keys, 13, ArtifactEntry, **fields, aliases=["newest"])
    trainer.file("latest.txt", b"step 4")
    trainer.file("curve.csv", b"1,0.5\n2,0.25\n", take="grow")
    trainer.checkpoint(4)
    trainer.outbox.append(CommitEntry)
    trainer.bytes("notes/1.txt", b"first")
    trainer.bytes("notes/1.txt", b"second")
    trainer.checkpoint(6)
    trainer.file("latest.txt", b"step 7")
    trainer.die()
    return trainer.directory


def commit(directory, spec, key=KEY):
    """Do what the committer's thread does, here: a crash of the store comes out of it."""
    hub = Hub(urgent=True)
    for entry in JournalReader(directory.journal(0), ENTRIES).new():
        hub.feed.take(0, entry)
    hub.feed.live = {0: False}
    said = []
    backend = RepositoryBackend(spec, directory, said.append)
    working = Committer(key, spec, backend, directory, hub, commit_every=600, tell=said.append)
    try:
        while working._step():
            pass
    finally:
        working._journal.close()
    return said


def finish(directory, specs):
    """What ``mandapa sync`` does."""
    assert Uploader(directory, specs, once=True).run()


def versions(store):
    """All that the store's repository holds, as values; nothing is wrong with it."""
    repo = Repository(store, threads=0)
    assert fsck(repo, deep=True).findings == []
    found = {}
    for name in (NAME, "evaluation"):
        artifact = repo.artifact(name)
        assert len({record.txn for record in artifact.open_log().records}) == len(artifact.open_log().records)
        found[name] = [
            (version.number, version.message, dict(version.metadata), version.digest) for version in artifact.versions()
        ]
        found[f"{name} aliases"] = artifact.aliases()
    return found


@pytest.fixture
def life(place, stores):
    """A run's directory as its trainer left it, and what becomes of it when nobody is killed."""
    directory = hand_over(place / "life")
    copy = RunDirectory(shutil.copytree(directory.path, place / "undisturbed"))
    store = MemoryObjectStore()
    commit(copy, stores.spec(store))
    expected = versions(store)
    assert [metadata.get("step") for _, _, metadata, _ in expected[NAME]] == [None, 2, 4, None, 6, None]
    assert len(expected["evaluation"]) == 1
    return directory, expected


def continued(directory, folder):
    """A copy of a run's directory, to go on in."""
    return RunDirectory(shutil.copytree(directory.path, folder))


def assert_let_go(directory):
    """Nothing waits in the directory any more: only the newest checkpoint stays, to resume from."""
    assert os.listdir(directory.staged) == []
    assert [str(path.relative_to(directory.checkpoints)) for path in Path(directory.checkpoints).rglob("*.bin")] == [
        "step-6/state.bin"
    ]


# -- the store ---------------------------------------------------------------------------------------------------------


# As long as there is one thread, a crash after a call is one before the next call.
@pytest.mark.parametrize("mode", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_a_crash_at_every_call_of_the_store(life, place, stores, mode):
    """Wherever in a commit: one version a batch, the very same as without a crash, and nothing stays behind."""
    directory, expected = life
    halved = 0
    for at in itertools.count(1):
        copy, store = continued(directory, place / str(at)), MemoryObjectStore()
        try:
            commit(copy, stores.spec(CrashingObjectStore(store, at=at, mode=mode)))
        except Crash:
            outcomes = list(JournalReader(copy.outcomes(KEY), OUTCOMES).new())
            halved += bool(outcomes) and isinstance(outcomes[-1], Started)
        else:
            break  # there is no such call any more
        finish(copy, {KEY: stores.spec(store)})
        assert versions(store) == expected, at
        assert_let_go(copy)
        shutil.rmtree(copy.path)
    assert at > 100
    assert halved > 50


@pytest.mark.parametrize("seed", range(100 if SOAK else 20))
def test_a_store_that_loses_requests_and_replies(life, place, stores, seed):
    """Lost, late, doubled and refused for nothing, and the uploader dies a few times: one version a batch."""
    directory, expected = life
    chance = random.Random(seed)
    store = MemoryObjectStore()
    Repository.create(store, threads=0)  # what is there already is not tried out again
    faulty = FaultyObjectStore(store, chance, lost=0.05, conflicts=0.05, doubled=0.05)
    spec = stores.spec(faulty)
    for _ in range(1000):
        stores.stores[spec.store] = CrashingObjectStore(faulty, at=chance.randrange(1, 60))
        with suppress(Crash, StorageError, CorruptionError, ConflictError):
            commit(directory, spec)
            break
    else:
        pytest.fail("it comes to no end")
    faulty.flush()
    finish(directory, {KEY: stores.spec(store)})
    assert versions(store) == expected


# -- the journal of the backend ----------------------------------------------------------------------------------------


def test_a_torn_line_of_what_was_done(life, place, stores, monkeypatch):
    """The uploader dies while it writes any of its lines, the store as it was then: one version a batch."""
    directory, expected = life
    turns = len(expected[NAME]) + len(expected["evaluation"])
    for turn, kind in itertools.product(range(1, turns + 1), (Started, Made)):
        tries = itertools.count()
        size = 1 << 20
        while (cut := next(tries) * 37) < size:
            copy, store = continued(directory, place / f"{turn}-{kind.__name__}-{cut}"), MemoryObjectStore()
            before, size = die_at_line(copy, stores.spec(store), turn, kind)
            os.truncate(copy.outcomes(KEY), before + min(cut, size - 1))
            finish(copy, {KEY: stores.spec(store)})
            assert versions(store) == expected, (turn, kind, cut)
            outcomes = list(JournalReader(copy.outcomes(KEY), OUTCOMES).new())
            assert [line.n for line in outcomes] == list(range(1, 2 * turns + 1))
            shutil.rmtree(copy.path)


def die_at_line(directory, spec, turn, kind):
    """Commit up to the line of that kind in that turn; gives where it begins and how long it is."""
    written = []
    append = Journal.append

    def dying(journal, line, **options):
        before = os.stat(journal.path).st_size
        append(journal, line, **options)
        if isinstance(line, kind):
            written.append((before, os.stat(journal.path).st_size - before))
            if len(written) == turn:
                raise Crash

    with pytest.MonkeyPatch.context() as patch, suppress(Crash):
        patch.setattr(Journal, "append", dying)
        commit(directory, spec)
    return written[-1]


@pytest.mark.parametrize("noted", [False, True])
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_the_next_life_goes_on_from_the_last_version(life, place, stores, turn, noted):
    """Trainer and uploader die at a commit, whether it was noted or not: no later version lacks what was committed."""
    directory, expected = life
    store = MemoryObjectStore()
    spec = stores.spec(store)
    before, _ = die_at_line(directory, spec, turn, Made)
    if not noted:
        os.truncate(directory.outcomes(KEY), before)
    again = Trainer(directory.path, attempt=2, specs={KEY: spec})
    again.bytes("notes/2.txt", b"once more")
    again.die()
    commit(directory, spec)
    *former, _ = versions(store)[NAME]
    assert former == expected[NAME]
    newest = Repository(store, threads=0)[NAME]
    assert newest.open("checkpoint/state.bin").read() == state(6)
    assert newest.parent == len(former) - 1


# -- the journal of a rank ---------------------------------------------------------------------------------------------


def test_a_journal_that_is_cut_anywhere_in_its_last_line(life, place, stores):
    """A torn line counts as not written, and the next life's lines follow on what is left."""
    directory, expected = life
    journal = Path(directory.journal(0)).read_bytes()
    lines = journal.splitlines(keepends=True)
    kept = len(journal) - len(lines[-1])
    for cut in range(0, len(lines[-1]), 1 if SOAK else 3):
        copy, store = continued(directory, place / str(cut)), MemoryObjectStore()
        os.truncate(copy.journal(0), kept + cut)
        commit(copy, stores.spec(store))
        found = versions(store)
        assert found[NAME] == expected[NAME][:-1]  # the last line was of something after the last checkpoint
        assert found["evaluation"] == expected["evaluation"]

        again = Trainer(copy.path, attempt=2)
        again.bytes("notes/2.txt", b"once more")
        again.die()
        reader = JournalReader(copy.journal(0), ENTRIES)
        assert [entry.n for entry in reader.new()] == list(range(1, len(lines) + 2))
        assert reader.damaged == 0
        commit(copy, stores.spec(store))
        *former, newest = versions(store)[NAME]
        assert former == expected[NAME][:-1]
        assert Repository(store, threads=0)[NAME].open("notes/2.txt").read() == b"once more"
        assert newest[0] == len(former)
        shutil.rmtree(copy.path)


def test_a_byte_that_is_damaged_anywhere_in_a_line(life, place, stores):
    """What was handed over before and after that line is committed, the log tells of it, the next life goes on."""
    directory, _ = life
    journal = Path(directory.journal(0)).read_bytes()
    lines = journal.splitlines(keepends=True)
    entries = list(JournalReader(directory.journal(0), ENTRIES).new())
    chance = random.Random(5)
    for n, line in enumerate(lines):
        copy, store = continued(directory, place / str(n)), MemoryObjectStore()
        at = sum(map(len, lines[:n])) + chance.randrange(len(line) - 1)
        damaged = bytearray(journal)
        damaged[at] = chance.choice([byte for byte in range(256) if byte not in (damaged[at], 10)])
        Path(copy.journal(0)).write_bytes(damaged)
        finish(copy, {KEY: stores.spec(store)})
        assert f"{copy.journal(0)}: 1 lines are damaged and were left out" in Path(copy.log).read_text()

        repo = Repository(store, threads=0)
        assert fsck(repo, deep=True).findings == []
        held = {(asset.path, asset.digest) for v in repo.artifact(NAME).versions() for asset in v.assets.values()}
        for entry in entries[:n] + entries[n + 1 :]:
            assert missing(directory, entry, held) == [], (n, entry)
        steps = [v.metadata["step"] for v in repo.artifact(NAME).versions() if "step" in v.metadata]
        assert steps == [step for step in (2, 4, 6) if step != getattr(entries[n], "step", None)]

        again = Trainer(copy.path, attempt=2)
        assert again.outbox.last == len(lines) + (n < len(lines) - 1)  # above all that is known
        again.checkpoint(8)
        again.die()
        finish(copy, {KEY: stores.spec(store)})
        assert Repository(store, threads=0)[NAME].metadata["step"] == 8
        shutil.rmtree(copy.path)


def missing(directory, entry, held):
    """The files of an entry that are in no version."""
    files = [entry.file] if isinstance(entry, AssetEntry) and not entry.grows else getattr(entry, "files", [])
    found = []
    for file in files:
        data = Path(directory.source(file.source)).read_bytes()
        if (file.path, hexdigest(data)) not in held:
            found.append(file.path)
    return found


# -- the end of an uploader --------------------------------------------------------------------------------------------


class Dying(RunDirectory):
    """A run's directory whose trainer hands over its last, and is dead, when somebody looks whether it lives."""

    words = None

    def rank_lock(self, rank):
        return self

    def held(self):
        return self.words is None or bool(self.words())


def test_the_last_words_of_a_trainer(place, stores):
    """An uploader that learns of a death does not end before it has read and committed all that the dead one wrote."""
    store = MemoryObjectStore()
    trainer = Trainer(place / "life")
    trainer.bytes("first.txt", b"first")
    uploader = Uploader(Dying(trainer.directory.path), {KEY: stores.spec(store)}, commit_every=0.01)
    release = uploader._release

    def die():
        uploader._directory.words = lambda: None
        trainer.bytes("last.txt", b"last")
        trainer.die()

    def released():
        release()
        if (0, 2) in uploader._done()[KEY] and uploader._directory.words is None:
            uploader._directory.words = die

    uploader._release = released
    assert uploader.run()
    assert Repository(store, threads=0)[NAME].open("last.txt").read() == b"last"


def test_a_life_that_begins_when_an_uploader_ends(place, stores, monkeypatch):
    """What the next life has handed over by then is still there for the next uploader, files that grow included."""
    store = MemoryObjectStore()
    first = Trainer(place / "life")
    first.file("curve.csv", b"1\n", take="grow")
    first.die()
    uploader = Uploader(first.directory, {KEY: stores.spec(store)}, once=True)
    write_status = uploader._write_status
    lives = []

    def begin(*, last=False):
        write_status(last=last)
        if last and not lives:
            lives.append(Trainer(place / "life", attempt=2))
            lives[0].file("curve-2.csv", b"2\n", take="grow")

    monkeypatch.setattr(uploader, "_write_status", begin)
    assert uploader.run()
    assert os.listdir(first.directory.staged) != []
    lives[0].die()
    finish(first.directory, {KEY: stores.spec(store)})
    assert Repository(store, threads=0)[NAME].open("curve-2.csv").read() == b"2\n"
    assert os.listdir(first.directory.staged) == []


def test_bytes_stay_until_every_backend_of_the_run_has_them(place, stores):
    """An uploader that does not know all backends of a run gives nothing up that the others have not got."""
    one, other = MemoryObjectStore(), MemoryObjectStore()
    trainer = Trainer(place / "life", keys=(KEY, OTHER))
    trainer.bytes("notes.txt", b"for both")
    trainer.checkpoint(2)
    trainer.checkpoint(4)
    trainer.die()
    specs = {KEY: stores.spec(one, "one"), OTHER: stores.spec(other, "other")}
    finish(trainer.directory, {KEY: specs[KEY]})
    finish(trainer.directory, {})
    finish(trainer.directory, specs)
    for store in (one, other):
        repo = Repository(store, threads=0)
        assert repo[NAME].open("notes.txt").read() == b"for both"
        assert [v.metadata.get("step") for v in repo.artifact(NAME).versions()] == [2, 4]


def test_the_newest_checkpoint_first_and_again(place, stores):
    """On a machine that goes away the newest checkpoint is committed ahead, once; so is one that comes later."""
    store = MemoryObjectStore()
    trainer = Trainer(place / "life")
    for step in (1, 2, 3):
        trainer.bytes("notes.txt", f"step {step}".encode())
        trainer.checkpoint(step)
    hub = Hub(urgent=True, newest_first=True)
    reader = JournalReader(trainer.directory.journal(0), ENTRIES)
    spec, said = stores.spec(store), []
    backend = RepositoryBackend(spec, trainer.directory, said.append)
    working = Committer(KEY, spec, backend, trainer.directory, hub, commit_every=600, tell=said.append)

    def work():
        for entry in reader.new():
            hub.feed.take(0, entry)
        return working._step()

    assert work()
    assert work()
    trainer.bytes("notes.txt", b"step 4")
    trainer.checkpoint(4)
    trainer.die()
    while work():
        pass
    working._journal.close()
    found = Repository(store, threads=0).artifact(NAME).versions()
    assert [v.metadata["step"] for v in found] == [3, 1, 4, 2, 3, 4]
    assert [v.open("notes.txt").read() for v in found] == [f"step {v.metadata['step']}".encode() for v in found]
