"""Ways to save a checkpoint and small files of a training, and what each needs to be measured on equal terms."""

from __future__ import annotations

import os
import shutil
import urllib.request
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import Place, children, end_uploader, uploader_of, wait_for
from work import Training

from mandapa import loggers


class Saver:
    """Opened when it is made, and ready: what that takes is not measured."""

    title = ""
    needs = ""
    """The package that has to be installed."""
    stores = True
    """Whether what it has saved is in the store."""

    def __init__(self, home: Path, place: Place) -> None:
        self.home = home
        self.place = place

    def begin(self) -> None:
        """Not measured: whatever precedes a checkpoint, or some small files."""

    def save(self, training: Training, step: int) -> None:
        """Save a checkpoint; training goes on when it returns."""

    def wait(self) -> None:
        """Until the checkpoint, or the small files, are where they are safe."""

    def log(self, path: Path, name: str) -> None:
        """Hand over a small file."""

    def end(self, step: int) -> None:
        """Not measured: what is no longer needed goes."""

    def processes(self) -> list[int]:
        """The process ids of its own processes, without the training's."""
        return []

    def close(self) -> None:
        """Nothing of it is left."""


class TorchSave(Saver):
    """Checkpoints and copies to files on the local disk."""

    title = "torch.save only, to a file"
    stores = False

    def path(self, step: int) -> Path:
        return self.home / f"{type(self).__name__}-{step}.pt"

    def save(self, training: Training, step: int) -> None:
        torch.save(training.state(), self.path(step))

    def log(self, path: Path, name: str) -> None:
        shutil.copyfile(path, self.home / name)

    def end(self, step: int) -> None:
        for path in self.home.glob(f"{type(self).__name__}-*"):
            path.unlink()


class Boto3(TorchSave):
    """The upload that a program does itself, and waits for."""

    title = "torch.save, boto3's upload_file"
    stores = True

    def __init__(self, home: Path, place: Place) -> None:
        super().__init__(home, place)
        with warnings.catch_warnings():  # botocore's own use of what Python has deprecated
            warnings.simplefilter("ignore")
            import boto3

            self._client = boto3.client("s3", **amazon(place))

    def save(self, training: Training, step: int) -> None:
        super().save(training, step)
        self.log(self.path(step), self.path(step).name)

    def log(self, path: Path, name: str) -> None:
        self._client.upload_file(str(path), "bucket", name)

    def end(self, step: int) -> None:
        super().end(step)
        forget(self.place, self.path(step).name)


class Composer(TorchSave):
    """Composer's logger that uploads files: it copies each into a folder, from where a worker sends it."""

    title = "torch.save, Composer's RemoteUploaderDownloader"
    needs = "composer"
    stores = True
    use_procs = True

    def __init__(self, home: Path, place: Place) -> None:
        super().__init__(home, place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from composer.loggers import RemoteUploaderDownloader

        self._staging = home / f"staging-{type(self).__name__}"
        self._staging.mkdir()
        self._logger = RemoteUploaderDownloader(
            "s3://bucket",
            backend_kwargs=amazon(place),
            upload_staging_folder=str(self._staging),
            use_procs=self.use_procs,
        )
        self._state: Any = SimpleNamespace(run_name="today")
        elsewhere = os.environ.pop("PYTHONPYCACHEPREFIX", "")  # what a worker imports is compiled where it is
        self._logger.init(self._state, None)
        os.environ["PYTHONPYCACHEPREFIX"] = elsewhere
        (home / "ready").write_bytes(b"x")
        self.log(home / "ready", f"ready-{type(self).__name__}")
        self.wait()

    def save(self, training: Training, step: int) -> None:
        super().save(training, step)
        self.log(self.path(step), self.path(step).name)

    def log(self, path: Path, name: str) -> None:
        self._logger.upload_file(self._state, name, path, overwrite=False)

    def batch_end(self) -> None:
        """What it does after each step of a training: an error of its workers is raised."""
        self._logger.batch_end(self._state, None)

    def waits(self) -> bool:
        """Whether anything is still to be sent."""
        self.batch_end()
        return any(self._staging.iterdir())

    def wait(self) -> None:
        wait_for(lambda: not self.waits())

    def end(self, step: int) -> None:
        super().end(step)
        forget(self.place, self.path(step).name)

    def processes(self) -> list[int]:
        return [worker.pid for worker in self._logger._workers]

    def close(self) -> None:
        self._logger.post_close()
        self._staging.rmdir()


class ComposerThreads(Composer):
    """The same without processes of its own."""

    title = "the same with use_procs=False"
    use_procs = False

    def processes(self) -> list[int]:
        return []


class Wandb(TorchSave):
    """W&B offline, an artifact a file: copied to where ``wandb sync`` would send it from."""

    title = "torch.save, W&B offline"
    needs = "wandb"

    def __init__(self, home: Path, place: Place) -> None:
        super().__init__(home, place)
        import wandb

        self._wandb = wandb
        self.begin()
        (home / "ready").write_bytes(b"x")
        self.log(home / "ready", "ready")
        self.wait()

    def begin(self) -> None:
        # No run of the program's: mandapa's logger would join that.
        self._run = self._wandb.init(project="today", mode="offline", reinit="create_new", dir=self.home)

    def save(self, training: Training, step: int) -> None:
        super().save(training, step)
        self._log(self.path(step), "checkpoint", "model")

    def wait(self) -> None:
        self._run.finish()

    def log(self, path: Path, name: str) -> None:
        self._log(path, name, "file")

    def _log(self, path: Path, name: str, kind: str) -> None:
        artifact = self._wandb.Artifact(name, kind)
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def end(self, step: int) -> None:
        super().end(step)
        for copy in Path(os.environ["WANDB_DATA_DIR"]).glob("artifacts/staging/*"):
            copy.unlink()

    def processes(self) -> list[int]:
        return children("wandb-core")

    def close(self) -> None:
        self._wandb.teardown()


class Mandapa(Saver):
    """A run with all loggers that users put together."""

    title = "mandapa"

    def __init__(self, home: Path, place: Place) -> None:
        super().__init__(home, place)
        self._run = place.run(f"today-{type(self).__name__}", home, *self.others())
        self._handle: Any = None

    def others(self) -> list[loggers.Logger]:
        """Besides those of each run."""
        return []

    def save(self, training: Training, step: int) -> None:
        self._handle = self._run.save_checkpoint(training.state(), step=step)

    def wait(self) -> None:
        if self._handle is None or self._handle.done():
            self._run.flush()
        else:
            wait_for(self._handle.done)

    def log(self, path: Path, name: str) -> None:
        self._run.log_asset(path, f"assets/{name}")

    def processes(self) -> list[int]:
        return [uploader_of(self._run)]

    def close(self) -> None:
        self._run.close()
        end_uploader(self._run)
        shutil.rmtree(self._run.dir, ignore_errors=True)


class MandapaWandb(Mandapa):
    """The same, and all that is logged goes to W&B offline as well."""

    title = "mandapa with W&B offline"
    needs = "wandb"

    def others(self) -> list[loggers.Logger]:
        return [loggers.WandBLogger("today", log_artifacts=True)]

    def processes(self) -> list[int]:
        return [*super().processes(), *children("wandb-core")]


SAVERS: list[type[Saver]] = [TorchSave, Boto3, Composer, ComposerThreads, Wandb, Mandapa, MandapaWandb]


def installed(saver: type[Saver]) -> bool:
    """Whether what it needs is there."""
    return not saver.needs or find_spec(saver.needs) is not None


def amazon(place: Place) -> dict[str, Any]:
    """How boto3 reaches the server."""
    return {
        "endpoint_url": place.options["endpoint_url"],
        "region_name": "us-east-1",
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
    }


def forget(place: Place, name: str) -> None:
    """Delete an object: the server holds all of them in memory."""
    url = f"{place.options['endpoint_url']}/bucket/{name}"
    urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()
