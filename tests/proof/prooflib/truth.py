"""What must be true of a world in the end."""

from __future__ import annotations

from collections.abc import Iterator

from mandapa.format.records import DeleteOp, Record, RegisterOp, VersionOp
from mandapa.repository.fsck import fsck
from mandapa.repository.log import Log
from mandapa.repository.mirror import mirror
from mandapa.repository.replay import follows, is_upkeep, txn_id
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState, fold
from prooflib.histories import Operation, contradiction
from prooflib.world import Action, Content, Place, Violation, World


def check(world: World) -> None:
    """Raise `Violation` unless every promise was kept."""
    repo = _whole(world.home)
    truth = Truth(world, repo)
    truth.check_history()
    truth.check_acknowledged()
    truth.check_versions()
    truth.check_readers()
    truth.check_order()
    if world.away is not None:
        check_mirror(world, repo, world.away)


def _whole(place: Place) -> Repository:
    repo = Repository(place.memory, threads=0)
    report = fsck(repo, deep=True)
    if not report.ok:
        raise Violation(f"fsck: {report.findings}")
    return repo


class Truth:
    """What the records say, and what every version must hold according to those who made them."""

    def __init__(self, world: World, repo: Repository) -> None:
        self.world = world
        self.repo = repo
        self.ids = dict(repo.catalog.state.names)
        registered = [op for record in repo.catalog.records for op in record.ops if isinstance(op, RegisterOp)]
        self.names = {op.artifact: op.name for op in registered}
        self.logs = {id_: repo.log(id_) for id_ in self.names}
        for log in self.logs.values():
            log.refresh()
        self.intents = {intent.txn: intent for intent in world.intents}
        self.contents: dict[tuple[str, int], Content] = {}

    def records(self) -> Iterator[tuple[str, Record]]:
        for id_, log in self.logs.items():
            for record in log.records:
                yield id_, record

    def check_history(self) -> None:
        """One record a transaction, no gap; a version comes from the newest, or the fixed, one that was live before."""
        for id_, log in self.logs.items():
            if len({record.txn for record in log.records}) != len(log.records):
                raise Violation(f"a transaction stands twice in {id_}")
            state = ArtifactState()
            for record in log.records:
                op = record.find(VersionOp)
                if op is not None:
                    intent = self.intents[record.txn]
                    if self.names[id_] != intent.artifact:
                        raise Violation(f"{record.txn} was meant for another artifact")
                    latest = state.latest()
                    parent = latest.op.number if latest is not None and intent.base == "latest" else None
                    if isinstance(intent.base, int):
                        parent = intent.base
                    if op.parent != parent:
                        raise Violation(f"v{op.number} comes from v{op.parent}, not from v{parent}")
                    if parent is not None and parent not in state.live():
                        raise Violation(f"v{op.number} comes from v{parent}, which was deleted before")
                gone = record.find(DeleteOp)
                if gone is not None and record.by.startswith("expirer"):
                    latest = state.latest()
                    if latest is not None and latest.op.number in gone.versions:
                        raise Violation(f"an expire took v{latest.op.number}, the newest of {id_}")
                fold(state, record, key="")
            for names in (state.aliases, state.tags):
                if not set(names.values()) <= set(state.live()):
                    raise Violation(f"{names} name deleted versions")

    def check_acknowledged(self) -> None:
        """What was acknowledged is there, once; what was refused is not."""
        made: dict[str, list[int]] = {}  # several when the artifact was removed, and made again, between two tries
        for _, record in self.records():
            if (op := record.find(VersionOp)) is not None:
                made.setdefault(record.txn, []).append(op.number)
        for intent in self.world.intents:
            if intent.version is not None and intent.version not in made.get(intent.txn, []):
                raise Violation(f"acknowledged as v{intent.version}, but there is {made.get(intent.txn)}")
            if intent.refused and intent.txn in made:
                raise Violation("refused, and made all the same")
        signed = [record.by for _, record in self.records()]
        for by, command in self.world.commands.items():
            if signed.count(by) > 1 or (command.answer is not None and by not in signed):
                raise Violation(f"the command {by} stands {signed.count(by)} times")

    def check_versions(self) -> None:
        """Every live version reads back as what its transaction meant."""
        for name, id_ in self.ids.items():
            if self.logs[id_].state.closed:
                continue  # whoever removed it died before the catalog knew
            for version in self.repo.artifact(name).versions():
                expected = self.content(id_, version.number)
                found = {}
                for path in version.assets:
                    with version.open(path) as file:
                        found[path] = file.read()
                if found not in expected:
                    raise Violation(f"{version.address} holds {_short(found)}, meant was {_short(expected)}")

    def check_readers(self) -> None:
        """Every process saw a prefix of the one history, and every reader the bytes that were meant."""
        for place, repo in self.world.repositories:
            if place is not self.world.home:
                continue
            if repo.catalog.lines != self.repo.catalog.lines[: len(repo.catalog.lines)]:
                raise Violation("a process saw another catalog")
            for id_, log in repo._logs.items():
                if log.lines != self.logs[id_].lines[: len(log.lines)]:
                    raise Violation("a process saw another history")
        for id_, number, content in self.world.reads:
            if content not in self.content(id_, number):
                raise Violation(f"a reader got {_short(content)} for v{number}")

    def check_order(self) -> None:
        """Each acknowledged operation can be put at one turn between its call and its answer, in the logs' order."""
        history = list(self.world.looks)
        intents = {intent.txn: intent for intent in self.world.intents if intent.version is not None}
        for id_, record in self.records():
            intent, command = intents.get(record.txn), self.world.commands.get(record.by)
            op = record.find(VersionOp)
            if op is not None and intent is not None and intent.version == op.number:
                history.append(Operation(id_, intent.call, intent.answer, record.seq + 1, append=True, who=record.by))
            elif op is None and command is not None and command.answer is not None:
                history.append(Operation(id_, command.call, command.answer, record.seq + 1, append=True, who=record.by))
        if found := contradiction(history):
            raise Violation(found)

    def content(self, id_: str, number: int) -> list[Content]:
        """What a version may hold: what one of its transaction's tries means, on top of its parent."""
        known = self.contents.get((id_, number))
        if known is None:
            version = self.logs[id_].state.versions[number]
            parents = [{}] if version.op.parent is None else self.content(id_, version.op.parent)
            known = []
            for done in self.intents[version.record.txn].tries:
                for content in self._apply(parents, done):
                    if content not in known:
                        known.append(content)
            self.contents[id_, number] = known
        return known

    def _apply(self, parents: list[Content], done: list[Action]) -> Iterator[Content]:
        """The parent without what is claimed, and what is put, whichever of the parents it is."""
        puts: list[Content] = [{}]
        claims: list[str] = []
        for action in done:
            if action[0] == "put":
                _, path, data = action
                puts = [{**put, path: data} for put in puts]
            elif action[0] == "remove":
                claims.append(action[1])
                puts = [{path: data for path, data in put.items() if not _below(path, action[1])} for put in puts]
            else:
                _, id_, number, at = action
                claims.append(at)
                puts = [
                    {**put, **{path: data for path, data in source.items() if _below(path, at)}}
                    for put in puts
                    for source in self.content(id_, int(number))
                ]
        for parent in parents:
            kept = {p: data for p, data in parent.items() if not any(_below(p, claim) for claim in claims)}
            for put in puts:
                yield {**kept, **put}


def _below(path: str, at: str) -> bool:
    return path == at or path.startswith(f"{at}/")


def _short(content: object) -> str:
    return repr(content)[:400]


# -- the repository that follows --------------------------------------------------------------------------------------


def check_mirror(world: World, source: Repository, away: Place) -> None:
    """It says what the source said at some time; and, after one call in peace, what the source says."""
    copy = _whole(away)
    _check_followers(source, copy, to_the_end=False)
    if not world.removed:
        done = mirror(Repository(world.home.memory, threads=0), Repository(away.memory, threads=0))
        if not done.ok:
            raise Violation(f"the mirror does not follow in peace: {[one.error for one in done.artifacts]}")
        _check_followers(source, _whole(away), to_the_end=True)


def _check_followers(source: Repository, copy: Repository, *, to_the_end: bool) -> None:
    for log in _logs(copy):
        told = [record.txn for record in log.records if not is_upkeep(record)]
        found = [(there, txns) for there in _logs(source) if (txns := _retold(source, there, log)).keys() >= set(told)]
        if told and not found:
            raise Violation(f"{log.id} says what no artifact of the source says")
        for there, txns in found[:1]:
            if [txns[txn] for txn in told] != sorted(txns[txn] for txn in told):
                raise Violation(f"{log.id} tells in another order")
            last = len(there.records) - 1 if to_the_end else max([txns[txn] for txn in told], default=-1)
            _compare(there, last, log)


def _logs(repo: Repository) -> list[Log[ArtifactState]]:
    state = repo.catalog.refresh()
    logs = [repo.log(id_) for id_ in sorted({*state.names.values(), *state.removed})]
    for log in logs:
        log.refresh()
    return logs


def _retold(source: Repository, there: Log[ArtifactState], log: Log[ArtifactState]) -> dict[str, int]:
    """What the records of the source are called in a log that follows -> their numbers in the source."""
    return {txn_id(source.id, there.id, record, log.id): record.seq for record in there.records if follows(record)}


def _compare(there: Log[ArtifactState], last: int, log: Log[ArtifactState]) -> None:
    then, state = ArtifactState(), log.state
    for record in there.records[: last + 1]:
        fold(then, record, key="")
    if [_identity(then, n) for n in then.versions] != [_identity(state, n) for n in state.versions]:
        raise Violation(f"{log.id} has other versions than {there.id} had at record {last}")
    # What was deleted again before it could be copied is there without content, and counts as deleted until the mirror
    # comes to where it was brought back.
    hidden = set(then.live()) - set(state.live())
    gone = {
        n for record in there.records[last + 1 :] for op in record.ops if isinstance(op, DeleteOp) for n in op.versions
    }
    if not set(state.live()) <= set(then.live()) or not (there.state.closed or hidden <= gone):
        raise Violation(f"{log.id} has {state.live()}, where {there.id} had {then.live()} at record {last}")
    for mine, theirs in ((state.aliases, then.aliases), (state.tags, then.tags)):
        if mine != {name: number for name, number in theirs.items() if number not in hidden}:
            raise Violation(f"{log.id} has the names {mine}, where {there.id} had {theirs}")


def _identity(state: ArtifactState, number: int) -> tuple[object, ...]:
    op = state.versions[number].op
    return number, op.digest, op.message, op.metadata, op.assets, op.bytes
