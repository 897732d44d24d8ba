"""`make demo-composer`: Composer trains, is killed, goes on elsewhere, and ends with the weights it would have had.

It drives `run_composer_trainer.py` as a user would, with an S3 server on this machine, and compares what is in the
store at the end with a training that nobody disturbed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch

import mandapa
from mandapa.testing.server import serve

HERE = Path(__file__).parent.resolve()
OUT = Path("demo-out/composer")
URL = "s3://team-bucket/runs"
EPOCHS = 4
ARGUMENTS = [
    "data.batch_size=8",
    f"trainer.max_duration={EPOCHS}ep",
    "trainer.progress_bar=false",
    "trainer.log_to_console=true",
    "trainer.console_log_interval=10ba",
]
BATCH = re.compile(r"\[epoch=(\d+)]\[batch=(\d+)/(\d+)]:")
LOSS = re.compile(r"\s+Train loss/train/total: (\S+)")


def main() -> int:
    """Tell it step by step; 0 when the weights are equal."""
    shutil.rmtree(OUT, ignore_errors=True)
    with serve() as server:
        os.environ.update(AWS_ENDPOINT_URL=server.url, AWS_REGION="us-east-1")
        os.environ.update(AWS_ACCESS_KEY_ID="demo", AWS_SECRET_ACCESS_KEY="demo")
        os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")  # one thread adds up in one order
        say("Composer trains a small network to read handwritten digits. Its ObjectStoreLogger makes a version of each")
        say(f"checkpoint in {URL}; an S3 server runs on this machine for as long as the demo.")

        title(1, "Train, and be killed in the second epoch")
        train("machine-1", kill_in=2)

        title(2, "What the dead trainer has handed over is not lost")
        say("The uploader, a process of its own, commits what waits. May this machine go then?")
        command("sync", "mandapa-runs", folder="machine-1", quiet=True)
        command("status", "mandapa-runs", folder="machine-1")

        title(3, "Start the same command on another machine: Composer's autoresume asks the store")
        train("machine-2")

        title(4, "The history, and what is in the last version")
        command("--repo", URL, "log", "digits")
        command("--repo", URL, "ls", "digits")

        title(5, "Are these the weights of a training that nobody has killed?")
        train("undisturbed", "loggers.object_store=false")
        return compare()


# -- training ----------------------------------------------------------------------------------------------------------


def train(machine: str, *overrides: str, kill_in: int = 0) -> None:
    """Run the example in an empty folder, which stands for a machine, and tell of each epoch."""
    folder = OUT / machine
    folder.mkdir(parents=True)
    say(f"$ mkdir {folder} && cd {folder}")
    say(" ".join(["$ python run_composer_trainer.py digits.yaml", *overrides, "..."]))
    program = [str(HERE / "run_composer_trainer.py"), str(HERE / "digits.yaml"), *overrides, *ARGUMENTS]
    last = deque[str](maxlen=20)
    trainer = subprocess.Popen(
        [sys.executable, *program],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert trainer.stdout is not None
    epoch = batch = told = 0
    try:
        for line in trainer.stdout:
            last.append(line)
            if found := BATCH.match(line):
                epoch, batch = int(found[1]), int(found[2])
                if epoch == kill_in and batch >= 30:
                    trainer.send_signal(signal.SIGKILL)
                    say(f"killed with SIGKILL in epoch {epoch}, batch {batch} of {found[3]}")
                    return
            elif (found := LOSS.match(line)) and epoch > told:
                told = epoch
                say(f"epoch {epoch}  batch {batch}  loss {found[1]}")
        if trainer.wait() or kill_in:
            raise SystemExit("".join(last) + f"the training in {folder} failed, or ended too early")
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()


# -- afterwards --------------------------------------------------------------------------------------------------------


def compare() -> int:
    """Look into the last checkpoint of the store, and into that of the undisturbed training."""
    (own,) = (OUT / "undisturbed/digits/checkpoints").glob(f"ep{EPOCHS}-*.pt")
    version = mandapa.open(URL)["digits"]
    (path,) = (path for path in version.assets if path.endswith(own.name))
    with version.open(path) as file:
        resumed = weights(file)
    undisturbed = weights(own)
    different = [name for name in undisturbed if not torch.equal(undisturbed[name], resumed[name])]
    what = f"{version.address}/{path}"
    if different or resumed.keys() != undisturbed.keys():
        say(f"The weights in {what} differ from those of the undisturbed training: {', '.join(different)}")
        return 1
    count = sum(tensor.numel() for tensor in resumed.values())
    say(f"All {count:,} weights in {what} equal those of the undisturbed training.")
    return 0


def weights(file: Any) -> dict[str, torch.Tensor]:
    """The model's, of a checkpoint of Composer: it is a pickle, so only of one's own."""
    return torch.load(file, weights_only=False, map_location="cpu")["state"]["model"]


def command(*words: str, folder: str = "", quiet: bool = False) -> None:
    """Run `mandapa` as a user would, after showing it."""
    say(" ".join(["$ mandapa", *words]))
    to = subprocess.DEVNULL if quiet else None
    subprocess.run(
        [sys.executable, "-m", "mandapa.cli", *words], cwd=OUT / folder if folder else None, stdout=to, check=True
    )


def title(number: int, text: str) -> None:
    """Begin a step."""
    say(f"\n{number}. {text}")


def say(text: str) -> None:
    """Print it now: commands print in between."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
