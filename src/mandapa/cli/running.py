"""Commands on the runs of this machine: ``status``, ``sync``."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mandapa.cli.progress import Bar
from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import clean, count, size
from mandapa.errors import AccessDeniedError, ConflictError, MandapaError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mandapa.run.backend import Backend
    from mandapa.run.directory import RunDirectory
    from mandapa.run.logger import BackendSpec
    from mandapa.run.status import BackendStatus, RunStatus

__all__ = ["COMMANDS"]

_DEFAULT = "mandapa-runs"
_TICK = 0.1


@click.command()
@click.argument("directory", default=_DEFAULT, type=click.Path(), metavar="[DIR]")
@common
@pass_session
def status(session: Session, directory: str) -> int:
    """What waits on this machine, and whether it may go. DIR is a run's folder, or one of runs (./mandapa-runs).

    Ends with 0 when all that was handed over is in versions, with 1 when something is not.
    """
    from mandapa.run.directory import RunDirectory
    from mandapa.run.status import look

    found = [look(run) for run in RunDirectory.find(directory)]
    for run in found:
        session.emit(_value(run), lambda run=run: _text(run))  # type: ignore[misc]
    safe = all(run.safe for run in found)
    if not session.json:
        if safe:
            click.echo("all is committed: this machine may go")
        elif all(run.committed for run in found):
            click.echo("what W&B recorded offline is only here: this machine must stay")
        else:
            click.echo("not all is committed: this machine must stay")
    return 0 if safe else 1


@click.command()
@click.argument("directory", default=_DEFAULT, type=click.Path(), metavar="[DIR]")
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds for each run; without, as long as it takes.")
@common
@pass_session
def sync(session: Session, directory: str, timeout: float | None) -> None:
    """Commit what runs on this machine have left. DIR is as for 'status'.

    Credentials come from where the cloud's own tools take them: those that a script passed are written nowhere. Can be
    stopped at any moment and called again. What W&B has recorded offline, 'wandb sync' sends.
    """
    from mandapa.run.directory import RunDirectory
    from mandapa.run.ring import remove_free
    from mandapa.run.status import look

    failure: Exception | None = None
    for run in RunDirectory.find(directory):
        before = look(run)
        if not before.committed:
            _sync(run, timeout, sum(backend.pending_bytes for backend in before.backends))
        for rank in run.ranks():
            remove_free(run, rank)
        after = look(run)
        session.emit(_value(after), lambda after=after: _text(after))  # type: ignore[misc]
        if not after.committed:
            failure = _failure(run, after)
    if failure is not None:
        raise failure


def _sync(run: RunDirectory, timeout: float | None, total: int) -> None:
    """Do an uploader's work here; where one is at work already, ask that one and wait."""
    import threading

    from mandapa.run.backend import WANDB, spec_from
    from mandapa.run.process import end_uploader
    from mandapa.run.status import look
    from mandapa.run.uploader import Uploader, saved_backends

    give_up = None if timeout is None else time.monotonic() + timeout
    with Bar(f"committing {run.name}", total or None) as bar:
        left = total

        def watch() -> bool:
            nonlocal left
            found = look(run)
            now = sum(backend.pending_bytes for backend in found.backends)
            bar(max(left - now, 0))
            left = now
            return found.committed

        def in_time() -> bool:
            return give_up is None or time.monotonic() < give_up

        def ask() -> None:
            with open(run.request, "a", encoding="utf-8"):
                os.utime(run.request)

        lock = run.uploader_lock()
        while in_time():
            if lock.take():
                specs = {key: spec_from(value) for key, value in saved_backends(run).items()}
                inside = [run.backend_lock(key) for key, spec in specs.items() if spec.store == WANDB]
                taken = [one for one in inside if one.take()]
                ours = taken == inside
                if not ours:
                    ask()  # a trainer is at work, which commits to W&B
                uploader = Uploader(run, specs, make={WANDB: _wandb if ours else None}, once=True)
                work = threading.Thread(target=uploader.run, daemon=True)
                work.start()
                while work.is_alive() and in_time():
                    work.join(_TICK)
                    watch()
                if not work.is_alive():
                    for held in (lock, *taken):
                        held.release()
                while not ours and in_time() and any(one.held() for one in inside) and not watch():
                    time.sleep(_TICK)
                return
            failures = _failures(run)
            ask()
            while lock.held() and in_time():  # one that dies at its work leaves the rest to us
                if watch():
                    return
                if _has_failed(run, since=failures):
                    end_uploader(run)  # it cannot, with what it knows; we have this shell's credentials
                time.sleep(_TICK)


def _wandb(spec: BackendSpec, directory: RunDirectory, tell: Callable[[str], None]) -> Backend:
    from mandapa.loggers.wandb_backend import WandbBackend

    return WandbBackend(spec, directory, tell)


def _failures(run: RunDirectory) -> dict[str, int]:
    """How often the uploader has failed at each backend since its last commit there."""
    from mandapa.run.directory import read_json

    told = read_json(run.status).get("backends", {})
    return {key: int(backend.get("error", {}).get("failures", 0)) for key, backend in told.items()}


def _has_failed(run: RunDirectory, *, since: dict[str, int]) -> bool:
    """Whether an uploader whose trainers are gone has tried again, and failed at everything that waits."""
    from mandapa.run.status import look

    found, failures = look(run), _failures(run)
    pending = [backend.key for backend in found.backends if backend.pending and backend.key in failures]
    return not found.live and bool(pending) and all(failures.get(key, 0) > since.get(key, 0) for key in pending)


def _failure(run: RunDirectory, found: RunStatus) -> MandapaError:
    """Why a run could not be synced."""
    from mandapa.run.directory import read_json
    from mandapa.run.reader import error_from

    told = read_json(run.status).get("backends", {})
    for backend in found.backends:
        error = told.get(backend.key, {}).get("error")
        if backend.pending and error:
            hint = _hint(backend) if error.get("type") == AccessDeniedError.__name__ else ""
            return error_from(str(error.get("type")), f"{found.run}: {error.get('message')}{hint}")
    for backend in found.backends:
        if backend.pending and (refused := told.get(backend.key, {}).get("refused")):
            return ConflictError(f"{found.run}: {refused.get('message')}")
    return StorageError(f"{found.run}: not all is committed yet; call 'mandapa sync {_near(found.path)}' again")


def _hint(backend: BackendStatus) -> str:
    if not backend.withheld:
        return ""
    return (
        f" (the run was given {', '.join(backend.withheld)} as arguments, which are written nowhere: "
        "set the store's environment variables, or a profile)"
    )


def _value(run: RunStatus) -> dict[str, Any]:
    return {**asdict(run), "committed": run.committed, "safe": run.safe}


def _text(run: RunStatus) -> str:
    doing = f"training (rank {', '.join(map(str, run.live))})" if run.live else "not training"
    uploader = "uploader at work" if run.uploading else "no uploader"
    lines = [f"{clean(run.run)}  attempt {run.attempt}, {doing}, {uploader}  {_near(run.path)}"]
    if not run.backends:
        lines.append("  no backend logger: its files are in that folder only")
    for backend in run.backends:
        waits = f"{count(backend.pending, 'thing')} waiting, {size(backend.pending_bytes)}"
        committed = backend.committed or f"{backend.artifact}, no version yet"
        lines.append(f"  {clean(committed)}  {waits if backend.pending else 'all committed'}  {_near(backend.store)}")
        lines += [f"    W&B has none of it yet: wandb sync {_near(folder)}" for folder in backend.unsent]
        if backend.error:
            lines.append(f"    last error: {clean(backend.error)}")
    if run.memory_bytes:
        held = f", {count(run.held, 'checkpoint')} not on the disk yet" if run.held else ""
        lines.append(f"  {size(run.memory_bytes)} of memory to hand checkpoints over{held}")
    if not run.committed and not run.uploading:
        lines.append(f"  nobody is committing this: mandapa sync {_near(run.path)}")
    return "\n".join(lines)


def _near(place: str) -> str:
    """A path, relative when it is below the working directory; anything else as it is."""
    return clean(place.removeprefix(os.path.join(os.getcwd(), "")))


COMMANDS = (status, sync)
