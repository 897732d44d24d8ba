"""The folders that paths are in; folders are stored nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["above", "folders_of"]


def above(path: str) -> Iterator[str]:
    """The folders that a path is in, the root last."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def folders_of(paths: Iterable[str]) -> set[str]:
    """Every folder, but the root, that a path is in."""
    folders: set[str] = set()
    for path in paths:
        folder = path.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return folders
