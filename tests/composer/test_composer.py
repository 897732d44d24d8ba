"""Composer trains, and what it uploads becomes versions; killed, it goes on as if it never had been."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import composer.utils
import pytest
import torch
from composer import Callback
from composer.callbacks import CheckpointSaver
from composer.loggers import FileLogger
from composer.loggers import WandBLogger as ComposersWandBLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mandapa import Repository, Version
from mandapa.errors import InvalidInputError
from mandapa.testing.server import Server, serve
from mandapa.trainers.composer import ObjectStoreLogger, WandBLogger

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from training import BATCHES, EPOCHS, store, trainer  # noqa: E402 - after the line above

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's, of which there are many; ours are asked for


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    """Composer leaves temporary folders to the garbage collector, which warns of them: here, where nobody minds."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


class Lab:
    """A server, a folder that everything is written to, and what came of it."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.repo = lambda: Repository(server.s3("lab"))

    def versions(self, name: str) -> list[Version]:
        return self.repo().artifact(name).versions()

    def last(self, name: str) -> Version:
        return self.versions(name)[-1]

    def checkpoints(self, name: str) -> list[Version]:
        return [version for version in self.versions(name) if "step" in version.metadata]

    def go(self, name: str) -> Path:
        """Work in another folder, as on another machine."""
        target = self.folder / name
        target.mkdir(exist_ok=True)
        os.chdir(target)
        return target

    def start(self, *arguments: Any, ranks: int = 0) -> subprocess.Popen[str]:
        launcher = ["-m", "composer.cli.launcher", "-n", str(ranks)] if ranks else []
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, HERE / "training.py", *arguments]
        return subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def finish(self, process: subprocess.Popen[str], code: int) -> str:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == code, out[-3000:]
        return out


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    before = os.getcwd()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="mandapa-composer-"))
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in (("LAB_URL", server.url), ("LAB_BUCKET", "lab"), ("MANDAPA_CACHE", str(folder / "cache"))):
            patch.setenv(name, value)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        try:
            yield Lab(folder, server)
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def others(lab: Lab) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Trainings in processes of their own, which go on while others are looked at: they import for seconds."""
    lab.go("machine-1")
    started = {"killed": lab.start("killed", 2), "pair": lab.start("pair", 0, ranks=2)}
    yield started
    for process in started.values():  # a worker may have no test that waits for it
        assert process.stdout is not None
        if not process.stdout.closed:
            process.communicate(timeout=120)


@pytest.fixture(scope="module")
def trained(lab: Lab, others: dict[str, Any]) -> Any:
    """The run ``whole``, which nobody has disturbed; its weights and its folder."""
    folder = lab.go("whole")
    made = trainer("whole")
    made.logger.upload_file("{run_name}/hparams.yaml", str(HERE / "training.py"))
    made.logger.log_hyperparameters({"later": object()})
    made.fit()
    made.close()
    return SimpleNamespace(
        weights={name: one.clone() for name, one in made.state.model.state_dict().items()}, folder=folder
    )


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until it is true."""
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "it did not become true in time"
        time.sleep(0.05)


def event_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*tfevents*")}


def name_of(epoch: int) -> str:
    return f"checkpoints/ep{epoch}-ba{epoch * BATCHES}-rank0.pt"


# -- versions ----------------------------------------------------------------------------------------------------------


def test_each_checkpoint_is_a_version(lab: Lab, trained: Any) -> None:
    """With its metrics, under Composer's name for it; the older ones are in older versions."""
    versions = lab.checkpoints("whole")
    assert [version.metadata["step"] for version in versions] == [BATCHES * n for n in range(1, EPOCHS + 1)]
    for epoch, version in enumerate(versions, start=1):
        assert version.metadata["epoch"] == epoch
        assert version.metadata["checkpoint"] == name_of(epoch)
        assert [path for path in version.assets if path.endswith(".pt")] == [name_of(epoch)]
        assert {"loss/train/total", "metrics/eval/MulticlassAccuracy"} <= version.metadata.keys()
        local = trained.folder / "whole" / name_of(epoch)
        assert version.open(name_of(epoch)).read() == local.read_bytes()
    last = lab.last("whole")
    assert last.message == "finished"
    assert name_of(EPOCHS) in last.assets
    assert len(lab.versions("whole")) <= EPOCHS + 3
    assert not [path for path in last.assets if path.endswith(".symlink") or "latest" in path]


def test_every_event_file_is_there_and_is_read(lab: Lab, trained: Any, tmp_path: Path) -> None:
    """Also those for which Composer has one name, and those that it does not upload at all."""
    local = event_files(trained.folder / "tensorboard_logs")
    last = lab.last("whole")
    found = {
        path.removeprefix("tensorboard_logs/"): last.open(path).read() for path in last.assets if "tfevents" in path
    }
    assert found == local
    assert len(local) > EPOCHS * 2
    assert any(path.startswith("whole/whole/") for path in local)  # of add_hparams
    last.download(tmp_path, only="tensorboard_logs/*")
    steps: set[int] = set()
    for path in (tmp_path / "tensorboard_logs/whole").glob("*tfevents*"):
        read = EventAccumulator(str(path)).Reload()
        if "loss/train/total" in read.Tags()["scalars"]:
            steps |= {event.step for event in read.Scalars("loss/train/total")}
    assert steps == set(range(EPOCHS * BATCHES))


def test_the_log_is_there(lab: Lab, trained: Any) -> None:
    """As it is at the end, also what is written when Composer closes."""
    assert lab.last("whole").open("logs-rank0.txt").read() == (trained.folder / "whole/logs-rank0.txt").read_bytes()


def test_hyperparameters_of_the_user_stay(lab: Lab, trained: Any) -> None:
    assert lab.last("whole").open("hparams.yaml").read() == (HERE / "training.py").read_bytes()


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_killed_training_goes_on_on_another_machine(lab: Lab, trained: Any, others: dict[str, Any]) -> None:
    """From what the store has, to the very weights of one that nobody has killed; the folder is its own."""
    out = lab.finish(others["killed"], 9)
    assert "begins at 0" in out
    lab.go("machine-1")
    synced = subprocess.run([sys.executable, "-m", "mandapa.cli", "sync"], capture_output=True, text=True, check=False)
    assert synced.returncode == 0, synced.stdout + synced.stderr
    assert lab.checkpoints("killed")[-1].metadata["epoch"] == 1
    folder = lab.go("machine-2")
    made = trainer("killed", autoresume=True)
    assert int(made.state.timestamp.batch) == BATCHES
    made.fit()
    made.close()
    weights = made.state.model.state_dict()
    assert weights.keys() == trained.weights.keys()
    assert all(torch.equal(weights[name], trained.weights[name]) for name in weights)
    assert [version.metadata["epoch"] for version in lab.checkpoints("killed")] == [1, 2, 3]
    last = lab.last("killed")
    files = [path for path in last.assets if "tfevents" in path]
    assert len(files) > len(event_files(folder))  # and those of the first machine
    assert "notes-rank0.txt" in last.assets
    assert [path for path in last.assets if path.endswith(".pt")] == [name_of(3)]


def test_two_ranks_make_one_history(lab: Lab, others: dict[str, Any]) -> None:
    """By Composer's launcher, closed by Composer at exit: whole checkpoints, and the files of both."""
    lab.finish(others["pair"], 0)
    assert [version.metadata["epoch"] for version in lab.checkpoints("pair")] == [1, 2, 3]
    last = lab.last("pair")
    assert last.message == "finished"
    assert {"logs-rank0.txt", "logs-rank1.txt", "notes-rank0.txt", "notes-rank1.txt", "same.txt"} <= last.assets.keys()
    for rank in (0, 1):
        local = lab.folder / f"machine-1/pair/logs-rank{rank}.txt"
        assert last.open(f"logs-rank{rank}.txt").read() == local.read_bytes()


@pytest.mark.parametrize(
    ("path", "batch"),
    [
        ("whole/checkpoints/ep1-ba4-rank0.pt", 4),  # in an older version, by its name
        ("/whole:v0~0/checkpoints/ep1-ba4-rank0.pt", 4),
        ("whole/checkpoints/latest-rank0.pt", 12),
        ("/whole:latest~1/checkpoints/latest-rank0.pt", 12),
    ],
)
@pytest.mark.parametrize("among", [False, True])
def test_a_checkpoint_is_loaded_by_name_and_by_address(
    lab: Lab, trained: Any, path: str, batch: int, among: bool, request: pytest.FixtureRequest
) -> None:
    """By a logger that is not among those of the Trainer, and by one that is, of a run of another name."""
    lab.go("loads")
    if "v0" in path:
        path = path.replace("v0~0", f"v{lab.checkpoints('whole')[0].number}")
    logger = store()
    made = trainer(
        f"load-{batch}-{abs(hash(path))}",
        loggers=[logger] if among else [],
        save_folder=None,
        load_path=path,
        load_object_store=logger,
    )
    assert int(made.state.timestamp.batch) == batch
    if batch == EPOCHS * BATCHES:
        weights = made.state.model.state_dict()
        assert all(torch.equal(weights[name], trained.weights[name]) for name in weights)
    made.close()


def test_what_is_not_there_is_not_found(lab: Lab, trained: Any, tmp_path: Path) -> None:
    """And is never answered by the newest checkpoint, for which Composer would ask then."""
    lab.go("loads")
    for name in (
        "whole/nope.pt",
        "whole/checkpoints/nope.pt.symlink",
        "whole/weights/latest-rank0.pt.symlink",
        "whole/nope.pt.symlink",
        "nobody/checkpoints/latest-rank0.pt.symlink",
        "a b/c",
        "whole/checkpoints",
    ):
        with pytest.raises(FileNotFoundError):
            store().download_file(name, str(tmp_path / "x"))
    with pytest.raises(FileNotFoundError, match="begins with a slash"):  # what is left when Composer took "whole:" away
        store().download_file("v0/x", str(tmp_path / "x"))
    with pytest.raises(InvalidInputError, match="names no version"):
        store().download_file("whole:/x", str(tmp_path / "x"))
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        store().download_file(f"whole/{name_of(1)}", str(tmp_path / "x"))
    assert (tmp_path / "x").read_text() == "mine"
    store().download_file(f"whole/{name_of(1)}", str(tmp_path / "x"), overwrite=True)
    assert (tmp_path / "x").read_bytes() == lab.checkpoints("whole")[0].open(name_of(1)).read()
    assert os.listdir(tmp_path) == ["x"]


def test_autoresume_asks_three_times(lab: Lab, trained: Any, tmp_path: Path) -> None:
    """For the newest checkpoint, which is no file; for what that name leads to; and for that."""
    lab.go("asks")
    logger = store()
    made = trainer("whole", loggers=[logger])
    latest = "whole/checkpoints/latest-rank0.pt"
    with pytest.raises(FileNotFoundError):
        logger.download_file(latest, str(tmp_path / "a"))
    logger.download_file(f"{latest}.symlink", str(tmp_path / "b"))
    target = (tmp_path / "b").read_text()
    assert target == f"whole/{name_of(EPOCHS)}"
    logger.download_file(target, str(tmp_path / "c"))
    assert (tmp_path / "c").read_bytes() == (trained.folder / target).read_bytes()
    logger.download_file(f"whole/{name_of(1)}", str(tmp_path / "d"))
    assert (tmp_path / "d").read_bytes() == (trained.folder / f"whole/{name_of(1)}").read_bytes()
    with pytest.raises(FileNotFoundError):
        logger.download_file("whole/checkpoints/other.pt.symlink", str(tmp_path / "e"))
    made.close()


# -- ends --------------------------------------------------------------------------------------------------------------


class Fails(Callback):
    def batch_end(self, state: Any, logger: Any) -> None:
        raise ArithmeticError("diverged")


def test_a_failed_training_is_no_finished_one(lab: Lab) -> None:
    """Also when the exception was taken care of before Composer closes, or comes after training."""
    lab.go("failed")
    with (
        pytest.raises(ArithmeticError),
        contextlib.closing(made := trainer("during", loggers=[store()], callbacks=[Fails()])),
    ):
        made.fit()
    made = trainer("before", loggers=[store()], callbacks=[Fails()])
    with pytest.raises(ArithmeticError):
        made.fit()
    made.close()
    made = trainer("after", loggers=[store()], max_duration="1ep")
    made.fit()
    with pytest.raises(ArithmeticError), contextlib.closing(made):
        raise ArithmeticError
    assert [lab.last(name).message for name in ("during", "before", "after")] == ["failed"] * 3


def test_a_training_without_checkpoints(lab: Lab) -> None:
    """Has its other files all the same."""
    lab.go("none")
    made = trainer("none", save_folder=None, max_duration="1ep")
    made.fit()
    made.close()
    assert lab.checkpoints("none") == []
    assert {"hparams.yaml", "logs-rank0.txt"} <= lab.last("none").assets.keys()


def test_several_loggers_share_one_run(lab: Lab, tmp_path: Path) -> None:
    """Each with its own artifact; each file is handed over once."""
    lab.go("several")
    only = lambda path: path.endswith(".pt")  # noqa: E731
    made = trainer(
        "several",
        loggers=[store(artifact="{run_name}-a"), store(artifact="{run_name}-b", should_log_asset=only)],
        max_duration="1ep",
    )
    made.logger.upload_file("{run_name}/notes.txt", str(HERE / "training.py"))
    made.fit()
    made.close()
    assert "notes.txt" in lab.last("several-a").assets
    assert "notes.txt" not in lab.last("several-b").assets
    for name in ("several-a", "several-b"):
        assert [version.metadata["epoch"] for version in lab.checkpoints(name)] == [1]
    with pytest.raises(InvalidInputError, match="one dir="):
        trainer("twice", loggers=[store(artifact="a"), store(artifact="b", dir="elsewhere")])


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """W&B without its server, and how often a run of it was begun."""
    module = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(module.Run, "get_url", lambda run: run.url, raising=False)  # of the W&B that Composer is for
    began: list[Any] = []
    init = module.init
    monkeypatch.setattr(module, "init", lambda *a, **given: (began.append(given), init(*a, **given))[1])
    return SimpleNamespace(module=module, began=began)


def test_the_run_of_composers_own_wandb_logger_is_joined(lab: Lab, wandb: Any) -> None:
    """Though it begins after ours, which would have begun one of its own."""
    folder = lab.go("joined")
    theirs = ComposersWandBLogger(project="vision", init_kwargs={"dir": str(folder), "id": "theirs"})
    ours = WandBLogger("vision", log_artifacts=False)
    made = trainer("joined", loggers=[ours, store(), theirs], max_duration="1ep", save_folder=None)
    made.fit()
    assert wandb.module.run.config["num_nodes"] == 1
    assert [given["id"] for given in wandb.began] == ["theirs"]
    made.close()
    assert len(wandb.began) == 1


def test_with_wandb_alone_the_newest_checkpoint_is_here(lab: Lab, wandb: Any, tmp_path: Path) -> None:
    """From the run's directory it can be fetched; older ones, and those of other runs, cannot."""
    folder = lab.go("alone")
    logger = WandBLogger("vision")
    made = trainer("alone", loggers=[logger], max_duration="2ep")
    made.fit()
    logger.download_file(f"alone/{name_of(2)}", str(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == (folder / "alone" / name_of(2)).read_bytes()
    for name in (f"alone/{name_of(1)}", "other/x", "other:v1/x"):
        with pytest.raises(FileNotFoundError):
            logger.download_file(name, str(tmp_path / "y"))
    made.close()
    with pytest.raises(FileNotFoundError):
        logger.download_file(f"alone/{name_of(2)}", str(tmp_path / "y"))
    assert len(wandb.began) == 1


# -- without training --------------------------------------------------------------------------------------------------


def begin(logger: ObjectStoreLogger, name: str, *others: Any, callbacks: Any = (), **state: Any) -> Any:
    made = SimpleNamespace(run_name=name, callbacks=list(callbacks), fsdp_sharded_state_dict_enabled=False, **state)
    logger.init(made, SimpleNamespace(destinations=[logger, *others]))
    return made


def test_a_log_that_composer_empties_is_not_lost(lab: Lab, tmp_path: Path) -> None:
    """What was handed over is ours, though Composer's next start truncates the very file before it is committed."""
    folder = lab.go("emptied")
    logger = store(dir=tmp_path)
    file_logger = FileLogger(filename="{run_name}/log.txt", capture_stdout=False, capture_stderr=False)
    file_logger._run_name = "emptied"
    state = begin(logger, "emptied", file_logger)
    path = folder / "log.txt"
    path.write_text("a long first line\n")
    logger.upload_file(state, "emptied/log.txt", path, overwrite=True)
    with path.open("a") as file:
        file.write("second\n")
    logger.upload_file(state, "emptied/log.txt", path, overwrite=True)
    path.write_text("new\n")  # the same file, as open(..., "w+") makes it
    logger.close(state, None)
    logger.post_close()
    assert lab.last("emptied").open("log.txt").read() == b"a long first line\nsecond\n"


def test_what_cannot_be_taken_is_told_and_training_goes_on(lab: Lab, tmp_path: Path) -> None:
    lab.go("told")
    logger = store(dir=tmp_path)
    state = begin(logger, "told")
    with pytest.warns(RuntimeWarning, match="told/a is not logged: there is no file"):
        logger.upload_file(state, "told/a", tmp_path / "nowhere", overwrite=False)
    logger.close(state, None)
    logger.post_close()


def test_a_remote_save_folder_is_told(lab: Lab, tmp_path: Path) -> None:
    saver = CheckpointSaver("somewhere")
    saver.remote_uploader = object()
    with pytest.warns(RuntimeWarning, match="local save_folder"):
        begin(store(dir=tmp_path), "remote", callbacks=[saver])


def test_shards_are_one_checkpoint(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's files, in the folder that Composer names: a version when all are there."""
    lab.go("shards")
    timestamps = composer.core.Timestamp(epoch=1, batch=2)
    saver = CheckpointSaver("{run_name}/checkpoints")
    config = SimpleNamespace(sharded_ckpt_prefix_dir="ep{epoch}-ba{batch}")
    loggers = []
    for rank in range(2):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        logger = store(dir=tmp_path)
        state = begin(logger, "shards", callbacks=[saver], timestamp=timestamps, fsdp_config=config)
        state.fsdp_sharded_state_dict_enabled = True
        for name in [f"__{rank}_0.distcp", *([".metadata"] if rank == 0 else [])]:
            (tmp_path / "shard").write_text(f"{rank} {name}")
            logger.upload_file(state, f"shards/checkpoints/ep1-ba2/{name}", tmp_path / "shard", overwrite=False)
            (tmp_path / "shard").unlink()
        loggers.append((logger, state))
    for logger, state in loggers:
        logger.batch_checkpoint(state, None)
    until(lambda: "shards" in [artifact.name for artifact in lab.repo().artifacts()])
    for logger, state in loggers:
        logger.close(state, None)
        logger.post_close()
    (version,) = lab.checkpoints("shards")
    assert version.metadata == {"step": 2, "epoch": 1, "checkpoint": "checkpoints/ep1-ba2"}
    found = {path: version.open(path).read().decode() for path in version.assets if path.startswith("check")}
    assert found == {
        f"checkpoints/ep1-ba2/{name}": f"{rank} {name}"
        for rank, name in ((0, "__0_0.distcp"), (0, ".metadata"), (1, "__1_0.distcp"))
    }


def test_a_checkpoint_of_rank_0_waits_for_no_other(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in a version long before the half minute is over after which a rank counts as silent."""
    lab.go("first")
    saver = CheckpointSaver("{run_name}/checkpoints")
    states = []
    for rank in range(2):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        logger = store(dir=tmp_path)
        states.append((logger, begin(logger, "first", callbacks=[saver], timestamp=composer.core.Timestamp(batch=2))))
        logger.log_hyperparameters({"lr": 1})
    (tmp_path / "x").write_text("x")
    monkeypatch.setenv("RANK", "0")  # Composer looks there when it makes a name
    logger, state = states[0]
    logger.upload_file(state, "first/checkpoints/ep0-ba2-rank0.pt", tmp_path / "x", overwrite=False)
    logger.epoch_checkpoint(state, None)
    until(lambda: "first" in [artifact.name for artifact in lab.repo().artifacts()], 10)
    assert lab.checkpoints("first")
    for logger, state in states:
        logger.close(state, None)
        logger.post_close()


def test_of_two_savers_the_first_is_gone_on_from(lab: Lab, tmp_path: Path) -> None:
    """As Composer does; files of the other one are kept, all of them, and are never taken for the newest checkpoint."""
    lab.go("two")
    logger = store(dir=tmp_path)
    savers = [
        CheckpointSaver(
            "{run_name}/full",
            remote_file_name="{run_name}/full/ba{batch}.pt",
            latest_remote_file_name="{run_name}/full/latest.pt",
        ),
        CheckpointSaver(
            "{run_name}/weights",
            remote_file_name="{run_name}/weights/ba{batch}.pt",
            latest_remote_file_name="{run_name}/weights/latest.pt",
        ),
    ]
    state = begin(logger, "two", callbacks=savers)
    for batch in (1, 2):
        state.timestamp = composer.core.Timestamp(batch=batch)
        for kind in ("full", "weights"):
            (tmp_path / "x").write_text(f"{kind} {batch}")
            logger.upload_file(state, f"two/{kind}/ba{batch}.pt", tmp_path / "x", overwrite=False)
            logger.upload_file(state, f"two/{kind}/latest.pt.symlink", tmp_path / "x", overwrite=True)
        logger.batch_checkpoint(state, None)
    logger.download_file("two/full/latest.pt.symlink", str(tmp_path / "a"))
    assert (tmp_path / "a").read_text() == "two/full/ba2.pt"
    with pytest.raises(FileNotFoundError):
        logger.download_file("two/weights/latest.pt.symlink", str(tmp_path / "b"))
    logger.close(state, None)
    logger.post_close()
    found = {path for path in lab.last("two").assets if path.endswith(".pt")}
    assert found == {"full/ba2.pt", "weights/ba1.pt", "weights/ba2.pt"}
    assert not [path for version in lab.versions("two") for path in version.assets if path.endswith(".symlink")]


class Unspeakable:
    def __repr__(self) -> str:
        raise ArithmeticError

    __str__ = __repr__


def test_hyperparameters_and_metrics_need_not_be_plain(lab: Lab, tmp_path: Path) -> None:
    """What is not becomes text; what is no number is left out."""
    lab.go("plain")
    logger = store(dir=tmp_path)
    saver = CheckpointSaver("{run_name}/checkpoints")
    state = begin(logger, "plain", callbacks=[saver], timestamp=composer.core.Timestamp(batch=1))
    logger.log_hyperparameters({"lr": 0.1, "deep": {"model": torch.nn.Linear(1, 1)}, "list": [1, object]})
    logger.log_hyperparameters({"later": 1})
    itself: dict[str, Any] = {}
    itself["itself"] = itself
    logger.log_hyperparameters({"cycle": itself, "y" * 5000: 1, "bad": Unspeakable()})
    logger.log_metrics(
        {"metrics/a": torch.tensor(0.5), "loss/b": 1, "metrics/text": "x", "metrics/many": [1, 2], "time/c": 3}, step=1
    )
    (tmp_path / "x").write_text("x")
    logger.upload_file(state, "plain/checkpoints/ep0-ba1-rank0.pt", tmp_path / "x", overwrite=False)
    logger.batch_checkpoint(state, None)
    logger.close(state, None)
    logger.post_close()
    (version,) = lab.checkpoints("plain")
    assert version.number == 0  # all hyperparameters are in one version
    assert {name: version.metadata[name] for name in version.metadata if "/" in name} == {
        "metrics/a": 0.5,
        "loss/b": 1.0,
    }
    text = version.open("hparams.yaml").read().decode()
    assert "lr: 0.1" in text
    assert "Linear(in_features=1" in text
    assert "later: 1" in text
    assert "{...}" in text
    assert "Unspeakable" in text


def test_an_object_store_of_composer_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"mandapa\.object_store\.S3ObjectStore"):
        ObjectStoreLogger(composer.utils.S3ObjectStore, {"bucket": "b"})


def test_where_composer_is_missing_the_extra_is_named() -> None:
    """By whoever imports the adapter; everything else works without it."""
    program = "import sys; sys.modules['composer'] = None; import mandapa.trainers; import mandapa.trainers.composer"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ImportError" in found.stderr
    assert "pip install 'mandapa[composer]'" in found.stderr
