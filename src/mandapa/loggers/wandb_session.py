"""The W&B run of a program: joined, made, or gone on with; and what this release of W&B can be asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mandapa.errors import AccessDeniedError, InvalidInputError, StorageError

__all__ = ["FLUSH", "Session", "mode_of", "supported"]

FLUSH = "x_transaction_log_flush_interval"
"""W&B's setting: seconds until it has written what it was given into its file; by itself it takes 15."""
_SETTINGS = {
    "init_timeout": 10.0,  # seconds until W&B's server must have answered
    "finish_timeout": 60.0,  # seconds that W&B may take to end
    FLUSH: 0.5,
}


class Session:
    """The W&B run that artifacts, metrics and hyperparameters go to.

    Args:
        name: Of the run.
        folder: Of the run.
        kwargs: Arguments of ``wandb.init``.
        wishes: Settings that are left out where W&B does not know them.
    """

    def __init__(
        self, name: str, folder: str, kwargs: Mapping[str, Any], wishes: Mapping[str, Any] | None = None
    ) -> None:
        self._wishes = {**_SETTINGS, **(wishes or {})}
        self.run: Any = None
        self._name = name
        self._folder = folder
        self._kwargs = kwargs
        self._joined = False
        self.same: dict[str, str] = {}
        """Arguments of ``wandb.init`` that go on with the same W&B run."""

    @property
    def is_open(self) -> bool:
        """Whether there is a W&B run that takes something."""
        return self.run is not None and not getattr(self.run, "_is_finished", False)

    @property
    def file(self) -> str:
        """Where W&B writes what the run gets."""
        return os.path.abspath(str(self.run.settings.sync_file))

    def open(self, *, program: bool = False) -> None:
        """Join the program's W&B run, or make one; ``program``: it becomes the program's.

        Raises:
            AccessDeniedError: No API key, or one that is refused.
            InvalidInputError: W&B is not installed, or does not take the arguments.
            StorageError: W&B does not answer.
        """
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise InvalidInputError("W&B needs the package wandb: pip install 'mandapa[wandb]'") from error
        current = wandb.run
        if program and current is not None:
            self._take(current, joined=True)
            return
        settings = self._kwargs.get("settings") or {}
        if isinstance(settings, Mapping):
            settings = {**supported(self._wishes), **settings}
        kwargs = {"name": self._name, **self._kwargs, **self.same, "settings": settings}
        if current is not None:
            kwargs["reinit"] = "create_new"
        if "WANDB_RUN_ID" not in os.environ:
            kwargs.setdefault("id", self._name)
        if mode_of(self._kwargs) != "offline" and "WANDB_RESUME" not in os.environ:
            kwargs.setdefault("resume", "allow")
        if "WANDB_DIR" not in os.environ:
            kwargs.setdefault("dir", self._folder)
        for name in ("cache", "data"):
            variable = f"WANDB_{name.upper()}_DIR"
            if os.environ.get(variable, "") == _ours.get(variable, ""):
                os.environ[variable] = _ours[variable] = os.path.join(self._folder, "wandb", name)
        try:
            self._take(wandb.init(**kwargs), joined=False)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            if "key" in str(error).lower():
                raise AccessDeniedError(
                    "W&B has no API key: run 'wandb login', set WANDB_API_KEY, or work with WANDB_MODE=offline"
                ) from error
            raise InvalidInputError(f"wandb.init: {error}") from error
        except wandb.errors.Error as error:
            text = str(error).partition("\n")[0]
            if "error 401" in text or "error 403" in text:
                raise AccessDeniedError(f"W&B refuses the API key: {text}") from error
            if current is None:
                wandb.teardown()  # else W&B holds the run's id for taken in this process
            raise StorageError(f"W&B does not answer: {text}", retryable=True) from error
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"wandb.init does not take these init_kwargs: {error}") from error

    def _take(self, run: Any, *, joined: bool) -> None:
        self.run, self._joined = run, joined
        where = {"project": run.project, "entity": run.entity, "id": run.id}
        self.same = {name: str(value) for name, value in where.items() if value}

    def finish(self, exit_code: int) -> None:
        """End the W&B run, unless it is the program's own; W&B may take a minute at most."""
        run, self.run = self.run, None
        if run is not None and not self._joined:
            run.finish(exit_code=exit_code)


def supported(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that this release of W&B has."""
    wandb: Any = importlib.import_module("wandb")
    found = {}
    for name, value in settings.items():
        with suppress(Exception):  # each release refuses with another error
            wandb.Settings(**{name: value})
            found[name] = value
    return found


_ours: dict[str, str] = {}
"""Environment variables that were set here, and to what."""


def mode_of(kwargs: Mapping[str, Any]) -> str:
    """What W&B's own switches say: ``online``, ``offline``, ``disabled``, ..."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    return str(kwargs.get("mode") or os.environ.get("WANDB_MODE") or "online").lower()
