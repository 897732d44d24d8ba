"""A store that does something else just before, or just after, a call that is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

from mandapa.object_store.base import Buffer, ObjectInfo, ObjectStore

_T = TypeVar("_T")

When = Literal["before", "after", "instead"]


class HookedObjectStore:
    """The same store, with actions that each happen once, at the first call that fits; an action may raise.

    Example:
        store.hook("before", "create", "log/", lambda _: other_writer_commits())
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._hooks: list[tuple[When, str, str, Callable[[Callable[[], object]], object]]] = []
        self.calls: list[str] = []

    @property
    def url(self) -> str:
        return self._store.url

    def hook(self, when: When, verb: str, prefix: str, action: Callable[[Callable[[], object]], object]) -> None:
        """Do ``action`` at the next call of ``verb`` on a key that starts with ``prefix``; it is given the call."""
        self._hooks.append((when, verb, prefix, action))

    @property
    def waiting(self) -> int:
        """Actions that did not happen yet."""
        return len(self._hooks)

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        return self._call("get", key, lambda: self._store.get(key, limit=limit))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        return self._call("get_ranges", key, lambda: self._store.get_ranges(key, ranges))

    def head(self, key: str) -> ObjectInfo:
        return self._call("head", key, lambda: self._store.head(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        return iter(self._call("list", prefix, lambda: [*self._store.list(prefix, start_after=start_after)]))

    def put(self, key: str, data: Buffer) -> None:
        self._call("put", key, lambda: self._store.put(key, data))

    def create(self, key: str, data: Buffer) -> None:
        self._call("create", key, lambda: self._store.create(key, data))

    def delete(self, keys: Iterable[str]) -> None:
        for key in list(keys):
            self._call("delete", key, lambda key=key: self._store.delete([key]))

    def _call(self, verb: str, key: str, call: Callable[[], _T]) -> _T:
        self.calls.append(f"{verb} {key}")
        hook = next((hook for hook in self._hooks if hook[1] == verb and key.startswith(hook[2])), None)
        if hook is None:
            return call()
        self._hooks.remove(hook)
        when, _, _, action = hook
        if when == "before":
            action(call)
        result = None if when == "instead" else call()
        if when != "before":
            action(call)
        return result  # type: ignore[return-value]
