"""What a training program sees of a run, with a real uploader and a repository in a folder."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mandapa
from mandapa import CheckpointSaver, Every, Handle, Limits, Repository, Run, Version
from mandapa.errors import ClosedError, ConflictError, InvalidInputError, NotFoundError, StorageError
from mandapa.loggers import FileLogger, Logger, ObjectStoreLogger
from mandapa.run import run as module
from mandapa.run.backend import spec_from
from mandapa.run.checkpoints import load_state
from mandapa.run.directory import RunDirectory
from mandapa.run.hparams import from_yaml
from mandapa.run.process import _children
from mandapa.run.uploader import Uploader, saved_backends


def until(true: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What ``true`` gives as soon as it is true; polled, with a deadline."""
    give_up = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < give_up, "it did not become true in time"
        time.sleep(0.01)
    return found


class Lab:
    """A folder with runs, and a repository that they log to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"

    def logger(self, repo: str = "repo", **options: Any) -> ObjectStoreLogger:
        return ObjectStoreLogger(self.folder / repo, **options)

    def run(self, name: str = "net", hparams: Any = None, *, loggers: list[Logger] | None = None, **given: Any) -> Run:
        """A run that saves with numpy alone; ``loggers`` are besides the backend, unless there is one among them."""
        given.setdefault("dir", self.runs)
        loggers = list(loggers or [])
        if not any(isinstance(one, ObjectStoreLogger) for one in loggers):
            loggers.append(self.logger())
        if not any(isinstance(one, CheckpointSaver) for one in loggers):
            loggers.append(CheckpointSaver(format="safetensors"))
        return Run(name, hparams, loggers=loggers, **given)

    def local(self, name: str = "net", *loggers: Logger, **given: Any) -> Run:
        """A run without backend."""
        given.setdefault("dir", self.runs)
        return Run(name, loggers=[CheckpointSaver(format="safetensors"), *loggers][-2:], **given)

    def repo(self, name: str = "repo") -> Repository:
        return mandapa.open(self.folder / name)

    def versions(self, name: str = "net", repo: str = "repo") -> list[Version]:
        return self.repo(repo).artifact(name).versions()

    def __getitem__(self, address: str) -> Version:
        return self.repo()[address]


def read(version: Version, path: str) -> bytes:
    return version.open(path).read()


def contents(version: Version) -> dict[str, bytes]:
    """Its files, but for the facts about the run."""
    return {path: read(version, path) for path in version.assets if path != ".mandapa/run.json"}


def facts(version: Version) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read(version, ".mandapa/run.json"))
    return found


def state(n: float) -> dict[str, Any]:
    return {"w": np.full(4, n), "n": n}


def step_in(version: Version, folder: Path) -> Any:
    """The number inside the checkpoint of a version."""
    target = folder / f"look-{version.address.replace(':', '-')}"
    version.download(target)
    return load_state(str(target / "checkpoint/state.safetensors"))["n"]


class Recorder(Logger):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def open(self, run: Any) -> None:
        self.heard.append(("open", run.name, run.rank, run.world_size, run.attempt, run.dir))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.heard.append(("metrics", dict(metrics), step))

    def log_hparams(self, hparams: Mapping[str, Any]) -> None:
        self.heard.append(("hparams", json.loads(json.dumps(hparams))))

    def flush(self) -> None:
        self.heard.append(("flush",))

    def close(self) -> None:
        self.heard.append(("close",))

    def of(self, kind: str) -> list[Any]:
        return [told[1:] for told in self.heard if told[0] == kind]


@pytest.fixture
def lab(place: Path) -> Lab:
    return Lab(place)


@pytest.fixture(scope="module")
def shared(shared_place: Path) -> Lab:
    """One for many tests, each with names of its own."""
    return Lab(shared_place)


@pytest.fixture(scope="module")
def run(shared: Lab) -> Iterator[Run]:
    """An open run for all tests that need no more: each with paths of its own."""
    with shared.run("shared", {"lr": 0.1}, limits=Limits(commit_every=3600)) as run:
        yield run


# -- assets ------------------------------------------------------------------------------------------------------------


def test_a_file_becomes_an_asset(run: Run, shared: Lab, tmp_path: Path) -> None:
    """Under its own name, or where it is told; a handle says how far it is."""
    (tmp_path / "one.txt").write_bytes(b"one")
    handle = run.log_asset(tmp_path / "one.txt")
    (tmp_path / "one.txt").unlink()
    assert handle.state in ("held", "durable")
    assert not handle.done()
    assert handle.version is None
    assert until(lambda: handle.state == "durable")
    assert "durable" in repr(handle)
    other = run.log_bytes("deep/er/two.txt", b"two")
    assert other.wait()
    assert (other.state, other.done()) == ("committed", True)
    assert handle.done()
    assert handle.wait(0)
    assert handle.version is not None
    assert handle.version in repr(handle)
    version = shared[handle.version]
    assert read(version, "one.txt") == b"one"
    assert read(version, "deep/er/two.txt") == b"two"
    assert (version.run, version.message) == ("shared", "")


def test_a_relative_file_is_that_of_the_working_directory(
    run: Run, shared: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "relative.txt").write_bytes(b"here")
    monkeypatch.chdir(tmp_path)
    handles = [run.log_asset("relative.txt"), run.log_asset("./relative.txt", at="a/b")]
    assert all(handle.wait() for handle in handles)
    assert read(shared[str(handles[1].version)], "a/b") == b"here"


@pytest.mark.parametrize("take", ["copy", "move", "link", "grow"])
def test_each_way_to_take_a_file(run: Run, shared: Lab, tmp_path: Path, take: Any) -> None:
    path = tmp_path / f"take-{take}"
    path.write_bytes(b"first\n")
    handle = run.log_asset(path, take=take)
    assert path.exists() == (take != "move")
    if take == "grow":
        with path.open("ab") as file:
            file.write(b"later\n")
    assert handle.wait()
    assert read(shared[str(handle.version)], path.name) == b"first\n"


def test_a_folder_becomes_its_files(run: Run, shared: Lab, tmp_path: Path) -> None:
    """Under the root, or where it is told; the handle is that of all of them."""
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/folder-a.txt").write_bytes(b"a")
    (tmp_path / "in/sub/folder-b.txt").write_bytes(b"b")
    (tmp_path / "in/sub/run.sh").write_bytes(b"#!")
    (tmp_path / "in/sub/run.sh").chmod(0o755)
    (tmp_path / "in/one").symlink_to("folder-a.txt")
    for at, prefix in ((None, ""), ("put/there", "put/there/")):
        handle = run.log_asset(tmp_path / "in", at=at)
        assert handle.wait()
        version = shared[str(handle.version)]
        for path, data in {"folder-a.txt": b"a", "sub/folder-b.txt": b"b", "one": b"a", "sub/run.sh": b"#!"}.items():
            assert read(version, prefix + path) == data
        assert version.assets[f"{prefix}sub/run.sh"].executable
        assert not version.assets[f"{prefix}one"].executable
    (tmp_path / "empty").mkdir()
    handle = run.log_asset(tmp_path / "empty")
    assert handle.wait(0)


def test_bytes_of_any_kind(run: Run, shared: Lab) -> None:
    data = bytearray(b"abcdef")
    given = {"bytes/a": b"", "bytes/b": data, "bytes/c": memoryview(data)[1:3], "bytes/d": memoryview(data)[::2]}
    handles = [run.log_bytes(at, one) for at, one in given.items()]
    data[:] = b"------"
    assert handles[-1].wait()
    version = shared[str(handles[-1].version)]
    assert [read(version, at) for at in given] == [b"", b"abcdef", b"bc", b"ace"]


def test_a_url_is_recorded(run: Run, shared: Lab) -> None:
    """With what is known of it; nothing is read."""
    run.log_url("data/train", "s3://elsewhere/train.parquet", size=5, checksum="etag:abc")
    handle = run.log_url("data/test", "https://example.invalid/test")
    assert handle.wait()
    assets = shared[str(handle.version)].assets
    assert (assets["data/train"].url, assets["data/train"].size, assets["data/train"].checksum) == (
        "s3://elsewhere/train.parquet",
        5,
        "etag:abc",
    )
    assert assets["data/test"].url == "https://example.invalid/test"


def test_every_hand_over_is_in_a_version(run: Run, shared: Lab) -> None:
    """A path that was handed over three times is in three, in order."""
    handles = [run.log_bytes("thrice", b"%d" % n) for n in range(3)]
    assert handles[2].wait()
    versions = [shared[str(handle.version)] for handle in handles]
    assert [read(version, "thrice") for version in versions] == [b"0", b"1", b"2"]
    assert versions[0].number < versions[1].number < versions[2].number


def test_a_file_takes_the_place_of_a_folder_and_back(run: Run, shared: Lab) -> None:
    """What is new counts, in the order of the calls."""
    for at, data in (("way", b"file"), ("way/deep/a", b"in"), ("way/deep", b"between"), ("way", b"again")):
        handle = run.log_bytes(at, data)
        assert handle.wait()
        version = shared[str(handle.version)]
        assert {path: read(version, path) for path in version.assets if path.startswith("way")} == {at: data}


def test_a_folder_of_several_takes_the_place_of_a_file(run: Run, shared: Lab) -> None:
    assert run.log_bytes("spot", b"file").wait()
    for at in ("spot/a", "spot/deep/b", "spot/deep/c"):
        handle = run.log_bytes(at, at.encode())
    assert handle.wait()
    version = shared[str(handle.version)]
    found = {path: read(version, path) for path in version.assets if path.startswith("spot")}
    assert found == {at: at.encode() for at in ("spot/a", "spot/deep/b", "spot/deep/c")}


def test_threads_may_log_at_once(run: Run, shared: Lab) -> None:
    """Eight of them, fifty assets each, and metrics between: nothing is lost or mixed up."""
    handles: dict[str, Handle] = {}
    failed: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for n in range(50):
                at = f"threads/{thread}/{n}"
                handles[at] = run.log_bytes(at, f"{thread}-{n}".encode())
                run.log_metrics({"loss": n}, step=n)
                if n == 25:
                    assert handles[at].wait(60)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert run.flush()
    assert len(handles) == 400
    assert all(handle.done() for handle in handles.values())
    version = shared["shared"]
    assert all(read(version, at) == at.removeprefix("threads/").replace("/", "-").encode() for at in list(handles)[::7])
    assert sum(path.startswith("threads/") for path in version.assets) == 400


def test_status_says_how_far_it_is(run: Run) -> None:
    handle = run.log_bytes("status", b"x")
    found = run.status()
    assert (found["run"], found["attempt"], found["safe"]) == ("shared", 1, False)
    assert found["held"] >= found["durable"]
    assert found["held"] > found["committed"]
    assert handle.wait()
    found = run.status()
    assert found["safe"]
    assert found["committed"] == found["held"]
    until(lambda: [backend.get("committed") for backend in run.status()["backends"].values()] == [handle.version])
    until(lambda: [backend["pending"] for backend in run.status()["backends"].values()] == [0])
    (backend,) = run.status()["backends"].values()
    assert (backend["state"], backend["artifact"]) == ("ok", "shared")


# -- other artifacts ---------------------------------------------------------------------------------------------------


def test_a_file_and_a_folder_become_artifacts(run: Run, shared: Lab, tmp_path: Path) -> None:
    """Exactly what is there, committed at once, with aliases, metadata and the run's name."""
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "data/a").write_bytes(b"a")
    (tmp_path / "data/sub/b").write_bytes(b"b")
    handle = run.log_artifact(
        "dataset", tmp_path / "data", aliases=["prod", "good"], metadata={"rows": 2, "x": math.nan}
    )
    until(handle.done)
    version = shared[str(handle.version)]
    assert contents(version) == {"a": b"a", "sub/b": b"b"}
    assert (version.address, version.run) == ("dataset:v0", "shared")
    assert version.metadata == {"rows": 2, "x": "NaN"}
    assert shared["dataset:prod"] == shared["dataset:good"] == version
    (tmp_path / "data/a").unlink()
    handle = run.log_artifact("dataset", tmp_path / "data", aliases="prod")
    until(handle.done)
    assert contents(shared["dataset:prod"]) == {"sub/b": b"b"}
    assert contents(shared["dataset:good"]) == {"a": b"a", "sub/b": b"b"}
    (tmp_path / "tokens.json").write_bytes(b"{}")
    handle = run.log_artifact("tokenizer", tmp_path / "tokens.json", take="move")
    until(handle.done)
    assert contents(shared["tokenizer"]) == {"tokens.json": b"{}"}
    assert not (tmp_path / "tokens.json").exists()


def test_the_artifact_of_the_run_itself_is_refused(run: Run, tmp_path: Path) -> None:
    """Under any spelling that the repository takes for the same."""
    (tmp_path / "a").write_bytes(b"a")
    for name in ("shared", "SHARED"):
        with pytest.raises(InvalidInputError, match="is the artifact of the run itself"):
            run.log_artifact(name, tmp_path / "a")


def test_what_a_run_used_is_written_down(run: Run, shared: Lab, tmp_path: Path) -> None:
    """By number, in all later versions: the lineage."""
    repo = shared.repo()
    with repo.artifact("imagenet").transaction() as txn:
        for path in ("train/a.txt", "train/b.bin", "test/c.txt"):
            txn.add_bytes(path, path.encode())
        txn.alias("prod")
    before = run.log_bytes("used/before", b"")
    assert before.wait()
    folder = run.use("imagenet:prod")
    assert folder == os.path.join(run.dir, "inputs", "imagenet-prod")
    assert Path(folder, "train/a.txt").read_bytes() == b"train/a.txt"
    assert run.use("imagenet", tmp_path / "some", only="*.txt") == str(tmp_path / "some")
    assert sorted(str(p.relative_to(tmp_path / "some")) for p in (tmp_path / "some").rglob("*") if p.is_file()) == [
        "test/c.txt",
        "train/a.txt",
    ]
    assert run.use("imagenet:v0/train", tmp_path / "part", only=["*.bin", "none"]) == str(tmp_path / "part")
    assert [p.name for p in (tmp_path / "part").rglob("*") if p.is_file()] == ["b.bin"]
    after = run.log_bytes("used/after", b"")
    assert after.wait()
    assert "imagenet:v0" not in shared[str(before.version)].used
    assert shared[str(after.version)].used == ("imagenet:v0",)


def test_what_cannot_be_used_is_told(run: Run, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        run.use("no-such-thing")
    with pytest.raises(NotFoundError):
        run.use("shared:v9999")
    for address in ("", "a b", "../x", "x:", 5):
        with pytest.raises(InvalidInputError):
            run.use(address)  # type: ignore[arg-type]


# -- metrics and hyperparameters ---------------------------------------------------------------------------------------


def test_loggers_are_told(lab: Lab) -> None:
    """In order: opened, then everything, then closed; metrics as floats, hyperparameters without secrets."""
    recorder = Recorder()
    run = lab.local("net", recorder)
    run.log_hparams({"lr": 0.5, "api_key": "hunter2hunter2"})
    run.log_metrics({"a": 1, "b": np.float32(0.5), "c": math.nan, "d": math.inf, "e": True, "f": np.array(2)}, step=3)
    run.log_hparams({"lr": 0.25, "more": [1]})
    run.flush()
    run.save_checkpoint(state(1), step=4)
    assert run.close()
    assert recorder.heard[0] == ("open", "net", 0, 1, 1, run.dir)
    assert recorder.heard[-1] == ("close",)
    metrics, step = recorder.of("metrics")[0]
    assert step == 3
    assert {name: type(value) for name, value in metrics.items()} == dict.fromkeys("abcdef", float)
    assert math.isnan(metrics.pop("c"))
    assert metrics == {"a": 1, "b": 0.5, "d": math.inf, "e": 1, "f": 2}
    assert recorder.of("hparams") == [
        ({"lr": 0.5, "api_key": "[redacted]"},),
        ({"lr": 0.25, "api_key": "[redacted]", "more": [1]},),
    ]
    assert len(recorder.of("flush")) == 2
    text = Path(run.dir, "hparams.yaml").read_text()
    assert "lr: 0.25" in text
    assert "hunter2" not in text


def test_a_logger_that_fails_is_told_once_and_left_alone(lab: Lab) -> None:
    """The others go on, and so does training."""

    class Broken(Recorder):
        def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
            super().log_metrics(metrics, step)
            raise ValueError("the logger's own fault")

    broken, recorder = Broken(), Recorder()
    with Run("net", loggers=[broken, recorder], dir=lab.runs) as run:
        with pytest.warns(
            RuntimeWarning, match=r"Broken failed and is left alone from here on: .*the logger's own fault"
        ):
            run.log_metrics({"a": 1}, step=1)
        run.log_metrics({"a": 1}, step=2)
        run.flush()
    assert len(broken.of("metrics")) == 1
    assert broken.of("flush") == broken.of("close") == []
    assert len(recorder.of("metrics")) == 2
    assert recorder.heard[-1] == ("close",)
    run = Run("net", loggers=[broken], dir=lab.runs, strict=True)
    with pytest.raises(ValueError, match="the logger's own fault"):
        run.log_metrics({"a": 1}, step=1)
    run.close()


def test_hyperparameters_are_a_file_of_each_version(run: Run, shared: Lab) -> None:
    run.log_hparams({"added": {"later": True}})
    run.flush()
    assert read(shared["shared"], "hparams.yaml") == Path(run.dir, "hparams.yaml").read_bytes()
    assert b"lr: 0.1" in read(shared["shared"], "hparams.yaml")
    assert b"later: true" in read(shared["shared"], "hparams.yaml")


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shared: Lab) -> Lab:
    """The run ``trained``: four checkpoints, the third of which is the best, and a log; closed."""
    saver = CheckpointSaver(format="safetensors", best=("loss", "min"), keep_local=2)
    with shared.run(
        "trained", {"lr": 0.1, "deep": {"a": [1, 2]}}, loggers=[saver, FileLogger(capture_stderr=False)]
    ) as run:
        for step, loss in ((10, 0.5), (20, 0.25), (30, 0.125), (40, math.nan)):
            run.log_metrics({"loss": loss}, step=step)
            run.log_bytes(f"at-{step}", b"x")
            handle = run.save_checkpoint(state(step), step=step, epoch=step // 10, metrics={"loss": loss, "lr": 0.1})
            assert handle.wait()
    return shared


def test_a_version_has_its_own_checkpoint(trained: Lab, tmp_path: Path) -> None:
    """And everything else as it was then; older checkpoints are in older versions."""
    versions = [version for version in trained.versions("trained") if "step" in version.metadata]
    assert [version.metadata["step"] for version in versions] == [10, 20, 30, 40]
    for version in versions:
        step = version.metadata["step"]
        assert step_in(version, tmp_path) == step
        assert [path for path in version.assets if path.startswith("checkpoint")] == ["checkpoint/state.safetensors"]
        assert [path for path in version.assets if path.startswith("at-")] == [
            f"at-{n}" for n in range(10, step + 1, 10)
        ]
        log = read(version, "logs-rank0.txt").decode()
        assert f"step {step}" in log
        assert f"step {step + 10}" not in log
    last = trained["trained"]
    assert step_in(last, tmp_path) == 40
    assert last.number > versions[-1].number


def test_what_is_put_beside_a_checkpoint_is_in_its_version(lab: Lab) -> None:
    """And only there: the next checkpoint has the folder for itself. What is in its way is in the version before."""
    with lab.run() as run:
        run.log_bytes("checkpoint/tokenizer.json", b"{}")
        run.save_checkpoint(state(1), step=1)
        run.save_checkpoint(state(2), step=2)
        run.log_bytes("checkpoint", b"in the way")
        run.save_checkpoint(state(3), step=3)
        run.log_bytes("checkpoint/state.safetensors/deep", b"too")
    found = [[path for path in version.assets if path.startswith("checkpoint")] for version in lab.versions()]
    assert found == [
        ["checkpoint/state.safetensors", "checkpoint/tokenizer.json"],
        ["checkpoint/state.safetensors"],
        ["checkpoint"],
        ["checkpoint/state.safetensors"],
        ["checkpoint/state.safetensors/deep"],
    ]


def test_message_and_metadata_of_a_checkpoint(trained: Lab) -> None:
    found = [version for version in trained.versions("trained") if "step" in version.metadata]
    assert [version.message for version in found] == ["step 10", "step 20", "step 30", "step 40"]
    assert found[0].metadata == {"step": 10, "epoch": 1, "loss": 0.5, "lr": 0.1}
    assert found[3].metadata["loss"] == "NaN"
    assert {version.run for version in found} == {"trained"}


def test_the_alias_best_follows_the_metric(trained: Lab) -> None:
    """NaN is never best."""
    assert trained["trained:best"].metadata["step"] == 30
    moves = trained.repo().artifact("trained").moves("best")
    assert len(moves) == 3


def test_so_many_checkpoints_stay_in_the_directory(trained: Lab) -> None:
    """Those that every backend has go, but for the newest."""
    folder = trained.runs / "trained/checkpoints"
    until(lambda: sorted(path.name for path in folder.glob("step-*")) == ["step-30", "step-40"])
    until(lambda: not os.listdir(trained.runs / "trained/.run/staged"))


def test_facts_of_the_run_are_in_each_version(trained: Lab) -> None:
    """Who, where, when, with what; while it goes on it says so."""
    versions = trained.versions("trained")
    first, last = facts(versions[0]), facts(versions[-1])
    assert (first["run"], first["attempt"], first["status"], first["ended"]) == ("trained", 1, "running", None)
    assert (last["status"], last["attempt"], last["resumed_from"], last["inputs"]) == ("finished", 1, None, [])
    assert last["ended"] >= last["started"] == first["started"]
    assert last["packages"]["numpy"] == np.__version__
    assert last["packages"]["mandapa"] == mandapa.__version__
    assert last["pid"] == os.getpid()
    assert last["ranks"] == {"rank": 0, "world_size": 1, "local_world_size": 1}
    assert last["folder"] == os.getcwd()
    for name in ("who", "host", "command", "python", "platform"):
        assert last[name], name
    assert from_yaml(read(versions[-1], "hparams.yaml").decode()) == {"lr": 0.1, "deep": {"a": [1, 2]}}


def test_facts_name_the_commit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is not committed."""
    source = lab.folder / "source"
    source.mkdir()
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", str(source)]
    (source / "train.py").write_text("1")
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True, timeout=60, capture_output=True)
    (source / "train.py").write_text("2")
    monkeypatch.chdir(source)
    lab.run().close()
    found = facts(lab["net"])["git"]
    assert (len(found["commit"]), found["branch"], found["dirty"], found["changed"]) == (40, "main", True, ["train.py"])
    assert "train.py" not in lab["net"].assets


@pytest.mark.parametrize(("mode", "expected"), [("max", 3), ("min", 2)])
def test_best_is_kept_over_attempts(lab: Lab, mode: Any, expected: int) -> None:
    """What a former attempt made is a rival, too; no number is none."""
    for attempt, losses in enumerate([[math.inf, None, 0.25], [0.5, "0.1", -math.inf, 0.375]]):
        with lab.run(loggers=[CheckpointSaver(format="safetensors", best=("loss", mode))]) as run:
            for n, loss in enumerate(losses):
                metrics = {} if loss is None else {"loss": loss}
                run.save_checkpoint(state(n), step=n + 3 * attempt, metrics=metrics)
    assert lab["net:best"].metadata["step"] == expected


def test_a_checkpoint_is_due_every_so_often(lab: Lab) -> None:
    """The state is made only then."""
    made = []
    saver = CheckpointSaver(format="safetensors", every=Every(steps=10), keep_local=3)
    with Run("net", loggers=[saver], dir=lab.runs) as run:
        for step in range(35):
            handle = run.maybe_checkpoint(lambda step=step: made.append(step) or state(step), step=step)  # type: ignore[misc]
            assert (handle is not None) == (step in (10, 20, 30))
    assert made == [10, 20, 30]
    with Run("net", loggers=[saver], dir=lab.runs) as run:
        assert [run.maybe_checkpoint(lambda: state(0), step=step) is not None for step in (31, 39, 40)] == [
            False,
            False,
            True,
        ]
    with Run("net", loggers=[CheckpointSaver(format="safetensors")], dir=lab.runs) as run:
        assert run.maybe_checkpoint(lambda: state(0), step=41) is not None


# -- resume ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_in_its_directory(trained: Lab, lab: Lab) -> None:
    """From the newest checkpoint that is there, by step, though its store is not asked."""
    shutil.copytree(trained.runs / "trained", lab.runs / "trained")
    with lab.run("trained", loggers=[trained.logger(artifact="copied")]) as run:
        assert run.attempt == 2
        checkpoint = run.latest_checkpoint()
        assert checkpoint is not None
        assert (checkpoint.step, checkpoint.epoch, checkpoint.metrics["loss"]) == (40, 4, "NaN")
        assert checkpoint.load()["n"] == 40
        assert checkpoint.download() == os.path.join(run.dir, "checkpoints/step-40")
        assert os.listdir(checkpoint.download(lab.folder / "there")) == ["state.safetensors"]
        run.save_checkpoint(state(35), step=35)
        run.save_checkpoint(state(41), step=41)
        run.save_checkpoint(state(39), step=39)
        checkpoint = run.latest_checkpoint()
        assert checkpoint is not None
        assert checkpoint.step == 41
    assert facts(trained["copied"])["resumed_from"]["step"] == 40


def checkpoint_version(lab: Lab, step: int) -> str:
    return next(version.address for version in lab.versions("trained") if version.metadata.get("step") == step)


def test_a_run_goes_on_on_another_machine(trained: Lab, lab: Lab) -> None:
    """From what the store has; the folder and the attempts go on, and different hyperparameters are told."""
    before = trained["trained"]
    with pytest.warns(RuntimeWarning, match=r"hyperparameters differ .*: lr: 0\.1 -> 0\.2"):
        run = trained.run("trained", {"lr": 0.2, "deep": {"a": [1, 2]}}, dir=lab.runs)
    assert run.attempt == facts(before)["attempt"] + 1
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.epoch) == (40, 4)
    assert checkpoint.version == checkpoint_version(trained, 40)
    assert checkpoint.metrics == {"loss": "NaN", "lr": 0.1}
    assert checkpoint.load()["n"] == 40
    assert checkpoint.download() == checkpoint.download()
    assert os.listdir(checkpoint.download(lab.folder / "mine")) == ["state.safetensors"]
    handle = run.save_checkpoint(state(50), step=50)
    assert handle.wait()
    version = trained[str(handle.version)]
    assert "at-40" in version.assets
    assert facts(version)["resumed_from"] == {"step": 40, "version": checkpoint.version}
    newest = run.latest_checkpoint()
    assert newest is not None
    assert (newest.step, newest.version) == (50, handle.version)
    run.close()


def test_a_run_may_begin_afresh(trained: Lab, lab: Lab) -> None:
    """With an empty folder; the history goes on, and what was before is not gone on from later."""
    with trained.run("trained", {"other": 1}, dir=lab.runs, resume="never") as run:
        assert run.latest_checkpoint() is None
        assert run.log_bytes("fresh", b"x").wait()
        version = trained["trained"]
        assert set(version.assets) == {".mandapa/run.json", "fresh", "hparams.yaml"}
        assert facts(version)["resumed_from"] is None
        run.save_checkpoint(state(5), step=5)
    with trained.run("trained", dir=lab.runs) as run:
        checkpoint = run.latest_checkpoint()
        assert checkpoint is not None
        assert checkpoint.step == 5
    with trained.run("trained", dir=lab.folder / "third", resume="must") as run:
        checkpoint = run.latest_checkpoint()
        assert checkpoint is not None
        assert (checkpoint.step, checkpoint.load()["n"]) == (5, 5)
    assert "at-40" not in trained["trained"].assets


def test_a_checkpoint_may_have_to_be_there(lab: Lab) -> None:
    """The refusal leaves nothing open: the same call without it works."""
    for given in ({"loggers": [CheckpointSaver(format="safetensors")]}, {"loggers": [lab.logger()]}):
        with pytest.raises(NotFoundError, match="resume='must': the run 'net' has no checkpoint"):
            Run("net", dir=lab.runs, resume="must", **given)  # type: ignore[arg-type]
    with lab.local() as run:
        run.save_checkpoint(state(1), step=1)
    with lab.local(resume="must") as run:
        assert run.latest_checkpoint() is not None


def test_equal_hyperparameters_are_no_news(lab: Lab) -> None:
    """And different ones are none where nothing is gone on from."""
    Run("net", {"lr": 1}, dir=lab.runs).close()
    with Run("net", {"lr": 2}, loggers=[CheckpointSaver(format="safetensors")], dir=lab.runs) as run:
        run.save_checkpoint(state(1), step=1)
    Run("net", {"lr": 2}, dir=lab.runs).close()
    with pytest.warns(RuntimeWarning, match=r"lr: 2 -> 3"):
        Run("net", {"lr": 3}, dir=lab.runs).close()


# -- where it goes -----------------------------------------------------------------------------------------------------


def test_without_a_backend_nothing_leaves_the_directory(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process, no network, no status; files are where they are told, and checkpoints are resumed from."""
    (tmp_path / "a.txt").write_bytes(b"a")
    known = len(_children)
    monkeypatch.setattr(subprocess, "Popen", None)
    with lab.local("net", FileLogger(capture_stderr=False)) as run:
        run.log_hparams({"lr": 1})
        run.log_metrics({"loss": 1}, step=1)
        handles = [
            run.log_asset(tmp_path / "a.txt"),
            run.log_asset(tmp_path / "a.txt", take="move"),
            run.log_bytes("deep/b.txt", b"b"),
            run.log_url("c", "s3://a/b"),
            run.log_artifact("other", tmp_path / "a.txt"),
        ]
        assert {handle.state for handle in handles} == {"local"}
        assert all(handle.wait() and handle.done() and handle.version is None for handle in handles)
        assert run.flush()
        assert run.status()["backends"] == {}
        assert run.status()["safe"]
        with pytest.raises(InvalidInputError, match="give the run one"):
            run.use("imagenet:v0")
    assert len(_children) == known
    assert (tmp_path / "a.txt").exists()
    found = {str(path.relative_to(run.dir)) for path in Path(run.dir).rglob("*") if path.is_file()}
    assert {"hparams.yaml", "logs-rank0.txt", "deep/b.txt"} <= found
    assert not any(path.endswith((".run/status.json", ".run/uploader.log")) for path in found)
    assert os.listdir(Path(run.dir, ".run/staged")) == os.listdir(Path(run.dir, ".run/backends")) == []


@pytest.mark.parametrize("keep", [1, 2])
def test_without_a_backend_old_checkpoints_go(lab: Lab, keep: int) -> None:
    saver = CheckpointSaver(format="safetensors", keep_local=keep)
    for attempt in range(2):
        with Run("net", loggers=[saver], dir=lab.runs) as run:
            for step in range(1, 4):
                handle = run.save_checkpoint(state(step), step=10 * attempt + step)
                assert handle.state == "local"
    assert len(list((lab.runs / "net/checkpoints").glob("step-*"))) == keep
    with lab.local() as run:
        checkpoint = run.latest_checkpoint()
        assert checkpoint is not None
        assert (checkpoint.step, checkpoint.load()["n"], checkpoint.version) == (13, 3, "")


def test_several_backends_each_get_what_they_want(lab: Lab, tmp_path: Path) -> None:
    """An artifact of another name, a second repository, and a filter."""
    loggers: list[Logger] = [
        lab.logger("one", artifact="team-{run_name}"),
        lab.logger("two", should_log_asset=lambda path: not path.endswith(".big")),
        lab.logger("one", artifact="second"),
    ]
    (tmp_path / "data").write_bytes(b"data")
    with lab.run(loggers=loggers) as run:
        assert len(run.status()["backends"]) == 3
        handles = [
            run.log_bytes("a.big", b"big"),
            run.log_bytes("b", b"b"),
            run.log_artifact("data", tmp_path / "data"),
        ]
        run.save_checkpoint(state(1), step=1)
        assert run.flush()
        assert [handle.version for handle in handles[:2]] == ["team-net:v0"] * 2
        only = run.log_bytes("c.big", b"")
        assert only.wait()
    for repo, name, files in (
        ("one", "team-net", {"a.big", "b", "c.big"}),
        ("one", "second", {"a.big", "b", "c.big"}),
        ("two", "net", {"b"}),
    ):
        version = lab.versions(name, repo)[-1]
        assert set(version.assets) == files | {".mandapa/run.json", "checkpoint/state.safetensors"}
        assert {other.run for other in lab.versions(name, repo)} == {"net"}
    assert [contents(lab.versions("data", repo)[0]) for repo in ("one", "two")] == [{"data": b"data"}] * 2


def test_what_no_backend_wants_is_local(lab: Lab, tmp_path: Path) -> None:
    """Of a folder of which some is wanted, the handle is that of what is."""
    (tmp_path / "in").mkdir()
    for name in ("a.yes", "b.no"):
        (tmp_path / "in" / name).write_bytes(b"x")
    with lab.run(loggers=[lab.logger(should_log_asset=lambda path: path.endswith(".yes"))]) as run:
        assert run.log_bytes("c.no", b"").state == "local"
        assert run.log_url("d.no", "s3://a/b").state == "local"
        assert run.log_asset(tmp_path / "in/b.no").state == "local"
        with pytest.raises(NotFoundError):
            run.log_asset(tmp_path / "in/missing.no")
        handle = run.log_asset(tmp_path / "in")
        assert handle.state != "local"
        assert handle.wait()
        assert [path for path in lab["net"].assets if "run.json" not in path] == ["a.yes"]
        assert run.status()["safe"]


def test_what_waits_is_committed_after_a_while(lab: Lab) -> None:
    """Nobody asks."""
    with lab.run(limits=Limits(commit_every=0.3)) as run:
        handle = run.log_bytes("a", b"a")
        started = time.monotonic()
        until(handle.done)
        assert time.monotonic() - started > 0.1
    assert read(lab["net:v0"], "a") == b"a"


def test_versions_are_made_when_there_is_reason_to(lab: Lab) -> None:
    """A checkpoint, a flush, a wait, the end; not for each asset."""
    with lab.run() as run:
        for n in range(5):
            run.log_bytes(f"{n}", b"x")
        assert run.save_checkpoint(state(1), step=1).wait()
        run.log_bytes("5", b"x")
        run.log_bytes("6", b"x")
        assert run.flush()
        handle = run.log_bytes("7", b"x")
        run.log_bytes("8", b"x")
        assert handle.wait()
        assert run.flush()
        run.log_bytes("9", b"x")
        assert run.close()
        assert run.close()
    counts = [sum(path.isdigit() for path in version.assets) for version in lab.versions()]
    assert counts == [5, 7, 9, 10]


def test_nobody_elses_changes_are_mixed_in(lab: Lab) -> None:
    """A version that somebody made in between is in the history, is told, and is not in what the run makes next."""
    with lab.run() as run:
        assert run.log_bytes("a", b"a").wait()
        with lab.repo().artifact("net").transaction("by hand") as txn:
            txn.add_bytes("stranger", b"s")
            txn.add_bytes("a", b"changed")
        assert set(lab["net"].assets) == {".mandapa/run.json", "a", "stranger"}
        assert run.log_bytes("b", b"b").wait()
        until(lambda: "strangers" in next(iter(run.status()["backends"].values())))
        with pytest.warns(RuntimeWarning, match="v1 were made by somebody else; what they changed is not in this run"):
            run._outbox.check_uploader()
        assert contents(lab["net"]) == {"a": b"a", "b": b"b"}
        assert [version.run for version in lab.versions()] == ["net", "", "net"]
        with lab.repo().artifact("net").transaction() as txn:
            txn.remove("b")
    assert contents(lab["net"]) == {"a": b"a", "b": b"b"}


def test_a_version_that_was_deleted_is_no_base(lab: Lab) -> None:
    """The run goes on from what is left of it."""
    with lab.run() as run:
        assert run.log_bytes("a", b"a").wait()
        assert run.log_bytes("b", b"b").wait()
        lab.repo().artifact("net").delete("v1")
        assert run.log_bytes("c", b"c").wait()
        assert contents(lab["net"]) == {"a": b"a", "c": b"c"}


# -- limits ------------------------------------------------------------------------------------------------------------


def test_what_there_is_no_room_for_is_skipped_and_told(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 3000)
    with lab.run(limits=Limits(staging_bytes=5000)) as run:
        assert run.flush()
        run.log_bytes("a", b"x" * 3000)
        for call in (lambda: run.log_asset(tmp_path / "large"), lambda: run.log_artifact("other", tmp_path / "large")):
            with pytest.warns(RuntimeWarning, match=r"there is no room for (large|other) \(3,000 bytes\) in .*net"):
                handle = call()
            assert (handle.state, handle.done(), handle.wait(), handle.version) == ("skipped", False, False, None)
        assert run.log_bytes("b", b"x" * 1000).state == "held"
        assert run.flush()
        assert run.log_asset(tmp_path / "large").wait()
        assert run.status()["safe"]
    assert {path: len(data) for path, data in contents(lab["net"]).items()} == {"a": 3000, "b": 1000, "large": 3000}


def test_who_would_rather_wait_waits_for_room(lab: Lab) -> None:
    """And gets it, though nobody else asks for a commit."""
    with lab.run(limits=Limits(staging_bytes=5000, when_full="wait")) as run:
        assert run.flush()
        run.log_bytes("a", b"x" * 3000)
        with pytest.warns(RuntimeWarning, match="the run waits until there is some"):
            handle = run.log_bytes("b", b"x" * 3000)
        assert handle.wait()
        with pytest.warns(RuntimeWarning, match=r"there is no room for c \(6,000 bytes\)"):
            assert run.log_bytes("c", b"x" * 6000).state == "skipped"  # it would be waited for in vain
    assert len(contents(lab["net"])["b"]) == 3000


def test_strict_runs_raise(lab: Lab) -> None:
    with lab.run(limits=Limits(staging_bytes=5000), strict=True) as run:
        run.flush()
        run.log_bytes("a", b"x" * 3000)
        with pytest.raises(StorageError, match="there is no room for b"):
            run.log_bytes("b", b"x" * 3000)
        assert run.flush()


def test_the_end_need_not_wait(lab: Lab, door: Any) -> None:
    """The uploader goes on alone."""
    run = lab.run(loggers=[ObjectStoreLogger(door.store, door.kwargs)], limits=Limits(at_exit="skip", linger=60))
    assert run.log_bytes("a", b"a").wait()
    door.shut()
    handle = run.log_bytes("b", b"b")
    started = time.monotonic()
    with pytest.warns(RuntimeWarning, match="the run 'net' ends before everything is committed; the uploader goes on"):
        assert not run.close()
    assert time.monotonic() - started < 2
    assert not run.close(), "nothing has changed"
    door.open()
    until(handle.done)
    assert run.close()
    assert contents(lab.versions(repo="door-repo")[-1]) == {"a": b"a", "b": b"b"}


def test_a_directory_that_was_moved_can_be_synced(lab: Lab, door: Any) -> None:
    """To another disk, say, with all that waits in it."""
    log = FileLogger(capture_stderr=False)
    run = lab.run(loggers=[ObjectStoreLogger(door.store, door.kwargs), log], limits=Limits(exit_seconds=0))
    door.shut()
    run.log_bytes("a", b"a")
    run.log_metrics({"loss": 1}, step=1)
    run.save_checkpoint(state(1), step=1)
    with pytest.warns(RuntimeWarning, match="ends before everything is committed"):
        run.close()
    os.kill(run._outbox.uploader_status()["pid"], 9)
    until(lambda: not RunDirectory(run.dir).uploader_lock().held())
    moved = lab.folder / "elsewhere/moved"
    moved.parent.mkdir()
    shutil.move(run.dir, moved)
    door.open()
    directory = RunDirectory(moved)
    lock = directory.uploader_lock()
    assert lock.take()
    specs = {key: spec_from(value) for key, value in saved_backends(directory).items()}
    assert Uploader(directory, specs, once=True).run()
    lock.release()
    found = contents(lab.versions(repo="door-repo")[-1])
    assert found["a"] == b"a"
    assert b"loss: 1.0" in found["logs-rank0.txt"]
    assert "checkpoint/state.safetensors" in found


# -- one run -----------------------------------------------------------------------------------------------------------


def test_a_name_that_is_opened_twice_closes_the_first(lab: Lab) -> None:
    """A cell of a notebook that is run again."""
    first = lab.local()
    with pytest.warns(RuntimeWarning, match="the run 'net' was open in this process: it is closed first"):
        second = lab.local()
    with pytest.raises(ClosedError, match="the run 'net' is closed"):
        first.log_metrics({"a": 1}, step=1)
    second.log_metrics({"a": 1}, step=1)
    assert (first.attempt, second.attempt) == (1, 2)
    other = lab.local("other")
    elsewhere = lab.local(dir=lab.folder / "elsewhere")
    for run in (second, other, elsewhere):
        run.close()
    lab.local().close()


def test_two_programs_cannot_train_one_run(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the other one."""
    monkeypatch.setattr("mandapa.run.directory._PATIENCE", 0.05)
    program = "import sys; from mandapa import Run; run = Run('net', dir=sys.argv[1]); print('on', flush=True); "
    program += "sys.stdin.read()"
    command = [sys.executable, "-c", program, str(lab.runs)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "on\n"
        with pytest.raises(
            ConflictError, match=rf"'net' is being trained by another process \(pid, host: {other.pid} "
        ):
            lab.local()
        lab.local(dir=lab.folder / "elsewhere").close()
        other.communicate()
    lab.local().close()


def test_a_closed_run_is_closed(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    run = lab.local()
    handle = run.log_bytes("a", b"a")
    assert run.close()
    assert run.close()
    for call in (
        lambda: run.log_metrics({"a": 1}, step=1),
        lambda: run.log_hparams({}),
        lambda: run.log_asset(tmp_path / "a"),
        lambda: run.log_bytes("b", b""),
        lambda: run.log_url("c", "s3://a/b"),
        lambda: run.log_artifact("other", tmp_path / "a"),
        lambda: run.use("a:v1"),
        lambda: run.save_checkpoint({}, step=1),
        lambda: run.maybe_checkpoint(dict, step=1),
        run.latest_checkpoint,
        run.flush,
    ):
        with pytest.raises(ClosedError, match="the run 'net' is closed"):
            call()
    assert handle.state == "local"


def test_a_handle_outlives_its_run(run: Run, shared: Lab, lab: Lab) -> None:
    with lab.run() as other:
        handle = other.log_bytes("a", b"a")
    assert (handle.done(), handle.wait(), handle.state) == (True, True, "committed")
    assert handle.version is not None


def test_a_run_that_fails_says_so(lab: Lab) -> None:
    """What it had handed over is committed all the same."""

    def train() -> None:
        with lab.run() as run:
            run.log_bytes("a", b"a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    version = lab["net"]
    assert (facts(version)["status"], read(version, "a")) == ("failed", b"a")


def test_a_beginning_that_fails_leaves_nothing_open(lab: Lab) -> None:
    """The next one, in the same process, knows nothing of it."""

    class Refuses(Logger):
        def open(self, run: Any) -> None:
            raise InvalidInputError("not like this")

    for _ in range(2):
        with pytest.raises(InvalidInputError, match="not like this"):
            lab.local("net", Refuses())
    assert not RunDirectory(lab.runs / "net").rank_lock(0).held()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lab.local().close()
    assert not any(key[0] == str(lab.runs / "net") for key in module._open_runs)
