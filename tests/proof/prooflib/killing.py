"""Real processes on a local directory, killed by SIGKILL at random moments and started again; then everything is read.

``python -m prooflib.killing FOLDER SEED KILLS`` plays it and prints what happened as JSON. The program that is started
has one thread and forks: a process that is born with everything imported is at work, and can be killed, at once.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mandapa.errors import ConflictError, NotFoundError
from mandapa.format.records import VersionOp
from mandapa.object_store import LocalObjectStore
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Author
from mandapa.repository.mirror import mirror
from mandapa.repository.repository import Repository
from mandapa.repository.version import Version
from prooflib.histories import Operation, contradiction

for needed in ("numpy", "mandapa.repository.gc", "mandapa.repository.rewrite"):
    importlib.import_module(needed)  # before the first fork: it would take much of each collector's life

ARTIFACT = "shared"
PLACES = 5
"""Paths that one writer uses again and again."""
LIVE = 8
"""Live versions, about: writers delete the oldest."""


def content(who: str, number: int) -> bytes:
    """What a writer puts with its commit of that number; each fourth makes a pack."""
    return f"{who}, commit {number}\n".encode() * (4_000 if number % 4 == 0 else 3)


def path(who: str, number: int) -> str:
    """Where."""
    return f"{who}/{number % PLACES}"


@dataclass
class Note:
    """A line in the diary of one who is killed now and then."""

    kind: str
    """``meant`` before a commit, ``made`` after it, ``saw`` after a read of the log, or what else was done."""
    call: int = 0
    """Nanoseconds of the machine's monotonic clock."""
    answer: int = 0
    number: int = 0
    txn: str = ""
    place: int = 0
    """The version made; records seen."""


class Diary:
    """Lines that survive the death of who wrote them, each written at once."""

    def __init__(self, folder: Path, who: str) -> None:
        self.path = folder / f"{who}.diary"
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, note: Note) -> None:
        os.write(self._file, json.dumps(asdict(note)).encode() + b"\n")

    def read(self) -> list[Note]:
        return [Note(**json.loads(line)) for line in self.path.read_bytes().splitlines()]


class Stage:
    """A folder with two repositories and the diaries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("home", "away"):
            Repository.create(LocalObjectStore(folder / name), threads=0)

    def open(self, name: str, who: str) -> Repository:
        """Both repositories, and all processes, share one cache, as on any machine."""
        store, cache = LocalObjectStore(self.folder / name), self.folder / "cache"
        return Repository(store, cache_dir=cache, threads=0, codec="raw", author=Author(who))


def writer(stage: Stage, who: str) -> Iterator[None]:
    """Commits, deletes and undeletes; what was meant when it was killed is done again, as the same transaction."""
    repo, diary = stage.open("home", who), Diary(stage.folder, who)
    artifact = repo.artifact(ARTIFACT)
    notes = [note for note in diary.read() if note.kind in ("meant", "made")]
    meant = notes[-1] if notes and notes[-1].kind == "meant" else None
    number = notes[-1].number + 1 if notes else 0
    while True:
        if meant is None:
            meant = Note("meant", time.monotonic_ns(), number=number, txn=repo.author.new_id().hex())
            diary.write(meant)
        with artifact.transaction(f"{who} {meant.number}", on_conflict="ours", txn_id=meant.txn) as txn:
            txn.add_bytes(path(who, meant.number), content(who, meant.number))
        assert txn.version is not None
        made = Note("made", meant.call, time.monotonic_ns(), meant.number, meant.txn, txn.version.number)
        diary.write(made)
        number, meant = meant.number + 1, None
        yield
        try:
            live = artifact.versions()
            if len(live) > LIVE:
                artifact.delete(live[0])
                diary.write(Note("deleted"))
            elif number % 5 == 0 and (dead := artifact.deleted()):
                artifact.undelete(dead[-1])
                diary.write(Note("brought back"))
        except (NotFoundError, ConflictError):
            pass  # somebody else did, or it is gone
        yield


def reader(stage: Stage, who: str) -> Iterator[None]:
    """Reads whole versions: right to the byte, or told that they were deleted."""
    repo, diary = stage.open("home", who), Diary(stage.folder, who)
    while True:
        call = time.monotonic_ns()
        try:
            versions = repo.artifact(ARTIFACT).versions()
        except NotFoundError:
            yield
            continue
        if not versions:
            yield
            continue
        diary.write(Note("saw", call, time.monotonic_ns(), place=len(versions[0]._log.records)))
        version = random.choice(versions)
        try:
            check_content(version)
        except NotFoundError as error:
            if "was deleted" not in str(error):
                raise
        diary.write(Note("read"))
        yield


def collector(stage: Stage, who: str) -> Iterator[None]:
    """Clean-ups with a grace of nothing."""
    repo, diary = stage.open("home", who), Diary(stage.folder, who)
    while True:
        if repo.gc(grace=0).freed:
            diary.write(Note("collected"))
        yield


def mirrorer(stage: Stage, who: str) -> Iterator[None]:
    """Lets the other repository follow."""
    home, away, diary = stage.open("home", who), stage.open("away", who), Diary(stage.folder, who)
    while True:
        done = mirror(home, away)
        assert done.ok, [one.error for one in done.artifacts]
        if sum(one.versions for one in done.artifacts):
            diary.write(Note("mirrored"))
        yield


ACTORS: dict[str, Callable[[Stage, str], Iterator[None]]] = {
    "writer0": writer,
    "writer1": writer,
    "reader0": reader,
    "collector0": collector,
    "mirrorer0": mirrorer,
}


PACE = {"reader0": 0.02, "mirrorer0": 0.02}
"""Seconds of rest, so that writers and collectors get the machine."""


def check_content(version: Version) -> None:
    """A version holds what whoever made it put, and nothing that nobody put."""
    who, number = version.message.split()
    names = list(version.assets)
    assert path(who, int(number)) in names
    for name in names:
        with version.open(name) as file:
            data = file.read()
        owner, at = data.split(b"\n")[0].decode().split(", commit ")
        assert name == path(owner, int(at))
        assert data == content(owner, int(at))
        assert name != path(who, int(number)) or (owner, at) == (who, number)


def born(stage: Stage, who: str) -> int:
    """A new process; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for _ in ACTORS[who](stage, who):
            time.sleep(PACE.get(who, 0))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def kill(pid: int) -> None:
    """Be sure that it was alive until now."""
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        raise AssertionError("a process ended by itself; it says why above")


def play(folder: Path, seed: int, kills: int) -> Counter[str]:
    """Kill so many, one at a time or all at once; then read everything. Raises when a promise is broken."""
    stage = Stage(folder)
    dice = random.Random(seed)
    counts: Counter[str] = Counter()
    alive = {who: born(stage, who) for who in ACTORS}
    try:
        while counts["SIGKILLs"] < kills:
            time.sleep(dice.random() * 0.35)
            victims = list(ACTORS) if dice.random() < 0.1 else [dice.choice(list(ACTORS))]
            for who in victims:
                kill(alive.pop(who))
                counts["SIGKILLs"] += 1
            alive.update((who, born(stage, who)) for who in victims)
    finally:
        for pid in alive.values():
            kill(pid)
            counts["SIGKILLs"] += 1
    check(stage, counts)
    return counts


def check(stage: Stage, counts: Counter[str]) -> None:
    """Every acknowledged commit is there, once; all is whole; all can have happened in one order."""
    repo = stage.open("home", "judge")
    report = fsck(repo, deep=True)
    assert report.findings == [], report.findings
    log = repo.artifact(ARTIFACT).open_log()
    numbers: dict[str, int] = {}
    slots: dict[str, int] = {}
    for record in log.records:
        assert record.txn not in slots, "a transaction stands twice"
        slots[record.txn] = record.seq
        if (op := record.find(VersionOp)) is not None:
            numbers[record.txn] = op.number
    history = []
    for who in ACTORS:
        for note in Diary(stage.folder, who).read():
            counts[note.kind] += 1
            if note.kind == "made":
                assert numbers.get(note.txn) == note.place, f"{who} was told v{note.place}: {numbers.get(note.txn)}"
                place = slots[note.txn] + 1
                history.append(Operation(log.id, note.call, note.answer, place, append=True, who=who))
            elif note.kind == "saw":
                history.append(Operation(log.id, note.call, note.answer, note.place, append=False, who=who))
    assert contradiction(history) == ""
    versions = repo.artifact(ARTIFACT).versions()
    for version in versions:
        check_content(version)
    away = stage.open("away", "judge")
    assert mirror(repo, away).ok
    report = fsck(away, deep=True)
    assert report.findings == [], report.findings
    copies = away.artifact(ARTIFACT).versions()
    assert [(one.number, one.digest, one.message) for one in copies] == [
        (one.number, one.digest, one.message) for one in versions
    ]


if __name__ == "__main__":
    print(json.dumps(play(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
