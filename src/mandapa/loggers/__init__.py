"""What listens to a run: loggers that make assets, and backend loggers that make versions of them elsewhere.

Each is loaded when its name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mandapa.loggers.file import FileLogger
    from mandapa.loggers.object_store import ObjectStoreLogger
    from mandapa.loggers.tensorboard import TensorboardLogger
    from mandapa.loggers.wandb import WandBLogger
    from mandapa.run.logger import BackendLogger, BackendSpec, Logger

__all__ = [
    "BackendLogger",
    "BackendSpec",
    "FileLogger",
    "Logger",
    "ObjectStoreLogger",
    "TensorboardLogger",
    "WandBLogger",
]

_LAZY = {
    "BackendLogger": "mandapa.run.logger",
    "BackendSpec": "mandapa.run.logger",
    "FileLogger": "mandapa.loggers.file",
    "Logger": "mandapa.run.logger",
    "ObjectStoreLogger": "mandapa.loggers.object_store",
    "TensorboardLogger": "mandapa.loggers.tensorboard",
    "WandBLogger": "mandapa.loggers.wandb",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
