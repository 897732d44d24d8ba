"""Checkpoints that something else has written: taken over whole, in versions at their place, and gone on from."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import mandapa
from mandapa import CheckpointSaver, Limits, Run, Version
from mandapa.errors import CorruptionError, InvalidInputError, NotFoundError, StorageError
from mandapa.loggers import Logger, ObjectStoreLogger
from mandapa.repository.artifact import Artifact
from mandapa.run.checkpoints import save_state
from mandapa.run.run import _open_runs


class Bench:
    """Runs of one name that log to one repository, and folders with checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *, at: str = "runs", backend: bool = True, loggers: list[Logger] | None = None, **given: Any) -> Run:
        found = [*(loggers or []), *([ObjectStoreLogger(self.folder / "repo")] if backend else [])]
        return Run("net", loggers=found, dir=self.folder / at, **given)

    def file(self, text: str, name: str = "model.pt") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def files(self, **files: str) -> Path:
        """A new folder."""
        folder = self.folder / f"made-{len(list(self.folder.glob('made-*')))}"
        for name, text in files.items():
            self.file(text, f"{folder.name}/{name.replace('__', '/').replace('_', '.')}")
        return folder

    def versions(self) -> list[Version]:
        return mandapa.open(self.folder / "repo").artifact("net").versions()

    def found(self) -> list[dict[str, str]]:
        """The files of each version with a checkpoint."""
        return [contents(version) for version in self.versions() if "step" in version.metadata]


def contents(version: Version) -> dict[str, str]:
    return {path: version.open(path).read().decode() for path in version.assets if not path.startswith(".mandapa/")}


def below(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Every file in a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def bench(place: Path) -> Iterator[Bench]:
    yield Bench(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for run in list(_open_runs.values()):  # of a test that failed
            run.close(timeout=0)


PLACES = [
    (None, "file", {"checkpoint/model.pt": "1"}, {"model.pt": "1"}),
    ("deep/ep1.pt", "file", {"deep/ep1.pt": "1"}, {"ep1.pt": "1"}),
    (None, "folder", {"checkpoint/a.pt": "1", "checkpoint/b/c.pt": "2"}, {"a.pt": "1", "b/c.pt": "2"}),
    ("deep/ep1", "folder", {"deep/ep1/a.pt": "1", "deep/ep1/b/c.pt": "2"}, {"a.pt": "1", "b/c.pt": "2"}),
]

TAKES = ["copy", "move", "link"]


# Each place is taken in two ways.
@pytest.mark.parametrize(
    ("at", "kind", "expected", "names", "take"),
    [(*place, take) for n, place in enumerate(PLACES) for m, take in enumerate(TAKES) if (n + m) % 3 != 2],
)
def test_a_checkpoint_is_at_its_place(
    bench: Bench, at: str | None, kind: str, expected: dict[str, str], names: dict[str, str], take: Any
) -> None:
    """In the version, and found again in the run's directory and in the store, under the names below its place."""
    source = bench.file("1") if kind == "file" else bench.files(a_pt="1", b__c_pt="2")
    with bench.run() as run:
        run.log_bytes("notes", b"n")
        handle = run.log_checkpoint(source, step=7, epoch=2, metrics={"loss": 0.5}, at=at, take=take)
        assert handle.wait(30)
        local = run.latest_checkpoint()
    assert bench.found() == [{"notes": "n", **expected}]
    (version,) = [version for version in bench.versions() if "step" in version.metadata]
    assert (version.message, version.address) == ("step 7", handle.version)
    facts = {"step": 7, "epoch": 2, "loss": 0.5}
    assert version.metadata == (facts if at is None else {**facts, "checkpoint": at})
    with bench.run(at="elsewhere", resume="must") as run:
        stored = run.latest_checkpoint()
    for found in (local, stored):
        assert found is not None
        assert (found.step, found.epoch, found.metrics, found.place) == (7, 2, {"loss": 0.5}, at or "checkpoint")
        assert found.version == version.address
        assert below(found.download()) == below(found.download(bench.folder / f"d-{found is local}")) == names


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_moved_is_gone_and_what_is_copied_stays(bench: Bench, kind: str) -> None:
    """And what is copied may be written over at once."""
    with bench.run() as run:
        for step, take in enumerate(("copy", "move"), start=1):
            source = bench.file("1") if kind == "file" else bench.files(model_pt="1")
            model = source if kind == "file" else source / "model.pt"
            run.log_checkpoint(source, step=step, take=take)
            assert model.exists() == (take == "copy")
            model.write_text("something else")
    assert bench.found() == [{"checkpoint/model.pt": "1"}] * 2


def test_a_symlink_is_what_it_leads_to(bench: Bench) -> None:
    """Which stays where it is, whatever is done with the link."""
    target = bench.file("1", "target.pt")
    (bench.folder / "latest.pt").symlink_to(target)
    with bench.run() as run:
        run.log_checkpoint(bench.folder / "latest.pt", step=1, at="model.pt", take="move")
    assert target.read_text() == "1"
    assert bench.found() == [{"model.pt": "1"}]


def test_a_version_holds_one_checkpoint_wherever_it_is(bench: Bench) -> None:
    """The next one takes the former's place away, also that of one which the run saved itself, and after a resume."""
    saver = CheckpointSaver(format="safetensors")
    with bench.run(loggers=[saver]) as run:
        run.log_bytes("ck/notes", b"n")
        run.log_checkpoint(bench.file("1"), step=1, at="ck/ep1.pt")
        run.log_checkpoint(bench.files(a="2", b="2"), step=2, at="ck/ep2")
        run.save_checkpoint({"n": 3}, step=3)
        run.log_checkpoint(bench.file("4"), step=4, at="ck/ep4.pt")
    with bench.run(at="elsewhere") as run:
        run.log_checkpoint(bench.file("5"), step=5, at="ck/ep5.pt")
    found = [sorted(files) for files in bench.found()]
    notes = "ck/notes"
    assert found == [
        ["ck/ep1.pt", notes],
        ["ck/ep2/a", "ck/ep2/b", notes],
        ["checkpoint/state.safetensors", notes],
        ["ck/ep4.pt", notes],
        ["ck/ep5.pt", notes],
    ]


def test_the_newest_is_gone_on_from_whoever_wrote_it(bench: Bench) -> None:
    """By step; a run may save some and have others written."""
    with bench.run(backend=False, loggers=[CheckpointSaver(format="safetensors", keep_local=5)]) as run:
        run.save_checkpoint({"n": 3}, step=3)
        run.log_checkpoint(bench.file("2"), step=2)
        assert run.latest_checkpoint().load() == {"n": 3}
        run.log_checkpoint(bench.file("3"), step=3)
        assert below(run.latest_checkpoint().download()) == {"model.pt": "3"}
        run.save_checkpoint({"n": 4}, step=3)
        assert below(run.latest_checkpoint().download()).keys() == {"state.safetensors"}
        assert run.latest_checkpoint().load() == {"n": 4}


@pytest.mark.parametrize("backend", [False, True])
def test_load_reads_the_only_file(bench: Bench, backend: bool) -> None:
    """Whatever its name; of several it does not choose one."""
    path = bench.folder / "mine.bin"
    save_state({"n": 1}, str(path), "safetensors")
    other = "there" if backend else "runs"
    with bench.run(backend=backend) as run:
        run.log_checkpoint(path, step=1, at="deep/mine.bin")
    with bench.run(backend=backend, at=other) as run:
        assert run.latest_checkpoint().load() == {"n": 1}
        run.log_checkpoint(bench.files(a="1", b="2"), step=2)
        with pytest.raises(InvalidInputError, match=r"2 files.*download\(\)"):
            run.latest_checkpoint().load()
    if backend:
        with bench.run(at="elsewhere") as run, pytest.raises(InvalidInputError, match="has no file"):
            run.latest_checkpoint().load()


@pytest.mark.parametrize("keep", [1, 2])
def test_without_a_backend_the_newest_stay(bench: Bench, keep: int) -> None:
    with bench.run(backend=False, loggers=[CheckpointSaver(keep_local=keep)]) as run:
        for step in range(1, 5):
            source = bench.file(str(step)) if step % 2 else bench.files(a=str(step), b__c=str(step))
            assert run.log_checkpoint(source, step=step, at=f"deep/{step}").state == "local"
        kept = below(f"{run.dir}/checkpoints")
        assert len(os.listdir(f"{run.dir}/checkpoints")) == keep + 1  # and where the next is written
    assert set(kept.values()) == {str(step) for step in range(5 - keep, 5)}


def test_what_is_committed_goes_from_the_directory(bench: Bench) -> None:
    """But for the newest; one step twice is two checkpoints."""
    with bench.run() as run:
        for n in range(4):
            run.log_checkpoint(bench.file(str(n)), step=5, at="a.pt")
        assert run.flush(30)
    assert [files["a.pt"] for files in bench.found()] == ["0", "1", "2", "3"]
    assert list(below(bench.folder / "runs/net/checkpoints").values()) == ["3"]


def test_loggers_hand_over_before(bench: Bench) -> None:
    """What they have belongs to the version of the checkpoint."""

    class Late(Logger):
        def open(self, run: Any) -> None:
            self.run = run
            self.path = bench.file("", "log.txt")

        def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
            self.path.write_text(self.path.read_text() + f"{step};")

        def flush(self) -> None:
            self.run.log_asset(str(self.path))

    with bench.run(loggers=[Late()]) as run:
        for step in (1, 2):
            run.log_metrics({"loss": 1}, step=step)
            run.log_checkpoint(bench.file(str(step)), step=step)
    assert [files["log.txt"] for files in bench.found()] == ["1;", "1;2;"]


def test_the_alias_best_follows_its_metric(bench: Bench) -> None:
    with bench.run(loggers=[CheckpointSaver(best=("loss", "min"))]) as run:
        for step, loss in ((1, 3), (2, 1), (3, 2)):
            run.log_checkpoint(bench.file(str(step)), step=step, metrics={"loss": loss}, at="m.pt")
    best = mandapa.open(bench.folder / "repo")["net:best"]
    assert (best.metadata["step"], contents(best)["m.pt"]) == (2, "2")


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("take", ["copy", "move"])
def test_what_there_is_no_room_for_is_skipped_and_stays(bench: Bench, take: Any) -> None:
    """Counted with all that waits; nothing of it is left in the run's directory, and nothing was taken away."""
    source = bench.files(a="x" * 20_000, b="x" * 20_000)
    with bench.run(limits=Limits(staging_bytes=30_000)) as run:
        with pytest.warns(RuntimeWarning, match=r"there is no room for checkpoint \(40,000 bytes\)"):
            handle = run.log_checkpoint(source, step=1, take=take)
        assert (handle.state, handle.version) == ("skipped", None)
        assert run.latest_checkpoint() is None
        assert below(source).keys() == {"a", "b"}
        assert run.log_checkpoint(bench.file("small"), step=2).wait(30)
    with (
        bench.run(limits=Limits(staging_bytes=30_000), strict=True) as run,
        pytest.raises(StorageError, match="no room"),
    ):
        run.log_checkpoint(source, step=3)
    assert below(bench.folder / "runs/net/checkpoints").keys() == {"step-2.rank0/model.pt"}


def test_what_the_journal_has_no_room_for_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in no version then, so nothing is taken away, and nothing is kept."""
    source = bench.files(a="1", b="2")
    with bench.run() as run:
        with monkeypatch.context() as patch:

            def full(line: Any) -> None:
                raise StorageError("the journal cannot be written: the disk is full", retryable=True)

            patch.setattr(run._outbox._journal, "append", full)
            with pytest.warns(RuntimeWarning, match="the disk is full"):
                assert run.log_checkpoint(source, step=1, take="move").state == "skipped"
        assert below(source).keys() == {"a", "b"}
        assert not below(f"{run.dir}/checkpoints")
        run.log_checkpoint(source, step=1, take="move")
    assert not below(source)


def test_bytes_of_a_checkpoint_that_waits_count(bench: Bench) -> None:
    with bench.run(limits=Limits(staging_bytes=30_000), strict=True) as run:
        assert run.flush(30)
        handle = run.log_checkpoint(bench.file("x" * 20_000), step=1)
        if not handle.done():
            with pytest.raises(StorageError, match="no room"):
                run.log_bytes("a", b"x" * 20_000)
        assert handle.wait(30)
        run.log_bytes("a", b"x" * 20_000)


def test_a_call_that_is_killed_half_way_leaves_nothing(bench: Bench) -> None:
    """And has taken nothing away: the next start of the rank sweeps what it was about to own."""
    source = bench.files(a="1", b="2")
    program = """if True:
        import os, sys
        import mandapa.run.staging as staging
        from mandapa import Run
        real, seen = staging._take_file, []
        def dies(path, target, take):
            if seen: os._exit(9)
            seen.append(path)
            return real(path, target, take)
        staging._take_file = dies
        Run("net", dir=sys.argv[1]).log_checkpoint(sys.argv[2], step=1, take="move")
    """
    found = subprocess.run([sys.executable, "-c", program, bench.folder / "runs", source], check=False)
    assert found.returncode == 9
    assert below(source) == {"a": "1", "b": "2"}
    assert below(bench.folder / "runs/net/checkpoints")
    with bench.run(backend=False) as run:
        assert run.latest_checkpoint() is None
        assert not below(f"{run.dir}/checkpoints")


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"step": -1}, "step=-1"),
        ({"step": 1, "epoch": 1.5}, "epoch=1.5"),
        ({"step": 1, "metrics": {"loss": object()}}, "loss"),
        ({"step": 1, "metrics": {"checkpoint": 1}}, "checkpoint"),
        ({"step": 1, "metrics": {"a": "x" * 16000}, "at": "y" * 200 + "/" + "z" * 200}, "metadata"),
        ({"step": 1, "at": "../up"}, "up"),
        ({"step": 1, "at": "/abs"}, "abs"),
        ({"step": 1, "at": ""}, "empty|''"),
        ({"step": 1, "at": ".mandapa/x"}, "mandapa"),
        ({"step": 1, "at": "x" * 256}, "255"),
        ({"step": 1, "take": "grow"}, "take='grow'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(bench: Bench, given: dict[str, Any], match: str) -> None:
    """At once, by name, and nothing is taken."""
    source = bench.file("1")
    with bench.run(backend=False) as run:
        with pytest.raises(InvalidInputError, match=match):
            run.log_checkpoint(source, **given)
        assert run.latest_checkpoint() is None
    assert source.exists()


def test_what_is_not_there_is_told(bench: Bench) -> None:
    (bench.folder / "empty").mkdir()
    os.mkfifo(bench.folder / "pipe")
    with bench.run(backend=False) as run:
        with pytest.raises(NotFoundError, match="nowhere"):
            run.log_checkpoint(bench.folder / "nowhere", step=1)
        with pytest.raises(InvalidInputError, match="holds no files"):
            run.log_checkpoint(bench.folder / "empty", step=1)
        with pytest.raises(InvalidInputError, match="is not a file"):
            run.log_checkpoint(bench.folder / "pipe", step=1)
        run.log_checkpoint(bench.file("1"), step=1)


@pytest.mark.parametrize(
    ("told", "error"),
    [("../../up", "up"), ("/etc", "etc"), ("", "empty|''"), ("a\x00b", "checkpoint is"), ("not/there", "nothing at")],
)
def test_a_hostile_place_is_refused(bench: Bench, told: str, error: str) -> None:
    """Whoever may write to the bucket cannot lead a resume out of its folder; and what is not there is told."""
    repo = mandapa.open(bench.folder / "repo", create=True)
    facts = {"step": 1, "checkpoint": told}
    with Artifact(repo, "net", run="net").transaction("step 1", facts) as txn:
        txn.add_bytes("checkpoint/state.pt", b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if told == "not/there":
            with bench.run() as run, pytest.raises(CorruptionError, match=error):
                run.latest_checkpoint().download()
        else:
            with pytest.raises(CorruptionError, match=error):
                bench.run()
    assert not (bench.folder.parent / "up").exists()


def test_a_metric_of_that_name_from_before_is_none(bench: Bench) -> None:
    """Only a text can be a place."""
    repo = mandapa.open(bench.folder / "repo", create=True)
    with Artifact(repo, "net", run="net").transaction("step 1", {"step": 1, "checkpoint": 5}) as txn:
        txn.add_bytes("checkpoint/state.pt", b"x")
    with bench.run() as run:
        found = run.latest_checkpoint()
        assert found is not None
        assert (found.place, found.metrics) == ("checkpoint", {"checkpoint": 5})
        assert below(found.download()) == {"state.pt": "x"}


# -- ranks -------------------------------------------------------------------------------------------------------------


def start_ranks(monkeypatch: pytest.MonkeyPatch, bench: Bench, ranks: int = 2) -> list[Run]:
    """Several ranks in one process."""
    runs = []
    for rank in range(ranks):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks)):
            monkeypatch.setenv(name, str(value))
        runs.append(bench.run())
    return runs


def test_a_whole_one_waits_for_no_other_rank(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in a version in a moment, though the other rank has never saved."""
    first, second = start_ranks(monkeypatch, bench)
    assert first.log_checkpoint(bench.file("1"), step=1, at="a.pt", whole=True).wait(10)
    assert bench.found() == [{"a.pt": "1"}]
    assert second.latest_checkpoint().step == 1
    assert below(second.latest_checkpoint().download()) == {"a.pt": "1"}
    for run in (first, second):
        run.close()


def test_parts_of_all_ranks_are_one_checkpoint(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of equal files never meet on the disk; `load` gives each rank its own."""
    runs = start_ranks(monkeypatch, bench)
    paths = []
    for rank in range(2):
        paths.append(bench.folder / f"shard-{rank}" / f"__{rank}.bin")
        paths[-1].parent.mkdir()
        save_state({"rank": rank}, str(paths[-1]), "safetensors")
    handles = [run.log_checkpoint(path.parent, step=4, at="ep1") for run, path in zip(runs, paths, strict=True)]
    assert all(handle.wait(30) for handle in handles)
    (version,) = [version for version in bench.versions() if "step" in version.metadata]
    assert sorted(path for path in version.assets if path.startswith("ep1")) == ["ep1/__0.bin", "ep1/__1.bin"]
    for rank, run in enumerate(runs):
        found = run.latest_checkpoint()
        assert found.load() == {"rank": rank}
        assert sorted(os.listdir(found.download())) == ["__0.bin", "__1.bin"]
    with pytest.raises(InvalidInputError, match="whole=True"):
        runs[0].log_checkpoint(paths[0], step=5, at="one.pt")
    for run in runs:
        run.close()
