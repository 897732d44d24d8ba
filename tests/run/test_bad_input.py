"""What cannot be is told at once and by name, and what a store cannot do now never ends a training."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import mandapa
from mandapa import CheckpointSaver, Limits, Run
from mandapa.cli import main
from mandapa.errors import (
    AccessDeniedError,
    InvalidInputError,
    MandapaError,
    NotFoundError,
    StorageError,
    StoreNotFoundError,
)
from mandapa.loggers import FileLogger, Logger, ObjectStoreLogger
from mandapa.object_store import LocalObjectStore, MemoryObjectStore, S3ObjectStore
from mandapa.run import outbox
from mandapa.run import run as module
from mandapa.run.directory import RunDirectory
from mandapa.run.status import look
from mandapa.testing.server import Server, serve


def until(true: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What ``true`` gives as soon as it is true; polled, with a deadline."""
    give_up = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < give_up, "it did not become true in time"
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def run(shared_place: Path) -> Iterator[Run]:
    """An open run with a backend, for all calls that are refused: nothing is handed over by them."""
    repo = mandapa.open(shared_place / "repo", create=True)
    with repo.artifact("Taken").transaction() as txn:
        txn.add_bytes("a", b"a")
    repo.artifact("Taken").tag("released", "v0")
    with Run("shared", loggers=[ObjectStoreLogger(shared_place / "repo")], dir=shared_place / "runs") as run:
        yield run


def s3(server_url: str, bucket: str, **more: Any) -> ObjectStoreLogger:
    keys = {"access_key_id": "test", "secret_access_key": "test"}
    return ObjectStoreLogger(
        S3ObjectStore, {"bucket": bucket, "endpoint_url": server_url, "region": "x", **keys, **more}
    )


class Both(str):
    """A text that is more."""


# -- stores that refuse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bucket", "error", "says"),
    [
        ("missing-bucket", StoreNotFoundError, "missing-bucket"),
        ("forbidden-bucket", AccessDeniedError, "forbidden-bucket"),
    ],
)
def test_a_store_that_refuses_ends_the_run_before_training(
    server: Server, place: Path, bucket: str, error: type[StorageError], says: str
) -> None:
    """Within seconds, as the error that it is; nothing stays open, and nothing is said to wait."""
    started = time.monotonic()
    with pytest.raises(error, match=says):
        Run("net", {"lr": 1}, loggers=[s3(server.url, bucket)], dir=place)
    assert time.monotonic() - started < 10
    directory = RunDirectory(place / "net")
    assert not directory.rank_lock(0).held()
    assert not list((place / "net/.run/staged").iterdir())
    with Run("net", {"lr": 1}, loggers=[s3(server.url, "good")], dir=place) as run:
        assert run.log_bytes("a", b"a").wait()


def test_a_store_that_is_away_only_warns(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training begins, and what is handed over waits."""
    monkeypatch.setattr(module, "ACCESS_PATIENCE", 0.5)
    with pytest.warns(RuntimeWarning, match=rf"assets wait in {place}/net until the store answers"):
        run = Run("net", loggers=[s3("http://127.0.0.1:9", "bucket")], dir=place)
    handle = run.log_bytes("a", b"a")
    assert handle.state in ("held", "durable")
    assert not handle.wait(0.05)
    assert not run.flush(0.05)
    assert not run.status()["safe"]
    with pytest.warns(RuntimeWarning, match="ends before everything is committed"):
        assert not run.close(timeout=0.05)
    with pytest.raises(StorageError, match="assets wait in"):
        Run("net", loggers=[s3("http://127.0.0.1:9", "bucket")], dir=place, strict=True)
    assert not RunDirectory(place / "net").rank_lock(0).held()


def test_access_that_is_lost_later_only_warns(place: Path, door: Any) -> None:
    """Training goes on; when access comes back, everything is committed, version by version."""
    saver = CheckpointSaver(format="safetensors")
    with Run("net", loggers=[ObjectStoreLogger(door.store, door.kwargs), saver], dir=place) as run:
        assert run.log_bytes("a", b"a").wait()
        door.shut()
        handle = run.log_bytes("b", b"b")
        assert not handle.wait(0.3)
        until(lambda: [found.get("error") for found in run.status()["backends"].values()] != [None])
        with pytest.warns(
            RuntimeWarning, match=r"the door is shut: .* is refused \(training goes on, and what was handed"
        ):
            run._outbox.check_uploader()
        for step in (1, 2):
            run.log_metrics({"loss": 1}, step=step)
            run.save_checkpoint({"w": np.ones(2), "step": step}, step=step)
        (told,) = run.status()["backends"].values()
        assert (told["state"], told["error"]["type"], told["pending"] > 0) == ("refused", "AccessDeniedError", True)
        door.open()
        assert run.flush(30)
        assert handle.version is not None
    versions = mandapa.open(door.repo).artifact("net").versions()
    assert [version.metadata.get("step") for version in versions] == [None, None, 1, 2, None]
    assert set(versions[-1].assets) >= {"a", "b", "checkpoint/state.safetensors"}


def test_strict_runs_raise_when_access_is_lost(place: Path, door: Any) -> None:
    run = Run("net", loggers=[ObjectStoreLogger(door.store, door.kwargs)], dir=place, strict=True)
    door.shut()
    run.log_bytes("a", b"a")
    run._outbox.append(outbox.CommitEntry)
    until(lambda: [found.get("error") for found in run.status()["backends"].values()] != [None])
    with pytest.raises(StorageError, match="the door is shut"):
        run._outbox.check_uploader()
    with pytest.raises(StorageError, match=r"the door is shut|ends before everything is committed"):
        run.close(timeout=0.1)
    assert not RunDirectory(place / "net").rank_lock(0).held()


@pytest.mark.parametrize(
    ("store", "options", "says"),
    [
        ("ftp://host/runs", {}, "names no object store"),
        ("s3://", {}, "is not the name of a bucket"),
        ("s3://bucket/../runs", {}, "prefix"),
        (LocalObjectStore, {"path": "x", "nonsense": 1}, "does not take these object_store_kwargs.*nonsense"),
        (LocalObjectStore, {}, "does not take these object_store_kwargs.*path"),
    ],
    ids=["scheme", "no bucket", "prefix", "unknown option", "missing option"],
)
def test_a_store_that_can_never_be_is_told_before_training(place: Path, store: Any, options: Any, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        Run("net", loggers=[ObjectStoreLogger(store, options)], dir=place)
    assert not RunDirectory(place / "net").rank_lock(0).held()


def test_a_folder_with_other_things_is_no_repository(place: Path) -> None:
    (place / "full").mkdir()
    (place / "full/thesis.tex").write_text("mine")
    with pytest.raises(InvalidInputError, match="holds other things"):
        Run("net", loggers=[ObjectStoreLogger(place / "full")], dir=place / "runs")
    assert os.listdir(place / "full") == ["thesis.tex"]


# -- loggers -----------------------------------------------------------------------------------------------------------


def test_a_store_in_memory_is_refused() -> None:
    """It would end with the uploader, and with it all that was logged."""
    for store in ("memory://", "memory://runs", MemoryObjectStore):
        with pytest.raises(InvalidInputError, match="a store in memory ends with its process"):
            ObjectStoreLogger(store)


class Inner(LocalObjectStore):
    pass


def test_stores_that_the_uploader_could_not_make_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a script, a notebook or a function; what is no store; what is no class."""

    class Here(LocalObjectStore):
        pass

    main = type("Main", (LocalObjectStore,), {"__module__": "__main__"})
    for store in (Here, main):
        with pytest.raises(InvalidInputError, match="move it to a module"):
            ObjectStoreLogger(store)
    for store in (dict, Logger, int):
        with pytest.raises(InvalidInputError, match="is no object store"):
            ObjectStoreLogger(store)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="needs a URL, a folder or a class"):
        ObjectStoreLogger("")
    for store in (5, None, LocalObjectStore("/tmp")):
        with pytest.raises((TypeError, InvalidInputError)):
            ObjectStoreLogger(store)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [object(), b"bytes", (1, 2), {1, 2}, lambda: 0, Path("a"), math.nan, {1: 2}, 1j])
def test_options_that_are_no_plain_values_are_refused(place: Path, option: Any) -> None:
    """By name: they could not reach the uploader as they are. Nothing is made."""
    logger = ObjectStoreLogger(S3ObjectStore, {"bucket": "b", "client": option})
    with pytest.raises(InvalidInputError, match=r"object_store_kwargs\['client'\] is a "):
        Run("net", loggers=[logger], dir=place)
    assert list(place.iterdir()) == []


def test_two_backends_for_one_place_are_refused(place: Path) -> None:
    """However it is written; other artifacts or places are others."""
    pairs: list[list[Logger]] = [
        [ObjectStoreLogger(place / "repo"), ObjectStoreLogger(str(place / "repo"))],
        [ObjectStoreLogger(place / "repo"), ObjectStoreLogger(f"{place}/other/../repo")],
        [s3("http://a", "b", prefix="x"), s3("http://a", "b", prefix="x", access_key_id="other")],
    ]
    for loggers in pairs:
        with pytest.raises(InvalidInputError, match="two backend loggers log to the artifact 'net' at one place"):
            Run("net", loggers=loggers, dir=place)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("loggers", "says"),
    [
        ([FileLogger], r"FileLogger is no logger .*: write FileLogger\(\.\.\.\)"),
        (FileLogger, r"write FileLogger\(\.\.\.\)"),
        ([ObjectStoreLogger], r"write ObjectStoreLogger\(\.\.\.\)"),
        (["tensorboard"], "str is no logger"),
        ("tensorboard", "str is no logger"),
        ([None], "NoneType is no logger"),
        (None, "NoneType is no logger"),
        (5, "int is no logger"),
        ([[FileLogger()]], "list is no logger"),
        ([CheckpointSaver(), CheckpointSaver()], "a run has one CheckpointSaver"),
    ],
)
def test_what_is_no_logger_is_refused(place: Path, loggers: Any, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        Run("net", loggers=loggers, dir=place)
    assert list(place.iterdir()) == []


def test_one_logger_needs_no_list(place: Path) -> None:
    Run("net", loggers=FileLogger(capture_stdout=False, capture_stderr=False), dir=place).close()  # type: ignore[arg-type]
    Run("net", loggers=(one for one in [FileLogger(capture_stdout=False, capture_stderr=False)]), dir=place).close()
    assert (place / "net/logs-rank0.txt").exists()


@pytest.mark.parametrize(
    "artifact", ["", "a b", "{run}", "{}", "{run_name", "{run_name.x}", "{run_name[0]}", "../x", "-x"]
)
def test_names_of_artifacts_that_cannot_be(place: Path, artifact: str) -> None:
    with pytest.raises(InvalidInputError):
        Run("net", loggers=[ObjectStoreLogger(place / "repo", artifact=artifact)], dir=place / "runs")
    assert not (place / "runs").exists()


# -- names, places, arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", " ", "a/b", "../x", ".hidden", "-x", "ü", "n" * 129, "a\nb", None, 5, b"net"])
def test_names_of_runs_that_cannot_be(place: Path, name: Any) -> None:
    with pytest.raises(InvalidInputError, match="cannot name an artifact"):
        Run(name, dir=place)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("given", [{"resume": "yes"}, {"resume": None}, {"resume": True}])
def test_arguments_that_cannot_be(place: Path, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="resume="):
        Run("net", dir=place, **given)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "given",
    [
        {"staging_bytes": -1}, {"staging_bytes": "1 GB"}, {"commit_every": -0.1}, {"commit_every": math.nan},
        {"commit_every": None}, {"exit_seconds": "10"}, {"linger": True}, {"when_full": "drop"}, {"at_exit": None},
    ],
)  # fmt: skip
def test_limits_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        Limits(**given)


def test_limits_may_be_infinite(place: Path) -> None:
    limits = Limits(commit_every=math.inf, exit_seconds=math.inf, linger=math.inf)
    with Run("net", loggers=[ObjectStoreLogger(place / "repo")], dir=place, limits=limits) as run:
        assert run.log_bytes("a", b"a").wait(20)


def test_a_file_where_the_runs_should_be(place: Path) -> None:
    (place / "runs").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be made"):
        Run("net", dir=place / "runs")


class Secretive:
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("I will not say")


def loop() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["self"] = [found]
    return found


@pytest.mark.parametrize("hparams", [5, "lr=1", [1], loop(), {"a": {1: "x", "1": "y"}}, range(3), {"k" * 5000: 1}])
def test_hyperparameters_that_cannot_be_written(place: Path, hparams: Any) -> None:
    """Before anything is made; later, the run goes on with those it has."""
    with pytest.raises(InvalidInputError, match="hparams"):
        Run("net", hparams, dir=place)
    assert list(place.iterdir()) == []
    with Run("net", {"lr": 1}, dir=place) as run:
        with pytest.raises(InvalidInputError, match="hparams"):
            run.log_hparams(hparams)
        run.log_hparams({"more": 2})
    assert (place / "net/hparams.yaml").read_text().split() == ["lr:", "1", "more:", "2"]


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": "0.5"}, {"loss": b"1"}, {"loss": None}, {"loss": [1]}, {"loss": {}}, {"loss": object()}, {"loss": 1j},
        {"loss": np.ones(2)}, {"loss": np.array(["a"])}, {"loss": 10**400}, {1: 0.5}, {None: 1}, [("loss", 1)], 0.5,
        None, "loss",
    ],
)  # fmt: skip
def test_metrics_that_are_no_numbers(run: Run, metrics: Any) -> None:
    with pytest.raises(InvalidInputError, match="metrics"):
        run.log_metrics(metrics, step=1)


@pytest.mark.parametrize("step", [-1, 1.0, 1.5, "1", None, True, math.nan, 1 << 53, [1], np.float32(1), 10**30])
def test_steps_that_are_no_integers(run: Run, step: Any) -> None:
    for call in (
        lambda: run.log_metrics({"loss": 1}, step=step),
        lambda: run.save_checkpoint({}, step=step),
        lambda: run.maybe_checkpoint(dict, step=step),
        lambda: run.save_checkpoint({}, step=1, epoch=step if step is not None else -1),
    ):
        with pytest.raises(InvalidInputError, match=r"(step|epoch)=.*an integer, 0 or more"):
            call()


@pytest.mark.parametrize("metrics", [{1: 2}, {"a": object()}, {"a": {1}}, [1], 5, {"a": "x" * 20_000}, {"a": 1 << 70}])
def test_metrics_of_a_checkpoint_that_cannot_be_metadata(run: Run, metrics: Any) -> None:
    """Nothing is saved."""
    with pytest.raises(InvalidInputError, match="metadata"):
        run.save_checkpoint({"a": 1}, step=1, metrics=metrics)
    assert not os.path.exists(os.path.join(run.dir, "checkpoints/step-1"))


PATHS = [
    "", ".", "..", "../a", "a/../b", "/a", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb", "\u2028", "\ud800", "x" * 256,
    "/".join(["x" * 200] * 6), ".mandapa", ".mandapa/run.json", 5, b"a",
]  # fmt: skip


@pytest.mark.parametrize("at", PATHS, ids=range(len(PATHS)))
def test_places_that_no_version_can_hold(run: Run, tmp_path: Path, at: Any) -> None:
    """Refused by each call; nothing is handed over, and a file that was to be moved is where it was."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_bytes(b"x")
    before = run.status()["held"]
    for call in (
        lambda: run.log_asset(tmp_path / "file", at=at, take="move"),
        lambda: run.log_asset(tmp_path / "folder", at=at, take="move"),
        lambda: run.log_bytes(at, b"x"),
        lambda: run.log_url(at, "s3://a/b"),
    ):
        if at == "" and call.__code__.co_names[-1] == "log_asset":
            continue
        with pytest.raises(InvalidInputError):
            call()
    if at:
        assert (tmp_path / "folder/file").exists()
    assert (tmp_path / "file").exists()
    assert run.status()["held"] == before or at == ""


def test_files_that_cannot_be_logged(run: Run, tmp_path: Path) -> None:
    """None, a pipe, a name that no version can hold, an unknown way to take it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "back\\slash").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "with-pipe").mkdir()
    os.mkfifo(tmp_path / "with-pipe/pipe")
    before = run.status()["held"]
    for name in ("missing", "dangling", "file/below"):
        with pytest.raises(MandapaError):
            run.log_asset(tmp_path / name)
    for take in ("copy", "move", "link", "grow"):
        for name in ("pipe", "back\\slash", "with-pipe"):
            with pytest.raises(InvalidInputError):
                run.log_asset(tmp_path / name, take=take)
        with pytest.raises(InvalidInputError, match="is not a file"):
            run.log_asset("/dev/null", take=take)
    for take in ("", "steal", None, True):
        with pytest.raises(InvalidInputError, match="take="):
            run.log_asset(tmp_path / "file", take=take)
    assert run.status()["held"] == before
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "dangling", "back\\slash", "file", "with-pipe"}


@pytest.mark.parametrize("data", ["text", None, 5, [1], Path("a"), Both("x")])
def test_bytes_that_are_none(run: Run, data: Any) -> None:
    with pytest.raises(InvalidInputError, match="log_bytes takes bytes, not"):
        run.log_bytes("a", data)


@pytest.mark.parametrize(
    ("url", "given"),
    [
        ("", {}), ("train.parquet", {}), ("ftp://a/b", {}), ("s3://", {}), ("s3://a/b c", {}), (None, {}), (5, {}),
        ("https://user:hunter2@host/x", {}), ("https://host/x?X-Amz-Signature=abc", {}), ("s3://a/" + "b" * 5000, {}),
        ("s3://a/b", {"size": -1}), ("s3://a/b", {"size": "5"}), ("s3://a/b", {"size": 1.5}),
        ("s3://a/b", {"size": 1 << 60}), ("s3://a/b", {"size": True}), ("s3://a/b", {"checksum": "abc"}),
        ("s3://a/b", {"checksum": "etag:" + "x" * 300}),
        ("s3://a/b", {"checksum": 5}), ("s3://a/b", {"checksum": None}), ("s3://a/b", {"checksum": "etag:a\nb"}),
    ],
)  # fmt: skip
def test_urls_that_cannot_be(run: Run, url: Any, given: dict[str, Any]) -> None:
    """Here, and not in the uploader, where nobody could mend them; and no secret is repeated."""
    with pytest.raises(InvalidInputError) as found:
        run.log_url("data", url, **given)
    assert "hunter2" not in str(found.value)


@pytest.mark.parametrize(
    "given",
    [
        {"name": ""}, {"name": "a/b"}, {"name": "../a"}, {"name": 5}, {"aliases": ["latest"]}, {"aliases": ["v1"]},
        {"aliases": "a b"}, {"aliases": [5]}, {"aliases": [""]}, {"metadata": {"a": object()}}, {"metadata": [1]},
        {"metadata": {"a": "x" * 20_000}}, {"path": "missing"}, {"path": "back\\slash"}, {"path": "pipe"},
        {"take": "grow"}, {"take": "steal"},
    ],
)  # fmt: skip
def test_artifacts_that_cannot_be(run: Run, tmp_path: Path, given: dict[str, Any]) -> None:
    """Nothing is handed over, and what was to be moved is where it was."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "back\\slash"):
        (tmp_path / name).write_bytes(b"x")
    before = run.status()["held"]
    call = {"name": "other", "path": "file", "take": "move", **given}
    with pytest.raises((InvalidInputError, NotFoundError)):
        run.log_artifact(call.pop("name"), tmp_path / call.pop("path"), **call)
    assert run.status()["held"] == before
    assert (tmp_path / "file").exists()


def test_an_artifact_of_nothing_is_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    handle = run.log_artifact("nothing", tmp_path / "empty")
    assert handle.wait(20)
    assert handle.version is None


# -- full disks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 300 MB in memory, of which a run leaves 268 to others."""
    disk = place / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300m,mode=0700", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True, timeout=20)


def fill(disk: Path) -> None:
    """Leave not one block of it."""
    fd = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        for size in (1 << 20, 4096):
            with suppress(OSError):
                while True:
                    os.write(fd, bytes(size))
    finally:
        os.close(fd)


# The uploader's word of it may come when there is room again.
@pytest.mark.filterwarnings("ignore:.*cannot be written. No space left on device:RuntimeWarning")
@pytest.mark.parametrize("backend", [True, False], ids=["backend", "local"])
def test_a_full_disk_never_ends_a_training(small_disk: Path, place: Path, tmp_path: Path, backend: bool) -> None:
    """Each call warns, or has nothing to say; when there is room again, all goes on."""
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    loggers: list[Logger] = [
        CheckpointSaver(format="safetensors"),
        FileLogger(capture_stdout=False, capture_stderr=False),
    ]
    loggers += [ObjectStoreLogger(place / "repo")] * backend
    with Run("net", {"lr": 1}, loggers=loggers, dir=small_disk) as run:
        first = run.log_bytes("first", b"1")
        fill(small_disk)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for n in range(20):  # the journal's last block is soon full, too
                run.log_metrics({"loss": n}, step=n)
                run.log_hparams({"more": n})
                run.log_url("data", "s3://a/b")
                handles = [
                    run.log_asset(tmp_path / "file", take=take)  # type: ignore[arg-type]
                    for take in ("copy", "move", "link", "grow")
                ]
                handles += [run.log_bytes("b", b"x"), run.log_artifact("other", tmp_path / "file")]
                handles.append(run.save_checkpoint({"w": np.zeros(100_000)}, step=n))
                assert {handle.state for handle in handles} <= {"skipped", "local", "held", "durable", "committed"}
                assert handles[-1].state == "skipped"
                run.flush(0)
                first.wait(0)
                run.latest_checkpoint()
        messages = {str(one.message) for one in told}
        assert any("there is no room for state.safetensors" in message for message in messages)
        assert any("there is no room for hparams.yaml" in message for message in messages)
        assert len(messages) < 15, messages
        os.unlink(small_disk / "filler")
        (tmp_path / "fresh").write_bytes(b"y")  # what was said to grow may be read for a while
        assert run.log_asset(tmp_path / "fresh", at="file").wait(20)
        assert run.save_checkpoint({"w": np.zeros(10)}, step=30).wait(20)
        run.log_hparams({"more": "room"})
        assert b"more: room" in Path(run.dir, "hparams.yaml").read_bytes()
    if backend:
        version = mandapa.open(place / "repo")["net"]
        assert (version.open("first").read(), version.open("file").read()) == (b"1", b"y")
        assert "checkpoint/state.safetensors" in version.assets


def test_a_journal_that_cannot_be_written_never_ends_a_training(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is said to be held that is not; strict runs raise."""
    (tmp_path / "file").write_bytes(b"x")

    def refuse(*given: Any, **options: Any) -> None:
        raise StorageError("rank0.journal cannot be written: No space left on device", retryable=True)

    for strict in (False, True):
        saver = CheckpointSaver(format="safetensors")
        run = Run("net", loggers=[ObjectStoreLogger(place / "repo"), saver], dir=place, strict=strict)
        handle = run.log_bytes("before", b"x")
        calls = [
            lambda: run.log_asset(tmp_path / "file"),  # noqa: B023
            lambda: run.log_bytes("b", b"x"),  # noqa: B023
            lambda: run.log_url("c", "s3://a/b"),  # noqa: B023
            lambda: run.log_artifact("other", tmp_path / "file"),  # noqa: B023
            lambda: run.save_checkpoint({"n": 1}, step=1),  # noqa: B023
            lambda: run.flush(),  # noqa: B023
            lambda: handle.wait(0.1),  # noqa: B023
        ]
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            patch.setattr("mandapa.run.journal.Journal.append", refuse)
            for call in calls:
                if strict:
                    with pytest.raises(StorageError, match="No space left"):
                        call()
                else:
                    assert getattr(call(), "state", "skipped") == "skipped"
        assert (
            [str(one.message) for one in told] == []
            if strict
            else ["rank0.journal cannot be written: No space left on device"]
        )
        assert run.flush(20)
        run.close()
    assert "before" in mandapa.open(place / "repo")["net"].assets


# -- without a backend -------------------------------------------------------------------------------------------------


def test_what_belongs_to_the_run_is_not_written_over(place: Path) -> None:
    """Neither are files and folders that are in each other's way; the run goes on."""
    with Run("net", dir=place) as run:
        for at in (".run/format.json", ".run/rank0.journal", ".run"):
            with pytest.raises(InvalidInputError, match="is the run's own"):
                run.log_bytes(at, b"x")
        run.log_bytes("a", b"x")
        with pytest.raises(StorageError, match="cannot be written"):
            run.log_bytes("a/b", b"x")
        run.log_bytes("c/d", b"x")
        with pytest.raises(StorageError, match="cannot be written"):
            run.log_bytes("c", b"x")
        run.log_bytes("e", memoryview(b"abcdef")[::2])
    assert (place / "net/e").read_bytes() == b"ace"
    assert RunDirectory(place / "net").name == "net"


# -- what only the repository can refuse -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "aliases"), [("TAKEN", []), ("Taken", ["released"])], ids=["name in another case", "alias that is a tag"]
)
def test_an_artifact_that_is_refused_for_good_holds_up_nothing(
    place: Path, tmp_path: Path, name: str, aliases: list[str]
) -> None:
    """It is told, its bytes stay, and the run goes on; ``sync`` makes it when it can be made."""
    (tmp_path / "file").write_bytes(b"x")
    repo = mandapa.open(place / "repo", create=True)
    with repo.artifact("Taken").transaction() as txn:
        txn.add_bytes("a", b"a")
    repo.artifact("Taken").tag("released", "v0")
    run = Run("net", loggers=[ObjectStoreLogger(place / "repo")], dir=place / "runs")
    handle = run.log_artifact(name, tmp_path / "file", aliases=aliases)
    assert run.log_bytes("a", b"a").wait(30)
    with pytest.warns(RuntimeWarning) as told:
        run.close(timeout=3)
    assert any("Taken" in str(one.message) or "released" in str(one.message) for one in told)
    assert any("ends before everything is committed" in str(one.message) for one in told)
    assert not handle.done()
    directory = RunDirectory(place / "runs/net")
    give_up = time.monotonic() + 30
    while directory.uploader_lock().held():  # it does not linger for what it cannot do
        assert time.monotonic() < give_up
        time.sleep(0.02)
    assert not look(directory).safe
    repo.artifact("Taken").remove()
    result = CliRunner().invoke(main, ["sync", directory.path])
    assert result.exit_code == 0, result.output
    assert mandapa.open(place / "repo")[name].open("file").read() == b"x"


# -- clocks ------------------------------------------------------------------------------------------------------------


def test_nothing_depends_on_the_wall_clock(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It jumps by years, back and forth, while a run goes on and when it is resumed."""
    jumps = iter([0.0, 4e9, -1e9, 3e9, 86_400.0] * 100_000)
    lock = threading.Lock()
    real = time.time

    def jumping() -> float:
        with lock:
            return max(real() + next(jumps), 1.0)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(jumping(), tz or UTC)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(outbox, "datetime", Clock)
    saver = CheckpointSaver(format="safetensors", every=mandapa.Every(seconds=1e-9), keep_local=10)
    for attempt in (1, 2):
        log = FileLogger(capture_stdout=False, capture_stderr=False)
        with Run("net", loggers=[ObjectStoreLogger(place / "repo"), saver, log], dir=place) as run:
            found = run.latest_checkpoint()
            assert (found and found.step) == (None if attempt == 1 else 2)
            for n in range(3):
                step = 3 * (attempt - 1) + n
                run.log_bytes(f"{step}", b"x")
                run.log_metrics({"loss": 1}, step=step)
                assert run.maybe_checkpoint(lambda step=step: {"n": step}, step=step) is not None  # type: ignore[misc]
            assert run.flush(20)
    found = [version.metadata.get("step") for version in mandapa.open(place / "repo").artifact("net").versions()]
    steps = [step for step in found if step is not None]
    assert steps == [0, 1, 2, 3, 4, 5]


# -- other systems -----------------------------------------------------------------------------------------------------


def test_windows_is_told_that_it_is_not_supported() -> None:
    """By name, where the run is asked for, and not by a module that is missing there; reading works."""
    program = """
import sys
sys.platform = "win32"
sys.modules["fcntl"] = None
import mandapa
try:
    mandapa.Run
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "mandapa.Run is not supported on Windows: use Linux, macOS, or WSL\n"
