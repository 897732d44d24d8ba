"""Where bytes live: one small interface, a store for each place, and wrappers as stores around stores.

Knows nothing of artifacts. Cloud clients are loaded when one of their names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mandapa.object_store.base import Buffer, ObjectInfo, ObjectStore
from mandapa.object_store.local import LocalObjectStore
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.object_store.probe import ProbeResult, probe
from mandapa.object_store.retry import RetryingObjectStore

if TYPE_CHECKING:
    from mandapa.object_store.azure import AzureObjectStore
    from mandapa.object_store.gcs import GCSObjectStore
    from mandapa.object_store.s3 import S3ObjectStore
    from mandapa.object_store.url import from_url

__all__ = [
    "AzureObjectStore",
    "Buffer",
    "GCSObjectStore",
    "LocalObjectStore",
    "MemoryObjectStore",
    "ObjectInfo",
    "ObjectStore",
    "ProbeResult",
    "RetryingObjectStore",
    "S3ObjectStore",
    "from_url",
    "probe",
]

_LAZY = {
    "AzureObjectStore": "azure",
    "GCSObjectStore": "gcs",
    "S3ObjectStore": "s3",
    "from_url": "url",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
