"""Commands that check: ``fsck`` the repository, ``drill`` a restore, ``doctor`` the place it is in."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from mandapa.cli.failure import exit_code
from mandapa.cli.progress import Bar
from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import clean, count, size, table
from mandapa.cli.text import time as utc
from mandapa.errors import AccessDeniedError, InvalidInputError, MandapaError

if TYPE_CHECKING:
    from mandapa.repository.drill import Drilled
    from mandapa.repository.fsck import FsckReport
    from mandapa.repository.repository import Repository

__all__ = ["COMMANDS"]

_RACES = 20
_ROUND_TRIPS = 5


@click.command()
@click.option("--deep", is_flag=True, help="Read and hash every stored byte too.")
@common
@pass_session
def fsck(session: Session, deep: bool) -> int:
    """Check that the repository is whole. Every invariant of the format is looked at; nothing is changed.

    Ends with 5 when something is wrong, and says what, where, and which versions it hurts.
    """
    from mandapa.repository.fsck import fsck as check

    repo = session.open()
    with Bar("checking", unit="things") as bar:
        report = check(repo, deep=deep, progress=bar.counted)
    value = {
        "url": repo.url,
        "ok": report.ok,
        "deep": deep,
        "checked": dict(report.checked),
        "findings": [
            {"invariant": found.invariant, "where": found.where, "problem": found.problem} for found in report.findings
        ],
        "hurt": list(report.hurt),
    }
    session.emit(value, lambda: _fsck_text(report, deep))
    return 0 if report.ok else 5


def _fsck_text(report: FsckReport, deep: bool) -> str:
    lines = [f"{found.invariant}  {clean(found.where)}: {clean(found.problem)}" for found in report.findings]
    if report.hurt:
        lines.append(f"cannot be read in full: {', '.join(map(clean, report.hurt))}")
    sizes = {"bytes": "stored", "bytes read": "read and hashed"}
    counts = [
        f"{size(n)} {sizes[what]}" if what in sizes else count(n, what.removesuffix("s"))
        for what, n in report.checked.items()
    ]
    lines.append(f"checked {', '.join(counts) or 'an empty repository'}")
    if not report.ok:
        lines.append(f"{count(len(report.findings), 'problem')}")
    else:
        lines.append("no problems" + ("" if deep else " (--deep reads every byte too)"))
    return "\n".join(lines)


@click.command()
@click.argument("address", required=False)
@click.option("--all", "every", is_flag=True, help="The newest version of every artifact.")
@click.option("--no-record", is_flag=True, help="Do not write down that it was restored.")
@click.option("--dir", "folder", type=click.Path(file_okay=False), metavar="DIR", help="Where to restore for a while.")
@common
@pass_session
def drill(session: Session, address: str | None, every: bool, no_record: bool, folder: str | None) -> int:
    """Prove that a version can be restored. It is restored by a new process, compared, and thrown away.

    Every file is read again from the disk, and tensors of checkpoints are loaded. The version's facts then say when
    that was. Ends with 5 when a file differs, and names each; with 6 when all is well but may not be written down.
    """
    from mandapa.repository.drill import drill as rehearse
    from mandapa.repository.drill import drill_all

    if every == (address is not None):
        raise click.UsageError("name a version, or --all", click.get_current_context())
    repo = session.open()
    if address is not None:
        version = repo[address]
        if version.path:
            raise InvalidInputError(f"{address!r}: a drill is of a whole version: {version.address}")
        with Bar(f"drilling {clean(version.address)}", version.size) as bar:
            drilled = rehearse(version, not no_record, folder=folder, progress=bar)
        session.emit(_drilled_value(drilled), lambda: _drilled_text(drilled))
        if drilled.unrecorded is not None:
            raise drilled.unrecorded
        return 0 if drilled.ok else 5
    with Bar("drilling") as bar:
        return _drill_table(session, drill_all(repo, not no_record, folder=folder, progress=bar))


_NAMED = 20  # files that are named before the rest is counted


def _drilled_text(drilled: Drilled) -> str:
    address = drilled.version.address
    speed = f"{count(drilled.files, 'file')}, {size(drilled.bytes)} in {drilled.seconds:.2f} s{_rate(drilled)}"
    lines = [f"    {clean(path) or 'the version'}: {clean(why)}" for path, why in drilled.problems[:_NAMED]]
    if len(drilled.problems) > _NAMED:
        lines.append(f"    ... and {count(len(drilled.problems) - _NAMED, 'problem')} more: --json names all")
    if lines:
        lines.insert(0, f"{address} cannot be restored in full: {count(len(drilled.problems), 'problem')}")
        lines.append(f"what is whole: {speed}")
    else:
        lines.append(f"{address} is restorable: {speed}, read again and compared")
    if drilled.urls:
        lines.append(f"{count(drilled.urls, 'URL')} not fetched")
    if drilled.tensors:
        lines.append(f"{count(drilled.tensors, 'tensor')} loaded, {size(drilled.tensor_bytes)}")
    lines += [f"not loaded: {clean(path)}: {clean(why)}" for path, why in drilled.unloaded[:_NAMED]]
    if len(drilled.unloaded) > _NAMED:
        lines.append(f"not loaded: {len(drilled.unloaded) - _NAMED:,} more")
    if drilled.recorded:
        lines.append(f"recorded: restored_at {utc(drilled.at)}")
    elif drilled.unrecorded is not None:
        lines.append("not recorded, though it is true")
    return "\n".join(lines)


def _rate(drilled: Drilled) -> str:
    return f" ({size(round(drilled.bytes / drilled.seconds))}/s)" if drilled.seconds > 0 and drilled.bytes else ""


def _drilled_value(drilled: Drilled) -> dict[str, Any]:
    return {
        "address": drilled.version.address,
        "ok": drilled.ok,
        "at": utc(drilled.at),
        "recorded": drilled.recorded,
        "unrecorded": str(drilled.unrecorded or ""),
        "files": drilled.files,
        "bytes": drilled.bytes,
        "urls": drilled.urls,
        "tensors": drilled.tensors,
        "tensor_bytes": drilled.tensor_bytes,
        "seconds": drilled.seconds,
        "problems": [{"path": path, "problem": why} for path, why in drilled.problems],
        "unloaded": [{"path": path, "problem": why} for path, why in drilled.unloaded],
    }


def _drill_table(session: Session, found: Iterable[tuple[str, Drilled | MandapaError]]) -> int:
    """Print what came of all drills; gives the exit code: 5 before others, else that of the first error."""
    rows: list[tuple[str, str, str, str]] = []
    codes: list[int] = []
    whole = 0
    for address, one in found:
        if isinstance(one, MandapaError):
            codes.append(exit_code(one))
            if session.json:
                error = {"error": type(one).__name__, "message": str(one), "exit_code": codes[-1]}
                session.emit({"address": address, "ok": False, **error}, str)
            rows.append((clean(address), "", "", f"no verdict: {clean(str(one))}"))
            continue
        if session.json:
            session.emit(_drilled_value(one), str)
        whole += one.ok
        codes.append(0 if one.ok else 5)
        if one.unrecorded is not None:
            codes.append(exit_code(one.unrecorded))
        rows.append((clean(address), size(one.bytes), f"{one.seconds:.2f} s", _verdict(one)))
    if not session.json:
        click.echo(table(rows, right=(1, 2)) if rows else "no artifacts yet")
        if rows:
            click.echo(f"{whole} of {count(len(rows), 'version')} restorable")
    return 5 if 5 in codes else next((code for code in codes if code), 0)


def _verdict(one: Drilled) -> str:
    if not one.ok:
        path, why = one.problems[0]
        more = f" and {len(one.problems) - 1} more" if len(one.problems) > 1 else ""
        return f"NOT restorable: {clean(path) or 'the version'}: {clean(why)}{more}"
    return "restorable" if one.unrecorded is None else f"restorable, not recorded: {clean(str(one.unrecorded))}"


class _Examination:
    """Checks by name, each with what was found."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []
        self.denied = False

    def note(self, name: str, detail: str, ok: bool = True) -> None:
        self.checks.append({"check": name, "ok": ok, "detail": detail})

    def run(self, name: str, look: Callable[[], str]) -> None:
        """Note what ``look`` says, or why it could not."""
        try:
            self.note(name, look())
        except MandapaError as error:
            self.denied = self.denied or isinstance(error, AccessDeniedError)
            self.note(name, str(error), ok=False)

    @property
    def ok(self) -> bool:
        return all(check["ok"] for check in self.checks)


@click.command()
@common
@pass_session
def doctor(session: Session) -> int:
    """Check access to the store and what it promises. Says by name what lacks.

    Writes a few small objects under probe/ and removes them. Ends with 6 when the store refused something, with 1
    when it cannot be trusted.
    """
    import mandapa

    repo = session.open()
    found = _Examination()
    found.note("versions", f"mandapa {mandapa.__version__}, Python {platform.python_version()}")
    found.note("repository", f"{repo.url}, id {repo.id}, format 1")
    found.run("read", lambda: _round_trip(repo))
    found.run("list", lambda: count(len(repo.artifacts()), "artifact"))
    single = repo.settings().get("writers") == "single"
    found.note("writers", "one at a time, as was promised at init" if single else "any number")
    found.run("write and delete", lambda: _write(repo))
    if single:
        found.note("create-if-absent", "not needed: one writer at a time")
    elif not found.denied:
        found.run("create-if-absent", lambda: _probe(repo, found))
    session.emit(
        {
            "url": repo.url,
            "id": repo.id,
            "ok": found.ok,
            "writers": "single" if single else "many",
            "checks": found.checks,
        },
        lambda: _doctor_text(found),
    )
    return 0 if found.ok else 6 if found.denied else 1


def _round_trip(repo: Repository) -> str:
    from mandapa.format.keys import MARKER
    from mandapa.format.records import MARKER_MAX

    times = []
    for _ in range(_ROUND_TRIPS):
        start = time.perf_counter()
        repo.store.get(MARKER, limit=MARKER_MAX)
        times.append(time.perf_counter() - start)
    return f"{sorted(times)[len(times) // 2] * 1000:.2f} ms a request"


def _write(repo: Repository) -> str:
    key = f"probe/{repo.author.new_id().hex()}/doctor"
    repo.store.put(key, b"written by 'mandapa doctor'; safe to delete")
    skew = (repo.store.head(key).last_modified - repo.author.clock()).total_seconds()
    repo.store.delete([key])
    if abs(skew) > 60:
        return f"allowed; this machine's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the store's"
    return "allowed"


def _probe(repo: Repository, found: _Examination) -> str:
    from mandapa.object_store import probe

    result = probe(repo.store, rounds=_RACES)
    if result.verdict != "ok":
        raise MandapaError(f"this store cannot be trusted with several writers: {'; '.join(result.reasons)}")
    conflicts = f", {count(result.spurious_conflicts, 'spurious conflict')}" if result.spurious_conflicts else ""
    return f"kept in {count(result.rounds, 'race')} of 16 writers{conflicts}"


def _doctor_text(found: _Examination) -> str:
    width = max(len(check["check"]) for check in found.checks)
    lines = []
    for check in found.checks:
        mark = click.style("ok  ", fg="green") if check["ok"] else click.style("FAIL", fg="red")
        lines.append(f"{mark}  {check['check'].ljust(width)}  {clean(check['detail'])}")
    lines.append("all is well" if found.ok else "something lacks: see FAIL above")
    return "\n".join(lines)


COMMANDS = (fsck, drill, doctor)
