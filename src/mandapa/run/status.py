"""How far the runs in a directory are, as their files say: whether the machine may go."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from mandapa.run.backend import WANDB
from mandapa.run.batches import Feed
from mandapa.run.committer import size_of, waits
from mandapa.run.directory import RunDirectory, read_json
from mandapa.run.journal import ENTRIES, CheckpointEntry, JournalReader
from mandapa.run.progress import Progress
from mandapa.run.ring import is_held, memory_of
from mandapa.run.uploader import saved_backends

__all__ = ["BackendStatus", "RunStatus", "is_unsent", "look"]


@dataclass(frozen=True)
class BackendStatus:
    """One place that a run logs to."""

    key: str
    store: str
    """A URL, or the class of an object store and what tells its place."""
    artifact: str
    pending: int
    """Things that were handed over and are in no version there."""
    pending_bytes: int
    committed: str
    """The newest version, as an address; empty: none yet."""
    error: str
    """What the uploader last could not do; empty when it could."""
    withheld: tuple[str, ...]
    """Options that were given to the run and are written nowhere, because they are secrets."""
    unsent: tuple[str, ...] = ()
    """Folders of offline W&B runs that ``wandb sync`` has not sent yet."""


@dataclass(frozen=True)
class RunStatus:
    """One run."""

    run: str
    path: str
    attempt: int
    live: tuple[int, ...]
    """Ranks whose trainer lives."""
    uploading: bool
    """Whether an uploader is at work."""
    backends: tuple[BackendStatus, ...]
    memory_bytes: int = 0
    """Of the machine, in which states are handed over."""
    held: int = 0
    """Checkpoints in it that are in no file yet: they would not survive a restart of the machine."""

    @property
    def committed(self) -> bool:
        """Whether everything that was handed over is committed."""
        return not any(backend.pending for backend in self.backends)

    @property
    def safe(self) -> bool:
        """Whether nothing would be lost with this machine: all is committed, and W&B has what it recorded offline."""
        return self.committed and not any(backend.unsent for backend in self.backends)


def look(directory: RunDirectory) -> RunStatus:
    """Read the journals of a run. Asks no process and no store.

    Raises:
        StorageError: They cannot be read.
        FormatVersionError: A newer mandapa wrote them.
    """
    # Before the journals: who is not alive then has written nothing that is not read now.
    live = tuple(rank for rank in directory.ranks() if directory.rank_lock(rank).held())
    feed = Feed()
    for rank in directory.ranks():
        for entry in JournalReader(directory.journal(rank), ENTRIES).new():
            feed.take(rank, entry)
    uploading = directory.uploader_lock().held()
    told = read_json(directory.status).get("backends", {})
    backends = []
    known_keys = {key for begin in feed.begun.values() for key in begin.backends}
    for key, value in saved_backends(directory).items():
        progress = Progress(directory, key).look()
        if key not in known_keys and not progress.any:
            continue  # it refused the run before that began
        pending = [
            entry
            for rank, entries in feed.entries.items()
            for entry in entries
            if waits(feed, key, progress.done, rank, entry)
        ]
        known = told.get(key, {})
        backends.append(
            BackendStatus(
                key=key,
                store=_place(value),
                artifact=value["artifact"],
                pending=len(pending),
                pending_bytes=sum(map(size_of, pending)),
                committed=progress.newest,
                error=str(known.get("error", {}).get("message", "")) if pending else "",
                withheld=tuple(value.get("withheld", ())),
                unsent=_unsent(directory, key) if value["store"] == WANDB else (),
            )
        )
    files = [f for entries in feed.entries.values() for e in entries if isinstance(e, CheckpointEntry) for f in e.files]
    return RunStatus(
        run=directory.name,
        path=directory.path,
        attempt=max(feed.begun, default=0),
        live=live,
        uploading=uploading,
        backends=tuple(backends),
        memory_bytes=sum(memory_of(directory, rank) for rank in directory.ranks()),
        held=sum(is_held(directory, file) for file in files),
    )


def is_unsent(file: str) -> bool:
    """Whether W&B's file of an offline run is there, and was not sent: ``wandb sync`` leaves a mark when it has."""
    return os.path.exists(file) and not os.path.exists(f"{file}.synced")


def _unsent(directory: RunDirectory, key: str) -> tuple[str, ...]:
    offline = read_json(os.path.join(directory.kept(key), "offline.json"))
    return tuple(os.path.dirname(file) for file in offline if is_unsent(file))


def _place(value: dict[str, Any]) -> str:
    store, options = str(value["store"]), value["options"]
    if store == WANDB:
        return "/".join(["W&B", *[str(options[name]) for name in ("entity", "project") if options.get(name)]])
    if "://" in store or ":" not in store:
        return store
    where = "/".join(str(options[name]) for name in ("bucket", "container", "path", "prefix") if options.get(name))
    return f"{store.rpartition(':')[2]} {where}".strip()
