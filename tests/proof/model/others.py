"""Those who work beside the writers: gc, a repacker, a reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.log import (
    CATALOG,
    LISTS,
    PACKS,
    GiveUp,
    Record,
    Steps,
    View,
    commit,
    condemned,
    delete,
    find,
    gone,
    keys,
    put,
    read_on,
)

if TYPE_CHECKING:
    from model.world import World


def collector(world: World) -> Steps[None]:
    """Several gcs, one after the other, with a grace of nothing."""
    for _ in range(world.between(3, 8)):
        yield world.between(0, 60)
        alone = not world.busy
        yield from _collect(world)
        if alone:
            return


def _collect(world: World) -> Steps[None]:
    """List, fence the catalog and read it again, fence every log, mark again, delete, remove the list."""
    store, off = world.store, world.off
    catalog = View(CATALOG)
    views: dict[str, View] = {}
    yield from read_on(store, catalog)
    needed: set[int] = set()
    for log in _registered(catalog):
        view = views[log] = View(log)
        yield from read_on(store, view)
        needed |= view.live_packs()
    # What is put after this look is no candidate; what was put before it, for a record to come, is.
    candidates = set((yield from keys(store, PACKS))) - needed
    others: dict[int, frozenset[int]] = {}
    for epoch in (yield from keys(store, LISTS)):
        if world.random.random() < 0.7:
            others[epoch] = (yield from find(store, LISTS, epoch)) or frozenset()
    yield world.stall()
    if "resume_nofence" in off and others:
        yield from _sweep_others(world, others, needed)
        return
    if not candidates and not others:
        return
    epoch = world.new()
    if "list_after_fences" not in off:
        yield from put(store, LISTS, epoch, frozenset(candidates))
    yield world.stall()
    if "catalog_unfenced" not in off:
        yield from commit(store, catalog, Record("fence", world.new()))
        yield from read_on(store, catalog)
    needed = set()
    for log in _registered(catalog):
        view = views.setdefault(log, View(log))
        yield world.stall()
        yield from commit(store, view, Record("fence", world.new()))
        yield world.stall()
        if "mark_beyond_fence" in off:
            yield from read_on(store, view)
            needed |= view.live_packs()
        else:
            needed |= view.live_packs()
            if world.reads_on:
                yield from read_on(store, view)
                needed |= view.live_packs()
    if "list_after_fences" in off:
        yield from put(store, LISTS, epoch, frozenset(candidates))
    yield world.stall()
    for pack in candidates - needed:
        yield world.between(0, 3)
        yield from delete(store, PACKS, pack)
    yield world.stall()
    yield from delete(store, LISTS, epoch)
    world.counts["gc"] += 1
    if "takeover_inmem" in off:
        yield from _sweep_others(world, others, needed)
    elif "remove_others" in off:
        for other in others:
            yield from delete(store, LISTS, other)
    else:
        there = set((yield from keys(store, PACKS)))
        for other, listed in others.items():
            if not listed & there:
                yield from delete(store, LISTS, other)


def _registered(catalog: View) -> list[str]:
    return sorted({record.artifact for record in catalog.records if record.kind == "register"})


def _sweep_others(world: World, others: dict[int, frozenset[int]], needed: set[int]) -> Steps[None]:
    """What no gc may do: delete what another's list names."""
    for epoch, listed in others.items():
        for pack in listed - needed:
            yield from delete(world.store, PACKS, pack)
        yield from delete(world.store, LISTS, epoch)


def repacker(world: World) -> Steps[None]:
    """Puts some packs of a live version under new names, and moves its root."""
    store = world.store
    views = {log: View(log) for log in world.logs}
    for _ in range(world.between(2, 6)):
        yield world.between(0, 80)
        view = views[world.pick(world.logs)]
        yield from read_on(store, view)
        live = [version for version in view.live() if view.roots[version]]
        if not live:
            continue
        version = world.pick(live)
        root = view.roots[version]
        moved = world.some(root, world.between(1, len(root)))
        if (yield from gone(store, moved)):
            continue
        fresh = set()
        for _ in moved:
            pack = world.new()
            yield from put(store, PACKS, pack, True)
            fresh.add(pack)
        yield world.stall()

        def sound(fresh: set[int] = fresh) -> Steps[bool]:
            if fresh & (yield from condemned(store)):
                return False
            return "nohead" in world.off or not (yield from gone(store, fresh))

        def notice(
            found: Record, record: Record, version: int = version, root: frozenset[int] = root, view: View = view
        ) -> Steps[Record]:
            if not view.is_live(version, root) or (found.kind == "fence" and not (yield from sound())):
                raise GiveUp
            return record

        if (yield from sound()):
            try:
                packs = frozenset(fresh | (root - moved))
                yield from commit(store, view, Record("repack", world.new(), version, packs), notice)
                world.counts["repacked"] += 1
            except GiveUp:
                pass


def reader(world: World) -> Steps[None]:
    """Reads versions; on a missing pack it reads the log again, and must find a reason there."""
    store = world.store
    views = {log: View(log) for log in world.logs}
    for _ in range(world.between(6, 14)):
        view = views[world.pick(world.logs)]
        yield from read_on(store, view)
        live = view.live()
        if not live:
            yield 60
            continue
        version = world.pick(live)
        root = view.roots[version]
        left = sorted(root)
        while left:
            yield world.stall() * 2
            if (yield from find(store, PACKS, left[-1])) is not None:
                left.pop()
                continue
            yield from read_on(store, view)
            if version in view.deleted:
                world.counts["read, deleted"] += 1
                break
            if view.roots[version] == root:
                world.errors.append("a reader misses a pack of a live version")
                break
            world.counts["read, moved"] += 1
            root = view.roots[version]
            left = sorted(root)
        else:
            world.counts["read"] += 1
