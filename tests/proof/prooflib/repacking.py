"""Storing a version otherwise, by docs/format.md, "Repack"."""

from __future__ import annotations

from collections.abc import Callable

from mandapa.content.edit import TreeRoot, edit_tree
from mandapa.content.fetch import pieces_of, read_pieces
from mandapa.content.index import Index
from mandapa.content.tree import Tree
from mandapa.content.upload import Upload
from mandapa.format.records import FenceOp, Op, Record, RepackOp
from mandapa.repository.log import Log
from mandapa.repository.packs import condemned_or_missing
from mandapa.repository.repository import Repository
from mandapa.repository.state import ArtifactState, VersionState
from mandapa.repository.version import address_of, root_of


class GiveUpError(Exception):
    """The version was deleted, moved, or the new containers were condemned."""


def repack(
    repo: Repository,
    log: Log[ArtifactState],
    number: int,
    *,
    moves: Callable[[str], bool] = lambda path: True,
    pause: Callable[[], object] = lambda: None,
) -> None:
    """Put the rows of a live version for which ``moves`` says so into new containers, inherit the rest.

    Raises:
        GiveUpError: Nothing was changed.
    """
    since = len(log.records)
    was = log.state.versions[number]
    root, fresh = _store_again(repo, was, moves)
    assert root.digest.hex() == was.op.digest, "a repacked version has another digest"
    pause()
    fenced = False

    def notice(record: Record) -> None:
        nonlocal fenced
        fenced = fenced or record.find(FenceOp) is not None

    def build(state: ArtifactState) -> list[Op]:
        nonlocal fenced
        if state.closed or not state.is_live(number, was.root):
            raise GiveUpError
        if fenced and condemned_or_missing(repo.store, fresh, threads=0):
            raise GiveUpError
        fenced = False
        return [RepackOp(number, was.root, address_of(root.address))]

    log.append(repo.author.new_id().hex(), build, repo.author, since=since, on_record=notice)


def _store_again(repo: Repository, was: VersionState, moves: Callable[[str], bool]) -> tuple[TreeRoot, set[bytes]]:
    with Upload(repo.store, index=Index(None), codec="raw", threads=0, new_id=repo.author.new_id) as upload:
        rows = {}
        for located in Tree(repo.reader, root_of(was.root)).rows():
            path = located.row.path
            if moves(path):
                pieces = list(pieces_of(located, repo.reader.load))
                data = b"".join([bytes(piece) for _, piece in read_pieces(repo.store, pieces, path=path, threads=0)])
                located = upload.add_bytes(path, data)
            rows[path] = located
        root = edit_tree(repo.reader, upload, None, rows)
        upload.flush()
        return root, set(upload.fresh)
