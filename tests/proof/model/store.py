"""A flat store with create-if-absent that loses requests and replies, delays writes, and refuses for nothing."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

LANDS = 0.2
"""Chance at each call that one write that was thought lost is done."""


class Taken(Exception):
    """The store says that the key is taken; it may be wrong."""


class Missing(Exception):
    """Nothing is there."""


class Lost(Exception):
    """No answer came: a write was done, or not, or will be."""


class Store:
    """Folders of keys; what happens is a function of ``random`` and of the order of calls.

    Args:
        random: Seeded.
        lost: Chance that a call gets no answer.
        refused: Chance that a create is refused though nothing is there.
    """

    def __init__(self, random: Random, *, lost: float, refused: float) -> None:
        self.folders: dict[str, dict[Any, Any]] = {}
        self._draw: Callable[[], float] = random.random
        self._lost = lost
        self._refused = lost + refused
        self._late: list[Callable[[], object]] = []

    def folder(self, name: str) -> dict[Any, Any]:
        """What is really there."""
        return self.folders.setdefault(name, {})

    def get(self, folder: str, key: Any) -> Any:
        """The object; raises `Missing`, `Lost`."""
        self._read()
        try:
            return self.folders[folder][key]
        except KeyError:
            raise Missing from None

    def after(self, folder: str, start: int) -> list[Any]:
        """What stands at numbers from ``start`` on, up to the first that is free; raises `Lost`.

        In one turn: what is there never changes, so that it does not matter when it is read.
        """
        self._read()
        there = self.folder(folder)
        found = []
        while start in there:
            found.append(there[start])
            start += 1
        return found

    def list(self, folder: str) -> list[Any]:
        """All keys; raises `Lost`."""
        self._read()
        return list(self.folder(folder))

    def create(self, folder: str, key: Any, value: Any) -> None:
        """Put it if nothing is there; raises `Taken`, `Lost`."""
        if self._late:
            self._land()
        draw = self._draw()
        if draw < self._lost:
            self._lose(lambda: self.folder(folder).setdefault(key, value))
        if draw < self._refused or key in self.folder(folder):
            raise Taken
        self.folders[folder][key] = value

    def put(self, folder: str, key: Any, value: Any) -> None:
        """Put it; raises `Lost`."""
        self._write(lambda: self.folder(folder).update({key: value}))

    def delete(self, folder: str, key: Any) -> None:
        """Remove it, if it is there; raises `Lost`."""
        self._write(lambda: self.folder(folder).pop(key, None))

    def flush(self) -> None:
        """All that is late is done now."""
        while self._late:
            self._late.pop()()

    def _read(self) -> None:
        if self._late:
            self._land()
        if self._draw() < self._lost:
            raise Lost

    def _write(self, call: Callable[[], object]) -> None:
        if self._late:
            self._land()
        if self._draw() < self._lost:
            self._lose(call)
        call()

    def _lose(self, call: Callable[[], object]) -> None:
        fate = int(self._draw() * 3)
        if fate == 1:
            call()
        elif fate == 2:
            self._late.append(call)
        raise Lost

    def _land(self) -> None:
        if self._draw() < LANDS:
            self._late.pop(int(self._draw() * len(self._late)))()
