"""The backend logger for our own repositories, in any object store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from mandapa import object_store
from mandapa.errors import InvalidInputError
from mandapa.object_store import ObjectStore
from mandapa.run.logger import BackendLogger, BackendSpec, artifact_name

__all__ = ["ObjectStoreLogger"]


class ObjectStoreLogger(BackendLogger):
    """Makes versions of a run's assets in a repository; the repository is made in an empty prefix.

    The uploader process builds the store, so that no client of a cloud lives in the training process. Secrets among
    the arguments reach it by a pipe; none is ever written down: ``mandapa sync`` takes credentials from the
    environment.

    Args:
        object_store_cls: A class of object stores that can be imported (`S3ObjectStore`, ...), or the URL of the place:
            ``s3://bucket/prefix``, ``gs://``, ``az://`` or a folder.
        object_store_kwargs: Arguments of the class, or further ones of the URL's.
        artifact: The artifact's name; may hold ``{run_name}``.
        should_log_asset: Takes the path that an asset has in the version; False leaves it out. By default all are
            logged.

    Raises:
        InvalidInputError: Not a class or URL of an object store, or a name that no artifact can have.

    Example:
        >>> from mandapa.object_store import S3ObjectStore
        >>> logger = ObjectStoreLogger(S3ObjectStore, {"bucket": "team-bucket", "prefix": "runs"})
        >>> logger.spec("resnet-7").artifact
        'resnet-7'
    """

    def __init__(
        self,
        object_store_cls: type[ObjectStore] | str | os.PathLike[str],
        object_store_kwargs: Mapping[str, Any] | None = None,
        *,
        artifact: str = "{run_name}",
        should_log_asset: Callable[[str], bool] | None = None,
    ) -> None:
        self._options = dict(object_store_kwargs or {})
        self._artifact = artifact
        self._should_log_asset = should_log_asset
        if isinstance(object_store_cls, type):
            self._store = self._name_of(object_store_cls)
        else:
            self._store = _place(os.fspath(object_store_cls))

    def spec(self, run_name: str) -> BackendSpec:
        """Where versions of that run go; nothing is opened."""
        return BackendSpec(self._store, self._options, artifact_name(self._artifact, run_name))

    def wants(self, path: str) -> bool:
        """What ``should_log_asset`` says."""
        return self._should_log_asset is None or bool(self._should_log_asset(path))

    def _name_of(self, cls: type) -> str:
        if cls.__module__ == "__main__" or "<" in cls.__qualname__:
            raise InvalidInputError(
                f"{cls.__qualname__} is defined in the script itself, in a notebook or in a function: the uploader "
                "process "
                "cannot import it from there; move it to a module"
            )
        if cls.__module__.partition(".")[0] == "composer":
            ours = cls.__name__ if hasattr(object_store, cls.__name__) else "S3ObjectStore"
            raise InvalidInputError(
                f"{cls.__module__}.{cls.__qualname__} is Composer's: use mandapa.object_store.{ours} and its "
                "arguments, or a URL"
            )
        if not all(hasattr(cls, method) for method in ("get", "get_ranges", "head", "list", "put", "create", "delete")):
            raise InvalidInputError(
                f"{cls.__module__}.{cls.__qualname__} is no object store: use a class of mandapa.object_store, or one "
                "that "
                "has the methods of mandapa.object_store.ObjectStore"
            )
        if cls.__module__.startswith("mandapa.object_store") and cls.__name__ == "MemoryObjectStore":
            raise InvalidInputError(_MEMORY)
        if "path" in self._options and cls.__name__ == "LocalObjectStore":
            self._options["path"] = os.path.abspath(os.fspath(self._options["path"]))
        return f"{cls.__module__}:{cls.__qualname__}"


_MEMORY = "a store in memory ends with its process, and a run logs by another one: use a folder, as in './runs'"


def _place(url: str) -> str:
    """A URL as the uploader, which stands in another folder, can use it."""
    if not url:
        raise InvalidInputError("ObjectStoreLogger needs a URL, a folder or a class of object stores")
    if url.startswith("memory://"):
        raise InvalidInputError(_MEMORY)
    return url if "://" in url else os.path.abspath(url)
