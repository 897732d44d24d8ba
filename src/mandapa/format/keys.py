"""Where each object lives under the repository's root. Source: docs/format.md §3."""

from __future__ import annotations

import re

__all__ = ["CATALOG", "GC", "MARKER", "container_key", "head_key", "log_key", "log_prefix", "may_be_swept", "parse_seq"]

MARKER = "mandapa.json"
GC = "gc/"
CATALOG = "catalog"
"""The id that stands for the catalog where an artifact id would stand."""

_SEQ = re.compile(r"[0-9]{16}", re.ASCII)
_KINDS = {b"p": "packs/", b"m": "meta/"}
_SWEPT = re.compile(r"(?:packs|meta)/[0-9a-f]{32}|(?:tx|probe)(?:/[0-9a-z_-][0-9a-z._-]{0,254}){1,4}", re.ASCII)


def container_key(container: bytes) -> str:
    """The key of a container from its 17 bytes: ``p`` (packs) or ``m`` (meta), then the id."""
    return _KINDS[container[:1]] + container[1:].hex()


def log_prefix(log: str) -> str:
    """The prefix of the records of an artifact's log, or of the catalog."""
    return "catalog/" if log == CATALOG else f"log/{log}/"


def log_key(log: str, seq: int) -> str:
    """The key of record ``seq``; keys sort as numbers do."""
    return f"{log_prefix(log)}{seq:016d}"


def head_key(log: str) -> str:
    """The key of the cached head of a log."""
    return f"head/{log}"


def parse_seq(key: str) -> int | None:
    """The number at the end of a record's key, or None when it is no such key."""
    tail = key.rsplit("/", 1)[-1]
    return int(tail) if _SEQ.fullmatch(tail) else None


def may_be_swept(key: str) -> bool:
    """Whether a gc may ever delete an object of this key."""
    return _SWEPT.fullmatch(key) is not None
