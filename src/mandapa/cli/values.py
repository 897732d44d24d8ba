"""Versions and assets as JSON objects: their keys are a promise to scripts (docs/cli.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mandapa.cli.text import size, time
from mandapa.errors import NotFoundError

if TYPE_CHECKING:
    from mandapa.repository.artifact import AliasStep
    from mandapa.repository.version import Asset, Diff, Version

__all__ = ["asset_value", "counts_of", "counts_text", "from_parent", "step_value", "summary", "version_value"]


def version_value(version: Version) -> dict[str, Any]:
    """A version; sizes in bytes."""
    return {
        "artifact": version.artifact.name,
        "number": version.number,
        "address": version.address,
        "digest": version.digest,
        "names": list(version.names),
        "created": time(version.created),
        "created_by": version.created_by,
        "run": version.run,
        "used": list(version.used),
        "parent": version.parent,
        "message": version.message,
        "metadata": dict(version.metadata),
        "facts": dict(version.facts),
        "asset_count": version.asset_count,
        "size": version.size,
        "added": version.added,
    }


def asset_value(asset: Asset) -> dict[str, Any]:
    """An asset: a file or a URL."""
    value: dict[str, Any] = {"path": asset.path, "kind": asset.kind, "size": asset.size}
    if asset.kind == "url":
        return {**value, "url": asset.url, "checksum": asset.checksum}
    return {**value, "digest": asset.digest, "executable": asset.executable}


def step_value(step: AliasStep) -> dict[str, Any]:
    """A move of an alias or tag."""
    return {"kind": step.kind, "name": step.name, "version": step.version, "at": time(step.at), "by": step.by}


def from_parent(version: Version) -> Diff | None:
    """What turned the version's parent into it; None when it has none, or none that can be read."""
    if version.parent is None:
        return None
    try:
        return version.artifact.version(version.parent).diff(version)
    except NotFoundError:
        return None  # the parent was deleted


def counts_of(diff: Diff) -> dict[str, int]:
    """How many assets were added, removed and changed."""
    return {"added": len(diff.added), "removed": len(diff.removed), "changed": len(diff.changed)}


def counts_text(diff: Diff) -> str:
    """``2 added, 1 changed``."""
    return ", ".join(f"{number:,} {what}" for what, number in counts_of(diff).items() if number) or "no asset"


def summary(version: Version) -> str:
    """``1.2 MB (+38 kB stored)``."""
    return f"{size(version.size)} (+{size(version.added)} stored)"
