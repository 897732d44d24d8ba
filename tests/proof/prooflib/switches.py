"""The rules of clean-ups, readers, moves and mirrors, switched off: what the code would be without each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from mandapa.errors import CorruptionError, NotFoundError
from mandapa.format.keys import GC
from mandapa.format.records import Op, Record, RepackOp, decode_gc_list
from mandapa.repository import gc, mirror
from mandapa.repository.gc import Collection
from mandapa.repository.log import Log
from mandapa.repository.logs import LogFacts
from mandapa.repository.marking import Look, Marks
from mandapa.repository.move import Move
from mandapa.repository.replica import Replica
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState
from mandapa.repository.version import Version, address_of


def mark_once(patch: pytest.MonkeyPatch) -> None:
    """Gc marks again after its fences."""
    patch.setattr(Marks, "add", lambda *_: None)


def mark_before_the_fence(patch: pytest.MonkeyPatch) -> None:
    """The second mark is of what was live at the fence, not of what was seen before it."""
    fence = Collection._fence

    def look_then_fence(self: Collection, logs: Sequence[LogFacts], *rest: object) -> list[int]:
        seen = [len(facts.log.records) - 1 for facts in logs]
        fence(self, logs, *rest)
        return seen

    patch.setattr(Collection, "_fence", look_then_fence)


def mark_beyond_the_fence(patch: pytest.MonkeyPatch) -> None:
    """What was live at the fence stays; what is deleted after it waits for the next gc."""
    add = Marks.add

    def at_the_tail(self: Marks, facts: LogFacts, _: int) -> None:
        facts.log.refresh()
        add(self, facts, len(facts.log.records) - 1)

    patch.setattr(Marks, "add", at_the_tail)


def no_fences(patch: pytest.MonkeyPatch) -> None:
    """Every log is fenced: else a writer does not know that it has to look again."""
    patch.setattr(Collection, "_fence", lambda _, logs, *__: [len(facts.log.records) - 1 for facts in logs])


def catalog_read_once(patch: pytest.MonkeyPatch) -> None:
    """The catalog is read again: what was registered meanwhile is fenced, and marked."""
    patch.setattr(Look, "new_logs", lambda _: None)


def the_list_is_kept_to_itself(patch: pytest.MonkeyPatch) -> None:
    """What may be deleted is told before any log is fenced."""
    patch.setattr(gc, "create_once", lambda *_: b"")


def remove_others(patch: pytest.MonkeyPatch) -> None:
    """Another's list goes only when none of its objects exists any more."""
    patch.setattr(Collection, "_tidy", lambda self, _: _all_lists(self._repo, lambda key, _: [key]))


def _all_lists(repo: Repository, doomed: Callable[[str, tuple[str, ...]], list[str]]) -> None:
    """Delete what ``doomed`` says of the key of each list, and the keys in it."""
    for info in list(repo.store.list(GC)):
        objects = decode_gc_list(repo.store.get(info.key), key=info.key).objects
        repo.store.delete(doomed(info.key, tuple(objects)))


def resume(patch: pytest.MonkeyPatch) -> None:
    """A gc that crashed is never resumed: who has not fenced since may not delete."""

    def sweep(self: Collection, look: Look) -> None:
        _all_lists(self._repo, lambda key, objects: [key, *(one for one in objects if one not in look.marks.keys)])

    patch.setattr(Collection, "_tidy", sweep)


def grace_of_objects_alone(patch: pytest.MonkeyPatch) -> None:
    """A version that was deleted less than the grace ago counts as live."""
    patch.setattr(Marks, "_fresh", lambda *_: False)


def no_second_look(patch: pytest.MonkeyPatch) -> None:
    """Who misses an object reads the log again."""

    def give_up(self: Version, error: NotFoundError) -> None:
        raise CorruptionError(f"{self.address}: {error}") from error

    patch.setattr(Version, "follow", give_up)


def stay_where_it_was(patch: pytest.MonkeyPatch) -> None:
    """A version that has moved is read where it is now."""

    def stay(self: Version, error: NotFoundError) -> None:
        state = self._log.refresh().versions[self.number]
        why = "was deleted" if state.deleted is not None else "is not whole"
        raise NotFoundError(f"{self.address} {why}") from error

    patch.setattr(Version, "follow", stay)


def _blind_move(*, was: bool, fence: bool) -> Callable[..., Record]:
    """A move that does not look whether the version is where it was, or whether a gc came in between."""
    commit = Move.commit

    def blind(self: Move, repo: Repository, log: Log[ArtifactState], since: int) -> Record:
        if not fence:
            return commit(Move(self.version, self.root, self.requires, ()), repo, log, since)
        assert not was
        number = self.version.op.number

        def build(state: ArtifactState) -> list[Op]:
            return [RepackOp(number, state.versions[number].root, address_of(self.root), sorted(self.requires))]

        return log.append(repo.author.new_id().hex(), build, repo.author, since=since)

    return blind


def move_without_was(patch: pytest.MonkeyPatch) -> None:
    """A version moves only from where it was when its new manifest was made."""
    patch.setattr(Move, "commit", _blind_move(was=False, fence=True))


def move_without_fence(patch: pytest.MonkeyPatch) -> None:
    """A fence makes a move look again at what was put for it."""
    patch.setattr(Move, "commit", _blind_move(was=True, fence=False))


def tell_by_chance(patch: pytest.MonkeyPatch) -> None:
    """What tells a record has an id that anybody who mirrors can compute."""
    drawn = iter(range(1 << 20))
    patch.setattr(mirror, "txn_id", lambda *_: f"{next(drawn):032x}")


def mirror_without_fence(patch: pytest.MonkeyPatch) -> None:
    """A fence makes a mirror look again at what it has put."""
    patch.setattr(Replica, "stands", lambda *_, **__: True)
