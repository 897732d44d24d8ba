"""A writer: makes versions, inherits, shares, dies and comes back, deletes, undeletes, names."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from model.log import CATALOG, PACKS, GiveUp, Packs, Record, Steps, View, commit, condemned, gone, put, read_on

if TYPE_CHECKING:
    from model.world import World


class Named:
    """The packs that a version to come will need, by why it may name them."""

    def __init__(self) -> None:
        self.inherited: set[int] = set()
        """From the root of a version that was live when the log was read."""
        self.shared: set[int] = set()
        """Found by the local index, which may be as old as it likes."""
        self.fresh: set[int] = set()
        """Put by this transaction."""

    def all(self) -> Packs:
        """All of them."""
        return frozenset(self.inherited | self.shared | self.fresh)

    def drop(self, pack: int) -> None:
        """Do not name it."""
        for packs in (self.inherited, self.shared, self.fresh):
            packs.discard(pack)


class Writer:
    """One who writes to one artifact."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = world.store
        self.random = world.random
        self.log: str = world.pick(world.logs)
        self.views = {log: View(log) for log in world.logs}
        self.view = self.views[self.log]
        self.known: list[int] = []

    def work(self) -> Steps[None]:
        """Look around once; then a few versions, each followed by something else."""
        for view in self.views.values():
            yield from read_on(self.store, view)
            for record in view.records:
                self.known += sorted(record.packs)
        yield self.world.stall()
        if "reg_late" not in self.world.off:
            yield from self.register()
        for _ in range(self.world.between(2, 5)):
            yield from self.make()
            yield from self.command()

    def register(self) -> Steps[None]:
        """Put the artifact into the catalog."""
        yield from commit(self.store, View(CATALOG), Record("register", self.world.new(), artifact=self.log))

    def put(self, count: int, named: Named) -> Steps[None]:
        """New packs."""
        for _ in range(count):
            pack = self.world.new()
            yield from put(self.store, PACKS, pack, True)
            named.fresh.add(pack)

    def bad(self, packs: Collection[int], *, look: bool = True) -> Steps[set[int]]:
        """Those that may not be named: listed by a gc or, looked for after that, not there."""
        bad = (yield from condemned(self.store)).intersection(packs)
        if look and "nohead" not in self.world.off:
            bad |= yield from gone(self.store, sorted(set(packs) - bad))
        return bad

    def secure(self, packs: set[int], named: Named, *, own: bool = True) -> Steps[None]:
        """Put again, under a new name, what is bad of them; ``own``: look for our own, too."""
        bad = yield from self.bad(packs if own else packs - named.fresh)
        if not own:
            bad |= yield from self.bad(packs & named.fresh, look=False)
        for pack in bad:
            named.drop(pack)
            yield from self.put(1, named)

    def make(self) -> Steps[None]:
        """One version, in one of two orders: packs before the log is read for the last time, or after."""
        random, view, off = self.random, self.view, self.world.off
        named = Named()
        yield from read_on(self.store, view)
        yield self.world.stall()
        live = view.live()
        base = self.world.pick(live) if live and random.random() < 0.8 else None
        root: Packs = frozenset() if base is None else view.roots[base]
        named.inherited = self.world.some(root, self.world.between(0, len(root)))
        pool = [pack for pack in self.known if pack not in named.inherited]
        for version in sorted(view.deleted):
            pool += sorted(view.roots[version])
        named.shared = self.world.some(pool, self.world.between(0, 2))
        early = random.random() < 0.5
        if early:
            yield from self.put(self.world.between(1, 2), named)
            yield self.world.stall()
            yield from read_on(self.store, view)
        stands = base is None or view.is_live(base, root)
        yield from self.secure(named.shared | named.fresh, named, own="nohead_own" not in off)
        if not stands and not {"inherit_nocheck", "inherit_oldroot"} & set(off):
            yield from self.secure(named.inherited, named)
        yield self.world.stall()
        if not early:
            yield from self.put(self.world.between(1, 2), named)
        yield self.world.stall()
        record = Record("version", self.world.new(), packs=named.all())
        if "reg_late" in off:
            yield from self.register()

        def notice(found: Record, record: Record) -> Steps[Record]:
            if found.kind != "fence":
                return record
            stands = base is None or (
                base not in view.deleted if "inherit_oldroot" in off else view.is_live(base, root)
            )
            doubtful = named.shared | named.fresh
            if not stands and "inherit_nocheck" not in off:
                doubtful |= named.inherited
            yield from self.secure(doubtful, named)
            return Record("version", record.txn, packs=named.all())

        start = len(view.records)
        work = commit(self.store, view, record, notice)
        if random.random() < 0.15:
            yield from self.die(work)
            yield from read_on(self.store, view)
            done = any(found.txn == record.txn for found in view.records[start:])
            if not done or "restart_noscan" in off:
                # Nothing is inherited any more, and nothing counts as put by this transaction.
                base = None
                named.fresh |= named.inherited | named.shared
                named.inherited, named.shared = set(), set()
                yield from self.secure(set(named.fresh), named)
                record = Record("version", record.txn, packs=named.all())
                yield from commit(self.store, view, record, notice)
        else:
            yield from work
        self.world.acknowledged.append((self.log, record.txn))

    def die(self, work: Steps[Record]) -> Steps[None]:
        """After a few calls of ``work``; then come back, some time later."""
        try:
            for _ in range(self.world.between(1, 6)):
                yield next(work)
        except StopIteration:
            pass
        yield self.world.stall()

    def command(self) -> Steps[None]:
        """Delete, name, undelete, or nothing."""
        random, view = self.random, self.view
        yield from read_on(self.store, view)
        yield self.world.stall()
        live, what = view.live(), random.random()
        try:
            if what < 0.35 and live:
                version = self.world.pick(live)
                if view.best != version:
                    yield from self.change("delete", version, self.still_unnamed)
            elif what < 0.5 and live:
                yield from self.change("alias", self.world.pick(live), self.still_live)
            elif what < 0.75 and view.deleted:
                version = self.world.pick(sorted(view.deleted))
                if not (yield from self.lost(view.roots[version])):
                    yield self.world.stall()
                    yield from self.change("undelete", version, self.still_whole)
                    self.world.counts["undeleted"] += 1
        except GiveUp:
            self.world.counts["given up"] += 1

    def change(self, kind: str, version: int, check: object) -> Steps[None]:
        """Append a record about one version."""

        def notice(found: Record, record: Record) -> Steps[Record]:
            yield from check(found, version)
            return record

        yield from commit(self.store, self.view, Record(kind, self.world.new(), version), notice)

    def still_unnamed(self, _: Record, version: int) -> Steps[None]:
        """What is to be deleted is live, and no alias names it."""
        yield from self.still_live(_, version)
        if "noprecond" not in self.world.off and self.view.best == version:
            raise GiveUp

    def still_live(self, _: Record, version: int) -> Steps[None]:
        """What is to be named is live."""
        if "noprecond" not in self.world.off and version in self.view.deleted:
            raise GiveUp
        return
        yield

    def still_whole(self, found: Record, version: int) -> Steps[None]:
        """What is to be brought back is deleted and, if a gc or a repack passed, looked at again."""
        if version not in self.view.deleted:
            raise GiveUp
        again = found.kind in ("fence", "repack") and "undelete_nofence" not in self.world.off
        if again and (yield from self.lost(self.view.roots[version])):
            raise GiveUp

    def lost(self, packs: Packs) -> Steps[set[int]]:
        """Packs of a deleted version that may not be named."""
        if "undelete_headonly" in self.world.off:
            return (yield from gone(self.store, sorted(packs)))
        return (yield from self.bad(packs))
