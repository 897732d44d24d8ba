"""A state that was handed over in memory is not lost with the trainer, with the uploader, or with both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lab import Lab, until

from mandapa import Limits, Run
from mandapa.loggers import ObjectStoreLogger
from mandapa.run.checkpoints import load_state
from mandapa.run.directory import RunDirectory
from mandapa.run.journal import ENTRIES, CheckpointEntry, File, JournalReader
from mandapa.run.resume import newest_local
from mandapa.run.ring import is_held, memory_of
from mandapa.run.status import look

TRAINER = """
if sys.argv[1] == "torch":
    from torch import arange, full
else:
    from numpy import arange, full  # it starts sooner

def made(step):
    return {"w": full((1 << 19,), float(step)), "few": arange(5), "step": step}

with Run("net", loggers=[logger(), CheckpointSaver(format=sys.argv[1])], dir=RUNS) as run:
    found = run.latest_checkpoint()
    say(found.step if found else 0)
    for line in sys.stdin:
        say(run.save_checkpoint(made(int(line)), step=int(line)).state)
"""


def files(directory: RunDirectory) -> list[File]:
    entries = JournalReader(directory.journal(0), ENTRIES).new()
    return [file for entry in entries if isinstance(entry, CheckpointEntry) for file in entry.files]


def train(lab: Lab, format_: str = "safetensors") -> subprocess.Popen[str]:
    return lab.python(TRAINER, format_)


def said(trainer: subprocess.Popen[str]) -> str:
    assert trainer.stdout is not None
    return trainer.stdout.readline().strip()


def save(trainer: subprocess.Popen[str], step: int) -> str:
    assert trainer.stdin is not None
    trainer.stdin.write(f"{step}\n")
    trainer.stdin.flush()
    return said(trainer)


def step_in(data: bytes, folder: Path) -> int:
    (folder / "found").write_bytes(data)
    state = load_state(str(folder / "found"))
    assert state["w"].tolist() == [float(state["step"])] * (1 << 19)
    assert state["few"].tolist() == [0, 1, 2, 3, 4]
    return int(state["step"])


def committed(lab: Lab) -> list[int]:
    """The steps inside the checkpoints of all versions that have one, in order."""
    versions = [version for version in lab.versions() if "step" in version.metadata]
    found = []
    for version in versions:
        (path,) = [path for path in version.assets if path.startswith("checkpoint/")]
        found.append(step_in(version.open(path).read(), lab.folder))
    return found


def stop_uploader(lab: Lab) -> int:
    (pid,) = until(lab.uploaders)
    os.kill(pid, signal.SIGSTOP)
    return int(pid)


@pytest.mark.parametrize(
    ("dead", "format_"),
    [("trainer", "safetensors"), ("uploader", "safetensors"), ("both", "safetensors"), ("both", "torch")],
)
def test_held(lab: Lab, dead: str, format_: str) -> None:
    """The call has returned, nothing is on the disk yet, and then somebody dies: it is committed all the same."""
    trainer = train(lab, format_)
    assert said(trainer) == "0"
    uploader = stop_uploader(lab)
    assert [save(trainer, 1), save(trainer, 2), save(trainer, 3)] == ["held"] * 3
    directory = RunDirectory(lab.runs / "net")
    assert [is_held(directory, file) for file in files(directory)] == [True, True, False]  # two slots, then a file
    assert look(directory).held == 2
    assert "2 checkpoints not on the disk yet" in lab.mandapa("status", lab.runs / "net", code=1)
    if dead in ("uploader", "both"):
        os.kill(uploader, signal.SIGKILL)
    if dead in ("trainer", "both"):
        lab.kill(trainer)
    if dead == "trainer":
        os.kill(uploader, signal.SIGCONT)
    if dead == "uploader":
        trainer.communicate(timeout=30)
    if dead == "both":
        lab.mandapa("sync", lab.runs / "net")
    until(lab.is_safe)
    assert committed(lab) == [1, 2, 3]
    until(lambda: not lab.uploaders())
    assert memory_of(directory, 0) == 0
    assert all(file.memory and not os.path.exists(file.memory.slot) for file in files(directory)[:2])


def test_the_next_attempt_goes_on_from_it(lab: Lab) -> None:
    """Both died, and a run of the name writes what was in memory, resumes from it, and commits it."""
    trainer = train(lab)
    assert said(trainer) == "0"
    uploader = stop_uploader(lab)
    save(trainer, 4)
    lab.kill(trainer)
    os.kill(uploader, signal.SIGKILL)
    again = train(lab)
    assert said(again) == "4"
    assert save(again, 4) == "held"  # the same step once more: neither takes the place of the other
    again.communicate(timeout=30)
    assert committed(lab) == [4, 4]
    assert memory_of(RunDirectory(lab.runs / "net"), 0) == 0 or until(lambda: not lab.uploaders())


def test_the_machine_was_started_again(lab: Lab) -> None:
    """Memory is empty then: what was durable is gone on from, what was not is told of, and nothing crashes."""
    trainer = train(lab)
    assert said(trainer) == "0"
    save(trainer, 1)
    until(lab.is_safe)
    uploader = stop_uploader(lab)
    save(trainer, 2)
    lab.kill(trainer)
    os.kill(uploader, signal.SIGKILL)
    directory = RunDirectory(lab.runs / "net")
    memory = files(directory)[-1].memory
    assert memory is not None
    os.unlink(memory.slot)
    assert look(directory).held == 0
    lab.mandapa("status", lab.runs / "net", code=1)
    again = lab.start(sys.executable, lab.write(TRAINER), "safetensors")  # it may be warned
    assert said(again) == "1"
    until(lambda: "the checkpoint of step 2" in str(lab.status()["backends"]))
    assert save(again, 2) == "held"
    again.communicate(timeout=30)
    assert committed(lab) == [1, 2]


def test_the_newest_state_is_found_at_once(lab: Lab) -> None:
    """Also while nobody else makes a file of it; and it is durable no sooner than it is in one."""
    with Run("net", loggers=[lab.logger()], dir=lab.runs) as run:
        uploader = stop_uploader(lab)
        handle = run.save_checkpoint({"w": torch.full((1 << 19,), 7.0)}, step=7)
        (file,) = files(RunDirectory(lab.runs / "net"))
        assert is_held(RunDirectory(lab.runs / "net"), file)
        assert handle.state == "held"
        found = run.latest_checkpoint()
        assert found is not None
        assert torch.equal(found.load()["w"], torch.full((1 << 19,), 7.0))
        os.kill(uploader, signal.SIGCONT)
        assert handle.wait(30)
        assert handle.state == "committed"
        pid = os.fork()
        if not pid:
            os._exit(0)  # a worker of a DataLoader comes and goes
        os.waitpid(pid, 0)
        assert run.save_checkpoint({"w": torch.ones(1 << 19)}, step=8).wait(30)


def test_a_full_disk_while_it_is_written(lab: Lab) -> None:
    """The state stays in memory, is not called durable, and is committed when there is room."""
    with Run("net", loggers=[lab.logger()], dir=lab.runs) as run:
        inner = lab.runs / "net/.run"
        (inner / "settling.tmp").mkdir()  # nobody can write there
        handle = run.save_checkpoint({"w": torch.ones(1 << 19)}, step=1)
        until(lambda: "cannot be written" in (inner / "uploader.log").read_text())
        assert handle.state == "held"
        (inner / "settling.tmp").rmdir()
        assert handle.wait(30)
        assert lab.versions()[0].metadata["step"] == 1


def test_what_is_written_at_once(tmp_path: Path) -> None:
    """A run without backend, and a state that is small: nobody is asked to write it."""
    with Run("alone", dir=tmp_path) as run:
        run.save_checkpoint({"w": torch.ones(1 << 19)}, step=1)
    store = ObjectStoreLogger(str(tmp_path / "store"))
    with Run("small", loggers=[store], dir=tmp_path) as run:
        run.save_checkpoint({"w": torch.ones(100)}, step=1)
    for name in ("alone", "small"):
        directory = RunDirectory(tmp_path / name)
        assert [file.memory for file in files(directory)] == [None]
        assert not os.path.exists(directory.inner + "/rank0.slots")
        found = newest_local(directory, 0, ())
        assert found is not None
        assert found.step == 1


def test_limits_count_what_is_in_memory(lab: Lab) -> None:
    """What waits is what was handed over, wherever it lies."""
    limits = Limits(staging_bytes=5 << 20)
    with Run("net", loggers=[lab.logger()], dir=lab.runs, limits=limits) as run:
        uploader = stop_uploader(lab)
        state = {"w": torch.ones(1 << 19)}
        assert [run.save_checkpoint(state, step=step).state for step in (1, 2)] == ["held", "held"]
        with pytest.warns(RuntimeWarning, match="no room"):
            assert run.save_checkpoint(state, step=3).state == "skipped"
        os.kill(uploader, signal.SIGCONT)
    assert committed_steps(lab) == [1, 2]


def committed_steps(lab: Lab) -> list[int]:
    return [version.metadata["step"] for version in lab.versions() if "step" in version.metadata]


def test_a_tiny_shared_memory(disk: Path) -> None:
    """As containers have it: the memory is a file beside the run, for trainer and uploader alike."""
    program = disk / "program.py"
    program.write_text(
        "import os, numpy\n"
        "from mandapa import CheckpointSaver, Run\n"
        "from mandapa.loggers import ObjectStoreLogger\n"
        "with Run('net', loggers=[ObjectStoreLogger('store'), CheckpointSaver(format='safetensors')]) as run:\n"
        "    for step in (1, 2, 3):\n"
        "        assert run.save_checkpoint({'w': numpy.full(1 << 19, step)}, step=step).wait(30)\n"
        "        assert not [name for name in os.listdir('/dev/shm') if name.startswith('mandapa-')]\n"
        "        print([name for name in os.listdir('mandapa-runs/net/.run') if name.endswith('.slot')])\n"
        "    assert run.latest_checkpoint().load()['w'][0] == 3\n"
    )
    command = 'mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77; exec "$0" -W error program.py'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, sys.executable],
        cwd=disk,
        capture_output=True,
        text=True,
        timeout=90,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this system lets nobody mount")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0] == lines[1] == lines[2] != "[]"
    until(lambda: not [name for name in os.listdir(disk / "mandapa-runs/net/.run") if name.endswith(".slot")])


@pytest.mark.slow
def test_the_benchmark_prints_its_table() -> None:
    """With little to save it says nothing of speed."""
    script = Path(__file__).parents[2] / "benchmarks" / "save_stall.py"
    words = [sys.executable, "-W", "error", str(script), "--mb", "4", "--rounds", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| ") == 5
    assert "nan" not in done.stdout
