"""A version stored otherwise: it needs no object any more that it needed before."""

from __future__ import annotations

from mandapa.content.tree import Tree
from mandapa.format.keys import container_key
from mandapa.repository.log import Log
from mandapa.repository.repository import Repository
from mandapa.repository.rewrite import rewrite
from mandapa.repository.state import ArtifactState
from mandapa.repository.version import root_of


def repack(repo: Repository, log: Log[ArtifactState], number: int) -> None:
    """Empty every container that a live version needs; so all others that need one of them move, too."""
    tree = Tree(repo.reader, root_of(log.state.versions[number].root))
    done = list(rewrite(repo, sorted(map(container_key, tree.containers()))))
    assert done
    assert not any(one.skipped for one in done), done
