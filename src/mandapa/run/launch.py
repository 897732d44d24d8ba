"""What the ranks that were started together agree on: which attempt it is, and what the run goes on from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from mandapa.errors import StorageError
from mandapa.run.directory import Lock, RunDirectory, read_json, write_json
from mandapa.run.journal import BeginEntry

__all__ = ["Launch", "join"]

_KEPT = 16  # launches that are remembered
_PATIENCE = 60.0  # seconds
_TOGETHER = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """One start of all ranks."""

    id: str
    attempt: int
    """How often the run was started, from 1."""
    fresh: bool
    """Nothing of former attempts is gone on from."""
    base: dict[str, int | None]
    """Backend -> the version that the run's folder is from here on, None: empty. Not there: as it was."""
    store: dict[str, Any] | None
    """The checkpoint in a store to go on from: ``key`` of the backend, ``folder`` (the version that the
    run's folder goes on from), ``address``, ``metadata``."""


class _Launches(msgspec.Struct, kw_only=True):
    attempt: int = 0
    launches: list[Launch] = []


def join(
    directory: RunDirectory,
    own: Sequence[BeginEntry],
    *,
    local_world: int,
    opened: Mapping[str, Mapping[str, Any]],
    settled: Mapping[str, bool],
    local_step: int | None,
    fresh: bool,
) -> Launch:
    """The launch that this process is part of; the first of its ranks decides for all.

    Args:
        directory: The run's.
        own: How this rank began before.
        local_world: Ranks on this machine.
        opened: Backend -> what its store knows of the run.
        settled: Backend -> whether this directory has begun to commit to it before.
        local_step: Of the newest whole checkpoint in the directory.
        fresh: Begin with an empty folder.

    Raises:
        StorageError: The directory cannot be written.
    """
    id_ = _identity(local_world)
    id_ = f"{id_}#{sum(begin.launch.startswith(f'{id_}#') for begin in own)}"
    lock = Lock(os.path.join(directory.inner, "launch.lock"))
    if not lock.take(patience=_PATIENCE):
        raise StorageError(f"another process (pid, host: {lock.holder()}) does not let go of {lock.path}")
    try:
        known = _read(directory.launches)
        for launch in known.launches:
            if launch.id == id_:
                return launch
        numbers = [known.attempt, *[begin.attempt for begin in own]]
        numbers += [int(found.get("attempt", 0)) for found in opened.values()]
        # What a store has from before the last fresh start is another story, also for an uploader that asked it then.
        since = max((begin.attempt for begin in own if begin.fresh), default=0)
        opened = {key: found for key, found in opened.items() if int(found.get("attempt", 0)) >= since}
        store = None if fresh else _newest_stored(opened, local_step)
        launch = Launch(
            id=id_, attempt=max(numbers) + 1, fresh=fresh, base=_base(opened, settled, store, fresh), store=store
        )
        launches = [*known.launches[1 - _KEPT :], launch]
        write_json(directory.launches, _Launches(attempt=launch.attempt, launches=launches), durable=True)
        return launch
    finally:
        lock.release()


def _identity(local_world: int) -> str:
    """Equal in all processes that one launcher started together, and in no others."""
    if local_world < 2:
        return os.urandom(16).hex()
    return "-".join([str(os.getppid()), *[os.environ.get(name, "") for name in _TOGETHER]])


def _read(path: str) -> _Launches:
    try:
        return msgspec.convert(read_json(path), _Launches)
    except msgspec.ValidationError:
        return _Launches()


def _newest_stored(opened: Mapping[str, Mapping[str, Any]], local_step: int | None) -> dict[str, Any] | None:
    """The checkpoint of the highest step in a store, if it is above the one in the directory."""
    found = [{"key": key, **known["checkpoint"]} for key, known in opened.items() if known.get("checkpoint")]
    best = max(found, key=lambda known: known["metadata"]["step"], default=None)
    if best is None or (local_step is not None and local_step >= best["metadata"]["step"]):
        return None
    return best


def _base(
    opened: Mapping[str, Mapping[str, Any]],
    settled: Mapping[str, bool],
    store: Mapping[str, Any] | None,
    fresh: bool,
) -> dict[str, int | None]:
    if fresh:
        return dict.fromkeys(settled)
    base: dict[str, int | None] = {}
    for key, known in opened.items():
        if store is not None and key == store["key"]:
            base[key] = store["folder"]
        elif not settled[key] and "newest" in known:
            base[key] = known["newest"]
    return base
