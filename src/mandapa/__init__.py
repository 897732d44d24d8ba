"""mandapa: git-like history for everything a training run makes or reads, in your own bucket.

Example:
    >>> import mandapa
    >>> repo = mandapa.open("memory://docs", create=True)
    >>> with repo.artifact("resnet-7").transaction(message="step 2000") as txn:
    ...     txn.add_bytes("notes.txt", b"better")
    >>> repo["resnet-7:latest/notes.txt"].open("notes.txt").read()
    b'better'
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mandapa.content.link import Mode
    from mandapa.repository.artifact import AliasStep, Artifact
    from mandapa.repository.policy import Policy
    from mandapa.repository.repository import Repository
    from mandapa.repository.transaction import Transaction
    from mandapa.repository.version import Asset, Diff, Version
    from mandapa.run.checkpoints import Checkpoint, CheckpointSaver, Every
    from mandapa.run.handle import Handle
    from mandapa.run.limits import Limits
    from mandapa.run.run import Run

__version__ = "0.1.0"

__all__ = [
    "AliasStep",
    "Artifact",
    "Asset",
    "Checkpoint",
    "CheckpointSaver",
    "Diff",
    "Every",
    "Handle",
    "Limits",
    "Policy",
    "Repository",
    "Run",
    "Transaction",
    "Version",
    "open",
]

_HOMES = {
    "AliasStep": "repository.artifact",
    "Artifact": "repository.artifact",
    "Asset": "repository.version",
    "Checkpoint": "run.checkpoints",
    "CheckpointSaver": "run.checkpoints",
    "Diff": "repository.version",
    "Every": "run.checkpoints",
    "Handle": "run.handle",
    "Limits": "run.limits",
    "Policy": "repository.policy",
    "Repository": "repository.repository",
    "Run": "run.run",
    "Transaction": "repository.transaction",
    "Version": "repository.version",
}


def open(  # noqa: A001 - the name that callers expect
    url: str | os.PathLike[str],
    *,
    create: bool = False,
    single_writer: bool = False,
    codec: Mode = "auto",
    **options: Any,
) -> Repository:
    """Open the repository at ``url``: ``s3://``, ``gs://``, ``az://``, ``memory://`` or a local path.

    Credentials and endpoints come from ``options`` (those of the object store), else from the usual environment
    variables, else, for S3 and with the extra ``aws``, from AWS profiles and SSO. The local index, and
    ``MANDAPA_CACHE_SIZE`` (10 GiB) of chunks from stores on other machines, are kept in ``MANDAPA_CACHE``, else in the
    user's cache folder; commits are signed with the user's and the machine's name.

    Args:
        url: Where it is.
        create: Make it when nothing is there; open it when it is there.
        single_writer: With ``create``: promise, for good, that never two processes write at once. For stores that do
            not keep create-if-absent.
        codec: ``auto``, ``raw`` or ``dense``: how new bytes are stored.
        options: Passed to the object store, as in `mandapa.object_store`.

    Raises:
        NotFoundError: There is no repository, and ``create`` is False.
        InvalidInputError: Not a URL of a store; or, with ``create``, something else is under that prefix.
        FormatVersionError: A newer mandapa made it.
        StorageError: The store failed, refused access, or, with ``create``, cannot be trusted with several writers.
    """
    from mandapa.environment import cache_dir, cache_size, who
    from mandapa.object_store import from_url
    from mandapa.repository.log import Author
    from mandapa.repository.repository import Repository

    store = from_url(os.fspath(url), **options)
    make = partial(Repository.create, single_writer=single_writer) if create else Repository
    return make(store, cache_dir=cache_dir(), cache_size=cache_size(), codec=codec, author=Author(who()))


def __getattr__(name: str) -> Any:
    """Load a public class when it is first used, so that ``import mandapa`` stays light."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"mandapa.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mandapa' has no attribute {name!r}")
