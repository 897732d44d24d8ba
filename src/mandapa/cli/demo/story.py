"""What ``mandapa demo`` does, step by step, and how it tells it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from io import StringIO
from typing import IO, Any

import click

import mandapa
from mandapa.cli.demo.training import ARTIFACT, Config, evaluate, load_data, load_model
from mandapa.cli.text import count, size
from mandapa.errors import CorruptionError, InvalidInputError, MandapaError
from mandapa.run.directory import RunDirectory
from mandapa.run.status import look

__all__ = ["Story"]

_RUN = re.compile(r"demo-([0-9]{1,9})")
_PATIENCE = 60.0  # seconds until an uploader that lives on must be done


class Story:
    """One run of the demo.

    Args:
        url: The repository; made if missing.
        out: A folder for working files; the directories of runs are made in it.
        epochs: How long to train; the trainer is killed half way.
        run_command: Runs a command line of `mandapa`; gives its exit code.
        quiet: Print nothing.
        embedded: The repository is the one that commands find by themselves in this folder.
    """

    def __init__(
        self, url: str, out: str, epochs: int, run_command: Callable[[list[str]], int], *, quiet: bool, embedded: bool
    ) -> None:
        self._run_command = run_command
        self._repo = mandapa.open(url, create=True)
        self._url = url
        self._quiet = quiet
        plain = embedded and not os.environ.get("MANDAPA_REPO")
        self._prefix = [] if plain else ["--repo", url]
        digits = self._repo.artifact(ARTIFACT)
        before = [*digits.versions(), *digits.deleted()] if digits.exists() else []
        runs = {version.run for version in before}
        if not all(_RUN.fullmatch(run) for run in runs):
            raise InvalidInputError(f"the artifact '{ARTIFACT}' in {url} is not the demo's: run it in another folder")
        # A run is what it is called: each call is a new one, also where a former call was stopped half way.
        folders = os.listdir(out) if os.path.isdir(out) else []
        number = 1 + max((int(found[1]) for found in map(_RUN.fullmatch, [*runs, *folders]) if found), default=0)
        self._name = f"demo-{number}"
        self._config = Config(epochs=epochs, seed=number)
        self._kill_at = epochs // 2 + 1
        self._out = out
        self._directory = os.path.join(out, self._name)
        self._restored = os.path.join(out, "best")
        self._step = 0
        self._waited = 0  # things without a commit when the trainer was killed
        self._result: dict[str, Any] = {"artifact": ARTIFACT, "run": self._name, "repository": self._repo.url}

    def run(self) -> dict[str, Any]:
        """Do it all; gives the facts.

        Raises:
            CorruptionError: The repository is not whole, or the restored model is not the one that was logged.
            MandapaError: The trainer failed.
        """
        self._say("A small network learns to read handwritten digits (1,797 images that come with scikit-learn).")
        self._say(f"Each epoch becomes a version of the artifact '{ARTIFACT}' in {self._url}: checkpoint, TensorBoard")
        self._say(f"events, log and hparams.yaml. This is run {self._name}; its directory is {self._directory}.")
        self._title(
            f"Train, and be killed while epoch {self._kill_at} of {self._config.epochs} is on its way to the store"
        )
        self._train(kill=True)
        self._title("What the dead trainer has handed over is not lost")
        self._outlive()
        self._title("Start the same program again, as on another machine")
        self._say(f"$ rm -r {self._directory}")
        shutil.rmtree(self._directory)
        self._train(kill=False)
        self._wait()
        self._look()
        self._check()
        self._restore()
        return self._result

    # -- training -----------------------------------------------------------------------------------------------------

    def _train(self, *, kill: bool) -> None:
        """Let the program train, and show what it prints."""
        self._say(f"$ python -m mandapa.cli.demo.training {self._url} {self._name} ...")
        with self._trainer() as (trainer, lines):
            for line in lines:
                self._say(line.rstrip("\n"))
                if found := re.match(r"resumed from (\S+):", line):
                    self._result["resumed_from"] = found[1]
                elif kill and line.startswith(f"epoch {self._kill_at} "):
                    os.kill(trainer.pid, signal.SIGKILL)
                    self._waited = sum(found.pending for found in look(RunDirectory(self._directory)).backends)
                    trainer.wait()
                    self._result["killed_in_epoch"] = self._kill_at
                    return
        if kill:
            raise MandapaError("the trainer ended before it could be killed")

    @contextmanager
    def _trainer(self) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
        """The training program in a session of its own, and what it prints; it never outlives the block."""
        arguments = [self._url, self._name, self._out, json.dumps(asdict(self._config))]
        command = [sys.executable, "-m", "mandapa.cli.demo.training", *arguments]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
            trainer = subprocess.Popen(  # noqa: S603 - our own program
                command, stdout=subprocess.PIPE, stderr=noise, text=True, start_new_session=True
            )
            assert trainer.stdout is not None
            try:
                yield trainer, trainer.stdout
                if trainer.wait() not in (0, -signal.SIGKILL):
                    noise.seek(0)
                    last = noise.read().strip().rpartition("\n")[2]
                    raise MandapaError(f"the training program failed: {last}")
            finally:
                trainer.kill()
                trainer.wait()
                trainer.stdout.close()

    def _outlive(self) -> None:
        """Show that the uploader, which nobody killed, commits what it was given, and ends."""
        things = count(self._waited, "thing")
        self._say(f"It was killed with SIGKILL, when {things} that it had handed over waited for a commit.")
        self._say("The uploader, a process of its own, commits what waits, and ends. May this machine go then?")
        self._wait()
        if self._command("status", self._directory):
            raise MandapaError(f"{self._directory}: not all is committed; .run/uploader.log there says why")

    def _wait(self) -> None:
        """Until there is no uploader any more."""
        directory, give_up = RunDirectory(self._directory), time.monotonic() + _PATIENCE
        while directory.uploader_lock().held():
            if time.monotonic() > give_up:
                raise MandapaError(f"the uploader of {self._directory} does not end; its .run/uploader.log says why")
            time.sleep(0.02)

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        digits = self._repo.artifact(ARTIFACT)
        mine = [version for version in digits.versions() if version.run == self._name]
        epochs = [version for version in mine if "epoch" in version.metadata]
        self._title("The history")
        self._command("log", ARTIFACT, "-n", str(len(mine)))
        self._title("What training changed, and what it cost")
        self._command("diff", epochs[0].address, epochs[-1].address)
        everything = [*digits.versions(), *digits.deleted()]
        logical, added = sum(version.size for version in everything), sum(version.added for version in everything)
        stored = sum(info.size for info in self._repo.store.list(""))
        self._say("")
        held = f"{count(len(everything), 'version')} of {size(logical)} together"
        self._say(f"{held}; the store holds {size(stored)} ({stored / logical:.0%}), logs and manifests included.")
        self._result.update(versions=[version.address for version in mine], logical=logical, added=added, stored=stored)

    def _check(self) -> None:
        self._title("Is every byte there?")
        if self._command("fsck", "--deep"):
            raise CorruptionError("the repository is not whole")

    def _restore(self) -> None:
        self._title("Take the best model out, and see that it is as good as was logged")
        shutil.rmtree(self._restored, ignore_errors=True)
        self._command("get", f"{ARTIFACT}:best", self._restored)
        logged = self._repo[f"{ARTIFACT}:best"].metadata["accuracy"]
        model, _ = load_model(self._restored)
        _, _, images, labels = load_data()
        accuracy = evaluate(model, images, labels)
        self._say(f"accuracy on {len(labels)} test images: {accuracy:.4f}; logged in training: {logged:.4f}")
        self._result.update(best=self._repo[f"{ARTIFACT}:best"].address, accuracy=accuracy, logged_accuracy=logged)
        if accuracy != logged:
            raise CorruptionError(f"the restored model has accuracy {accuracy}, and {logged} was logged")
        self._say("")
        name = " ".join(["mandapa", *self._prefix])
        self._say(
            f"Go on: {name} show {ARTIFACT}:best    {name} ls {ARTIFACT}    {name} cat {ARTIFACT}:best/hparams.yaml"
        )
        self._say(f"Or look at the curves: tensorboard --logdir {self._restored}/tensorboard")

    # -- telling ------------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if not self._quiet:
            click.echo(text)

    def _title(self, text: str) -> None:
        self._step += 1
        self._say("")
        self._say(click.style(f"{self._step}. {text}", bold=True))

    def _command(self, *arguments: str) -> int:
        """Run a command as a user would, after showing it."""
        self._say("$ " + " ".join(["mandapa", *self._prefix, *arguments]))
        with redirect_stdout(StringIO()) if self._quiet else nullcontext():
            return self._run_command(["--repo", self._url, *arguments])
