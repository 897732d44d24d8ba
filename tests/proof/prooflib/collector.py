"""Garbage collection by docs/format.md, "Collect garbage", with a grace of nothing: what the protocol must stand."""

from __future__ import annotations

from collections.abc import Iterator

from mandapa.content.tree import Tree
from mandapa.errors import NotFoundError
from mandapa.format.keys import container_key
from mandapa.format.records import FenceOp, Record, Root, decode_gc_list, encode_gc_list
from mandapa.repository.log import Log, create_once
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState, fold
from mandapa.repository.version import root_of

LISTED = ("packs/", "meta/", "tx/")


def collect(repo: Repository) -> Iterator[str]:
    """One gc, a step at a time: yields the name of each step when it is done, and goes on when asked for the next."""
    store, author = repo.store, repo.author
    epoch = author.new_id().hex()
    listed = {info.key for prefix in LISTED for info in store.list(prefix)}
    yield "looked"
    repo.catalog.refresh()
    marked: set[str] = set()
    for log in _logs(repo):
        log.refresh()
        marked |= _mark(repo, log, {(n, log.state.versions[n].root) for n in log.state.live() if not log.state.closed})
    candidates = sorted(listed - marked)
    if not candidates:
        yield "nothing to do"
        return
    create_once(store, f"gc/{epoch}", encode_gc_list(epoch, candidates), author)
    yield "listed"
    fence = [FenceOp(epoch)]
    repo.catalog.append(author.new_id().hex(), lambda _: fence, author)
    repo.catalog.refresh()
    yield "catalog fenced"
    fenced = [(log, log.append(author.new_id().hex(), lambda _: fence, author)) for log in _logs(repo)]
    yield "fenced"
    marked = set()
    for log, record in fenced:
        log.refresh()
        marked |= _mark(repo, log, _live_since(log, record))
    doomed = [key for key in candidates if key not in marked]
    yield "marked"
    for key in doomed:
        store.delete([key])
    yield "swept"
    store.delete([f"gc/{epoch}"])
    _drop_dead_lists(repo)
    yield "done"


def collect_all(repo: Repository) -> None:
    """One gc from start to end."""
    for _ in collect(repo):
        pass


def _logs(repo: Repository) -> list[Log[ArtifactState]]:
    """The log of every artifact that the catalog has ever registered."""
    state = repo.catalog.state
    return [repo.log(id_) for id_ in sorted({*state.names.values(), *state.removed})]


def _live_since(log: Log[ArtifactState], fence: Record) -> set[tuple[int, Root]]:
    """Versions, and where they were, that were live at a fence or at any record after it."""
    state = ArtifactState()
    live = set()
    for record in log.records:
        fold(state, record, key="")
        if record.seq >= fence.seq and not state.closed:
            live |= {(number, state.versions[number].root) for number in state.live()}
    return live


def _mark(repo: Repository, log: Log[ArtifactState], live: set[tuple[int, Root]]) -> set[str]:
    """Keys of the containers that these versions need."""
    marked = set()
    for number, root in sorted(live, key=lambda pair: (pair[0], pair[1].object)):
        try:
            marked |= {container_key(container) for container in Tree(repo.reader, root_of(root)).containers()}
        except NotFoundError:
            # Another gc may have swept what was deleted, or moved, before its own fence: it is not live any more.
            state = log.refresh()
            if not state.closed and state.is_live(number, root):
                raise
    return marked


def _drop_dead_lists(repo: Repository) -> None:
    """Another's list goes only when none of its objects exists any more."""
    there: set[str] | None = None
    for info in list(repo.store.list("gc/")):
        try:
            objects = decode_gc_list(repo.store.get(info.key), key=info.key).objects
        except NotFoundError:
            continue
        if there is None:
            there = {info.key for prefix in LISTED for info in repo.store.list(prefix)}
        if there.isdisjoint(objects):
            repo.store.delete([info.key])
