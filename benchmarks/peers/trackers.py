"""Experiment trackers, each without a server: W&B offline and MLflow with a file of SQLite."""

from __future__ import annotations

import os
from pathlib import Path

from tools import Tool


class WandB(Tool):
    """An artifact a version, of which the files are hashed and copied to where ``wandb sync`` would send them from."""

    package = "wandb"

    def prepare(self) -> None:
        self.store.mkdir()
        os.environ |= {f"WANDB_{kind}_DIR": str(self.home / kind.lower()) for kind in ("CACHE", "CONFIG")}
        os.environ |= {"WANDB_DATA_DIR": str(self.store), "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
        import wandb

        self.wandb = wandb
        self.wandb_run = wandb.init(project="bench", mode="offline", dir=self.home)

    def commit(self, number: int) -> None:
        artifact = self.wandb.Artifact("bench", "model")
        artifact.add_dir(str(self.source))
        self.wandb_run.log_artifact(artifact)


class MLflow(Tool):
    """A folder of the run's artifacts a version."""

    package = "mlflow"

    def prepare(self) -> None:
        self.store.mkdir()
        os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        import mlflow

        self.mlflow = mlflow
        mlflow.set_tracking_uri(f"sqlite:///{self.home}/mlflow.db")
        experiment = mlflow.create_experiment("bench", artifact_location=str(self.store))
        self.id = mlflow.start_run(experiment_id=experiment).info.run_id

    def commit(self, number: int) -> None:
        self.last = f"v{number}"
        self.mlflow.log_artifacts(str(self.source), self.last)

    def restore(self, dest: Path) -> None:
        self.mlflow.artifacts.download_artifacts(
            run_id=self.id, artifact_path=self.last, dst_path=str(dest.parent / "mlflow")
        )
        os.rename(dest.parent / "mlflow" / self.last, dest)
