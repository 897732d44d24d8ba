"""What the tests of clean-up share: versions made quickly, what a plan says, and the rules said once more."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from mandapa.object_store import MemoryObjectStore
from mandapa.repository.policy import Policy, duration
from mandapa.repository.repository import Repository
from mandapa.repository.retention import Expired, ExpirePlan


class Shifted(MemoryObjectStore):
    """A store whose clock the test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = timedelta()

    def _stamp(self, key: str) -> None:
        data, at = self._objects[key]
        self._objects[key] = (data, at + self.shift)

    def put(self, key, data):
        super().put(key, data)
        self._stamp(key)

    def create(self, key, data):
        super().create(key, data)
        self._stamp(key)


def add(
    repo: Repository, name: str = "m", *, used: tuple[str, ...] = (), run: str = "", base=..., **metadata: Any
) -> int:
    """One more version; its number."""
    artifact = repo.artifact(name)
    artifact.run = run
    with artifact.transaction(metadata=metadata, **({} if base is ... else {"base": base})) as txn:
        txn.add_bytes("x", repo.author.new_id() * 100)
        for address in used:
            txn.uses(address)
    assert txn.version is not None
    return txn.version.number


def live(repo: Repository, name: str = "m") -> list[int]:
    return [version.number for version in Repository(repo.place).artifact(name).versions()]


def goes(plan: ExpirePlan, name: str = "m") -> list[int]:
    return [one.version for part in plan.artifacts if part.name == name for one in part.goes]


def why(plan: ExpirePlan, name: str = "m") -> dict[int, tuple[str, ...]]:
    return {one.version: one.by for part in plan.artifacts if part.name == name for one in part.stays}


def skipped(done: Iterable[Expired], name: str = "m") -> dict[int, str]:
    return {one.version: one.skipped for one in done if one.artifact == name}


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def oracle(
    policy: Policy, versions: list[dict], ages: list[int], names: dict[str, tuple[str, int]], used: set[int], dead
):
    """What stays, said once more in the plainest way."""
    alive = [n for n in range(len(versions)) if n not in dead]
    stays = set(alive[-1:])
    for n in alive:
        newer = [m for m in alive if m > n]
        if len(newer) < policy.keep_last:
            stays.add(n)
        for rule in policy.keep_best:
            many, metric, mode = int(rule[0]), rule[2:-4], rule[-3:]
            mine = versions[n].get(metric)
            if is_number(mine):
                better = 0
                for m in alive:
                    other = versions[m].get(metric)
                    if is_number(other):
                        wins = other < mine if mode == "min" else other > mine
                        better += wins or (other == mine and m < n)
                if better < many:
                    stays.add(n)
        if policy.keep_every:
            step = versions[n].get("step")
            whole = is_number(step) and step == int(step)
            if (int(step) if whole else n) % policy.keep_every == 0:
                stays.add(n)
        if policy.newer_than and ages[n] < duration(policy.newer_than):
            stays.add(n)
        for kind, at in names.values():
            if at == n and (policy.keep_aliased if kind == "alias" else policy.keep_tagged):
                stays.add(n)
        if policy.keep_used and n in used:
            stays.add(n)
    return stays
