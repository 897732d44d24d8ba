"""What the tests of mirrors share: repositories to copy, what they say, and stores that somebody else writes to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from safetensors.torch import save

from mandapa.format.records import AnnotateOp
from mandapa.object_store import MemoryObjectStore, ObjectStore
from mandapa.object_store.base import Buffer, ObjectInfo
from mandapa.repository.fsck import fsck
from mandapa.repository.gc import Collection
from mandapa.repository.replay import ORIGIN
from mandapa.repository.repository import Repository


def repository(store=None, **options) -> Repository:
    return Repository.create(MemoryObjectStore() if store is None else store, **options)


def reopened(repo: Repository, store: ObjectStore | None = None, **options) -> Repository:
    """The same, as another process on another machine sees it."""
    return Repository(repo.place if store is None else store, **options)


def commit(repo: Repository, name: str = "m", message: str = "", *, alias: str = "", **files: bytes) -> int:
    """A version with these files; `__` in a name is a slash."""
    with repo.artifact(name).transaction(message=message) as txn:
        for path, data in files.items():
            txn.add_bytes(path.replace("__", "/"), data)
        if alias:
            txn.alias(alias)
    assert txn.version is not None
    return txn.version.number


def annotate(repo: Repository, name: str, version: int, **facts: object) -> None:
    """Note facts of a version."""
    log = repo.artifact(name).open_log()
    log.append(repo.author.new_id().hex(), lambda _: [AnnotateOp(version, facts)], repo.author)


def checkpoints(count: int, *, size: int = 60_000, change: float = 1e-6) -> list[bytes]:
    """Files of fp32 weights that change a little, with their bf16 copy, and a tensor that stays."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=size).astype(np.float32)
    found = []
    for _ in range(count):
        weights = weights * (1 + change * rng.normal(size=size).astype(np.float32))
        tensor = torch.from_numpy(weights)
        found.append(save({"w": tensor, "copy": tensor.to(torch.bfloat16), "frozen": torch.ones(30_000)}))
    return found


def content(version) -> dict[str, object]:
    return {
        path: (asset.executable, version.open(path).read())
        if asset.kind == "file"
        else (asset.url, asset.size, asset.checksum)
        for path, asset in version.assets.items()
    }


def says(repo: Repository) -> dict[str, dict[str, object]]:
    """All that a repository says of its artifacts, but for where bytes are and who wrote the records."""
    repo = reopened(repo)
    found: dict[str, dict[str, object]] = {}
    for artifact in repo.artifacts():
        state = artifact.state()
        if not state.versions:
            continue
        found[artifact.name] = {
            "versions": {
                v.number: (
                    *(v.digest, v.message, v.metadata, v.parent, v.run, v.used, v.size, v.asset_count),
                    {name: fact for name, fact in v.facts.items() if name != ORIGIN},
                    content(v),
                )
                for v in artifact.versions()
            },
            "deleted": {v.number: (v.digest, v.message, v.metadata, v.parent, v.used) for v in artifact.deleted()},
            "aliases": artifact.aliases(),
            "tags": artifact.tags(),
            "burned": sorted(state._burned),
        }
    return found


def check(source: Repository, destination: Repository) -> None:
    """The destination says what the source says, and is whole."""
    assert says(destination) == says(source)
    whole(destination)


def whole(repo: Repository) -> None:
    """Every invariant of the format holds, down to each byte."""
    findings = fsck(reopened(repo), deep=True).findings
    assert findings == []


def sweep(repo: Repository) -> int:
    """A clean-up without any grace; gives the bytes that went."""
    before = stored(repo)
    for _ in Collection(reopened(repo), grace=0).steps():
        pass
    return before - stored(repo)


def stored(repo: Repository) -> int:
    """Bytes of all containers."""
    return sum(info.size for prefix in ("packs/", "meta/") for info in repo.place.list(prefix))


class Watched:
    """The same store; before one of its calls (from 1), somebody else does something."""

    def __init__(self, store: ObjectStore, at: int | None = None, act: Callable[[], object] = lambda: None) -> None:
        self._store = store
        self._at = at
        self._act = act
        self._lock = threading.Lock()
        self.calls = 0

    def _call(self) -> None:
        with self._lock:
            self.calls += 1
            now = self.calls == self._at
        if now:
            self._act()

    @property
    def url(self) -> str:
        return self._store.url

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        self._call()
        return self._store.get(key)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        self._call()
        return self._store.get_ranges(key, ranges)

    def head(self, key: str) -> ObjectInfo:
        self._call()
        return self._store.head(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        self._call()
        return self._store.list(prefix, start_after=start_after)

    def put(self, key: str, data: Buffer) -> None:
        self._call()
        self._store.put(key, data)

    def create(self, key: str, data: Buffer) -> None:
        self._call()
        self._store.create(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        self._call()
        self._store.delete(keys)
