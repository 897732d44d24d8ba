"""How a run's checkpoints become its own, and are handed over: states that it writes, and files of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from mandapa.content.walk import walk
from mandapa.errors import InvalidInputError
from mandapa.format.strict import check_path
from mandapa.repository.metadata import clean_metadata
from mandapa.run.backend import CHECKPOINT
from mandapa.run.capture import Capture, capture
from mandapa.run.checkpoints import save_state
from mandapa.run.directory import RunDirectory
from mandapa.run.handle import Handle
from mandapa.run.journal import ENTRIES, CheckpointEntry, File, JournalReader
from mandapa.run.listeners import Listeners, check_step
from mandapa.run.outbox import Outbox
from mandapa.run.ring import Ring, Slot
from mandapa.run.staging import drop, release, take_all

__all__ = ["Saving"]

SMALL = 1 << 20
"""Bytes of a state up to which it is written at once: that takes no longer than to hand it to somebody else."""


class Saving:
    """The checkpoints of one rank; called while the outbox is working.

    Args:
        outbox: Where they are handed over.
        directory: The run's.
        loggers: They hand over what they have before each.
        savers: All ranks on this machine that may save.
    """

    def __init__(self, outbox: Outbox, directory: RunDirectory, loggers: Listeners, savers: Sequence[int]) -> None:
        self.rank = outbox.rank
        self._outbox = outbox
        self._directory = directory
        self._loggers = loggers
        self._saver = loggers.saver
        self._savers = savers
        self._size_guess = 0
        self._ring: Ring | None = None

    def save(self, state: Any, *, step: int, epoch: int | None, metrics: Mapping[str, Any] | None) -> Handle:
        """Write a state, and hand it over; see `Run.save_checkpoint`."""
        facts = self._check(step, epoch, metrics)
        name = self.file_name(step, epoch)
        captured = capture(state, self._saver.format) if self._outbox.keys else None
        if captured is not None and captured.size <= SMALL:
            captured = None
        guess = self._size_guess if captured is None else captured.size
        slot: Slot | None = None
        before = -1

        def own() -> list[File]:
            nonlocal slot, before
            path = self._new_path(step, name)
            file = None
            if captured is not None and (slot := self._slot(captured.memory)) is not None:
                file = self._hold(captured, slot, name, path)
            if file is None:
                self._size_guess = save_state(state, path, self._saver.format, self._directory.unfinished(self.rank))
                source = self._directory.relative(path)
                file = File(path=f"{CHECKPOINT}/{name}", source=source, size=self._size_guess)
            before = self._outbox.last
            return [file]

        try:
            return self._hand_over(name, guess, own, step=step, epoch=epoch, metrics=facts)
        finally:
            if slot is not None and before in (-1, self._outbox.last):  # no line speaks of it
                slot.free()

    def _slot(self, size: int) -> Slot | None:
        """Memory for so many bytes, if there is some."""
        if self._ring is None:
            self._ring = Ring(self._directory, self.rank, self._outbox.turns)
        try:
            return self._ring.take(size)
        except OSError:  # of the list of slots: a file it is, then
            return None

    def _hold(self, captured: Capture, slot: Slot, name: str, path: str) -> File | None:
        """Copy a state into memory; its file, of which only the place is taken yet. None: the slot's disk fails."""
        try:
            memory = captured.fill(slot, self._directory.relative(slot.path))
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError:
            slot.free()
            return None
        return File(
            path=f"{CHECKPOINT}/{name}", source=self._directory.relative(path), size=captured.size, memory=memory
        )

    def close(self) -> None:
        """Let go of the memory; what is in it goes its way."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def log(
        self,
        path: str | os.PathLike[str],
        *,
        step: int,
        epoch: int | None,
        metrics: Mapping[str, Any] | None,
        at: str | None,
        whole: bool,
        take: Literal["copy", "move", "link"],
    ) -> Handle:
        """Own files that something else has written, and hand them over; see `Run.log_checkpoint`."""
        place = CHECKPOINT if at is None else check_path(at)
        facts = self._check(step, epoch, metrics, place)
        if take not in ("copy", "move", "link"):
            raise InvalidInputError(f"take={take!r}: use 'copy', 'move' or 'link'")
        source = os.fspath(path)
        name = ""
        size = 0
        if os.path.isdir(source):
            found = walk(source)
            if not found:
                raise InvalidInputError(f"{source} holds no files: a checkpoint has one at least")
            size = sum(file.stat.st_size for file in found)
            inside = {file.path: check_path(f"{place}/{file.path}") for file in found}
        else:
            name = check_path(os.path.basename(os.path.abspath(source) if at is None else place))
            inside = {name: check_path(f"{place}/{name}") if at is None else place}
            if at is not None and not whole and len(self._savers) > 1:
                raise InvalidInputError(
                    f"at={at!r}: one file is all of the checkpoint there: say whole=True, or hand over a folder "
                    "from each rank"
                )
            with suppress(OSError):  # whoever opens it says what is wrong
                size = os.stat(source).st_size
        moved: list[str] = []

        def own() -> list[File]:
            folder, sizes, gone = self._take(source, step, take, name)
            moved[:] = gone
            return [File(path=inside[n], source=f"{folder}/{n}", size=size) for n, size in sizes.items()]

        handle = self._hand_over(place, size, own, step=step, epoch=epoch, metrics=facts, place=place, whole=whole)
        if handle.state != "skipped":
            drop(moved)
        return handle

    def _check(
        self, step: Any, epoch: Any, metrics: Mapping[str, Any] | None, place: str = CHECKPOINT
    ) -> dict[str, Any]:
        """The metrics, clean; raises `InvalidInputError` of what no checkpoint can be called with."""
        check_step(step)
        if epoch is not None:
            check_step(epoch, "epoch")
        facts = clean_metadata(metrics)
        if "checkpoint" in facts:
            raise InvalidInputError("metrics['checkpoint']: that name tells where the checkpoint is; use another one")
        clean_metadata({**facts, "step": step, "epoch": epoch, "checkpoint": place})  # together they are the version's
        if self.rank not in self._savers:
            raise InvalidInputError(
                "parts of a checkpoint on several machines are not supported yet: save a whole state on rank 0 only"
            )
        return facts

    def _hand_over(self, what: str, size: int, own: Callable[[], list[File]], **fields: Any) -> Handle:
        """Let the loggers hand over what they have, then this rank's files, which ``own`` makes the run's."""
        self._loggers.tell(lambda logger: logger.flush())
        files = self._outbox.make_room(what, size, own)
        if files is None:
            return self._outbox.skipped()
        saver = self._saver
        waits = sum(file.size for file in files)
        fields |= {"files": files, "best": saver.best, "keep_local": saver.keep_local}
        handle = self._outbox.hand_over(self._outbox.keys, waits, CheckpointEntry, **fields)
        if handle.state == "skipped":
            drop(self._directory.source(file.source) for file in files)
        if not self._outbox.keys:
            self._prune()
        return handle

    def file_name(self, step: int, epoch: int | None) -> str:
        """Of this rank's file in the folder of a checkpoint that it saves."""
        size = len(self._savers)
        return self._saver.name(run_name=self._directory.name, rank=self.rank, world_size=size, step=step, epoch=epoch)

    def _new_path(self, step: int, name: str) -> str:
        """Where a state is written."""
        path = self._free(f"step-{step}", f"/{name}")
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        return path

    def _free(self, folder: str, inside: str = "") -> str:
        """A place that nothing was ever at: what is there may be on its way to a store."""
        first = os.path.join(self._directory.checkpoints, folder)
        path, turn = f"{first}{inside}", 1
        while os.path.lexists(path):
            turn += 1
            path = f"{first}.{turn}{inside}"
        return path

    def _take(
        self, source: str, step: int, take: Literal["copy", "move", "link"], name: str
    ) -> tuple[str, dict[str, int], list[str]]:
        """Own files of others in a folder that is theirs alone, whole or not at all: the folder, and as `take_all`."""
        scratch = os.path.join(self._directory.unfinished(self.rank), "taken")
        os.makedirs(os.path.dirname(scratch), mode=0o700, exist_ok=True)
        sizes, moved = take_all(source, scratch, take, name=name)
        folder = self._free(f"step-{step}.rank{self.rank}")
        os.rename(scratch, folder)
        return self._directory.relative(folder), sizes, moved

    def _prune(self) -> None:
        """Without backends nobody else removes old checkpoints; one more stays while other ranks may lag."""
        entries = [
            e
            for e in JournalReader(self._directory.journal(self.rank), ENTRIES).new()
            if isinstance(e, CheckpointEntry)
        ]
        keep = self._saver.keep_local + (len(self._savers) > 1)
        for entry in entries[:-keep]:
            release(self._directory, entry)
