"""Who works in the world: writers, readers, collectors, movers, expirers, removers, and who mirrors."""

from __future__ import annotations

import re

from mandapa.errors import ConflictError, InvalidInputError, NotFoundError
from mandapa.format.keys import container_key, log_key
from mandapa.repository.artifact import Artifact
from mandapa.repository.gc import Collection
from mandapa.repository.mirror import mirror
from mandapa.repository.policy import Policy
from mandapa.repository.repack import RepackPlan, Step, apply_repack
from mandapa.repository.retention import apply_expire, plan_expire
from mandapa.repository.rewrite import plan_rewrite, rewrite
from mandapa.repository.transaction import Transaction
from mandapa.repository.version import Version
from prooflib.world import PATHS, POOL, Action, Actor, Command, Intent, Place, Violation


def writer(me: Actor) -> None:
    """Makes versions, with the same transaction id again when it was killed, and moves, deletes and undeletes."""
    random, world = me.random, me.world
    world.busy += 1
    me.work(_look_around)
    for _ in range(random.randint(2, 4)):
        intent = _intent(me)
        world.intents.append(intent)
        for _ in range(4):
            me.work(lambda me, intent=intent: _transact(me, intent))
            if intent.over or random.random() < 0.1:
                break  # or nobody takes it up again
            intent.unknown = True
        if random.random() < 0.3:
            me.work(_look_around)
        for _ in range(random.randint(0, 2)):
            me.work(_command)
    world.busy -= 1


def _look_around(me: Actor) -> None:
    """What others have stored is remembered, and soon out of date."""
    for version in me.versions():
        try:
            list(version.rows())
        except NotFoundError:
            continue


def _intent(me: Actor) -> Intent:
    random = me.random
    plan: list[Action] = []
    for _ in range(random.randint(1, 3)):
        kind = random.random()
        if kind < 0.7:
            data = random.choice(POOL) if random.random() < 0.85 else f"{me.name} {random.random()}".encode()
            plan.append(("put", random.choice(PATHS), data))
        elif kind < 0.85:
            plan.append(("copy", random.choice(me.world.names), random.choice([*PATHS, "d"])))
        else:
            plan.append(("remove", random.choice([*PATHS, "d"])))
    return Intent(
        artifact=random.choice(me.world.names),
        txn=random.getrandbits(128).to_bytes(16, "big").hex(),
        base=random.choices(["latest", "fixed", None], [0.7, 0.15, 0.15])[0],
        ours=random.random() < 0.5,
        plan=plan,
    )


def _transact(me: Actor, intent: Intent) -> None:
    done: list[Action] = []
    me.signed()
    intent.call = intent.call or me.world.scheduler.turns
    artifact = me.repo.artifact(intent.artifact)
    how = "ours" if intent.ours else "raise"
    if intent.base == "fixed":
        intent.base = _choose(me, artifact)
    try:
        with artifact.transaction("m", base=intent.base, on_conflict=how, txn_id=intent.txn) as txn:
            me.pause()
            for action in intent.plan:
                _act(me, txn, action, done)
                me.pause()
            if txn.version is None:
                intent.tries.append(done)
    except ConflictError:
        me.world.counts["conflict"] += 1
        intent.refuse()
    except NotFoundError as error:
        if "was removed" not in str(error) and not isinstance(intent.base, int):
            raise
        intent.refuse()
    else:
        assert txn.version is not None
        intent.over, intent.version = True, txn.version.number
        intent.answer = me.world.scheduler.turns


def _choose(me: Actor, artifact: Artifact) -> int | str:
    """A version to start from, if there is one."""
    try:
        return me.random.choice(artifact.versions()).number
    except (NotFoundError, IndexError):
        return "latest"


def _act(me: Actor, txn: Transaction, action: Action, done: list[Action]) -> None:
    if action[0] == "put":
        _, path, data = action
        txn.add_bytes(path, data)
        done.append(action)
    elif action[0] == "remove":
        try:
            txn.remove(action[1])
        except NotFoundError:
            return
        done.append(action)
    else:
        _, name, path = action
        try:
            version = me.random.choice(me.repo.artifact(name).versions())
            txn.copy(version.address, path)
        except (NotFoundError, IndexError):
            return
        done.append(("copy", version._log.id, str(version.number), path))


def _command(me: Actor) -> None:
    """Something but a version."""
    random, world = me.random, me.world
    kind = random.random()
    versions = me.versions(deleted=kind > 0.75)
    me.pause()
    if not versions:
        return
    version = random.choice(versions[-3:])
    artifact = version.artifact
    command = world.commands[me.signed()] = Command(world.scheduler.turns)
    try:
        if kind < 0.6:
            artifact.delete(version)
        elif kind < 0.67:
            artifact.alias("best", version)
        elif kind < 0.72:
            artifact.alias("best", None)
        elif kind < 0.75:
            artifact.tag(f"t{random.randint(0, 3)}", version)
        elif kind > 0.75:
            _undelete(me, artifact, version)
        else:
            return
    except (ConflictError, NotFoundError, InvalidInputError):
        return
    command.answer = world.scheduler.turns


def _undelete(me: Actor, artifact: Artifact, version: Version) -> None:
    """Bring a version back; within the grace that cannot be refused for its bytes."""
    world = me.world
    try:
        artifact.undelete(version)
    except NotFoundError as error:
        record = version._state.deleted
        assert record is not None
        deleted = world.home.memory.head(log_key(version._log.id, record.seq)).last_modified
        if not world.removed and (world.store_time() - deleted).total_seconds() < world.grace:
            raise Violation(f"{version.address} was deleted a moment ago: {error}") from error
        raise
    world.counts["undelete"] += 1


def reader(me: Actor) -> None:
    """Reads whole versions: gets the bytes, or is told that the version was deleted; nothing else."""
    for _ in range(me.random.randint(3, 6)):
        me.pause()
        me.work(_read)


def _read(me: Actor) -> None:
    versions = me.versions()
    if not versions:
        return
    me.pause()
    version = me.random.choice(versions)
    content = {}
    try:
        for path in version.assets:
            me.pause()
            with version.open(path) as file:
                content[path] = file.read()
    except NotFoundError as error:
        if not re.search("was (deleted|removed)", str(error)):
            raise
        me.world.counts["gone"] += 1
        return
    me.world.counts["read"] += 1
    me.world.reads.append((version._log.id, version.number, content))


def gc(me: Actor) -> None:
    """Collects as long as there are writers; is killed at times and never resumed."""
    _collect_often(me, me.world.home)


def gc_away(me: Actor) -> None:
    """The same in the repository that follows."""
    assert me.world.away is not None
    _collect_often(me, me.world.away)


def _collect_often(me: Actor, place: Place) -> None:
    for _ in range(12):
        me.world.scheduler.sleep(me.random.randint(0, 60))
        me.work(lambda me: _collect(me, place))
        if not me.world.busy:
            return


def _collect(me: Actor, place: Place) -> None:
    for step in Collection(me.open(place), grace=me.world.grace).steps():
        me.world.counts["gc"] += step == "done"
        if me.slow:
            me.pause()


def mover(me: Actor) -> None:
    """Stores versions otherwise, and empties containers."""
    for _ in range(6):
        me.pause()
        me.work(me.random.choice([_repack, _rewrite]))
        if not me.world.busy:
            return


def _repack(me: Actor) -> None:
    """As dense as can be, whether or not that saves anything."""
    versions = me.versions()
    if not versions:
        return
    version = me.random.choice(versions)
    me.signed()
    step = Step(version.number, version._state.root.hash, 1 << 40, 0)
    plan = RepackPlan(version.artifact.name, me.repo.id, (step,))
    try:
        for done in apply_repack(version.artifact, plan):
            me.world.counts["repack"] += not done.skipped
    except NotFoundError:
        return


def _rewrite(me: Actor) -> None:
    """Some containers of a version are not needed any more by anybody; or those that are half dead."""
    random, versions = me.random, me.versions()
    if not versions:
        return
    version = random.choice(versions)
    try:
        keys = sorted(map(container_key, version.tree.containers()))
        if random.random() < 0.3:
            keys = plan_rewrite(me.repo, grace=me.world.grace, least=0).keys
    except NotFoundError:
        return
    me.pause()
    me.signed()
    for done in rewrite(me.repo, random.sample(keys, random.randint(0, len(keys)))):
        me.world.counts["rewrite"] += not done.skipped
        me.pause()


def expirer(me: Actor) -> None:
    """Cleans up by policy: plans, and some time later does what is still allowed."""
    for _ in range(3):
        me.world.scheduler.sleep(me.random.randint(0, 200))
        me.work(_expire)


def _expire(me: Actor) -> None:
    me.signed()
    policy = Policy(keep_last=me.random.randint(1, 3), keep_aliased=me.random.random() < 0.5)
    try:
        plan = plan_expire(me.repo, [me.random.choice(me.world.names)], policy)
    except NotFoundError:
        return
    me.pause()
    for done in apply_expire(me.repo, plan):
        me.world.counts["expire"] += not done.skipped


def remover(me: Actor) -> None:
    """Removes an artifact; who comes later makes a new one of that name."""
    me.world.scheduler.sleep(me.random.randint(0, 400))
    me.work(_remove)


def _remove(me: Actor) -> None:
    me.world.removed = True
    try:
        me.artifact().remove()
    except NotFoundError:
        return
    me.world.counts["remove"] += 1


def mirrorer(me: Actor) -> None:
    """Lets the other repository follow, as long as there are writers; several may do so at once."""
    for _ in range(8):
        me.pause()
        me.work(_mirror)
        if not me.world.busy:
            return


def _mirror(me: Actor) -> None:
    assert me.world.away is not None
    done = mirror(me.repo, me.open(me.world.away))
    for one in done.artifacts:
        if one.error is not None and not (me.world.removed and isinstance(one.error, ConflictError | NotFoundError)):
            raise Violation(f"the mirror of {one.artifact} does not follow: {one.error}") from one.error
        me.world.counts["mirrored"] += one.versions
