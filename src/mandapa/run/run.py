"""A run: what a training program hands over, and what it goes on from. Its calls return at once."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal

if sys.platform == "win32":
    raise ImportError("mandapa.Run is not supported on Windows: use Linux, macOS, or WSL")

import msgspec

from mandapa.address import parse_address
from mandapa.content.walk import walk
from mandapa.errors import InvalidInputError, NotFoundError, StorageError
from mandapa.format.strict import check_label, check_name, check_path
from mandapa.repository.metadata import clean_metadata
from mandapa.repository.urls import check_facts, check_url
from mandapa.run.backend import WANDB, public, spec_from
from mandapa.run.checkpoints import Checkpoint
from mandapa.run.directory import RunDirectory, write_json
from mandapa.run.facts import gather, ranks_from_environment
from mandapa.run.handle import Handle, together
from mandapa.run.hparams import diff, from_yaml, plain, to_yaml
from mandapa.run.inside import Inside
from mandapa.run.journal import ArtifactEntry, UrlEntry, UseEntry
from mandapa.run.launch import join
from mandapa.run.limits import Limits
from mandapa.run.listeners import Listeners, check_metrics, check_step
from mandapa.run.logger import Logger, Take
from mandapa.run.outbox import Outbox, now
from mandapa.run.process import UploaderProcess
from mandapa.run.reader import error_from, fetch
from mandapa.run.resume import from_store, newest_local, one_at_a_time
from mandapa.run.saving import Saving
from mandapa.run.secrets import redact
from mandapa.run.staging import plain_view
from mandapa.run.troubles import Troubles

__all__ = ["Run"]

ACCESS_PATIENCE = 10.0
"""Seconds until a store must have answered before training starts."""

_FOREVER = 1e9  # seconds
_OTHERS = 10.0  # seconds for other ranks to end, whose assets this process commits
_STOP = 0.5  # seconds for a commit of this process that is under way

_open_runs: dict[tuple[str, int], Run] = {}


class Run:
    """A named training: hands assets over to its loggers, and finds the checkpoint to go on from.

    Every call returns at once and never waits for a store. What was handed over is owned before the call returns,
    written to a journal in the run's directory, and made into versions by another process. A run whose store is down
    goes on.

    Safe to use from several threads. A process that is forked from this one (a DataLoader's worker) gets a
    `ClosedError`.

    Args:
        name: Of the run, and by default of its artifact; the same name on every start.
        hparams: Any mapping, dataclass, Namespace, pydantic model or OmegaConf container; becomes ``hparams.yaml``,
            without secrets.
        loggers: Those that make assets, those that log artifacts, and a `CheckpointSaver` if the default one will not
            do.
        resume: ``auto``: go on from the newest whole checkpoint, if there is one; ``must``: there has to be one;
            ``never``: start with an empty folder.
        dir: Where the run's directory is made.
        strict: A failure of logging raises, instead of warning.
        limits: Caps; see `Limits`.

    Raises:
        InvalidInputError: A name, hyperparameter or logger that cannot be.
        NotFoundError: ``resume="must"``, and there is no checkpoint.
        AccessDeniedError, StoreNotFoundError, StorageError: A backend refused, within 10 seconds. One that does not
            answer only warns.
        ConflictError: Another live process trains this run, in this directory and of this rank.
        SecurityError, FormatVersionError: The directory is another user's, or of a newer mandapa.

    Example:
        >>> import tempfile
        >>> from mandapa import Run
        >>> with Run("resnet-7", {"lr": 0.1}, dir=tempfile.mkdtemp()) as run:
        ...     run.log_metrics({"loss": 0.5}, step=1)
    """

    def __init__(
        self,
        name: str,
        hparams: Any = None,
        *,
        loggers: Iterable[Logger] = (),
        resume: Literal["auto", "never", "must"] = "auto",
        dir: str | os.PathLike[str] = "mandapa-runs",  # noqa: A002 - the word that users expect
        strict: bool = False,
        limits: Limits | None = None,
    ) -> None:
        if resume not in ("auto", "never", "must"):
            raise InvalidInputError(f"resume={resume!r}: use 'auto', 'never' or 'must'")
        self._pid = os.getpid()
        self._closed = True  # until all is ready
        self._limits = limits or Limits()
        self._troubles = Troubles(strict=strict)
        self._inputs: list[str] = []
        self._hparams: dict[str, Any] = {}
        self.name = check_name(name)
        given = plain(hparams)
        self._loggers = Listeners(loggers, self._troubles)
        self._saver = self._loggers.saver
        self.rank, self.world_size, local_rank, self._local_world = ranks_from_environment(os.environ)
        if self.world_size > 1 and self._saver.every is not None and self._saver.every.seconds is not None:
            raise InvalidInputError("Every(seconds=) lets ranks disagree on when to save: use Every(steps=)")
        first = self.rank - local_rank
        together = self._local_world == self.world_size
        self._savers = list(range(first, first + self._local_world)) if together else [0]
        self._backends = self._loggers.backends(self.name)
        if self._backends and first > 0:
            self._backends = {}
            self._troubles.warn(
                "this machine does not have rank 0: the artifacts of a run on several machines are logged by the one "
                "that has; what is handed over here stays here"
            )
        self._directory = RunDirectory(os.path.join(os.fspath(dir), self.name), self.name)
        self.dir = self._directory.path
        _close_former(self.dir, self.rank)
        self._rank_lock = self._directory.take_rank(self.rank)
        try:
            self._begin(given, resume)
        except BaseException:
            self._abandon()
            raise

    # -- beginning ----------------------------------------------------------------------------------------------------

    def _begin(self, given: dict[str, Any], resume: str) -> None:
        directory = self._directory
        uploader: UploaderProcess | None = None
        known: dict[str, Any] = {}
        if self._backends:
            times = {"linger": self._limits.linger, "commit_every": self._limits.commit_every}
            limits = {name: min(seconds, _FOREVER) for name, seconds in times.items()}  # JSON knows no infinity
            config = {"backends": [value for _, value in self._backends.values()], "limits": limits}
            uploader = UploaderProcess(directory, msgspec.json.encode(config))
            known = uploader.begin(ACCESS_PATIENCE, self._stores.keys()).get("backends", {})
            for key in self._backends.keys() - known.keys():  # which an uploader that is not there yet has not noted
                write_json(directory.backend(key), public(self._backends[key][1]), durable=True)
            self._check_access(known)
        opened = {key: known.get(key, {}).get("opened") or {} for key in self._backends}
        former = self._former_hparams(opened)
        self._outbox = outbox = Outbox(
            directory,
            self.rank,
            list(self._backends),
            uploader=uploader,
            limits=self._limits,
            troubles=self._troubles,
        )
        local = None if resume == "never" else newest_local(directory, self.rank, outbox.progress.values())
        launch = join(
            directory,
            outbox.begun,
            local_world=self._local_world,
            opened=opened,
            settled={key: progress.any for key, progress in outbox.progress.items()},
            local_step=None if local is None else local.step,
            fresh=resume == "never",
        )
        if resume == "must" and local is None and launch.store is None:
            raise NotFoundError(f"resume='must': the run {self.name!r} has no checkpoint, neither here nor in a store")
        self.attempt = launch.attempt
        self._stored = launch.store
        self._saving = Saving(outbox, directory, self._loggers, self._savers)
        outbox.begin(launch.attempt, launch=launch.id, local_ranks=self._savers, base=launch.base, fresh=launch.fresh)
        self._closed = False
        _open_runs[self.dir, self.rank] = self
        resumed = self.latest_checkpoint()
        if resumed is not None and self._saver.every is not None:
            self._saver.every.start(resumed.step)
        self._facts = self._gather(resumed)
        self._write_facts("running")
        self._loggers.open(self)
        atexit.register(self._at_exit)  # after what a logger has registered: it is called before that
        self._work_inside()
        self.log_hparams(given)
        if resumed is not None and given and former is not None and (lines := diff(former, self._hparams)):
            self._troubles.warn(f"hyperparameters differ from those of the run so far: {'; '.join(lines[:20])}")

    @property
    def _stores(self) -> dict[str, dict[str, Any]]:
        """The backends that the uploader commits to."""
        return {key: value for key, (_, value) in self._backends.items() if value["store"] != WANDB}

    def _work_inside(self) -> None:
        """Begin to commit to the backends that live in this process."""
        inside = {}
        for key, (logger, value) in self._backends.items():
            spec = spec_from(value)
            backend = logger.backend(spec, self._directory, self._note)
            if backend is not None:
                inside[key] = (spec, backend)
        if inside:
            every = min(self._limits.commit_every, _FOREVER)
            self._outbox.inside = Inside(self._directory, self.rank, inside, commit_every=every, tell=self._note)
            self._outbox.inside.start()

    def _note(self, line: str) -> None:
        self._directory.note(redact(line))

    def _abandon(self) -> None:
        """End what has begun, without waiting for anything."""
        self._loggers.abandon()
        self._closed = True
        atexit.unregister(self._at_exit)
        if _open_runs.get((self.dir, self.rank)) is self:
            del _open_runs[self.dir, self.rank]
        outbox: Outbox | None = getattr(self, "_outbox", None)  # there is none before the uploader has answered
        if outbox is not None:
            outbox.abandon()
        self._rank_lock.release()

    def _check_access(self, known: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse to train where a backend refused us; one that does not answer may come back."""
        for key, value in self._stores.items():
            backend = known.get(key, {})
            error = backend.get("error", {})
            if backend.get("state") in ("refused", "failed"):
                raise error_from(error["type"], error["message"])
            if backend.get("state") != "ok":
                why = error.get("message") or f"{value['store']} has not answered for {ACCESS_PATIENCE:.0f} s"
                self._troubles.report(f"assets wait in {self.dir} until the store answers: {why}")

    def _former_hparams(self, opened: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
        """The hyperparameters of the run so far, as far as they are known."""
        text = ""
        with suppress(OSError), open(os.path.join(self.dir, "hparams.yaml"), encoding="utf-8") as file:
            text = file.read(1 << 20)
        text = text or next((str(known["hparams"]) for known in opened.values() if "hparams" in known), "")
        return from_yaml(text) if text else None

    def _gather(self, resumed: Checkpoint | None) -> dict[str, Any]:
        if self.rank or not self._backends:
            return {}
        ranks = {"rank": self.rank, "world_size": self.world_size, "local_world_size": self._local_world}
        facts = gather(run=self.name, attempt=self.attempt, started=now(), ranks=ranks)
        return {**facts, "resumed_from": resumed and {"step": resumed.step, "version": resumed.version}}

    def _write_facts(self, status: str) -> None:
        """``.mandapa/run.json``: written when an attempt begins and when it ends."""
        if self._facts:
            ended = None if status == "running" else now()
            facts = {**self._facts, "status": status, "ended": ended, "inputs": self._inputs}
            text = msgspec.json.format(msgspec.json.encode(facts)) + b"\n"
            self._outbox.bytes(".mandapa/run.json", text, list(self._backends), reserved=True)

    # -- what the run logs --------------------------------------------------------------------------------------------

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Give numbers to the loggers that write them down. NaN and infinities are numbers.

        Raises:
            InvalidInputError: Not names and numbers, or no step.
        """
        with self._outbox.working():
            numbers = check_metrics(metrics)
            check_step(step)
            self._loggers.tell(lambda logger: logger.log_metrics(numbers, step))

    def log_hparams(self, hparams: Any) -> None:
        """Add hyperparameters; ``hparams.yaml`` has all of them, with secrets replaced by ``[redacted]``.

        Raises:
            InvalidInputError: What cannot be written; the message names it.
            StorageError: With ``strict=True``: there is no room for it.
        """
        with self._outbox.working():
            self._hparams.update(redact(plain(hparams)))
            if self.rank or not self._hparams:
                return
            text = to_yaml(self._hparams).encode()
            self._outbox.make_room("hparams.yaml", len(text), lambda: self._write_bytes("hparams.yaml", text))
            if keys := self._wanting("hparams.yaml"):
                self._outbox.bytes("hparams.yaml", text, keys)
            self._loggers.tell(lambda logger: logger.log_hparams(self._hparams))

    def log_asset(self, path: str | os.PathLike[str], at: str | None = None, *, take: Take = "copy") -> Handle:
        """Hand a file over, or each file of a folder; its bytes are owned when the call returns.

        Args:
            path: A file, which may be rewritten or deleted as soon as the call has returned; or a folder.
            at: Its place in the run's folder, by default its name; of a folder, the folder that its files go under.
            take: ``copy``: a copy (no bytes are moved where the file system can clone). ``move``: the file is moved
                away. ``link``: a hard link; you promise never to write into the file again, which a link does not guard
                against. ``grow``: nothing is copied; you promise that bytes are only ever appended to the file: the
                version gets those that it has now.

        Raises:
            NotFoundError: There is no such file.
            InvalidInputError: No file, a place that no version can hold, or an unknown ``take``.
            StorageError: It cannot be read; or, with ``strict=True``, there is no room for it.
        """
        with self._outbox.working():
            source = os.fspath(path)
            if take not in ("copy", "move", "link", "grow"):
                raise InvalidInputError(f"take={take!r}: use 'copy', 'move', 'link' or 'grow'")
            if os.path.isdir(source):
                prefix = f"{check_path(at)}/" if at else ""
                handles = [self.log_asset(found.source, prefix + found.path, take=take) for found in walk(source)]
                return together(handles) if handles else self._outbox.local()
            place = check_path(os.path.basename(os.path.abspath(source)) if at is None else at)
            if keys := self._wanting(place):
                return self._outbox.file(place, source, keys, take)
            if not os.path.isfile(source):
                raise NotFoundError(f"there is no file or folder {source!r}")
            return self._outbox.local()

    def log_bytes(self, at: str, data: bytes | bytearray | memoryview) -> Handle:
        """Hand bytes over, for the place ``at`` in the run's folder.

        A run without backend logger writes them to that place in its directory.

        Raises:
            InvalidInputError: A place that no version can hold, or no bytes.
            StorageError: With ``strict=True``: there is no room for them.
        """
        with self._outbox.working():
            if not isinstance(data, bytes | bytearray | memoryview):
                raise InvalidInputError(f"log_bytes takes bytes, not {type(data).__name__}")
            keys = self._wanting(check_path(at))
            if not self._backends:
                self._check_free(at)
                view = plain_view(data)
                written = self._outbox.make_room(at, len(view), lambda: self._write_bytes(at, view))
                return self._outbox.skipped() if written is None else self._outbox.local()
            return self._outbox.bytes(at, data, keys) if keys else self._outbox.local()

    def _check_free(self, at: str) -> None:
        inner = os.path.basename(self._directory.inner)
        if at.partition("/")[0] == inner:
            raise InvalidInputError(f"{at!r}: the folder {inner!r} is the run's own")

    def _write_bytes(self, at: str, data: bytes | memoryview) -> int:
        """Replace a file in the run's directory, whole or not at all; gives its bytes."""
        target = os.path.join(self.dir, at)
        temporary = os.path.join(self._directory.inner, f"rank{self.rank}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        return len(data)

    def log_url(self, at: str, url: str, *, size: int | None = None, checksum: str = "") -> Handle:
        """Record a URL at a place in the run's folder; its bytes stay where they are and are not read.

        Raises:
            InvalidInputError: A scheme that is not allowed, a URL that carries a secret, a place that no version can
                hold, or a size or checksum that cannot be.
        """
        with self._outbox.working():
            check_url(url)
            check_facts(url, size, checksum)
            keys = self._wanting(check_path(at))
            if not keys:
                return self._outbox.local()
            skip = [key for key in self._backends if key not in keys]
            return self._outbox.hand_over(keys, 0, UrlEntry, path=at, url=url, size=size, checksum=checksum, skip=skip)

    def log_artifact(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        aliases: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        take: Literal["copy", "move", "link"] = "copy",
    ) -> Handle:
        """Make a version of another artifact: exactly this file, or the contents of this folder. Committed at once.

        Raises:
            NotFoundError: There is nothing at ``path``.
            InvalidInputError: A name, alias, path or metadata that cannot be; or the run's own artifact.
            StorageError: It cannot be read; or, with ``strict=True``, there is no room for it.
        """
        with self._outbox.working():
            check_name(name)
            facts = clean_metadata(metadata)
            source = os.fspath(path)
            if take not in ("copy", "move", "link"):
                raise InvalidInputError(f"take={take!r}: use 'copy', 'move' or 'link'")
            labels = [check_label(alias) for alias in ([aliases] if isinstance(aliases, str) else aliases)]
            if any(value["artifact"].lower() == name.lower() for _, value in self._backends.values()):
                raise InvalidInputError(f"{name!r} is the artifact of the run itself: use log_asset, or another name")
            if not os.path.exists(source):
                raise NotFoundError(f"there is no file or folder {source!r}")
            if not self._backends:
                return self._outbox.local()
            at = None if os.path.isdir(source) else check_path(os.path.basename(os.path.abspath(source)))
            taken = self._outbox.own(name, source, take)
            if taken is None:
                return self._outbox.skipped()
            return self._outbox.hand_over(
                list(self._backends),
                taken[1],
                ArtifactEntry,
                name=name,
                source=self._directory.relative(taken[0]),
                at=at,
                size=taken[1],
                aliases=labels,
                metadata=facts,
            )

    def use(
        self,
        address: str,
        dest: str | os.PathLike[str] | None = None,
        *,
        only: str | Sequence[str] | None = None,
    ) -> str:
        """Download a version of the repository that the first backend logs to, and record that the run used it.

        Args:
            address: As everywhere: ``imagenet:v3``, ``base-model:prod/tokenizer``.
            dest: Where to; by default a folder below ``inputs`` in the run's directory.
            only: A pattern, or several, over whole paths.

        Returns:
            The folder's path.

        Raises:
            InvalidInputError: No address, or the run has no backend logger.
            NotFoundError: No such version.
            StorageError: The store failed or refused.
        """
        with self._outbox.working():
            parsed = parse_address(address)
            value = next(iter(self._stores.values()), None)
            if value is None:
                raise InvalidInputError("use() reads from the place of the first ObjectStoreLogger: give the run one")
            patterns = None if only is None else [only] if isinstance(only, str) else list(only)
            name = f"{parsed.name}-{parsed.ref}{f'~{parsed.back}' if parsed.back else ''}"
            target = os.path.join(self.dir, "inputs", name) if dest is None else os.fspath(dest)
            with one_at_a_time(self._directory):
                found = fetch(value, address, os.path.abspath(target), only=patterns)
            self._outbox.try_append(UseEntry, address=found["address"])
            self._inputs.append(found["address"])
            return target

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, state: Any, *, step: int, epoch: int | None = None, metrics: Mapping[str, Any] | None = None
    ) -> Handle:
        """Write a state into the run's directory and hand it over: a version, with all that was handed over before.

        Where a run has several ranks, each hands over its own state, or one does for all; the version is made when all
        have.

        Args:
            state: What ``torch.save`` takes, or, with ``format="safetensors"``, tensors, numbers, strings, lists and
                dicts.
            step: Of the training, 0 or more: what "newest" means when a run is resumed.
            epoch: Of the training.
            metrics: Numbers of this checkpoint; metadata of its version.

        Raises:
            InvalidInputError: A step, epoch, metric or state that cannot be; or a part of a checkpoint on several
                machines.
            StorageError: It cannot be written; without ``strict=True`` only a full disk, by `Limits`, warns.
        """
        with self._outbox.working():
            return self._saving.save(state, step=step, epoch=epoch, metrics=metrics)

    def log_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        at: str | None = None,
        whole: bool = False,
        take: Literal["copy", "move", "link"] = "copy",
    ) -> Handle:
        """Hand over a checkpoint that something else has written: a version, as `save_checkpoint` makes one.

        Its bytes are owned when the call returns. Ranks that write it together call with one step and ``at``.

        Args:
            path: A file; or a folder, whose contents are this rank's files.
            step: Of the training, 0 or more: what "newest" means when a run is resumed.
            epoch: Of the training.
            metrics: Numbers of this checkpoint; metadata of its version.
            at: What in the version is the checkpoint, by default the folder ``checkpoint``, into which a file goes
                under its name. A file that is given a place is at that very place. The next version has its own
                checkpoint, and this one no more.
            whole: It is all of the checkpoint: no other rank has a part, and none is waited for.
            take: As of `log_asset`, without ``grow``.

        Raises:
            NotFoundError: There is nothing at ``path``.
            InvalidInputError: A step, epoch, metric or place that cannot be; an empty folder; one file at a place of
                its own where other ranks have parts; or a part of a checkpoint on several machines.
            StorageError: It cannot be read; without ``strict=True`` a full disk, by `Limits`, only warns.
        """
        with self._outbox.working():
            return self._saving.log(path, step=step, epoch=epoch, metrics=metrics, at=at, whole=whole, take=take)

    def maybe_checkpoint(
        self,
        make_state: Callable[[], Any],
        *,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> Handle | None:
        """`save_checkpoint` of ``make_state()`` when the saver's ``every`` says that one is due; None when not."""
        with self._outbox.working():
            check_step(step)
            if self._saver.every is not None and not self._saver.every(step):
                return None
            return self.save_checkpoint(make_state(), step=step, epoch=epoch, metrics=metrics)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The whole checkpoint of the highest step to go on from, or None: from this directory, or from the store.

        What the store has was asked when the run began.
        """
        with self._outbox.working():
            local = newest_local(self._directory, self.rank, self._outbox.progress.values())
            store = self._stored
            if store is None or (local is not None and local.step >= store["metadata"]["step"]):
                return local
            file = self._saving.file_name(store["metadata"]["step"], store["metadata"].get("epoch"))
            return from_store(self._directory, self._backends[store["key"]][1], store, file)

    # -- waiting ------------------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Make a commit of everything handed over happen now; whether it is done, False after ``timeout`` seconds.

        Raises:
            StorageError: With ``strict=True``: a backend failed.
        """
        with self._outbox.working():
            self._loggers.tell(lambda logger: logger.flush())
        return self._outbox.flush(timeout)

    def status(self) -> dict[str, Any]:
        """How far everything is; reads local files only.

        ``held``, ``durable``, ``committed``: numbers in this rank's journal. ``safe``: whether the machine may go, as
        far as this process knows. ``backends``: what each is at (``state``, ``error``, ``committed``, ``pending``).
        """
        with self._outbox.working():
            outbox, told, reports = self._outbox, self._outbox.uploader_status(), self._outbox.reports()
            done = [progress.look().done.highest(self.rank) for progress in outbox.progress.values()]
            return {
                "run": self.name,
                "attempt": self.attempt,
                "held": outbox.last,
                "durable": told.get("durable", {}).get(str(self.rank), 0),
                "committed": min(done, default=0),
                "safe": not outbox.waiting(),
                "backends": {key: reports.get(key, {}) for key in self._backends},
            }

    def close(self, timeout: float | None = None) -> bool:
        """End the run: hand the rest over, commit, and wait for that; whether all is committed. Any number of times.

        After ``timeout`` seconds (by default `Limits.exit_seconds`) it returns, and the uploader goes on alone;
        ``mandapa sync`` does what that one did not. Stores of which nothing but failures come are not waited for.

        Raises:
            StorageError: With ``strict=True``: not all is committed.
        """
        return self._close("finished", timeout)

    def _close(self, status: Literal["finished", "failed"], timeout: float | None) -> bool:
        if self._pid != os.getpid():
            return True
        if self._closed:
            return not self._outbox.waiting()
        self._closed = True
        atexit.unregister(self._at_exit)
        _open_runs.pop((self.dir, self.rank), None)
        done = False
        try:
            self._loggers.tell(lambda logger: logger.close(), backends=False)
            with suppress(StorageError):  # a full disk, of which it has warned
                self._write_facts(status)
            if not (done := self._outbox.end(status, timeout)):
                self._troubles.report(
                    f"the run {self.name!r} ends before everything is committed; the uploader goes on, and "
                    f"'mandapa status {self.dir}' says when the machine may go"
                )
        finally:
            if self._outbox.inside is not None:
                if done:
                    self._outbox.inside.drain(_OTHERS)
                self._outbox.inside.stop(_STOP)
            self._saving.close()
            try:
                self._loggers.tell(lambda logger: logger.close(), makers=False)
            finally:
                self._rank_lock.release()
        return done

    def __enter__(self) -> Run:
        """The run itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; an exception marks the attempt as failed, and what was handed over is committed all the same."""
        clean = error is None or (isinstance(error, SystemExit) and not error.code)
        if error is not None and not clean and not self._closed and self._pid == os.getpid():
            text = "".join(traceback.format_exception(error))
            self._loggers.tell(lambda logger: logger.log_failure(text))
        self._close("finished" if clean else "failed", None)

    def _at_exit(self) -> None:
        self._close("failed" if getattr(sys, "last_value", None) is not None else "finished", None)

    def _wanting(self, place: str) -> list[str]:
        """The backends that log the asset at that place."""
        return [key for key, (logger, _) in self._backends.items() if logger.wants(place)]


def _close_former(folder: str, rank: int) -> None:
    """In a notebook a cell is run again, and the run of the first time is still open."""
    former = _open_runs.get((folder, rank))
    if former is not None:
        text = f"the run {former.name!r} was open in this process: it is closed first"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        former.close()
