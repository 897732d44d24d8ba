"""Runs under bad conditions, by real processes and real servers: dead stores, killed trainers, forks, little memory."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import stores
from lab import Lab, contents, remove, steps, until

from mandapa import CheckpointSaver, Repository, Run
from mandapa.digest import Hasher
from mandapa.errors import InvalidInputError
from mandapa.loggers import FileLogger, ObjectStoreLogger, TensorboardLogger
from mandapa.object_store import LocalObjectStore, S3ObjectStore
from mandapa.testing.faults import CountingObjectStore
from mandapa.testing.server import serve

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")


# -- a store that does not answer --------------------------------------------------------------------------------------


def test_training_does_not_notice_a_store_that_never_answers(lab, gate, monkeypatch):
    """Calls return at once and close keeps its word; when the store answers, everything comes to it, byte for byte."""
    monkeypatch.setattr("mandapa.run.run.ACCESS_PATIENCE", 1.0)
    begin = time.monotonic()
    with pytest.warns(RuntimeWarning, match="assets wait in .* until the store answers"):
        run = Run("net", loggers=[lab.logger(gate.url)], dir=lab.runs)
    assert time.monotonic() - begin < 4

    data = {f"part/{number}": os.urandom(10_000) for number in range(1000)}
    source = lab.folder / "asset"
    seconds: dict[str, list[float]] = {"log": [], "copy": []}
    for path, content in data.items():
        source.write_bytes(content)
        begin = time.perf_counter()
        handle = run.log_asset(source, path)
        seconds["log"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        shutil.copyfile(source, lab.folder / f"copy-{len(seconds['copy'])}")
        seconds["copy"].append(time.perf_counter() - begin)
    p99 = {what: statistics.quantiles(times, n=100)[-1] for what, times in seconds.items()}
    # On a machine that is busy with other things, no call takes much longer than a bare copy does.
    assert p99["log"] <= max(0.010, 3 * p99["copy"]), p99
    assert handle.state in ("held", "durable")

    begin = time.monotonic()
    with pytest.warns(RuntimeWarning, match="ends before everything is committed"):
        assert not run.close(timeout=2)
    assert time.monotonic() - begin < 4
    assert "not all is committed" in lab.mandapa("status", lab.runs, code=1)

    gate.open(lab.server)
    assert "all committed" in lab.mandapa("sync", lab.runs)
    lab.versions()[-1].download(lab.folder / "back")
    back = lab.folder / "back/part"
    assert {f"part/{path.name}": path.read_bytes() for path in back.iterdir()} == data
    assert "all is committed" in lab.mandapa("status", lab.runs)


def test_sync_does_not_wait_for_the_uploader_to_end_its_pause(lab):
    """An uploader that was refused makes longer and longer pauses; who asks is not kept waiting for the next try."""
    denied = lab.folder / "denied"
    options = {"path": str(lab.folder / "repo"), "denied": str(denied)}
    run = Run("net", loggers=[ObjectStoreLogger(stores.Moody, options)], dir=lab.runs)
    denied.touch()
    run.log_bytes("a", b"1")
    with pytest.warns(RuntimeWarning, match="ends before"):
        run.close(timeout=0)
    (key,) = lab.status()["backends"]
    until(lambda: lab.status()["backends"][key].get("error", {}).get("failures") == 4)
    denied.unlink()
    begin = time.monotonic()
    lab.mandapa("sync", lab.runs)
    assert time.monotonic() - begin < 3  # the pause after four failures takes four seconds


def test_one_backend_is_away_and_the_other_does_not_wait(lab, dead_gate):
    """What one store has is its own affair; which one lacks what is told, and made up for when it is back."""
    away = ObjectStoreLogger(S3ObjectStore, {"bucket": f"{lab.bucket}-a", "endpoint_url": dead_gate.url})
    lacks = f"cannot read .* in s3://{lab.bucket}-a: nothing listens"
    with pytest.warns(RuntimeWarning, match=f"assets wait .* {lacks}"):
        run = Run("net", loggers=[away, lab.logger()], dir=lab.runs)
    handle = run.log_bytes("a", b"1")
    with pytest.warns(RuntimeWarning, match=f"{lacks} .*training goes on"):
        assert not run.flush(timeout=2)
    assert contents(lab.versions()[-1]) == {"a": b"1"}
    assert not handle.done()
    with pytest.warns(RuntimeWarning, match="ends before"):
        run.close(timeout=0)

    until(lambda: sorted(b["pending"] > 0 for b in lab.status()["backends"].values()) == [False, True])
    told = json.loads(lab.mandapa("status", lab.runs, "--json", code=1))
    pending = {backend["store"]: (backend["pending"], backend["error"]) for backend in told["backends"]}
    assert pending[f"S3ObjectStore {lab.bucket}"] == (0, "")
    count, error = pending[f"S3ObjectStore {lab.bucket}-a"]
    assert count == 1 + 2  # and what is true of the run, at its begin and at its end
    assert "nothing listens there" in error

    dead_gate.open(lab.server)
    lab.mandapa("sync", lab.runs)
    assert contents(lab.versions(f"{lab.bucket}-a")[-1]) == {"a": b"1"}
    assert "all is committed" in lab.mandapa("status", lab.runs)


# -- the bytes are the run's -------------------------------------------------------------------------------------------


def rewrite(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"something else, and longer than before" * 1000)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(b"another file")
    os.replace(path.with_name("new"), path)


def write_inside(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"inside")


AFTERWARDS = {
    "copy": (rewrite, append, replace, write_inside, lambda path: os.truncate(path, 10), os.unlink),
    "move": (lambda path: path.write_bytes(b"a new file"), lambda path: None),
    "link": (os.unlink, replace, lambda path: os.rename(path, path.with_name("elsewhere"))),
    "grow": (append, os.unlink, replace, lambda path: os.rename(path, path.with_name("elsewhere"))),
}


def test_what_becomes_of_a_file_after_the_call_is_not_logged(lab):
    """Each way to take a file over holds what it promises: the version has the bytes of the moment of the call."""
    expected = {}
    with Run("net", loggers=[lab.logger()], dir=lab.runs) as run:
        for take, ways in AFTERWARDS.items():
            for number, afterwards in enumerate(ways):
                path = lab.folder / f"{take}-{number}"
                expected[path.name] = os.urandom(5000)
                path.write_bytes(expected[path.name])
                run.log_asset(path, take=take)
                afterwards(path)
        folder = lab.folder / "folder"
        (folder / "inner").mkdir(parents=True)
        (folder / "inner/a").write_bytes(b"1")
        run.log_asset(folder, "folder")
        shutil.rmtree(folder)
    assert contents(lab.versions()[-1]) == expected | {"folder/inner/a": b"1"}


def test_a_log_that_is_rotated_is_in_the_versions_from_before_and_after(lab):
    """Another file at the same path is another asset, though both only grow: neither takes the other's place unseen."""
    path = lab.folder / "train.log"
    with Run("net", loggers=[lab.logger()], dir=lab.runs) as run:
        path.write_bytes(b"one\ntwo\n")
        run.log_asset(path, take="grow")
        os.rename(path, path.with_name("train.log.1"))
        path.write_bytes(b"three\n")
        run.log_asset(path, take="grow")
    assert {contents(version).get("train.log") for version in lab.versions()} >= {b"one\ntwo\n", b"three\n"}


def test_a_checkpoint_is_what_it_was_when_it_was_saved(lab):
    """Weights that go on changing while a checkpoint waits are not in it."""
    weights = np.zeros(250_000, np.float32)
    saver = CheckpointSaver(format="safetensors")
    with Run("net", loggers=[lab.logger(), saver], dir=lab.runs) as run:
        for step in range(1, 6):
            weights[:] = step
            run.save_checkpoint({"at": np.array([step, 0]), "w": weights}, step=step)
            weights[:] = -1
    from safetensors.numpy import load

    found = [version for version in lab.versions() if "step" in version.metadata]
    assert [version.metadata["step"] for version in found] == [1, 2, 3, 4, 5]
    for version in found:
        assert set(load(contents(version)["checkpoint/state.safetensors"])["w"]) == {version.metadata["step"]}


# -- forks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_data_loader_with_forked_workers_beside_a_draining_run(lab, epochs):
    """Workers fork while other threads log; they may print, and get a clear error at once when they log."""
    trainer = lab.python(
        """
        import warnings
        import torch
        from torch.utils.data import DataLoader, Dataset

        warnings.filterwarnings("ignore", "This DataLoader will create")  # on a machine of one core
        run = Run("net", loggers=[FileLogger(), TensorboardLogger(), logger()], dir=RUNS)

        class Data(Dataset):
            def __len__(self):
                return 16

            def __getitem__(self, at):
                print("item", at)
                begin = time.monotonic()
                for call in (lambda: run.log_asset(__file__), lambda: run.log_metrics({"a": 1}, 1), run.flush,
                             lambda: run.save_checkpoint({}, step=1), run.latest_checkpoint, run.status):
                    try:
                        call()
                    except ClosedError as error:
                        assert "forked" in str(error)
                    else:
                        raise AssertionError("no ClosedError")
                assert run.close() is True  # nothing to do here; and nothing is done to the parent's run
                return torch.tensor(time.monotonic() - begin)

        stop = threading.Event()

        def log():
            for step in itertools.count():
                if stop.wait(0.001):
                    return
                run.log_metrics({"thread/value": step}, step)
                run.log_bytes(f"thread/{step % 100}", b"x" * 1000)

        thread = threading.Thread(target=log)
        thread.start()
        waited = []
        with run:
            for epoch in range(int(sys.argv[1])):
                for number, batch in enumerate(DataLoader(Data(), batch_size=4, num_workers=2)):
                    waited += batch.tolist()
                    step = epoch * 4 + number + 1
                    run.save_checkpoint({"w": torch.full((100_000,), float(step))}, step=step)
            stop.set()
            thread.join()
        say("waited", len(waited), max(waited))
        """,
        epochs,
    )
    out = lab.finish(trainer, seconds=30 * epochs)
    count, longest = out.splitlines()[-1].removeprefix("waited ").split()
    assert (int(count), out.count("item")) == (16 * epochs, 16 * epochs)
    assert float(longest) < 1
    versions = lab.versions()
    assert [v.metadata["step"] for v in versions if "step" in v.metadata] == list(range(1, 4 * epochs + 1))
    log = contents(versions[-1])["logs-rank0.txt"].decode()
    assert log.count("[stdout] waited") == 0  # that came after the end
    assert "[stdout] item" not in log  # what a child prints is not the run's
    assert lab.is_safe()


# -- little memory -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> Iterator[tuple[Path, str]]:
    """A file of safetensors with 1 GiB of noise, in memory if there is room (disks are slow), and its digest."""
    room = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    parent = "/dev/shm" if room > 4 << 30 else None
    count, size = 16, 64 << 20
    places = {
        f"layer.{at}": {"dtype": "U8", "shape": [size], "data_offsets": [at * size, (at + 1) * size]}
        for at in range(count)
    }
    header = json.dumps(places).encode()
    digest = Hasher()
    noise = np.random.default_rng(7).integers(0, 1 << 63, size // 8, np.uint64)
    with tempfile.TemporaryDirectory(prefix="mandapa-large-", dir=parent) as folder:
        path = Path(folder, "state.safetensors")
        with open(path, "wb") as file:
            for data in (
                len(header).to_bytes(8, "little") + header,
                *itertools.repeat(memoryview(noise).cast("B"), count),
            ):
                file.write(data)
                digest.update(data)
                np.multiply(noise, np.uint64(3), out=noise)
        yield path, digest.hexdigest()


@pytest.mark.parametrize("program", ["mandapa.cli", "mandapa.run.uploader"])
def test_a_gibibyte_is_committed_with_a_quarter_of_its_size_of_memory(lab, large, program, monkeypatch):
    """The uploader's memory does not grow with a checkpoint, be it for a folder (the one) or for S3 (the other)."""
    path, digest = large
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, serve() as server:
        monkeypatch.setenv("LAB_RUNS", f"{folder}/runs")
        monkeypatch.setenv("LAB_URL", server.url)
        trainer = lab.python(
            """
            place, path, to_folder = sys.argv[1:]
            run = Run("net", loggers=[ObjectStoreLogger(place) if to_folder == "True" else logger()], dir=RUNS)
            say(json.load(open(f"{run.dir}/.run/status.json"))["pid"])
            sys.stdin.readline()
            run.log_asset(path, "checkpoint/state.safetensors", take="link")
            os.kill(os.getpid(), signal.SIGKILL)
            """,
            f"{folder}/repo",
            path,
            to_folder := program == "mandapa.cli",
        )
        uploader = int(trainer.stdout.readline())
        os.kill(uploader, signal.SIGSTOP)  # that one has all the memory that there is
        trainer.communicate("go\n", timeout=20)
        os.kill(uploader, signal.SIGKILL)
        assert "nobody is committing this" in lab.mandapa("status", f"{folder}/runs", code=1)

        words = ["sync", f"{folder}/runs"] if program == "mandapa.cli" else [f"{folder}/runs/net"]
        limited = ["sh", "-c", 'ulimit -d 262144 && exec "$@"', "sh", sys.executable]  # KiB of RLIMIT_DATA
        lab.finish(lab.start(*limited, "-c", "import mmap; mmap.mmap(-1, 300 << 20, mmap.MAP_PRIVATE)"), 1)
        lab.finish(lab.start(*limited, "-m", program, *words, stdin=subprocess.DEVNULL))
        store = LocalObjectStore(f"{folder}/repo") if to_folder else server.s3(lab.bucket)
        (version,) = Repository(store).artifact("net").versions()
        asset = version.assets["checkpoint/state.safetensors"]
        assert (asset.digest, asset.size) == (digest, path.stat().st_size)
        with version.open(asset.path) as stored, open(path, "rb") as file:
            for one in (stored, file):
                one.seek(-1000, os.SEEK_END)
            assert stored.read() == file.read()


@pytest.mark.slow
def test_a_gibibyte_of_torch_checkpoints_is_committed_with_little_memory(lab, large, monkeypatch):
    """Several, one after the other, of a state that was written by torch, with nothing but an uploader's limits."""
    with tempfile.TemporaryDirectory(dir=large[0].parent) as folder, serve() as server:
        monkeypatch.setenv("LAB_RUNS", f"{folder}/runs")
        monkeypatch.setenv("LAB_URL", server.url)
        trainer = lab.python(
            """
            import torch
            run = Run("net", loggers=[logger(), CheckpointSaver(keep_local=3)], dir=RUNS)
            os.kill(json.load(open(f"{run.dir}/.run/status.json"))["pid"], signal.SIGSTOP)
            model = {f"layer.{n}": torch.randn(16 << 20) for n in range(16)}
            for step in (1, 2, 3):
                model[f"layer.{step}"] *= 0.99
                run.save_checkpoint({"model": model, "step": step}, step=step)
            say(json.load(open(f"{run.dir}/.run/status.json"))["pid"])
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        os.kill(int(lab.finish(trainer, -signal.SIGKILL)), signal.SIGKILL)
        limited = ["sh", "-c", 'ulimit -d 262144 && exec "$@"', "sh", sys.executable]
        words = ["-m", "mandapa.cli", "sync", f"{folder}/runs"]
        lab.finish(lab.start(*limited, *words, stdin=subprocess.DEVNULL), seconds=300)
        versions = Repository(server.s3(lab.bucket)).artifact("net").versions()
        found = {v.metadata["step"]: v.assets["checkpoint/state.pt"].digest for v in versions if "step" in v.metadata}
        for step in (1, 2, 3):
            digest = Hasher()
            with open(f"{folder}/runs/net/checkpoints/step-{step}/state.pt", "rb") as file:
                while data := file.read(1 << 24):
                    digest.update(data)
            assert found.pop(step) == digest.hexdigest()
        assert not found


# -- stores of one's own -----------------------------------------------------------------------------------------------


def test_a_store_that_refuses_to_delete(lab):
    """Training needs no right to delete: not to make a repository, not to commit, not to go on."""
    for step in (1, 2, 3):
        logger = ObjectStoreLogger(stores.NeverDeletes, {"bucket": lab.bucket, "endpoint_url": lab.server.url})
        saver = CheckpointSaver(format="safetensors", best=("loss", "min"))
        with Run("net", loggers=[FileLogger(), TensorboardLogger(), logger, saver], dir=lab.runs) as run:
            found = run.latest_checkpoint()
            assert (found and found.load()["at"].tolist()) == ([step - 1, 0] if step > 1 else None)
            run.log_metrics({"loss": 1 / step}, step)
            run.log_artifact("sub", Path(__file__), aliases=["new"])
            handle = run.save_checkpoint({"at": np.array([step, 0])}, step=step, metrics={"loss": 1 / step})
            assert handle.wait(20)
        assert steps(lab.versions()[-1]) == {"checkpoint/state.safetensors": (step, 0)}
        if step == 2:
            remove(lab.runs)  # another machine
    assert Repository(lab.server.s3(lab.bucket))["net:best"].metadata["step"] == 3


def test_a_store_that_the_uploader_cannot_make_ends_the_run_before_training(lab):
    """A class that only the training process can see; nothing waits in vain for a whole training."""
    trainer = lab.python(
        """
        from mandapa.object_store import LocalObjectStore

        class Own(LocalObjectStore):
            pass

        def make():
            class Inner(LocalObjectStore):
                pass
            return Inner

        for cls in (Own, make()):
            try:
                ObjectStoreLogger(cls, {"path": RUNS + "/../repo"})
            except InvalidInputError as error:
                say("cannot import it" in str(error))
        """
    )
    assert lab.finish(trainer) == "True\nTrue\n"

    made = types.ModuleType("made_by_hand")
    made.Own = type("Own", (LocalObjectStore,), {"__module__": "made_by_hand"})
    kept = {"path": str(lab.folder / "repo")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "made_by_hand", made)
        with pytest.raises(InvalidInputError, match="cannot import Own from 'made_by_hand'"):
            Run("net", loggers=[ObjectStoreLogger(made.Own, kept)], dir=lab.runs)
    with pytest.raises(InvalidInputError, match="does not take these object_store_kwargs"):
        Run("net", loggers=[ObjectStoreLogger(stores.Moody, kept)], dir=lab.runs)
    with pytest.raises(InvalidInputError, match="object_store_kwargs\\['denied'\\] is a PosixPath"):
        Run("net", loggers=[ObjectStoreLogger(stores.Moody, {**kept, "denied": lab.folder})], dir=lab.runs)
    until(lambda: not lab.uploaders(), 5)

    with Run("net", loggers=[ObjectStoreLogger(stores.Outer.Inner, kept)], dir=lab.runs) as run:
        run.log_bytes("a", b"1")
    assert contents(Repository(LocalObjectStore(lab.folder / "repo"))["net:latest"]) == {"a": b"1"}


# -- secrets -----------------------------------------------------------------------------------------------------------

SECRETS = {
    "key": "AKIA" + "Q7ZP5XW2LM4K6T3B",
    "secret": "wJalr" + "XUtnFEMIbK7MDENGbPxRfiCY0123456789abcd",
    "session": "FwoG" + "ZXIvYXdzEBYaDHh1c3RvbWVyc2VjcmV0" * 3,
    "hparam": "sk-proj-" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4",
    "argument": "hf_" + "ZyXwVuTsRqPoNmLkJiHgFeDcBa987654",
    "remote": "ghp_" + "0a1b2c3d4e5f6g7h8i9j0A1B2C3D4E5F6G7H",
    "password": "correct-horse-battery-staple",
}


def test_secrets_reach_no_disk_no_store_and_no_list_of_processes(lab, gate, tmp_path, monkeypatch):
    """Those of the store, among hyperparameters, on the command line and in the address of the git remote."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("MANDAPA_CACHE", str(lab.folder / "cache"))
    work = lab.folder / "work"
    git = ["git", "-C", str(work), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(work)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    remote = f"https://me:{SECRETS['remote']}@example.org/team/code.git"
    subprocess.run([*git, "remote", "add", "origin", remote], check=True)
    code = """
        secrets = json.loads(sys.stdin.readline())
        keys = dict(access_key_id=secrets["key"], secret_access_key=secrets["secret"], session_token=secrets["session"])
        hparams = {"lr": float(sys.argv[3]), "hub": {"api_key": secrets["hparam"]}, "db": f"postgres://me:{secrets['password']}@db/x"}
        loggers = [FileLogger(), TensorboardLogger(), logger(sys.argv[4], **keys), SAVER]
        with Run("net", hparams, loggers=loggers, dir=RUNS) as run:
            run.log_metrics({"loss": 1}, 1)
            run.save_checkpoint(state(1), step=run.attempt).wait(20)
            say("look")
            sys.stdin.readline()
    """
    monkeypatch.setattr(sys, "warnoptions", [])
    for attempt, url in enumerate((lab.server.url, gate.url), 1):
        if attempt == 2:
            gate.open(lab.server)
        arguments = ["--token", SECRETS["argument"], 0.1 * attempt, url, f"--api-key={SECRETS['argument']}"]
        trainer = lab.start(sys.executable, lab.write(code), *arguments, cwd=work)
        trainer.stdin.write(json.dumps(SECRETS) + "\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == "look\n"
        (uploader,) = lab.uploaders()
        look_for_secrets(lab, Path(f"/proc/{uploader}/cmdline").read_bytes())
        _, err = trainer.communicate("go\n", timeout=30)
        assert trainer.returncode == 0, err
        assert (("differ" in err) and ("lr: 0.1" in err)) == (attempt == 2)
        until(lambda: not lab.uploaders())
        look_for_secrets(lab, err.encode())

    facts = json.loads(lab.versions()[-1].open(".mandapa/run.json").read())
    assert facts["git"]["remote"].endswith("example.org/team/code.git")
    assert facts["command"][2] == "--token"
    hparams = contents(lab.versions()[-1])["hparams.yaml"].decode()
    assert "api_key" in hparams
    for saved in (lab.runs / "net/.run/backends").iterdir():
        withheld = json.loads(saved.read_bytes())["withheld"]
        assert sorted(withheld) == ["access_key_id", "secret_access_key", "session_token"]


def look_for_secrets(lab: Lab, *more: bytes) -> None:
    """None of them is in a file, an object, an asset or a record."""
    places: dict[str, bytes] = {str(number): data for number, data in enumerate(more)}
    for folder in (lab.runs, lab.folder / "cache"):
        for path in folder.rglob("*"):
            if path.is_file():
                places[str(path)] = path.read_bytes()
    store = lab.server.s3(lab.bucket)
    for info in store.list(""):
        places[info.key] = bytes(store.get(info.key))
    for version in lab.versions():
        places |= {f"{version.address}/{path}": version.open(path).read() for path in version.assets}
        places[version.address] = repr((version.message, version.metadata, version.facts)).encode()
    assert len(places) > 20
    found = [
        (place, name) for place, data in places.items() for name, secret in SECRETS.items() if secret.encode() in data
    ]
    assert not found


# -- reading back ------------------------------------------------------------------------------------------------------


def test_the_newest_of_twenty_checkpoints_is_fetched_alone(lab, gate, monkeypatch):
    """Its bytes and little more travel, for whoever reads the version and for a run that goes on elsewhere."""
    size = 1 << 20
    with Run("net", loggers=[lab.logger(), CheckpointSaver(format="safetensors")], dir=lab.runs) as run:
        run.log_bytes("other", os.urandom(3 * size))
        for step in range(1, 21):
            noise = np.random.default_rng(step).integers(0, 256, size, np.uint8)
            run.save_checkpoint({"at": np.array([step, 0]), "w": noise}, step=step)
    store = CountingObjectStore(lab.server.s3(lab.bucket))
    version = Repository(store)["net:latest"]
    result = version.download(lab.folder / "back", only="checkpoint/*")
    assert (result.files, size < result.bytes < size + 1000) == (1, True)
    assert size < store.bytes_read < size + 100_000
    assert sum(store.requests.values()) < 20

    gate.open(lab.server)
    monkeypatch.setenv("MANDAPA_CACHE_SIZE", "0")  # elsewhere nothing is at hand
    with Run("net", loggers=[lab.logger(gate.url)], dir=lab.folder / "elsewhere", resume="must") as run:
        found = run.latest_checkpoint()
        before = gate.received
        folder = Path(found.download())
        assert size < gate.received - before < size + 100_000
        assert (folder / "state.safetensors").read_bytes() == (
            lab.folder / "back/checkpoint/state.safetensors"
        ).read_bytes()
        before = gate.received
        found.download()  # what is here already is not fetched again
        assert gate.received - before < 100_000


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of TensorBoard's own
def test_tensorboard_reads_the_events_of_a_version(lab, tmp_path):
    """All scalars of both attempts, the first of which was killed, and the text log beside them."""
    code = """
        run = Run("net", {"lr": 0.1}, loggers=[FileLogger(), TensorboardLogger(), logger(), SAVER], dir=RUNS)
        begin = (run.attempt - 1) * 150 + 1
        print("attempt", run.attempt)
        for step in range(begin, begin + 150):
            run.log_metrics({"loss": step / 8, "lr": 0.5}, step)
        handle = run.save_checkpoint(state(step, size=10), step=step)
        run.log_metrics({"lost/with the process": 1}, step + 1)
        if run.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    """
    lab.finish(lab.python(code), -signal.SIGKILL)
    lab.finish(lab.python(code))
    version = lab.versions()[-1]
    version.download(tmp_path / "back")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(tmp_path / "back/tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    scalars = {name: [(item.step, item.value) for item in reader.Scalars(name)] for name in reader.Tags()["scalars"]}
    assert scalars["loss"] == [(step, step / 8) for step in range(1, 301)]
    assert scalars["lr"] == [(step, 0.5) for step in range(1, 301)]
    assert "hparams" in reader.Tags()["tensors"]
    for attempt, name in ((1, "logs-rank0.txt"), (2, "logs-rank0.attempt-2.txt")):
        text = (tmp_path / "back" / name).read_text()
        assert f"[stdout] attempt {attempt}\n" in text
        assert [float(line.split("loss: ")[1].split()[0]) for line in text.splitlines() if "loss: " in line] == [
            step / 8 for step in range(150 * attempt - 149, 150 * attempt + 1)
        ]
        assert "hparams  lr: 0.1\n" in text
