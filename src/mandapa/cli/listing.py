"""Commands that look: ``log``, ``show``, ``ls``, ``diff``, ``best``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from mandapa.cli.session import Session, common, pass_session
from mandapa.cli.text import age, clean, count, first_line, size, table, value
from mandapa.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from mandapa.repository.artifact import Artifact
    from mandapa.repository.repository import Repository
    from mandapa.repository.tensors import Tensor, TensorChange
    from mandapa.repository.version import Asset, Diff, Version

__all__ = ["COMMANDS"]

_SHOWN = 12  # paths that `show` lists of a change before it counts the rest
_SHOWN_TENSORS = 6  # of a file, that `diff` lists before it counts the rest


@click.command()
@click.argument("address", required=False, metavar="[ARTIFACT[:REF][/PATH]]")
@click.option("-n", "--max-count", type=click.IntRange(min=1), metavar="N", help="At most N versions.")
@click.option("--deleted", is_flag=True, help="Deleted versions instead of live ones.")
@common
@pass_session
def log(session: Session, address: str | None, max_count: int | None, deleted: bool) -> None:
    """List artifacts, or the versions of one. Newest first.

    With a PATH only the versions in which that file or folder changed; with a REF, from that version back.
    """
    from mandapa.address import Address, parse_address

    repo = session.open()
    if address is None:
        if deleted:
            raise click.UsageError("--deleted needs an artifact", click.get_current_context())
        _log_all(session, repo, max_count)
        return
    parsed = parse_address(address)
    artifact = repo.artifact(parsed.name)
    if deleted:
        found = artifact.deleted()
    else:
        found = artifact.versions(parsed.path or None)
        if parsed.path and not found:
            raise NotFoundError(f"no live version of {parsed.name} has {parsed.path!r}")
    if (parsed.ref, parsed.back) != ("latest", 0):
        start = artifact.resolve(Address(parsed.name, parsed.ref, parsed.back)).number
        found = [version for version in found if version.number <= start]
    found.reverse()
    _print_versions(session, found[:max_count])


def _print_versions(session: Session, versions: list[Version]) -> None:
    from mandapa.cli.values import version_value

    if session.json:
        for version in versions:
            session.emit(version_value(version), str)
        return
    now = datetime.now(UTC)
    rows = [
        (
            f"v{version.number}",
            ", ".join(map(clean, version.names)),
            size(version.size),
            f"+{size(version.added)}",
            age(version.created, now),
            clean(version.run),
            first_line(version.message) or _facts(version),
        )
        for version in versions
    ]
    click.echo(table(rows, right=(2, 3)) if rows else "no versions")


def _facts(version: Version) -> str:
    """The first few facts, for a version without a message."""
    return first_line("  ".join(f"{key}={value(item)}" for key, item in list(version.metadata.items())[:4]), 80)


def _log_all(session: Session, repo: Repository, max_count: int | None) -> None:
    from mandapa.cli.values import version_value

    rows = []
    for artifact in repo.artifacts()[:max_count]:
        live, stored = _sums(artifact)
        latest = live[-1] if live else None
        if session.json:
            newest = None if latest is None else version_value(latest)
            aliases = artifact.aliases()
            session.emit(
                {
                    "artifact": artifact.name,
                    "versions": len(live),
                    "latest": newest,
                    "aliases": aliases,
                    "stored": stored,
                },
                str,
            )
        elif latest is None:
            rows.append((clean(artifact.name), "-", "", "", f"{size(stored)} stored", "", ""))
        else:
            aliases_ = ", ".join(f"{clean(name)}=v{number}" for name, number in artifact.aliases().items())
            rows.append(
                (
                    clean(artifact.name),
                    f"v{latest.number}",
                    aliases_,
                    size(latest.size),
                    f"{size(stored)} stored",
                    age(latest.created),
                    clean(latest.run),
                )
            )
    if not session.json:
        click.echo(table(rows, right=(3, 4)) if rows else "no artifacts yet: 'mandapa add ARTIFACT PATH' makes one")


def _sums(artifact: Artifact) -> tuple[list[Version], int]:
    """Live versions, and the bytes that all commits put, those of deleted versions included."""
    live = artifact.versions()
    return live, sum(version.added for version in (*live, *artifact.deleted()))


@click.command()
@click.argument("address")
@common
@pass_session
def show(session: Session, address: str) -> None:
    """Show one version, or one file in it."""
    from mandapa.cli.values import asset_value, counts_of, from_parent, version_value

    version = session.open()[address]
    if version.path and (asset := version.assets.get(version.path)) is not None:
        session.emit({**asset_value(asset), "address": f"{version.address}/{asset.path}"}, lambda: _asset_text(asset))
        return
    if version.path:
        raise InvalidInputError(f"{version.address}/{version.path} is no file: 'mandapa ls' shows folders")
    diff = from_parent(version)
    changes = None if diff is None else counts_of(diff)
    session.emit({**version_value(version), "changes": changes}, lambda: _version_text(version, diff))


def _asset_text(asset: Asset) -> str:
    rows = [("path", clean(asset.path)), ("size", f"{size(asset.size)}{_exact(asset.size)}")]
    if asset.kind == "url":
        rows += [("url", clean(asset.url)), ("checksum", clean(asset.checksum) or "not known")]
    else:
        rows += [("blake3", asset.digest), ("mode", "executable" if asset.executable else "plain")]
    return table(rows)


def _exact(number: int | None) -> str:
    return f" ({number:,} bytes)" if number is not None and number >= 1000 else ""


def _version_text(version: Version, diff: Diff | None) -> str:
    from mandapa.cli.values import counts_text

    when = version.created.strftime("%Y-%m-%d %H:%M:%S UTC")
    rows = [
        ("version", version.address),
        ("names", ", ".join(map(clean, version.names))),
        ("when", f"{when} ({age(version.created)})"),
        ("who", clean(version.created_by)),
        ("run", clean(version.run)),
        ("used", ", ".join(map(clean, version.used))),
        ("digest", version.digest),
        ("parent", "none" if version.parent is None else f"v{version.parent}"),
        ("assets", f"{version.asset_count:,}"),
        ("size", f"{size(version.size)}{_exact(version.size)}"),
        ("stored", f"+{size(version.added)}{_exact(version.added)}"),
    ]
    parts = [table([row for row in rows if row[1]])]
    if version.message:
        parts.append("\n".join(f"    {clean(line)}" for line in version.message.strip().split("\n")))
    for title, facts in (("metadata", version.metadata), ("facts", version.facts)):
        if facts:
            listed = table([(clean(key), value(item)) for key, item in sorted(facts.items())], indent="    ")
            parts.append(f"{title}\n{listed}")
    if diff is not None:
        lines = [_line(mark, path, sizes) for mark, path, sizes, _, _ in _entries(diff)]
        more = [f"    ... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        head = f"changes since v{version.parent}: {counts_text(diff)}"
        parts.append("\n".join([head, *(f"    {line}" for line in lines[:_SHOWN]), *more]))
    elif version.parent is not None:
        parts.append(f"changes since v{version.parent}: not known, it was deleted")
    return "\n\n".join(parts)


@click.command()
@click.argument("address", required=False, metavar="[ADDRESS[/FOLDER]]")
@click.option("-r", "--recursive", is_flag=True, help="Everything below, not one level.")
@click.option("--tensors", is_flag=True, help="The tensors of a file, or of all files below.")
@common
@pass_session
def ls(session: Session, address: str | None, recursive: bool, tensors: bool) -> None:
    """List the files and folders of a version. Without argument, the names of all artifacts."""
    repo = session.open()
    if address is None:
        if tensors:
            raise click.UsageError("--tensors needs an address", click.get_current_context())
        for artifact in repo.artifacts():
            name = artifact.name
            session.emit({"artifact": name}, lambda name=name: clean(name))  # type: ignore[misc]
        return
    version = repo[address]
    if tensors:
        _list_tensors(session, version)
        return
    entries = list(_listed(version, recursive))
    if not entries and version.path:
        raise NotFoundError(f"{version.address} has nothing at {version.path!r}")
    if session.json:
        for entry in entries:
            session.emit(entry, str)
        return
    click.echo(table([_ls_row(entry) for entry in entries], right=(0,)) if entries else "empty")


def _list_tensors(session: Session, version: Version) -> None:
    """The tensors of the file that the address names, or of all files below that have some."""
    one = bool(version.path) and version.path in version.assets
    files = [version.path] if one else [e["path"] for e in _listed(version, True) if e["kind"] == "file" and e["size"]]
    if not files:
        raise NotFoundError(f"{version.address} has nothing at {version.path!r}")
    rows = []
    for path in files:
        try:
            found = version.tensors(path)
        except InvalidInputError:  # not a file of tensors
            if one:
                raise
            continue
        for tensor in found.values():
            if session.json:
                session.emit({"path": path, **_tensor_value(tensor)}, str)
            rows.append((clean(path), clean(tensor.name), tensor.dtype, _shape(tensor), size(tensor.size)))
    if not session.json:
        click.echo(table([row[one:] for row in rows], right=(4 - one,)) if rows else "no tensors")


def _tensor_value(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "size": tensor.size}


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _ls_row(entry: dict[str, Any]) -> tuple[str, str]:
    name = clean(entry["path"])
    if entry["kind"] == "folder":
        return size(entry["size"]), f"{name}/  ({count(entry['asset_count'], 'asset')})"
    if entry["kind"] == "url":
        return size(entry["size"]), f"{name} -> {clean(entry['url'])}"
    return size(entry["size"]), name + ("*" if entry["executable"] else "")


def _listed(version: Version, recursive: bool) -> Iterator[dict[str, Any]]:
    """Assets below the address's path, folders taken together unless ``recursive``."""
    from mandapa.cli.values import asset_value
    from mandapa.repository.version import Asset

    if version.path and (one := version.assets.get(version.path)) is not None:
        yield asset_value(one)
        return
    below = f"{version.path}/" if version.path else ""
    folder: dict[str, Any] | None = None
    for located in version.rows(below):
        asset = Asset.from_row(located)
        first, slash, _ = asset.path[len(below) :].partition("/")
        path = below + first
        if folder is not None and folder["path"] != path:
            yield folder
            folder = None
        if not slash or recursive:
            yield asset_value(asset)
            continue
        if folder is None:
            folder = {"path": path, "kind": "folder", "size": 0, "asset_count": 0}
        folder["size"] += asset.size or 0
        folder["asset_count"] += 1
    if folder is not None:
        yield folder


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--exit-code", is_flag=True, help="End with 1 when they differ.")
@click.option("--stat", is_flag=True, help="By how much tensors changed; reads those that did.")
@common
@pass_session
def diff(session: Session, a: str, b: str, exit_code: bool, stat: bool) -> int:
    """Compare two versions: files, their tensors, and metadata. Marks: + added, - removed, ~ changed, from A to B.

    Both may name the same folder or file, as in 'diff digits:v1/logs digits:v2/logs': then only that is compared.
    """
    repo = session.open()
    before, after = repo[a], repo[b]
    if before.path != after.path:
        raise InvalidInputError(
            f"A names {before.path or 'all'!r}, B {after.path or 'all'!r}: name the same path in both"
        )
    found = before.diff(after)
    entries = [entry for entry in _entries(found) if _within(entry[1], before.path)]
    metadata = {} if before.path else dict(found.metadata)
    differs = bool(entries or metadata)
    tensors = {path: _tensor_changes(before, after, path, stat) for mark, path, *_ in entries if mark == "~"}
    session.emit(
        _diff_value(before, after, entries, metadata, tensors),
        lambda: _diff_text(entries, metadata, tensors, stat=stat),
    )
    return 1 if differs and exit_code else 0


def _tensor_changes(before: Version, after: Version, path: str, stat: bool) -> list[TensorChange]:
    """What became of the tensors of a changed file; nothing for one that has none."""
    try:
        return before.diff_tensors(after, path, stat=stat)
    except InvalidInputError:
        return []


_Entry = tuple[str, str, str, "Asset | None", "Asset | None"]


def _entries(diff: Diff) -> list[_Entry]:
    """(mark, path, sizes, before, after), sorted by path."""
    found: list[_Entry] = [("+", asset.path, size(asset.size), None, asset) for asset in diff.added]
    found += [("-", asset.path, size(asset.size), asset, None) for asset in diff.removed]
    found += [("~", old.path, _change(old, new), old, new) for old, new in diff.changed]
    return sorted(found, key=lambda entry: entry[1])


def _change(old: Asset, new: Asset) -> str:
    if old.size != new.size:
        return f"{size(old.size)} -> {size(new.size)}"
    if old.digest == new.digest and old.executable != new.executable:
        return "now executable" if new.executable else "no longer executable"
    return size(new.size)


def _within(path: str, place: str) -> bool:
    return not place or path == place or path.startswith(f"{place}/")


_COLOURS = {"+": "green", "-": "red", "~": "yellow"}


def _line(mark: str, path: str, sizes: str) -> str:
    return click.style(f"{mark} {clean(path)}", fg=_COLOURS[mark]) + f"  {sizes}"


def _diff_text(
    entries: list[_Entry],
    metadata: dict[str, tuple[Any, Any]],
    tensors: dict[str, list[TensorChange]],
    *,
    stat: bool,
) -> str:
    width = max([len(clean(entry[1])) for entry in entries], default=0)
    lines = []
    for mark, path, sizes, _, _ in entries:
        lines.append(click.style(f"{mark} {clean(path).ljust(width)}", fg=_COLOURS[mark]) + f"  {sizes}")
        changes = tensors.get(path)
        if changes:
            shown = changes if stat else changes[:_SHOWN_TENSORS]
            lines.append(table([_tensor_row(change) for change in shown]))
            if len(shown) < len(changes):
                lines.append(f"    ... and {count(len(changes) - len(shown), 'tensor')} more: --stat shows all")
    rows = [(f"  {clean(key)}", f"{_given(old)} -> {_given(new)}") for key, (old, new) in metadata.items()]
    if rows:
        lines += ["metadata", table(rows)]
    return "\n".join(lines) or "no difference"


def _tensor_row(change: TensorChange) -> tuple[str, ...]:
    a, b, stat = change.before, change.after, change.stat
    mark = {"added": "+", "removed": "-"}.get(change.kind, "~")
    shown = a or b
    assert shown is not None
    what = f"{shown.dtype} {_shape(shown)}"
    if a and b and change.kind in ("dtype", "shape"):
        what = f"{what} -> {b.dtype} {_shape(b)}"
    if stat is None:
        return f"    {mark} {clean(change.name)}", what, ""
    figures = f"L2 {stat.l2:.3g} ({stat.relative:.2%})  max {stat.max:.3g}  cosine {stat.cosine:.6f}"
    odd = [f"{word} {old} -> {new}" for word, (old, new) in (("NaN", stat.nan), ("Inf", stat.inf)) if old or new]
    return f"    {mark} {clean(change.name)}", what, "  ".join([figures, *odd])


def _given(item: Any) -> str:
    return "(none)" if item is None else value(item)


def _diff_value(
    a: Version,
    b: Version,
    entries: list[_Entry],
    metadata: dict[str, tuple[Any, Any]],
    tensors: dict[str, list[TensorChange]],
) -> dict[str, Any]:
    from mandapa.cli.values import asset_value

    def of(mark: str) -> list[dict[str, Any]]:
        return [asset_value(new or old) for m, _, _, old, new in entries if m == mark and (new or old)]  # type: ignore[arg-type]

    changed = [{"before": asset_value(old), "after": asset_value(new)} for _, _, _, old, new in entries if old and new]
    return {
        "a": a.address,
        "b": b.address,
        "differs": bool(entries or metadata),
        "added": of("+"),
        "removed": of("-"),
        "changed": changed,
        "metadata": {key: {"before": old, "after": new} for key, (old, new) in metadata.items()},
        "tensors": {path: [_change_value(change) for change in found] for path, found in tensors.items() if found},
    }


def _change_value(change: TensorChange) -> dict[str, Any]:
    stat = change.stat
    figures = None if stat is None else {name: _finite(getattr(stat, name)) for name in stat.__dataclass_fields__}
    return {
        "name": change.name,
        "kind": change.kind,
        "before": change.before and _tensor_value(change.before),
        "after": change.after and _tensor_value(change.after),
        "stat": figures,
    }


def _finite(item: Any) -> Any:
    """JSON has neither NaN nor infinities: they are strings, as in metadata."""
    return str(item) if isinstance(item, float) and not math.isfinite(item) else item


@click.command()
@click.argument("artifact")
@click.option("--by", metavar="METRIC", required=True, help="A number in the versions' metadata.")
@click.option("--min", "least", is_flag=True, help="The least is best.")
@click.option("--max", "greatest", is_flag=True, help="The greatest is best.")
@common
@pass_session
def best(session: Session, artifact: str, by: str, least: bool, greatest: bool) -> None:
    """Find the best version by a metric. Of several the oldest."""
    from mandapa.cli.values import version_value

    if least == greatest:
        raise click.UsageError("what is best: --min or --max?", click.get_current_context())
    found = session.open().artifact(artifact).best(by, "min" if least else "max")
    session.emit(version_value(found), lambda: f"{found.address}  {clean(by)} {value(found.metadata[by])}")


COMMANDS = (log, show, ls, diff, best)
