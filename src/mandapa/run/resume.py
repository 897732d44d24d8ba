"""What a run can go on from: the newest whole checkpoint in its directory, or in a version."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mandapa.errors import CorruptionError, StorageError
from mandapa.run.backend import checkpoint_place, name_below
from mandapa.run.batches import Feed, complete_checkpoints
from mandapa.run.checkpoints import Checkpoint
from mandapa.run.directory import Lock, RunDirectory
from mandapa.run.journal import ENTRIES, BeginEntry, CheckpointEntry, EndEntry, JournalReader
from mandapa.run.progress import Progress
from mandapa.run.reader import fetch
from mandapa.run.ring import settle

__all__ = ["from_store", "newest_local", "one_at_a_time"]

_PATIENCE = 24 * 3600.0  # seconds: another rank may be fetching a very large version

Dest = str | os.PathLike[str] | None


def newest_local(directory: RunDirectory, rank: int, progress: Iterable[Progress]) -> Checkpoint | None:
    """The checkpoint of the highest step of which every rank's file is in the run's directory.

    What was before an attempt that began afresh does not count. What is in memory yet is written first.

    Raises:
        StorageError: There is no room to write it.
    """
    feed = Feed()
    since = 0
    for other in directory.ranks():
        for entry in JournalReader(directory.journal(other), ENTRIES).new():
            if isinstance(entry, BeginEntry) and entry.fresh:
                since = max(since, entry.attempt)
            if isinstance(entry, BeginEntry | CheckpointEntry | EndEntry):
                feed.take(other, entry)
    found = [
        parts
        for parts in complete_checkpoints(feed)
        if parts[0][1].attempt >= since and all(settle(directory, f) for _, e in parts for f in e.files)
    ]
    if not found:
        return None
    parts = max(found, key=lambda parts: (parts[0][1].step, parts[0][1].attempt, parts[0][1].n))
    first, entry = parts[0]
    own = [file for other, e in parts if other == rank for file in e.files] or entry.files
    sources = {name_below(file.path, entry.place): file.source for _, e in parts for file in e.files}
    return Checkpoint(
        step=entry.step,
        epoch=entry.epoch,
        metrics=entry.metrics,
        version=next((address for one in progress if (address := one.look().version(first, entry.n))), ""),
        place=entry.place,
        file=name_below(own[0].path, entry.place) if len(own) == 1 else "",
        fetch=_gather(directory, sources, f"step-{entry.step}-{entry.attempt}.{entry.n}"),
    )


def from_store(directory: RunDirectory, backend: Mapping[str, Any], known: Mapping[str, Any], file: str) -> Checkpoint:
    """The checkpoint in a version: ``known`` is what the uploader told of it, ``file`` the name of this rank's file.

    Raises:
        CorruptionError: The version says that its checkpoint is at what is no path.
    """
    metadata = dict(known["metadata"])
    address: str = known["address"]
    step, epoch = metadata.pop("step"), metadata.pop("epoch", None)
    place = checkpoint_place(known["metadata"])
    if not place:
        raise CorruptionError(f"{address}: where its checkpoint is: {metadata['checkpoint']!r} is no path")
    if isinstance(metadata.get("checkpoint"), str):  # else it is a number of the user's, from before that word was ours
        del metadata["checkpoint"]

    def fetch_(dest: Dest) -> str:
        target = os.path.join(directory.path, "resume", address.replace(":", "-")) if dest is None else os.fspath(dest)
        with one_at_a_time(directory):
            found = fetch(backend, address, os.path.abspath(target), folder=place)
        if not found["files"] + found["skipped"]:
            raise CorruptionError(f"{address}: there is nothing at {place!r}, where its checkpoint should be")
        return target

    return Checkpoint(step=step, epoch=epoch, metrics=metadata, version=address, place=place, file=file, fetch=fetch_)


@contextmanager
def one_at_a_time(directory: RunDirectory) -> Iterator[None]:
    """Ranks of one machine fetch one after the other: the second finds what the first has brought.

    Raises:
        StorageError: Another rank has been at it for a day.
    """
    lock = Lock(os.path.join(directory.inner, "fetch.lock"))
    if not lock.take(patience=_PATIENCE):
        raise StorageError(
            f"another process (pid, host: {lock.holder()}) has been fetching into {directory.path} for a day"
        )
    try:
        yield
    finally:
        lock.release()


def _gather(directory: RunDirectory, sources: Mapping[str, str], folder: str) -> Callable[[Dest], str]:
    """Brings the files of a local checkpoint together."""

    def gather(dest: Dest) -> str:
        paths = {name: directory.source(source) for name, source in sources.items()}
        folders = {path.removesuffix(name) for name, path in paths.items()}
        if dest is None and len(folders) == 1:
            return folders.pop().rstrip("/")
        target = os.path.join(directory.path, "resume", folder) if dest is None else os.fspath(dest)
        for name, path in paths.items():
            inside = os.path.join(target, name)
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            temporary = f"{inside}.{os.getpid()}.tmp"
            shutil.copyfile(path, temporary)
            os.replace(temporary, inside)
        return target

    return gather
