"""W&B with its own package: what is recorded is what a version holds, whoever is killed, whatever does not answer."""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import wandb
import wandb.proto.wandb_internal_pb2 as protocol
from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
from wandb_server import wandb_server

import mandapa
from mandapa.errors import InvalidInputError
from mandapa.loggers import WandBLogger, wandb_backend
from mandapa.loggers import wandb as wandb_module
from mandapa.run.directory import RunDirectory
from mandapa.run.status import look

PRELUDE = """
import json, os, signal, sys, time
import numpy as np
from mandapa import CheckpointSaver, Limits, Run
from mandapa.loggers import FileLogger, ObjectStoreLogger, TensorboardLogger, WandBLogger

def begin(*loggers, **options):
    saver = CheckpointSaver(format="safetensors", best=("loss", "min"))
    return Run("net", {"lr": 0.5}, loggers=[saver, ObjectStoreLogger("store"), *loggers], dir="runs", **options)

def state(step):
    return {"w": np.full(1000, step, np.float32)}
"""


class Bench:
    """Programs that train in a folder of their own, with a home of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        self.env |= {"HOME": str(self.home), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        self.env |= {"WANDB_ERROR_REPORTING": "false"}

    def start(self, program: str, **env: str) -> subprocess.Popen[str]:
        code = PRELUDE + textwrap.dedent(program)
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env={**self.env, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, code: int = 0, **env: str) -> str:
        process = self.start(program, **env)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, f"{process.returncode}: {out[-2000:]} {err[-4000:]}"
        return out

    def mandapa(self, *words: str, code: int = 0, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mandapa.cli", *words],
            cwd=self.folder,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == code, f"{done.returncode}: {done.stdout[-2000:]} {done.stderr[-4000:]}"
        return done.stdout + done.stderr

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.folder / "runs/net")

    def settled(self) -> None:
        """Wait until no process is at work in the run's directory."""
        give_up = time.monotonic() + 30
        while self.directory.uploader_lock().held() or self.directory.rank_lock(0).held():
            assert time.monotonic() < give_up
            time.sleep(0.05)

    def recorded(self) -> list[protocol.ArtifactRecord]:
        """The artifacts in W&B's files, oldest first."""
        found = []
        for path in sorted(glob.glob(str(self.folder / "runs/net/wandb/offline-run-*/*.wandb"))):
            records = [protocol.Record.FromString(data) for data in wandb_backend._records(path, 0)]
            assert records
            found += [record.artifact for record in records if record.HasField("artifact")]
        return found

    def restored(self, address: str = "net:latest") -> wandb.Artifact:
        """A version, restored from the store, as an artifact that W&B itself makes of it."""
        version = mandapa.open(self.folder / "store")[address]
        folder = self.folder / "restored"
        shutil.rmtree(folder, ignore_errors=True)
        version.download(folder)
        artifact = wandb.Artifact("net", type="model")
        artifact.add_dir(str(folder), skip_cache=True, policy="immutable")
        for path, asset in version.assets.items():
            if asset.url:
                entry = ArtifactManifestEntry(path=path, ref=asset.url, digest=asset.url)
                artifact.manifest.add_entry(entry)
        return artifact


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


TRAIN = """
run = begin(TensorboardLogger(), FileLogger(), WandBLogger("vision"))
run.log_url("data/train.parquet", "s3://elsewhere/train.parquet", size=7)
for step in (1, 2, 3):
    print("step", step)
    run.log_metrics({"loss": 1 / step if step < 3 else 9.0}, step=step)
    handle = run.save_checkpoint(state(step), step=step, metrics={"loss": 1 / step if step < 3 else 9.0})
    if step == 1:
        assert handle.wait(60)
"""


def facts(artifact: protocol.ArtifactRecord) -> dict:
    return json.loads(artifact.metadata)


def test_what_w_and_b_recorded_offline_is_what_the_version_holds(bench):
    """All assets, references, aliases and metadata; and nothing is written outside of the run's directory."""
    out = bench.run(
        TRAIN + "many = [run.log_bytes(f'many/{n}', b'%d' % n) for n in range(600)]\n"
        "assert run.close()\nprint(handle.version, file=sys.stderr)"
    )
    assert "step 3" in out
    bench.settled()
    artifacts = bench.recorded()
    assert [facts(one).get("step") for one in artifacts] == [1, 2, 3, None]
    assert [sorted(one.aliases) for one in artifacts] == [
        ["best", "latest"],
        ["best", "latest"],
        ["latest"],
        ["latest"],
    ]
    assert {one.type for one in artifacts} == {"model"}
    assert facts(artifacts[1]) == {"loss": 0.5, "step": 2, "mandapa": facts(artifacts[1])["mandapa"]}
    assert artifacts[-1].digest == bench.restored().digest
    repo = mandapa.open(bench.folder / "store")
    by_step = {version.metadata.get("step"): version.address for version in repo.artifact("net").versions()}
    assert artifacts[1].digest == bench.restored(by_step[2]).digest  # once for a version in the middle
    entries = {entry.path: entry for entry in artifacts[-1].manifest.contents}
    assert len(entries) > 600
    reference = entries.pop("data/train.parquet")
    assert (reference.ref, reference.size, reference.local_path) == ("s3://elsewhere/train.parquet", 7, "")
    inside = str(bench.folder / "runs/net")
    assert all(entry.local_path.startswith(inside) and os.path.isfile(entry.local_path) for entry in entries.values())
    assert not list(bench.home.rglob("*"))
    assert sorted(os.listdir(bench.folder)) == ["home", "restored", "runs", "store"]


def test_a_trainer_that_was_killed_right_after_the_call(bench):
    """What W&B had not written is logged again by sync, each commit once; then the digests are equal."""
    bench.run(TRAIN + "os.kill(os.getpid(), signal.SIGKILL)", code=-signal.SIGKILL)
    bench.settled()
    said = bench.mandapa("status", "runs", code=1)
    assert "waiting" in said
    assert "nobody is committing this: mandapa sync runs/net" in said
    (bench.folder / "absent/wandb").mkdir(parents=True)
    (bench.folder / "absent/wandb/__init__.py").write_text("raise ImportError('not installed')")
    said = bench.mandapa("sync", "runs", code=2, PYTHONPATH=str(bench.folder / "absent"))
    assert "pip install 'mandapa[wandb]'" in said
    assert "W&B is switched off here" in bench.mandapa("sync", "runs", code=2, WANDB_MODE="disabled")
    synced = bench.mandapa("sync", "runs")
    assert "W&B has none of it yet: wandb sync runs/net/wandb/offline-run-" in synced
    artifacts = bench.recorded()
    assert artifacts[-1].digest == bench.restored().digest
    assert [facts(one)["step"] for one in artifacts] == [1, 2, 3]
    assert len({facts(one)["mandapa"]["txn"] for one in artifacts}) == 3
    assert {one.run_id for one in artifacts} == {"net"}
    assert look(bench.directory).committed
    said = bench.mandapa("status", "runs", code=1)
    assert said.endswith("what W&B recorded offline is only here: this machine must stay\n")
    bench.mandapa("sync", "runs")
    assert len(bench.recorded()) == 3


def test_what_w_and_b_has_written_is_not_logged_twice(bench):
    """It died between W&B's file and its own journal."""
    bench.run(TRAIN + "assert run.close()")
    bench.settled()
    (key,) = [backend.key for backend in look(bench.directory).backends if backend.unsent]
    before = bench.recorded()
    journal = Path(bench.directory.outcomes(key))
    lines = journal.read_bytes().splitlines(keepends=True)
    last = max(
        at for at, line in enumerate(lines) if b'"kind":"made"' in line and before[-1].digest[:12].encode() in line
    )
    journal.write_bytes(b"".join(lines[:last]))
    state = Path(bench.directory.kept(key)) / "state.json"
    known = json.loads(state.read_bytes())
    assert known["txn"] == facts(before[-1])["mandapa"]["txn"]
    state.write_text(json.dumps({**known, "txn": "", "folder": known["folder"]}))
    assert not look(bench.directory).committed
    bench.mandapa("sync", "runs")
    assert look(bench.directory).committed
    assert len(bench.recorded()) == len(before)


def test_files_are_kept_until_wandb_sync_has_sent_them(bench):
    """Of an offline run that was sent, only the newest version's stay: from them the next one is made."""
    bench.run(TRAIN + "assert run.close()")
    bench.settled()
    (backend,) = [backend for backend in look(bench.directory).backends if backend.unsent]
    files = Path(bench.directory.kept(backend.key)) / "files"
    needed = {entry.local_path for one in bench.recorded() for entry in one.manifest.contents if entry.local_path}
    assert {str(path) for path in files.iterdir()} == needed
    for folder in backend.unsent:
        (Path(folder) / "run-net.wandb.synced").touch()
    assert look(bench.directory).safe
    bench.run("run = begin(WandBLogger('vision'))\nassert run.close()")
    bench.settled()
    (newest,) = bench.recorded()[len(needed) and -1 :]
    assert {str(path) for path in files.iterdir()} == {e.local_path for e in newest.manifest.contents if e.local_path}
    assert newest.digest == bench.restored().digest


def test_it_joins_the_run_that_the_program_has(bench):
    """And leaves it open; its own end is in its file later."""
    bench.run(
        """
        import wandb
        settings = {"x_transaction_log_flush_interval": 0.5}
        theirs = wandb.init(project="theirs", id="abc", dir=".", settings=settings)
        run = begin(WandBLogger("vision"))
        run.log_metrics({"loss": 0.5}, step=1)
        handle = run.log_bytes("notes.txt", b"x")
        assert run.close()
        assert wandb.run is theirs
        theirs.log({"later": 1}, step=2)
        theirs.finish()
        """
    )
    (path,) = glob.glob(str(bench.folder / "wandb/offline-run-*/run-abc.wandb"))
    records = [protocol.Record.FromString(data) for data in wandb_backend._records(path, 0)]
    (artifact,) = [record.artifact for record in records if record.HasField("artifact")]
    assert artifact.project == "theirs"
    assert artifact.digest == bench.restored().digest
    logged = {item.nested_key[0] if item.nested_key else item.key for r in records for item in r.history.item}
    assert {"loss", "later"} <= logged


def test_a_run_of_the_program_that_is_finished_too_early(bench):
    """Then a W&B run of the same id takes what is left."""
    bench.run(
        """
        import wandb
        theirs = wandb.init(project="theirs", id="abc", dir=".")
        run = begin(WandBLogger("vision"))
        theirs.finish()
        run.log_bytes("notes.txt", b"x")
        assert run.close()
        """
    )
    files = glob.glob(str(bench.folder / "**/offline-run-*/run-abc.wandb"), recursive=True)
    records = [protocol.Record.FromString(data) for path in files for data in wandb_backend._records(path, 0)]
    assert [record.artifact.digest for record in records if record.HasField("artifact")] == [bench.restored().digest]


def test_other_artifacts_and_other_ranks(bench):
    """`Run.log_artifact` makes an artifact of that name; assets of all ranks are in the run's; rank 0 talks to W&B."""
    program = """
    run = begin(WandBLogger("vision"))
    run.log_bytes(f"rank{run.rank}.txt", b"%d" % run.rank)
    if run.rank == 1:
        os.makedirs("corpus/a")
        open("corpus/a/b.txt", "w").write("text")
        run.log_artifact("corpus", "corpus", aliases=["clean"], metadata={"words": 1})
    assert run.close()
    """
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    both = [bench.start(program, RANK=str(rank), LOCAL_RANK=str(rank), **ranks) for rank in (0, 1)]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    bench.settled()
    if not look(bench.directory).committed:  # rank 0 may be the first to end
        bench.mandapa("sync", "runs")
    artifacts = bench.recorded()
    (corpus,) = [one for one in artifacts if one.name == "corpus"]
    assert (corpus.type, sorted(corpus.aliases)) == ("artifact", ["clean", "latest"])
    assert [entry.path for entry in corpus.manifest.contents] == ["a/b.txt"]
    assert facts(corpus)["words"] == 1
    newest = [one for one in artifacts if one.name == "net"][-1]
    assert {"rank0.txt", "rank1.txt"} <= {entry.path for entry in newest.manifest.contents}
    assert newest.digest == bench.restored().digest


def test_w_and_b_may_be_switched_off(bench):
    """By its own switch, or for artifacts only: then no byte waits for it."""
    bench.run(
        """
        run = begin(WandBLogger("vision"))
        run.log_metrics({"loss": 0.5}, step=1)
        assert len(run.status()["backends"]) == 1
        assert run.close()
        """,
        WANDB_MODE="disabled",
    )
    assert not bench.recorded()
    bench.run(
        """
        run = begin(WandBLogger("vision", log_artifacts=False))
        run.log_metrics({"loss": 0.5}, step=2)
        assert len(run.status()["backends"]) == 1
        assert run.close()
        """
    )
    assert not bench.recorded()
    (path,) = glob.glob(str(bench.folder / "runs/net/wandb/offline-run-*/run-net.wandb"))
    records = [protocol.Record.FromString(data) for data in wandb_backend._records(path, 0)]
    assert any(item.value_json == "0.5" for record in records for item in record.history.item)
    config = {item.key: item.value_json for record in records for item in record.config.update}
    assert json.loads(config["lr"]) == 0.5


def test_no_key(bench):
    """An error when the run begins, with what to do; the run can be started right after."""
    out = bench.run(
        """
        from mandapa.errors import InvalidInputError
        try:
            begin(WandBLogger("vision"))
        except InvalidInputError as error:
            print(error)
        begin().close()
        """,
        WANDB_MODE="online",
    )
    assert out == "W&B has no API key: run 'wandb login', set WANDB_API_KEY, or work with WANDB_MODE=offline\n"


def test_wandb_is_not_installed(monkeypatch):
    """The error names the extra; so does one about a name."""
    with pytest.raises(InvalidInputError, match=r"may hold {run_name}, and nothing else"):
        WandBLogger(artifact="{rank}")
    monkeypatch.setattr(wandb_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match=r"pip install 'mandapa\[wandb\]'"):
        WandBLogger()


# -- online ------------------------------------------------------------------------------------------------------------


def test_online_a_version_is_there_when_w_and_b_has_all_of_it(bench):
    """Addresses are W&B's; what did not change is not sent again; a second start goes on in the same W&B run."""
    with wandb_server() as server:
        env = {**server.env(), "WANDB_MODE": "online"}
        out = bench.run(
            """
            run = begin(TensorboardLogger(), FileLogger(), WandBLogger("vision", artifact="{run_name}-files"))
            for step in (1, 2):
                run.log_metrics({"loss": 1 / step}, step=step)
                assert run.save_checkpoint(state(step), step=step).wait(60)
            (report,) = [report for report in run.status()["backends"].values() if report["store"] == "wandb"]
            print(report["state"], report["committed"], report["pending"])
            assert run.close()
            """,
            **env,
        )
        assert out == "ok team/vision/net-files:v1 0\n"
        bench.settled()
        assert look(bench.directory).safe
        versions = server.artifacts["vision/net-files"]
        assert [version.metadata.get("step") for version in versions] == [1, 2, None]
        assert versions[-1].digest == bench.restored().digest
        checkpoint = "checkpoint/state.safetensors"
        assert server.read(versions[1], checkpoint) == (bench.folder / "restored" / checkpoint).read_bytes()
        assert {"latest"} <= versions[-1].aliases
        server.uploads.clear()
        bench.run(
            """
            run = begin(WandBLogger("vision", artifact="{run_name}-files"))
            run.log_bytes("more.txt", b"more")
            assert run.close()
            """,
            **env,
        )
        assert versions[-1].digest == bench.restored().digest
        assert sorted(set(server.uploads)) == [".mandapa/run.json", "more.txt"]
        (run,) = server.runs.values()
        assert (run.name, run.attempts, run.state) == ("net", 2, "finished")
        assert [row["loss"] for row in run.history] == [1.0, 0.5]
        assert run.config["lr"] == 0.5


def test_a_server_that_goes_away(bench):
    """Training goes on, the end is capped, what waits is kept, and sync brings it when the server is back."""
    with wandb_server() as server:
        env = {**server.env(), "WANDB_MODE": "online"}
        process = bench.start(
            """
            run = begin(WandBLogger("vision", init_kwargs={"settings": {"finish_timeout": 1}}))
            assert run.save_checkpoint(state(1), step=1).wait(60)
            print("down", flush=True)
            sys.stdin.readline()
            at = time.monotonic()
            run.log_bytes("notes.txt", b"x")
            run.save_checkpoint(state(2), step=2)
            print(time.monotonic() - at < 1, run.close(timeout=2), flush=True)
            """,
            **env,
        )
        assert process.stdout.readline() == "down\n"
        server.down()
        at = time.monotonic()
        out, err = process.communicate("\n", timeout=120)
        assert (process.returncode, out.split()) == (0, ["True", "False"]), (out, err)
        assert time.monotonic() - at < 20
        bench.settled()
        said = bench.mandapa("status", "runs", code=1)
        assert "nobody is committing this: mandapa sync runs/net" in said
        server.up()
        bench.mandapa("sync", "runs", **env)
        assert look(bench.directory).safe
        versions = server.artifacts["vision/net"]
        assert [version.metadata.get("step") for version in versions] == [1, 2, None]
        assert versions[-1].digest == bench.restored().digest


def test_a_server_that_is_down_when_the_run_begins(bench):
    """It is told of, training begins, and nothing is lost that would become an artifact."""
    with wandb_server() as server:
        env = {**server.env(), "WANDB_MODE": "online"}
        server.down()
        settings = "init_kwargs={'settings': {'init_timeout': 1, 'finish_timeout': 1}}"
        process = bench.start(
            f"""
            run = begin(WandBLogger("vision", {settings}))
            print("begun", flush=True)
            run.log_metrics({{"loss": 1}}, step=1)
            run.log_bytes("notes.txt", b"x")
            run.flush(timeout=0)
            sys.stdin.readline()
            assert run.flush(timeout=60)
            run.log_metrics({{"loss": 0.5}}, step=2)
            assert run.close()
            """,
            **env,
        )
        assert process.stdout.readline() == "begun\n"
        server.up()
        _, err = process.communicate("\n", timeout=120)
        assert process.returncode == 0, err
        assert "W&B does not answer" in err
        assert server.artifacts["vision/net"][-1].digest == bench.restored().digest


def test_a_key_that_is_refused(bench):
    """It is an error when the run begins, as of any store that refuses."""
    with wandb_server() as server:
        server.refuse = 401
        out = bench.run(
            """
            from mandapa.errors import InvalidInputError
            try:
                begin(WandBLogger("vision"))
            except InvalidInputError as error:
                print(str(error).partition(":")[0])
            """,
            **server.env(),
            WANDB_MODE="online",
        )
    assert out == "W&B refuses the API key\n"


def test_sync_leaves_w_and_b_to_a_trainer_that_is_at_work(bench):
    """Even when the uploader is gone: two that commit to one place would not know of each other."""
    process = bench.start(
        """
        run = begin(WandBLogger("vision"))
        handle = run.log_bytes("notes.txt", b"x")
        print(json.load(open(f"{run.dir}/.run/status.json"))["pid"], flush=True)
        sys.stdin.readline()
        assert run.close()
        """
    )
    pid = int(process.stdout.readline())
    key = next(backend.key for backend in look(bench.directory).backends if backend.store.startswith("W&B"))
    lock = bench.directory.backend_lock(key)
    assert lock.held()
    os.kill(pid, signal.SIGKILL)
    bench.mandapa("sync", "runs")
    assert look(bench.directory).committed
    assert lock.held()
    assert process.poll() is None
    _, err = process.communicate("\n", timeout=60)
    assert process.returncode == 0, err
    bench.settled()
    assert not lock.held()
    assert len({facts(one)["mandapa"]["txn"] for one in bench.recorded()}) == len(bench.recorded())
    assert bench.recorded()[-1].digest == bench.restored().digest
