"""All logs of a repository with few requests: a listing tells which have moved, the rest is known on this machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from mandapa.content.parallel import in_order
from mandapa.errors import CorruptionError, FormatVersionError
from mandapa.format.keys import log_prefix, parse_seq
from mandapa.repository.log import Log
from mandapa.repository.shelf import Kept
from mandapa.repository.state import ArtifactState

if TYPE_CHECKING:
    from mandapa.object_store.base import ObjectInfo
    from mandapa.repository.repository import Repository

__all__ = ["LogFacts", "keep_logs", "read_logs"]

_PREFIX = "log/"
_SEGMENTS = 8
"""Rows of one log on the shelf; when there would be more they become one."""


@dataclass(frozen=True, slots=True)
class LogFacts:
    """One artifact that the catalog has ever registered."""

    id: str
    name: str | None
    """None when it was removed."""
    log: Log[ArtifactState]
    """Read to its tail."""
    times: dict[int, datetime]
    """Number of a record -> when the store got it, by the store's clock, from the same listing; a record that came
    after that has no time here."""


class _Segment(msgspec.Struct, array_like=True, frozen=True):
    """Some records of one log as they are kept, from the number in their key on."""

    lines: list[bytes]
    seen: tuple[int, datetime]
    """How many of the log's records a listing showed last, and when the last of them was put."""
    head: int
    """How many a head held."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Segment).decode


def read_logs(repo: Repository) -> list[LogFacts]:
    """Every artifact that the catalog has ever registered, its log read to the tail, sorted by id.

    A record that the store got before the call is seen. Costs one request for each 1,000 records that there are, to
    list them all; one for the catalog; and for each log that has moved since this machine read it one for each new
    record. A log that it never read costs one for each record, or, with a head, two and one for each record after it.

    What this machine knows is believed if the listing shows as many records, the last with the size and the time that
    it had in a listing before; each is checked as if it came from the store. `Repository.log` gives the same logs: to
    append to one needs no reading.

    Raises:
        CorruptionError: A record is missing, altered, or does not follow from those before it.
        FormatVersionError: A record needs a newer mandapa.
    """
    catalog = repo.catalog.refresh()
    names = {artifact: name for name, artifact in catalog.names.items()}
    ids = sorted([*names, *catalog.removed])
    logs = [repo.log(id_) for id_ in ids]
    before = [len(log.records) for log in logs]
    kept = repo.kept_logs.read()
    listed = _listed(repo, ids)
    known = _segments(kept)
    moved: list[tuple[Log[ArtifactState], int]] = []
    for log, count in zip(logs, before, strict=True):
        infos = listed.get(log.id, [])
        if count and not _same(log.lines[:count], log.seen, infos):
            log.forget()
        if not log.records:
            _preload(log, known.get(log.id, []), infos)
        if len(log.records) < len(infos):
            moved.append((log, len(infos)))
    # Several logs at once, each record after record; or one log with several records at once.
    outer, inner = (repo.threads, 0) if len(moved) > 1 else (0, repo.threads)
    for _ in in_order(lambda one: _read_on(*one, threads=inner), moved, threads=outer):
        pass
    facts = []
    for log in logs:
        infos = listed.get(log.id, [])
        log.seen = (len(infos), infos[-1].last_modified) if infos else None
        times = {seq: info.last_modified for seq, info in enumerate(infos)}
        facts.append(LogFacts(log.id, names.get(log.id), log, times))
    _keep(repo, kept, known, logs)
    return facts


def keep_logs(repo: Repository) -> None:
    """Remember on this machine what was read of logs, and appended to them, since `read_logs`.

    One request for each 1,000 records there are, or none if nothing is new: of what is kept the time must be known,
    by which it is believed later. Optional: without it the next `read_logs` reads what was appended since, one by one.

    Raises:
        CorruptionError: A record is missing.
    """
    catalog = repo.catalog.state
    ids = [*catalog.names.values(), *catalog.removed]
    logs = [(log, len(log.records)) for log in map(repo.log, ids)]
    if all(count == (log.seen[0] if log.seen else 0) for log, count in logs):
        return
    kept = repo.kept_logs.read()
    listed = _listed(repo, ids)
    good = []
    for log, count in logs:
        infos = listed.get(log.id, [])[:count]
        if _same(log.lines[:count], log.seen, infos):
            log.seen = (count, infos[-1].last_modified)
            good.append(log)
        elif not count:
            good.append(log)  # not read by this process: what is kept of it stays
    _keep(repo, kept, _segments(kept), good)


def _read_on(log: Log[ArtifactState], count: int, *, threads: int) -> None:
    """Read to record ``count``; if that does not follow from what is known, know nothing and begin again."""
    known = bool(log.records)
    try:
        log.read_to(count, threads=threads)
    except CorruptionError:
        if not known:
            raise
        log.forget()
        log.read_to(count, threads=threads)


def _listed(repo: Repository, ids: Sequence[str]) -> dict[str, list[ObjectInfo]]:
    """Artifact id -> the objects of its records, as one listing shows them; keys that are none of a record are ignored.

    What comes after a gap is left out, when the record in the gap is there: a folder that grows while it is listed may
    show a record and not the one before it.
    """
    found: defaultdict[str, list[ObjectInfo]] = defaultdict(list)
    gaps: set[str] = set()
    for info in repo.store.list(_PREFIX):
        id_, _, number = info.key[len(_PREFIX) :].partition("/")
        infos = found[id_]
        if number == f"{len(infos):016d}" and id_ not in gaps:
            infos.append(info)
        elif "/" not in number and parse_seq(number) is not None:
            gaps.add(id_)
    for id_ in gaps.intersection(ids):
        repo.log(id_).check_there(len(found[id_]), log_prefix(id_))
    return found


def _same(lines: Sequence[bytes], seen: tuple[int, datetime] | None, infos: Sequence[ObjectInfo]) -> bool:
    """Whether known records are those of a listing: by the time of the last that an earlier one showed, and by sizes.

    What this process has read or appended since has no time; that somebody set its store back meanwhile, and others
    went on with records as long as those, is not looked for.
    """
    if not 0 < len(lines) <= len(infos):
        return False
    start = len(lines) - 1
    if seen is not None:
        start = seen[0] - 1
        if start >= len(lines) or infos[start].last_modified != seen[1]:
            return False
    return all(infos[at].size == len(lines[at]) for at in range(start, len(lines)))


def _segments(kept: Kept) -> dict[str, list[tuple[bytes, _Segment]]]:
    """Artifact id -> (key, segment), each of which goes on where the one before ended."""
    found: defaultdict[str, list[tuple[bytes, _Segment]]] = defaultdict(list)
    for key in sorted(kept.rows):
        before = found[key[:16].hex()]
        if int.from_bytes(key[16:], "big") == sum([len(segment.lines) for _, segment in before]):
            with suppress(msgspec.MsgspecError):  # of another mandapa
                before.append((key, _decode(kept.rows[key])))
    return found


def _preload(log: Log[ArtifactState], segments: Sequence[tuple[bytes, _Segment]], infos: Sequence[ObjectInfo]) -> None:
    """Let a log know what this machine knows of it, if that is what the listing shows."""
    lines = [line for _, segment in segments for line in segment.lines]
    if not segments or segments[-1][1].seen[0] != len(lines) or not _same(lines, segments[-1][1].seen, infos):
        return
    try:
        log.preload(lines, head=segments[-1][1].head)
    except (CorruptionError, FormatVersionError):
        return  # the store may hold better ones, or says the same


def _keep(
    repo: Repository,
    kept: Kept,
    known: dict[str, list[tuple[bytes, _Segment]]],
    logs: Sequence[Log[ArtifactState]],
) -> None:
    """Make the shelf hold these logs, as far as a listing showed them, and no others."""
    put: dict[bytes, bytes] = {}
    stay: set[bytes] = set()
    for log in logs:
        segments = known.get(log.id, [])
        if log.seen is None:
            stay.update([key for key, _ in segments])
            continue
        lines = log.lines[: log.seen[0]]
        done = sum([len(segment.lines) for _, segment in segments])
        same = [line for _, segment in segments for line in segment.lines] == lines[:done]
        if same and done == len(lines) and segments[-1][1].seen == log.seen:
            stay.update([key for key, _ in segments])
            continue
        if same and done < len(lines) and len(segments) < _SEGMENTS:
            stay.update([key for key, _ in segments])
        else:
            done = 0
        put[bytes.fromhex(log.id) + done.to_bytes(8, "big")] = _encode(_Segment(lines[done:], log.seen, log.head))
    drop = kept.rows.keys() - stay - put.keys()
    if put or drop:
        repo.kept_logs.write(kept, put, drop)
