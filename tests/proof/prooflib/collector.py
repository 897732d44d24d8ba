"""The clean-up with a grace of nothing: what the protocol must stand."""

from __future__ import annotations

from collections.abc import Iterator

from mandapa.repository.gc import Collection
from mandapa.repository.repository import Repository


def collect(repo: Repository) -> Iterator[str]:
    """One gc, a step at a time."""
    return Collection(repo, grace=0).steps()


def collect_all(repo: Repository) -> None:
    """One gc from start to end."""
    Collection(repo, grace=0).run()
