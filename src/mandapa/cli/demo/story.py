"""What ``mandapa demo`` does, step by step, and how it tells it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from io import StringIO
from typing import Any

import click

import mandapa
from mandapa.cli.demo.training import ARTIFACT, Config, evaluate, load_data, load_model
from mandapa.cli.text import count, size
from mandapa.errors import CorruptionError, InvalidInputError, MandapaError

__all__ = ["Story"]


class Story:
    """One run of the demo.

    Args:
        url: The repository; made if missing.
        out: A folder for working files.
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
        if any(not run.startswith("demo-") for run in runs):
            raise InvalidInputError(f"the artifact '{ARTIFACT}' in {url} is not the demo's: run it in another folder")
        number = 1 + len(runs)
        self._config = Config(run=f"demo-{number}", epochs=epochs, seed=number)
        self._kill_at = epochs // 2 + 1
        self._work = os.path.join(out, self._config.run)
        self._restored = os.path.join(out, "best")
        self._step = 0
        self._result: dict[str, Any] = {"artifact": ARTIFACT, "run": self._config.run, "repository": self._repo.url}

    def run(self) -> dict[str, Any]:
        """Do it all; gives the facts.

        Raises:
            CorruptionError: The repository is not whole, or the restored model is not the one that was logged.
            MandapaError: The trainer failed.
        """
        self._say("A small network learns to read handwritten digits (1,797 images that come with scikit-learn).")
        self._say(f"Each epoch becomes a version of the artifact '{ARTIFACT}' in {self._url}: checkpoint, TensorBoard")
        self._say(f"events, log and hparams.yaml. This is run {self._config.run}; it works in {self._work}/.")
        shutil.rmtree(self._work, ignore_errors=True)
        self._title(f"Train, and be killed in epoch {self._kill_at} of {self._config.epochs}")
        self._train(kill=True)
        self._title("Start the same program again")
        # As on another machine: nothing is left but the repository.
        shutil.rmtree(self._work, ignore_errors=True)
        self._train(kill=False)
        self._look()
        self._check()
        self._restore()
        return self._result

    # -- training -----------------------------------------------------------------------------------------------------

    def _train(self, *, kill: bool) -> None:
        self._say(f"$ python -m mandapa.cli.demo.training {self._url} {self._work} ...")
        with self._trainer() as (trainer, events):
            for event in events:
                if "resumed" in event:
                    self._result["resumed_from"] = event["resumed"]
                    self._say(
                        f"resumed from {event['resumed']}: model, optimizer and random state of epoch {event['epoch']}"
                    )
                elif "version" in event:
                    self._epoch(event)
                elif kill and event.get("committing") == self._kill_at:
                    os.kill(trainer.pid, signal.SIGKILL)
                    trainer.wait()
                    self._killed()
                    return
        if kill:
            raise MandapaError("the trainer ended before it could be killed")

    @contextmanager
    def _trainer(self) -> Iterator[tuple[subprocess.Popen[str], Iterator[dict[str, Any]]]]:
        """The training program in a session of its own, and what it reports; it never outlives the block."""
        arguments = [self._url, self._work, json.dumps(asdict(self._config))]
        command = [sys.executable, "-m", "mandapa.cli.demo.training", *arguments]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
            trainer = subprocess.Popen(  # noqa: S603 - our own program
                command, stdout=subprocess.PIPE, stderr=noise, text=True, start_new_session=True
            )
            assert trainer.stdout is not None
            try:
                yield trainer, map(json.loads, trainer.stdout)
                if trainer.wait() not in (0, -signal.SIGKILL):
                    noise.seek(0)
                    last = noise.read().strip().rpartition("\n")[2]
                    raise MandapaError(f"the training program failed: {last}")
            finally:
                trainer.kill()
                trainer.wait()
                trainer.stdout.close()

    def _epoch(self, event: dict[str, Any]) -> None:
        version = self._repo[event["version"]]
        best = ", the best so far" if "best" in version.names else ""
        numbers = f"loss {event['loss']:.4f}  accuracy {event['accuracy']:.4f}"
        self._say(f"epoch {event['epoch']}  {numbers}  -> {version.address}{best}")

    def _killed(self) -> None:
        """Say what the store has after the kill."""
        newest = self._repo.artifact(ARTIFACT).version()
        self._result["killed_in_epoch"] = self._kill_at
        done = newest.run == self._config.run and newest.metadata["epoch"] == self._kill_at
        moment = "right after its commit" if done else "in the middle of its commit"
        self._say(f"epoch {self._kill_at}  killed with SIGKILL, {moment}")
        self._say(f"The newest version is {newest.address}, of epoch {newest.metadata['epoch']}, and it is whole.")

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        digits = self._repo.artifact(ARTIFACT)
        mine = [version for version in digits.versions() if version.run == self._config.run]
        self._title("The history")
        self._command("log", ARTIFACT, "-n", str(len(mine)))
        self._title("What training changed, and what it cost")
        self._command("diff", mine[0].address, mine[-1].address)
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
