"""A run loses nothing, whoever is killed and whenever: what a call has taken is in a version, byte for byte."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from blake3 import blake3
from click.testing import CliRunner
from lab import give_back

from mandapa.cli import main
from mandapa.errors import InvalidInputError, NotFoundError
from mandapa.object_store import LocalObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository
from mandapa.run.backend import INCOMPLETE, key_of, spec_from
from mandapa.run.checkpoints import load_state
from mandapa.run.directory import RunDirectory
from mandapa.run.journal import ENTRIES, OUTCOMES, CheckpointEntry, JournalReader, Started
from mandapa.run.resume import newest_local
from mandapa.testing.server import Knobs, serve

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")

PROGRAM = Path(__file__).with_name("trainer.py")
NAME = "resnet-7"
KILLS = 30
"""Of a trainer, of an uploader, or of both at once, in one test."""

spec = importlib.util.spec_from_file_location("trainer", PROGRAM)
trainer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainer)


def until(true, seconds=30.0):
    """What ``true`` gives as soon as it is true; polled, with a deadline."""
    give_up = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < give_up, "it did not become true in time"
        time.sleep(0.005)
    return found


def gone(pid):
    """Whether a process has ended: what it had open is closed then, and its locks are free."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def command(pid):
    """The command line of a process; empty when it is gone, or about to be."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill(*pids):
    """As the kernel does when memory runs out; they are gone when this returns."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: all(map(gone, pids)))


@pytest.fixture
def folder(place):
    """A folder for runs; every process that names it on its command line is gone when the test ends."""
    yield place
    while left := [int(name) for name in os.listdir("/proc") if name.isdecimal() and str(place) in command(name)]:
        kill(*left)
    give_back(place)


class Place:
    """Where versions go: what a run is told of it, and how the test reads it."""

    def __init__(self, url, options, store):
        self.url = url
        self.options = options
        self._store = store

    def open(self):
        """The repository, as a process has it that was not there before."""
        return Repository(self._store(), threads=2)

    def steps(self):
        """Of the versions that are those of a checkpoint, in order."""
        try:
            versions = self.open().artifact(NAME).versions()
        except NotFoundError:
            return []
        return [version.metadata["step"] for version in versions if "step" in version.metadata]


@contextmanager
def repository(kind, folder, monkeypatch):
    """A repository in a folder, or behind a slow and flaky server."""
    if kind == "local":
        path = str(folder / "repository")
        yield Place(path, {}, lambda: LocalObjectStore(path))
        return
    with serve(Knobs(latency=0.002, error_rate=0.01, seed=7)) as server:
        secrets = {"access_key_id": "test", "secret_access_key": "test"}
        # What a script was given as arguments is written nowhere: `mandapa sync` finds its own.
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        options = {"endpoint_url": server.url, "region": "us-east-1", **secrets}
        yield Place("s3://bucket/runs", options, lambda: server.s3(prefix="runs"))


class Lives:
    """The lives of one run, one after the other."""

    def __init__(self, kind, folder, place):
        self.place = place
        self.make = trainer.use(kind)
        self.format = self.make.format
        self.folder = folder
        self.dir = str(folder / "runs" / NAME)
        self.ledger = folder / "ledger"
        self.pid = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, PROGRAM, kind, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._server.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(10)

    def begin(self, steps=None, *, pause=0.0, wait=False, gate=""):
        """Start the run, once more: for so many steps, or for ever; from when ``gate`` exists, and not to the end."""
        order = {"name": NAME, "dir": os.path.dirname(self.dir), "url": self.place.url, "options": self.place.options}
        order |= {"ledger": str(self.ledger), "said": str(self.folder / "said"), "work": str(self.folder / "work")}
        self._server.stdin.write(
            json.dumps({**order, "steps": steps, "pause": pause, "wait": wait, "gate": gate}) + "\n"
        )
        self._server.stdin.flush()
        self.pid = int(self._server.stdout.readline())

    def alive(self):
        return not gone(self.pid)

    def uploader(self):
        """The process id of the uploader; 0 when there is none."""
        try:
            pid = int(Path(self.dir, ".run", "uploader.lock").read_text().partition(" ")[0] or 0)
        except FileNotFoundError:
            return 0
        return pid if pid and f"mandapa.run.uploader\0{self.dir}\0" in command(pid) else 0

    def kill(self, *which):
        """Kill the trainer, the uploader, or both; gives how many there were."""
        pids = [pid for pid in (self.pid if who == "trainer" else self.uploader() for who in which) if pid]
        kill(*pids)
        return len(pids)

    def hold_back(self, steps):
        """A life in which the uploader is stopped before the first step; both are left as they are after the last."""
        gate = self.folder / f"gate-{self.noted()}"
        before = self.said("resumed"), self.said("done")
        self.begin(steps, wait=True, gate=str(gate))
        until(lambda: self.said("resumed") > before[0])
        os.kill(self.uploader(), signal.SIGSTOP)
        gate.touch()
        until(lambda: self.said("done") > before[1])

    def resumed(self):
        """From which step the newest life went on, and which version had it."""
        line = [line for line in self.lines() if line["kind"] == "resumed"][-1]
        return line["step"], line["version"]

    def finish(self):
        """Wait for the end of a life that was not killed."""
        until(lambda: not self.alive(), 60)

    def lines(self):
        """What the ledger says."""
        try:
            return [json.loads(line) for line in self.ledger.read_bytes().splitlines()]
        except FileNotFoundError:
            return []

    def said(self, kind):
        """How many lines of a kind the ledger has."""
        return sum(line["kind"] == kind for line in self.lines())

    def noted(self):
        """How long the ledger is."""
        return self.ledger.stat().st_size if self.ledger.exists() else 0

    def key(self):
        value = {"store": self.place.url, "options": self.place.options, "artifact": NAME}
        return key_of(spec_from(value))

    def committing(self):
        """Whether a commit was begun and not finished."""
        lines = []
        with suppress(InvalidInputError):  # the run's directory is not made yet
            lines = list(JournalReader(RunDirectory(self.dir).outcomes(self.key()), OUTCOMES).new())
        return bool(lines) and isinstance(lines[-1], Started)


def mandapa(*arguments, code=0):
    """A command, in this process."""
    found = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="mandapa")
    assert found.exit_code == code, f"{arguments}: {found.exit_code} {found.output[-1000:]}"
    return found.output


def load(version, name="state"):
    """The state in a version's checkpoint, and the step that it is of."""
    path = next(path for path in version.assets if path.startswith("checkpoint/"))
    with tempfile.TemporaryDirectory() as folder, version.open(path) as source:
        local = os.path.join(folder, os.path.basename(path))
        Path(local).write_bytes(source.read())
        state = load_state(local)
    step = state["model"]["step"]
    trainer.check(state, step)
    return state, step


class Reader(threading.Thread):
    """Looks at the newest version again and again, as somebody who serves or evaluates it would."""

    def __init__(self, place):
        super().__init__(daemon=True)
        self._place = place
        self._stopping = threading.Event()
        self.error = None
        self.steps = []
        """Of the checkpoints that were met."""

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, kind, *_):
        self._stopping.set()
        self.join(30)
        if kind is None and self.error is not None:
            raise self.error

    def run(self):
        try:
            self._read()
        except BaseException as error:
            self.error = error

    def _read(self):
        repo, newest = None, -1
        while not self._stopping.wait(0.02):
            try:
                repo = repo or self._place.open()
                version = repo[NAME]
            except NotFoundError:
                assert newest < 0  # only before the first commit
                continue
            assert version.number >= newest
            if version.number > newest:
                newest = version.number
                if (step := look(version)) is not None:
                    self.steps.append(step)
                assert step is not None or not self.steps


def look(version):
    """One version as a reader meets it: a whole checkpoint, with everything else as it was then; gives its step."""
    if not any(path.startswith("checkpoint/") for path in version.assets):
        assert "step" not in version.metadata
        return None
    _, step = load(version)
    if "step" in version.metadata:
        assert version.metadata["step"] == step
        assert version.message == f"step {step}"
        with version.open("progress.json") as file:
            assert json.load(file)["step"] == step
    return step


def test_what_the_reader_refuses(folder):
    """The reader of these tests sees a checkpoint of two steps, one in other metadata, and one that is half."""
    repo = Repository.create(LocalObjectStore(folder / "repository"), threads=0)
    path = folder / "state.safetensors"

    def version(state, step):
        from mandapa.run.checkpoints import save_state

        save_state(state, str(path), "safetensors")
        with repo.artifact(NAME).transaction(f"step {step}", {"step": step}, base=None) as txn:
            txn.add(path, at="checkpoint/state.safetensors")
            txn.add_bytes("progress.json", json.dumps({"step": step}).encode())
        return txn.version

    model = trainer.NumpyModel()
    assert look(version(model.state(4), 4)) == 4
    mixed = {"model": model.state(4)["model"], "optim": model.state(6)["optim"]}
    torn = model.state(4)
    torn["model"]["seen"][32:] = 2
    for state, step in ((model.state(4), 6), (mixed, 4), (torn, 4)):
        with pytest.raises(AssertionError):
            look(version(state, step))


def check(lives):
    """What must hold when `mandapa sync` has ended, however often whom was killed before."""
    lines = lives.lines()
    repo = lives.place.open()
    report = fsck(repo, deep=True)
    assert report.findings == []
    versions = repo.artifact(NAME).versions()
    assert [version.number for version in versions] == list(range(len(versions)))

    # Everything that was taken is in a version; fsck has read the bytes and found that they have their digests.
    held = defaultdict(set)
    longest = {}
    for version in versions:
        for asset in version.assets.values():
            held[asset.path].add((asset.size, asset.digest))
            if asset.path.startswith("curves/") and asset.size > longest.get(asset.path, (0,))[0]:
                longest[asset.path] = (asset.size, version)
    lost = [
        line
        for line in lines
        if line["kind"] in ("asset", "checkpoint") and (line["size"], line["digest"]) not in held[line["path"]]
    ]
    assert lost == []
    curves = {}
    for path, (_, version) in longest.items():
        with version.open(path) as file:
            curves[path] = file.read()
    grown = [line for line in lines if line["kind"] == "grown"]
    assert [line for line in grown if blake3(curves[line["path"]][: line["size"]]).hexdigest() != line["digest"]] == []

    # One version a checkpoint, and none that nobody saved.
    saved = Counter((entry.attempt, entry.step) for entry in journal(lives) if isinstance(entry, CheckpointEntry))
    assert set(saved.values()) == {1}
    made = Counter(version.metadata["step"] for version in versions if "step" in version.metadata)
    assert made == Counter(step for _, step in saved)
    assert {(line["attempt"], line["step"]) for line in lines if line["kind"] == "checkpoint"} <= set(saved)
    assert len({record.txn for record in repo.artifact(NAME).open_log().records}) == len(versions)

    # Every checkpoint is a whole one, and just what an undisturbed training would have come to.
    steps = [look(version) for version in versions]
    first = next(n for n, step in enumerate(steps) if step is not None)
    assert None not in steps[first:]
    assert steps[-1] == max(step for step in steps if step is not None)
    assert not any(path.startswith(INCOMPLETE) for path in versions[-1].assets)
    state, step = load(versions[-1])
    undisturbed = lives.make()
    for number in range(1, step + 1):
        undisturbed.train(number)
    ended = lives.make()
    ended.load(state)
    assert ended.fingerprint() == undisturbed.fingerprint()
    check_resumed(lines)


def check_resumed(lines):
    """Each life went on from the newest checkpoint whose save had returned, or a newer one, never an older one."""
    newest = 0
    attempt = 0
    for line in lines:
        if line["kind"] == "resumed":
            assert line["step"] >= newest
            assert line["attempt"] > attempt
            attempt = line["attempt"]
            newest = line["step"]
        elif line["kind"] == "checkpoint":
            assert line["attempt"] == attempt
            newest = line["step"]


def journal(lives):
    """What the run's journal holds."""
    reader = JournalReader(RunDirectory(lives.dir).journal(0), ENTRIES)
    found = list(reader.new())
    assert reader.damaged == 0
    return found


def wait_for_a_moment(lives, chance):
    """A moment in the life of a run at which somebody is to die."""
    kind = chance.choice(("now", "line", "line", "commit", "commit"))
    if kind == "line":
        before = lives.noted()
        until(lambda: lives.noted() > before)
    elif kind == "commit":
        until(lives.committing)
    time.sleep(chance.uniform(0, 0.05 if kind != "now" else 0.3))


@pytest.mark.parametrize("seed", range(9 if os.environ.get("MANDAPA_SOAK") else 1))
@pytest.mark.parametrize(("kind", "model"), [("local", "torch"), ("s3", "numpy")])
def test_kills(folder, monkeypatch, kind, model, seed):
    """Trainer, uploader or both are killed, life after life: nothing is lost, doubled, mixed up or gone back to."""
    chance = random.Random(f"{kind} {seed}")
    kills, halved = Counter(), 0
    with repository(kind, folder, monkeypatch) as where, Lives(model, folder, where) as lives:
        with Reader(where) as reader:
            while kills.total() < KILLS or (halved < 3 and kills.total() < 4 * KILLS):  # how many it cuts is chance
                lives.begin(pause=0.02)
                for _ in range(chance.choice((0, 0, 1, 2))):
                    wait_for_a_moment(lives, chance)
                    kills["uploader"] += lives.kill("uploader")
                    halved += lives.committing()
                wait_for_a_moment(lives, chance)
                who = chance.choice((("trainer",), ("trainer", "uploader")))
                kills["both" if len(who) > 1 else "trainer"] += bool(lives.kill(*who))
                halved += lives.committing() and len(who) > 1
                if chance.random() < 0.15:
                    mandapa("sync", lives.dir)
            lives.kill("uploader")
            mandapa("sync", lives.dir)
            assert "this machine may go" in mandapa("status", lives.dir)
            check(lives)
            lives.begin(2)
            lives.finish()
            assert "this machine may go" in mandapa("status", lives.dir)
        check(lives)
        until(lambda: not lives.uploader())  # it ends by itself
        # Of what was handed over only the newest checkpoint stays; of what was about to be, what was moved.
        assert [name for name in os.listdir(RunDirectory(lives.dir).staged) if not name.endswith(".moved")] == []
        saved = [file.source for entry in journal(lives) for file in getattr(entry, "files", ())]
        kept = [source for source in saved if Path(lives.dir, source).exists()]
        assert [Path(source).parent.name for source in kept] == [f"step-{where.steps()[-1]}"]
    assert lives.said("closed") == 1
    assert min(kills.values()) >= 3
    assert halved >= 3  # commits that were begun, and finished by another process
    assert len(set(reader.steps)) >= 5


def test_a_checkpoint_that_only_the_journal_has(folder, monkeypatch):
    """Trainer and uploader die before a checkpoint is committed: the next life goes on from it, and commits it."""
    with repository("local", folder, monkeypatch) as where, Lives("numpy", folder, where) as lives:
        lives.hold_back(4)
        lives.kill("trainer")
        lives.kill("uploader")
        mandapa("status", lives.dir, code=1)
        assert where.steps() == []
        found = newest_local(RunDirectory(lives.dir), 0, ())
        assert found.step == 4
        trainer.check(found.load(), 4)
        lives.begin(0)
        lives.finish()
        assert lives.resumed()[0] == 4
        assert "this machine may go" in mandapa("status", lives.dir)
        check(lives)
        assert where.steps() == [2, 4]


def test_a_run_that_went_on_elsewhere(folder, monkeypatch):
    """Both died here, another machine went on from the store: the next life here sees what the store has since."""
    with repository("local", folder, monkeypatch) as where, Lives("numpy", folder, where) as lives:
        lives.begin(2, wait=True)
        until(lambda: where.steps() == [2] and not lives.committing())
        lives.kill("trainer", "uploader")
        here, lives.dir = lives.dir, str(folder / "elsewhere" / NAME)
        lives.begin(2)
        lives.finish()
        assert lives.resumed()[0] == 2
        lives.dir = here
        lives.begin(0)
        lives.finish()
        step, version = lives.resumed()
        assert step == 4
        assert where.open()[version].metadata["step"] == 4


def test_the_machine_goes_away(folder, monkeypatch):
    """SIGTERM: the newest checkpoint is committed first, then the others in order; then the uploader ends by itself."""
    with repository("s3", folder, monkeypatch) as where, Lives("numpy", folder, where) as lives:
        lives.hold_back(8)
        os.kill(lives.pid, signal.SIGSTOP)
        uploader = lives.uploader()
        os.kill(uploader, signal.SIGTERM)
        os.kill(uploader, signal.SIGCONT)
        until(lambda: gone(uploader))
        assert "this machine may go" in mandapa("status", lives.dir)
        assert where.steps() == [8, 2, 4, 6, 8]
        assert look(where.open()[NAME]) == 8


def test_who_waits_for_an_uploader_takes_over(folder, monkeypatch):
    """'mandapa sync' asks the uploader that is at work; when that one is killed it does the work itself."""
    with repository("local", folder, monkeypatch) as where, Lives("numpy", folder, where) as lives:
        lives.hold_back(2)
        lives.kill("trainer")
        asked = Path(RunDirectory(lives.dir).request)
        waiting = threading.Thread(target=lambda: (until(asked.exists), lives.kill("uploader")), daemon=True)
        waiting.start()
        mandapa("sync", lives.dir)
        waiting.join(10)
        check(lives)
