"""The manifest's tree: looking up, walking, comparing and editing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mandapa.content.edit import edit_tree
from mandapa.content.tree import Located, NodeReader, Tree
from mandapa.digest import digest
from mandapa.format import manifest
from mandapa.format.manifest import Chunk, FileRow, NodeAddress, UrlRow


class Nodes:
    """Keeps nodes in a dict and counts what is written and read."""

    def __init__(self):
        self.stored = {}
        self.written = 0

    def put_node(self, hash_, stored, raw_size):
        self.written += 1
        container = b"m" + self.written.to_bytes(16, "big")
        self.stored[container] = stored
        return NodeAddress(container, 16, len(stored), hash_)

    def get_ranges(self, key, ranges):
        container = b"m" + bytes.fromhex(key.removeprefix("meta/"))
        return [self.stored[container] for _ in ranges]


def file(path, content):
    table = (b"p" + digest(str(content).encode())[:16],)
    data = str(content).encode()
    return Located(FileRow(path, len(data), 0, digest(data), (Chunk(0, 16, len(data), len(data), 0),)), table)


def edits_of(mapping):
    return {path: None if value is None else file(path, value) for path, value in mapping.items()}


@pytest.fixture
def small(monkeypatch):
    """Nodes of a few rows, so that a few rows make tall trees."""
    monkeypatch.setattr(manifest, "LEAF_LIMITS", (2, 6, 3))
    monkeypatch.setattr(manifest, "BRANCH_LIMITS", (2, 5, 3))


paths = st.integers(0, 60).map(lambda n: f"{'dir/' * (n % 3)}{n:03}")
changes = st.lists(st.dictionaries(paths, st.none() | st.integers(0, 3), max_size=25), max_size=6)


@settings(max_examples=300, deadline=None)
@given(changes)
def test_edits_in_any_steps_give_the_tree_of_one_build(history):
    """The same assets have the same tree and digest, and get, rows and diff agree with a dict."""
    saved = manifest.LEAF_LIMITS, manifest.BRANCH_LIMITS
    manifest.LEAF_LIMITS, manifest.BRANCH_LIMITS = (2, 6, 3), (2, 5, 3)
    try:
        nodes = Nodes()
        reader = NodeReader(nodes, keep=4)
        state: dict[str, int] = {}
        root = None
        before = []
        for step in history:
            root = edit_tree(reader, nodes, root.address if root else None, edits_of(step))
            state.update(step)
            state = {k: v for k, v in state.items() if v is not None}
            before.append((root, dict(state)))
            built = edit_tree(reader, nodes, None, edits_of(state))
            assert (built.digest, built.assets, built.size) == (root.digest, root.assets, root.size)
            tree = Tree(reader, root.address)
            assert [(i.row.path, i.row.digest) for i in tree.rows()] == [
                (p, digest(str(state[p]).encode())) for p in sorted(state)
            ]
            for path in [*state, "nothing", "dir/"]:
                found = tree.get(path)
                assert (found.row.size if found else None) == (1 if path in state else None)
            assert [i.row.path for i in tree.under("dir")] == [p for p in sorted(state) if p.startswith("dir/")]
        for root_a, a in before:
            for root_b, b in before:
                got = [
                    (x and x.row.path, y and y.row.path)
                    for x, y in Tree(reader, root_a.address).diff(Tree(reader, root_b.address))
                ]
                want = [
                    (p if p in a else None, p if p in b else None) for p in sorted({*a, *b}) if a.get(p) != b.get(p)
                ]
                assert got == want
    finally:
        manifest.LEAF_LIMITS, manifest.BRANCH_LIMITS = saved


def test_one_change_rewrites_one_node_a_level():
    """An edit of one row of 50,000 writes at most three nodes, and a diff reads no more than it must."""
    nodes = Nodes()
    reader = NodeReader(nodes)
    rows = {f"data/{i // 100:04}/{i:06}.bin": i for i in range(50_000)}
    root = edit_tree(reader, nodes, None, edits_of(rows))
    rng = random.Random(1)
    for _ in range(20):
        path = rng.choice(list(rows))
        before = nodes.written
        cold = NodeReader(nodes)
        changed = edit_tree(cold, nodes, root.address, {path: file(path, "new")})
        assert nodes.written - before <= 3
        assert len(cold._nodes) <= 2 * 3 + 1
        apart = NodeReader(nodes)
        assert [(a.row.path, b.row.size) for a, b in Tree(apart, root.address).diff(Tree(apart, changed.address))] == [
            (path, 3)
        ]
        assert len(apart._nodes) <= 2 * 3 + 2


def test_a_url_counts_in_the_digest_by_url_size_and_checksum():
    """Each of a URL's three facts changes the digest; nothing else does."""
    nodes = Nodes()
    reader = NodeReader(nodes)
    seen = set()
    for row in [
        UrlRow("a", "s3://x/y", 3, "md5:0"),
        UrlRow("a", "s3://x/z", 3, "md5:0"),
        UrlRow("a", "s3://x/y", None, "md5:0"),
        UrlRow("a", "s3://x/y", 3, ""),
    ]:
        seen.add(edit_tree(reader, nodes, None, {"a": Located(row, ())}).digest)
    assert len(seen) == 4


def test_all_containers_of_a_tree_are_told():
    """A mark over the tree sees every pack that a row names and every node."""
    nodes = Nodes()
    reader = NodeReader(nodes)
    rows = edits_of({f"{i:05}": i for i in range(3000)})
    root = edit_tree(reader, nodes, None, rows)
    assert set(Tree(reader, root.address).containers()) == {*nodes.stored, *(r.table[0] for r in rows.values())}
