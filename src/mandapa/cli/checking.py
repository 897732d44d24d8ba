"""Commands that check: ``fsck`` the repository, ``drill`` a restore, ``doctor`` the place it is in."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from mandapa.cli.failure import exit_code
from mandapa.cli.progress import Bar
from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import clean, count, size, table, value
from mandapa.cli.text import time as utc
from mandapa.errors import AccessDeniedError, CorruptionError, InvalidInputError, MandapaError, NotFoundError

if TYPE_CHECKING:
    from mandapa.object_store import ObjectStore
    from mandapa.repository.drill import Drilled
    from mandapa.repository.fsck import Finding, FsckReport, Loss, Sampled
    from mandapa.repository.repository import Repository

__all__ = ["COMMANDS"]

_RACES = 20
_ROUND_TRIPS = 5


@click.command()
@click.option("--deep", is_flag=True, help="Read and hash every stored byte too.")
@click.option("--sample", metavar="P", help="Read and hash this share of the bytes, as in 2% or 0.02.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Which bytes: those of the check with this seed.")
@common
@pass_session
def fsck(session: Session, deep: bool, sample: str | None, seed: int | None) -> int:
    """Check that the repository is whole. Every invariant of the format is looked at; nothing is changed.

    Ends with 5 when something is wrong, and says what, where, which versions it hurts, and what can be read of these.
    """
    from mandapa.repository.fsck import fsck as check

    if deep and sample is not None:
        raise click.UsageError("--deep reads all, --sample a share: one of them", click.get_current_context())
    if seed is not None and sample is None:
        raise click.UsageError("--seed chooses what --sample reads", click.get_current_context())
    share = None if sample is None else _share(sample)
    place = _place(session)
    if seed is None:
        seed = random.SystemRandom().getrandbits(32)
    with Bar("checking", unit="things") as bar:
        report = check(place, deep=deep, sample=share, seed=seed, progress=bar.counted)
    session.emit(_fsck_value(report, place.url, deep), lambda: _fsck_text(report, deep))
    return 0 if report.ok else 5


def _share(text: str) -> float:
    """``2%`` or ``0.02`` as a share."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InvalidInputError(f"--sample {text}: write a share as 2% or 0.02, up to 100%")
    return share


def _place(session: Session) -> Repository | ObjectStore:
    """The repository; or its store, when there is one that cannot be opened."""
    from mandapa.object_store import from_url

    try:
        return session.open()
    except CorruptionError:
        return from_url(session.url())
    except NotFoundError:
        url = session.named()
        if url is None:
            raise
        store = from_url(url)
        if next(iter(store.list("catalog/")), None) is None:
            raise
        return store  # all but the marker is there


def _fsck_value(report: FsckReport, url: str, deep: bool) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "url": url,
        "ok": report.ok,
        "deep": deep,
        "sample": None if report.sampled is None else asdict(report.sampled),
        "checked": dict(report.checked),
        "findings": [asdict(found) for found in report.findings],
        "hurt": report.hurt,
        "losses": [asdict(loss) for loss in report.losses],
        "unreadable": report.unreadable,
    }


_SHOWN = 50  # findings, and versions that are hurt, that are told before the rest is counted
_PATHS = 3  # paths that are named of each of these


def _fsck_text(report: FsckReport, deep: bool) -> str:
    lines = [_finding_text(found) for found in report.findings[:_SHOWN]]
    lines += _more(report.findings, "problem")
    if report.unreadable:
        named = ", ".join(map(clean, report.unreadable[:_SHOWN]))
        lines += [f"cannot be opened: {named}", *_more(report.unreadable, "artifact")]
    if report.losses:
        lines += ["cannot be read in full:", table([_loss_row(loss) for loss in report.losses[:_SHOWN]], indent="    ")]
        lines += _more(report.losses, "version")
    sizes = {"bytes": "stored", "bytes read": "read and hashed"}
    counts = [
        f"{size(n)} {sizes[what]}" if what in sizes else count(n, what.removesuffix("s"))
        for what, n in report.checked.items()
    ]
    lines.append(f"checked {', '.join(counts) or 'an empty repository'}")
    if report.sampled is not None:
        lines.append(_sample_text(report.sampled))
    if not report.ok:
        lines.append(count(len(report.findings), "problem"))
    else:
        lines.append("no problems" + ("" if deep or report.sampled else " (--deep reads every byte too)"))
    return "\n".join(lines)


def _finding_text(found: Finding) -> str:
    where = "" if found.problem.startswith(found.where) else f"{clean(found.where)}: "
    return f"{found.invariant}  {where}{clean(found.problem)}"


def _more(items: Sequence[object], noun: str) -> list[str]:
    return [f"... and {count(len(items) - _SHOWN, noun)} more: --json names all"] if len(items) > _SHOWN else []


def _loss_row(loss: Loss) -> tuple[str, str, str, str]:
    lost = [clean(path) for path in loss.lost[:_PATHS]]
    if more := len(loss.lost) - len(lost) + loss.more:
        lost.append(f"{more:,} more")
    if loss.unnamed:
        lost.append(f"{count(loss.unnamed, 'asset')} whose names are lost")
    near = " and ".join(clean(address) for address in (loss.older, loss.newer) if address)
    total = loss.whole + len(loss.lost) + loss.more + loss.unnamed
    return (
        clean(loss.address),
        f"{loss.whole:,} of {count(total, 'asset')} whole",
        f"lost: {', '.join(lost)}",
        f"nearest whole: {near}" if near else "no version of it is whole",
    )


def _sample_text(sampled: Sampled) -> str:
    share = sampled.bytes / sampled.of_bytes if sampled.of_bytes else 0.0
    return (
        f"sample: {share:.1%} of the bytes, {sampled.containers:,} of {count(sampled.of_containers, 'container')}; "
        f"again: --sample {sampled.share * 100:g}% --seed {sampled.seed}"
    )


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
    from mandapa.repository.drill import RESTORED

    address = drilled.version.address
    speed = f"{count(drilled.files, 'file')}, {size(drilled.bytes)} in {drilled.seconds:.2f} s{_rate(drilled)}"
    lines = [f"    {clean(path) or 'the version'}: {clean(why)}" for path, why in drilled.problems[:_NAMED]]
    if len(drilled.problems) > _NAMED:
        lines.append(f"    ... and {count(len(drilled.problems) - _NAMED, 'problem')} more: --json names all")
    if lines:
        lines.insert(0, f"{address} cannot be restored in full: {count(len(drilled.problems), 'problem')}")
        lines.append(f"what is whole: {speed}")
        proven = drilled.version.facts.get(RESTORED)
        if isinstance(proven, dict):  # written by whoever
            lines.append(f"last proven restorable: {value(proven.get('at'))}, by {value(proven.get('by'))}")
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
        lines.append(f"recorded: {RESTORED} {utc(drilled.at)}")
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
