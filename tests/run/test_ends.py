"""How trainers end, by themselves or killed, one rank or several: all that they handed over is in versions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import stores
from lab import Lab, contents, remove, steps, until

from mandapa import CheckpointSaver, Run
from mandapa.errors import AccessDeniedError
from mandapa.loggers import ObjectStoreLogger
from mandapa.run.directory import RunDirectory

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")


# -- several ranks -----------------------------------------------------------------------------------------------------

RANKS = """
run = Run("net", loggers=[logger(), SAVER], dir=RUNS)
rank, other, attempt = run.rank, 1 - run.rank, sys.argv[1]

def meet(at):  # a barrier
    open(f"{RUNS}/../{attempt}-{at}-{rank}", "w").close()
    while not os.path.exists(f"{RUNS}/../{attempt}-{at}-{other}"):
        time.sleep(0.002)
"""


def torchrun(lab: Lab, code: str, attempt: int) -> subprocess.Popen[str]:
    """Two ranks, as torchrun starts them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=0"]
    log = open(lab.folder / f"torchrun-{attempt}.log", "w")  # noqa: SIM115 - handed to the process
    with log:
        return lab.start(sys.executable, *launcher, lab.write(RANKS + textwrap.dedent(code)), attempt, stderr=log)


def test_a_rank_is_killed_and_both_go_on_from_the_newest_whole_checkpoint(lab):
    """A version has the parts of one step or of none; the part that was left alone is kept beside; nobody is behind."""
    code = """
        begun = run.latest_checkpoint()
        begin = begun.step + 1 if begun else 1
        if begun:
            say(f"resumed {rank}: {begun.load()['at'].tolist()} of {sorted(os.listdir(begun.download()))}")
        meet("begin")
        with run:
            for step in range(begin, begin + 6):
                if attempt == "1" and rank == 1 and step == 6:
                    while not os.path.exists(f"{RUNS}/../1-saved-0"):
                        time.sleep(0.002)
                    os.kill(os.getpid(), signal.SIGKILL)
                run.save_checkpoint(state(step, rank), step=step, metrics={f"loss/{rank}": step})
                if step == 6:
                    open(f"{RUNS}/../1-saved-{rank}", "w").close()
                run.log_bytes(f"notes/{rank}-{step}", b"")
                meet(step)
    """
    first = torchrun(lab, code, 1)
    lab.finish(first, 1)
    lab.mandapa("sync", lab.runs)
    found = {version.metadata["step"]: steps(version) for version in lab.versions() if "step" in version.metadata}
    parts = {f"checkpoint/state-rank{rank}.safetensors": rank for rank in (0, 1)}
    assert found == {step: {path: (step, rank) for path, rank in parts.items()} for step in range(1, 6)}
    newest = lab.versions()[-1]
    assert steps(newest) == found[5]
    lone = "incomplete-checkpoint/step-6/state-rank0.safetensors"
    assert steps(newest, "incomplete-checkpoint") == {lone: (6, 0)}
    notes = {path for path in newest.assets if path.startswith("notes/")}
    assert notes >= {f"notes/{rank}-{step}" for rank in (0, 1) for step in range(1, 6)}

    out = lab.finish(torchrun(lab, code, 2))
    files = [path.removeprefix("checkpoint/") for path in parts]
    assert sorted(out.splitlines()) == [f"resumed {rank}: [5, {rank}] of {files}" for rank in (0, 1)]
    found = {version.metadata["step"]: steps(version) for version in lab.versions() if "step" in version.metadata}
    assert found == {step: {path: (step, rank) for path, rank in parts.items()} for step in range(1, 12)}
    assert "all is committed" in lab.mandapa("status", lab.runs)
    assert not steps(lab.versions()[-1], "incomplete-checkpoint")


def test_rank_0_saves_for_all(lab):
    """Rank 1 has a run open and never saves: versions are made all the same, while training goes on."""
    code = """
        with run:
            meet("begin")
            if rank == 0:
                handles = [run.save_checkpoint(state(step), step=step) for step in (1, 2, 3)]
                say([handle.wait(10) for handle in handles[:2]])
            run.log_metrics({"loss": 1}, step=1)
            meet("end")
    """
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    ranks = [
        lab.python(RANKS + textwrap.dedent(code), 1, env=os.environ | sizes | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    assert [lab.finish(rank) for rank in ranks] == ["[True, True]\n", ""]
    found = {version.metadata["step"]: steps(version) for version in lab.versions() if "step" in version.metadata}
    assert found == {step: {"checkpoint/state-rank0.safetensors": (step, 0)} for step in (1, 2, 3)}


# -- killed trainers ---------------------------------------------------------------------------------------------------

KILLED = """
loggers = [FileLogger(), TensorboardLogger(), logger(), SAVER]
with Run("net", loggers=loggers, limits=Limits(linger=LINGER), dir=RUNS) as run:
    for step in range(1, 4):
        run.log_metrics({"loss": step}, step)
        run.log_bytes(f"notes/{step}", b"%d" % step)
        run.save_checkpoint(state(step), step=step)
    run.log_bytes("notes/last", b"last")
    say("go")
    sys.stdin.readline()
"""


def test_the_uploader_outlives_a_killed_trainer_until_all_is_committed(lab):
    """Nobody is needed for that, and then it ends by itself."""
    trainer = lab.python("LINGER = 600\n" + KILLED)
    assert trainer.stdout.readline() == "go\n"
    lab.kill(trainer)
    until(lambda: not lab.uploaders(), 15)
    assert not lab.status()["running"]
    versions = lab.versions()
    assert [version.metadata["step"] for version in versions if "step" in version.metadata] == [1, 2, 3]
    assert {path: data for path, data in contents(versions[-1]).items() if path.startswith("notes/")} == {
        "notes/1": b"1",
        "notes/2": b"2",
        "notes/3": b"3",
        "notes/last": b"last",
    }
    assert steps(versions[-1]) == {"checkpoint/state.safetensors": (3, 0)}
    assert "all is committed" in lab.mandapa("status", lab.runs)


def test_the_uploader_gives_up_when_it_has_lingered(lab, gate, monkeypatch):
    """With a dead store it ends, nothing is lost, and whoever reads what the trainer prints does not wait for it."""
    monkeypatch.setenv("LAB_URL", gate.url)
    monkeypatch.setenv("LAB_PATIENCE", "0.5")
    trainer = lab.python("LINGER = 3\nimport warnings; warnings.simplefilter('default')\n" + KILLED)
    assert trainer.stdout.readline() == "go\n"
    (uploader,) = lab.uploaders()
    trainer.kill()
    begin = time.monotonic()
    out, err = trainer.communicate(timeout=2)
    assert lab.uploaders() == [uploader]
    assert (out, err.count("RuntimeWarning")) == ("", 1)
    until(lambda: not lab.uploaders(), 10)
    assert 2 < time.monotonic() - begin < 10
    assert "nobody is committing this" in lab.mandapa("status", lab.runs, code=1)
    assert not lab.status()["running"]
    gate.open(lab.server)
    lab.mandapa("sync", lab.runs)
    assert steps(lab.versions()[-1]) == {"checkpoint/state.safetensors": (3, 0)}
    assert contents(lab.versions()[-1])["notes/last"] == b"last"


def test_what_a_killed_trainer_had_half_taken_goes_at_the_next_start(lab):
    """Or a machine that is taken away again and again would have a part of a checkpoint more each time."""
    large = lab.folder / "source/large"
    large.parent.mkdir()
    with open(large, "wb") as file:
        file.truncate(2 << 30)
    calls = {
        "copy": "run.log_asset(sys.argv[1])",
        "save": "mandapa.run.saving.SMALL = 1 << 40\n"  # to the disk, not to memory
        "run.save_checkpoint({'w': numpy.zeros(1 << 30, numpy.uint8)}, step=1)",
        "folder": "run.log_artifact('sub', os.path.dirname(sys.argv[1]))",
    }
    program = """
        with Run("net", loggers=[logger(), SAVER], dir=RUNS) as run:
            say("go")
            exec(sys.argv[2])
    """
    folders = [lab.runs / "net/.run/staged", lab.runs / "net/checkpoints"]

    def bytes_there() -> int:
        return sum(path.stat().st_blocks * 512 for folder in folders for path in folder.rglob("*") if path.is_file())

    for call in calls.values():
        trainer = lab.python(program, large, call)
        assert trainer.stdout.readline() == "go\n"
        before = bytes_there()
        until(lambda before=before: bytes_there() > before + 1_000_000)
        lab.kill(trainer)
        assert bytes_there() > 1_000_000
        lab.finish(lab.python(program, large, "pass"))
        assert bytes_there() < 1_000_000
    assert lab.is_safe()


def test_what_a_killed_uploader_said_last_is_not_believed(lab):
    """A run that begins asks the store anew whether it may write, and does not go by an answer of long ago."""
    denied = lab.folder / "denied"
    options = {"path": str(lab.folder / "repo"), "denied": str(denied)}
    program = """
        import stores
        run = Run("net", loggers=[ObjectStoreLogger(stores.Moody, json.loads(sys.argv[1]))], dir=RUNS)
        os.kill(json.load(open(f"{run.dir}/.run/status.json"))["pid"], signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    lab.finish(lab.python(program, json.dumps(options)), -signal.SIGKILL)
    assert lab.status()["running"]  # as it says
    until(lambda: not RunDirectory(lab.runs / "net").uploader_lock().held())  # a kill takes its time
    denied.touch()
    with pytest.raises(AccessDeniedError, match="no, not now"):
        Run("net", loggers=[ObjectStoreLogger(stores.Moody, options)], dir=lab.runs)


def test_a_run_whose_uploader_never_came_up_is_told_and_synced(lab, monkeypatch):
    """Where a stopped 'mandapa sync' has the uploader's place all the time, nothing passes for committed."""
    monkeypatch.setenv("LAB_PATIENCE", "0.2")
    lock = RunDirectory(lab.runs / "net", "net").uploader_lock()
    assert lock.take()
    try:
        program = """
            import warnings
            warnings.simplefilter("ignore")
            run = Run("net", loggers=[logger()], dir=RUNS)
            run.log_bytes("a", b"1")
            os.kill(os.getpid(), signal.SIGKILL)
        """
        lab.finish(lab.python(program), -signal.SIGKILL)
        assert "this machine must stay" in lab.mandapa("status", lab.runs, code=1)
    finally:
        lock.release()
    assert "nobody is committing this" in lab.mandapa("status", lab.runs, code=1)
    lab.mandapa("sync", lab.runs)
    assert contents(lab.versions()[-1]) == {"a": b"1"}


def test_a_run_is_begun_again_where_another_was_removed(lab):
    """The uploader of a run whose folder was taken away ends, and says and commits nothing for the next one there."""
    for step in range(1, 4):
        saver = CheckpointSaver(format="safetensors")
        with Run("net", loggers=[lab.logger(), saver], dir=lab.runs) as run:
            found = run.latest_checkpoint()
            assert (found and found.step) == (step - 1 or None)
            run.save_checkpoint({"at": np.array([step, 0])}, step=step)
        remove(lab.runs)
    until(lambda: not lab.uploaders(), 5)
    assert not lab.runs.exists()
    assert [version.message for version in lab.versions()] == [
        word for step in range(1, 4) for word in (f"step {step}", "finished")
    ]


ENDS = {
    "nothing": ("pass", "finished", 0),
    "raises": ("raise ValueError('of the test')", "failed", 1),
    "with-exit": ("with run: sys.exit(0)", "finished", 0),
    "with-exit-3": ("with run: sys.exit(3)", "failed", 3),
    "with-raises": ("with run: raise ValueError('of the test')", "failed", 1),
    "with-interrupt": ("with run: raise KeyboardInterrupt", "failed", -signal.SIGINT),
}


def test_a_program_that_ends_has_committed_everything(lab):
    """Whether or not anybody calls close, and however it ends; and the last version says how."""
    program = """
        run = Run(sys.argv[1], loggers=[FileLogger(capture_stderr=False), logger()], dir=RUNS)
        run.log_bytes("a", b"1")
        run.log_metrics({"loss": 0.5}, 1)
        exec(sys.argv[2])
    """
    trainers = {name: lab.python(program, name, end) for name, (end, _, _) in ENDS.items()}
    for name, trainer in trainers.items():
        lab.finish(trainer, ENDS[name][2])
    assert lab.mandapa("status", lab.runs).splitlines()[-1] == "all is committed: this machine may go"
    for name, (_, status, _) in ENDS.items():
        version = lab.versions(artifact=name)[-1]
        assert contents(version)["a"] == b"1"
        assert b"loss: 0.5" in contents(version)["logs-rank0.txt"]
        facts = json.loads(version.open(".mandapa/run.json").read())
        assert (name, facts["status"], facts["ended"] >= facts["started"]) == (name, status, True)
    until(lambda: not lab.uploaders(), 5)
