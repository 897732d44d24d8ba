"""What a run's calls give back: what became of the thing that was handed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

__all__ = ["Handle", "together"]


class Waiter(Protocol):
    """What a handle asks of its run."""

    def has_committed(self, n: int, keys: Sequence[str]) -> bool:
        """Whether these backends have entry ``n``."""

    def version_of(self, n: int, keys: Sequence[str]) -> str | None:
        """The version that entry ``n`` went into, in the first of these backends."""

    def is_durable(self, n: int) -> bool:
        """Whether entry ``n`` is on the disk."""

    def wait_for(self, n: int, keys: Sequence[str], timeout: float | None) -> bool:
        """Ask for a commit, and wait until these backends have entry ``n``."""


class Handle:
    """What became of something that was handed over.

    *held*: the call has returned; it survives the death of trainer and uploader. *durable*: about a second later; it
    survives the machine's restart. *committed*: it is in a version, and survives the machine. *skipped*: there was no
    room, and nothing was taken. *local*: the run has no backend logger that wants it.

    Example:
        >>> import tempfile
        >>> from mandapa import Run
        >>> with Run("resnet-7", dir=tempfile.mkdtemp()) as run:
        ...     handle = run.log_bytes("notes.txt", b"Dropout helps.")
        >>> handle.state
        'local'
    """

    def __init__(self, run: Waiter, n: int, keys: Sequence[str], *, taken: bool = True) -> None:
        self._run = run
        self._n = n
        self._keys = keys
        self._taken = taken

    def done(self) -> bool:
        """Whether every backend has committed it. Reads local files only."""
        return self._taken and self._run.has_committed(self._n, self._keys)

    def wait(self, timeout: float | None = None) -> bool:
        """Make a commit happen now, and wait for it; whether it is committed, False after ``timeout`` seconds.

        Raises:
            StorageError: With ``strict=True``: a backend failed.
        """
        return self._taken and self._run.wait_for(self._n, self._keys, timeout)

    @property
    def version(self) -> str | None:
        """The address of the version that holds it, of the first backend; None until it is committed."""
        return self._run.version_of(self._n, self._keys) if self._taken else None

    @property
    def state(self) -> Literal["skipped", "local", "held", "durable", "committed"]:
        """The strongest promise that holds now."""
        if not self._taken:
            return "skipped"
        if not self._keys:
            return "local"
        if self.done():
            return "committed"
        return "durable" if self._run.is_durable(self._n) else "held"

    def __repr__(self) -> str:
        return f"<Handle {self.version or self.state}>"


def together(handles: Sequence[Handle]) -> Handle:
    """What became of all of these, of one run: the last is committed when all are; one that is skipped counts."""
    parts = [(one._run, one._n, one._keys, one._taken) for one in handles]  # noqa: SLF001 - what a handle is
    run, n, _, _ = max(parts, key=lambda part: part[1])
    keys = dict.fromkeys(key for _, _, wanted, _ in parts for key in wanted)
    return Handle(run, n, list(keys), taken=all(taken for *_, taken in parts))
