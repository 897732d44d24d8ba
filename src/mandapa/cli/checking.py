"""Commands that check: ``fsck`` the repository, ``doctor`` the place it is in."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mandapa.cli.progress import Bar
from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import clean, count, size
from mandapa.errors import AccessDeniedError, MandapaError

if TYPE_CHECKING:
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


COMMANDS = (fsck, doctor)
