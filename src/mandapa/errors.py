"""The errors of mandapa, one class for each thing that a caller does next.

::

    MandapaError
    ├── InvalidInputError(ValueError)        the caller passed something that can never work: change the call
    ├── NotFoundError(FileNotFoundError)     a name, version, asset or object is not there (or was deleted: it says so)
    ├── AlreadyExistsError(FileExistsError)  create-if-absent lost: read what is there and decide
    ├── ConflictError                        another commit came in between: look at it and try again
    ├── CorruptionError                      stored bytes are not what was written: run ``mandapa fsck``
    ├── FormatVersionError                   written by a newer mandapa, or with a feature this one lacks: upgrade
    ├── StorageError(OSError)                the store failed; ``.retryable`` says whether trying again may help
    │   ├── AccessDeniedError                the store refused: fix credentials or permissions
    │   └── StoreNotFoundError               the bucket or container itself is not there: make it, or fix its name
    ├── ClosedError                          the object was closed, or belongs to the process that forked this one
    └── SecurityError                        bytes from outside ask for something unsafe: nothing was done
"""

from __future__ import annotations

__all__ = [
    "AccessDeniedError",
    "AlreadyExistsError",
    "ClosedError",
    "ConflictError",
    "CorruptionError",
    "FormatVersionError",
    "InvalidInputError",
    "MandapaError",
    "NotFoundError",
    "SecurityError",
    "StorageError",
    "StoreNotFoundError",
]


class MandapaError(Exception):
    """Base of every error that mandapa raises on purpose."""


class InvalidInputError(MandapaError, ValueError):
    """An argument can never work; the message says which one and what would."""


class NotFoundError(MandapaError, FileNotFoundError):
    """A repository, artifact, version, asset or object is not there; says so when it was deleted."""


class AlreadyExistsError(MandapaError, FileExistsError):
    """Something of that name is there already (create-if-absent, or a taken name)."""


class ConflictError(MandapaError):
    """Another commit changed what this one claims; nothing was written. Attribute ``paths`` lists what clashed."""

    def __init__(self, message: str, *, paths: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.paths = paths


class CorruptionError(MandapaError):
    """Bytes that were read are not the bytes that were written. Attribute ``key`` names the object when known."""

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class FormatVersionError(MandapaError):
    """The data needs a newer mandapa, or a feature that this one does not have."""


class StorageError(MandapaError, OSError):
    """The object store failed. ``retryable`` is True when the same call may work later."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class AccessDeniedError(StorageError):
    """The store refused the credentials, or they lack a permission that the message names."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=False)


class StoreNotFoundError(StorageError):
    """The bucket or container that holds everything is not there; make it, or check its name, region and endpoint.

    Not a `NotFoundError`: that says of one key that it is absent, and whoever commits acts on it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=False)


class ClosedError(MandapaError):
    """The object was closed, or was inherited by a forked child in which it must not be used."""


class SecurityError(MandapaError):
    """Bytes from outside ask for something unsafe, such as a path outside the target; nothing was done."""
