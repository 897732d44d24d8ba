"""Rewriting: what little is needed of half-dead packs is stored again, and nothing else changes for anyone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import save

from mandapa.content import moving
from mandapa.content.codecs import BF16, DELTA
from mandapa.content.fetch import pieces_of
from mandapa.content.index import Index, Piece
from mandapa.content.upload import Upload
from mandapa.digest import digest
from mandapa.errors import CorruptionError, InvalidInputError
from mandapa.format.keys import container_key, log_key
from mandapa.format.manifest import Branch, ChildRow, LargeFileRow, encode_node
from mandapa.format.records import FenceOp, RepackOp, encode_gc_list
from mandapa.format.strict import seal
from mandapa.object_store import MemoryObjectStore
from mandapa.object_store.base import Buffer
from mandapa.repository import rewrite as rewrite_module
from mandapa.repository.fsck import fsck
from mandapa.repository.gc import Collection
from mandapa.repository.repository import Repository
from mandapa.repository.rewrite import HalfDead, RewritePlan, Rewritten, plan_rewrite, rewrite
from mandapa.repository.version import address_of, root_of
from mandapa.testing.faults import CountingObjectStore, Crash, CrashingObjectStore


class Store(MemoryObjectStore):
    """One that does something else just before the next create below ``log/``."""

    before_commit: Callable[[], object] | None = None

    def create(self, key: str, data: Buffer) -> None:
        if key.startswith("log/") and self.before_commit is not None:
            action, self.before_commit = self.before_commit, None
            action()
        super().create(key, data)


def copy_of(repo: Repository) -> Store:
    """A store with the same objects, of its own."""
    store = Store()
    store._objects.update(repo.place._objects)
    return store


def make(store: object | None = None, *, threads: int = 2) -> Repository:
    return Repository.create(store or MemoryObjectStore(), codec="raw", threads=threads)


def noise(seed: int, size: int) -> bytes:
    return Random(seed).randbytes(size)


def add(repo: Repository, name: str, files: dict[str, bytes]) -> None:
    with repo.artifact(name).transaction(base=None) as txn:
        for path, data in files.items():
            txn.add_bytes(path, data)


def content(repo: Repository) -> dict[str, tuple[str, dict[str, bytes | str]]]:
    """Address -> digest and bytes of every live version, as someone sees them who comes now."""
    repo = Repository(repo.place)
    return {
        version.address: (
            version.digest,
            {path: asset.url or version.open(path).read() for path, asset in version.assets.items()},
        )
        for artifact in repo.artifacts()
        for version in artifact.versions()
    }


def pieces(repo: Repository) -> set[Piece]:
    """Every chunk that a live version needs, bases included."""
    return {
        one
        for artifact in repo.artifacts()
        for version in artifact.versions()
        for located in version.rows()
        for piece in pieces_of(located, repo.reader.load)
        for one in piece.chain()
    }


def packs(repo: Repository) -> dict[str, int]:
    return {info.key: info.size for info in repo.store.list("packs/")}


def needed(repo: Repository) -> set[str]:
    return {container_key(piece.container) for piece in pieces(repo)}


def sweep(repo: Repository) -> set[str]:
    """A clean-up without any grace; gives the packs that it has deleted."""
    return {key for key in gc(repo) if key.startswith("packs/")}


def gc(repo: Repository) -> set[str]:
    work = Collection(repo, grace=0)
    for _ in work.steps():
        pass
    return set(work.freed)


def done(repo: Repository, keys: set[str]) -> list[Rewritten]:
    return list(rewrite(repo, keys))


@pytest.fixture
def half_dead() -> Repository:
    """One pack of which two artifacts need one file of three."""
    repo = make()
    add(repo, "a", {"kept": noise(1, 300_000), "gone": noise(2, 400_000), "gone too": noise(3, 400_000)})
    add(repo, "a", {"kept": noise(1, 300_000), "new": noise(4, 100_000)})
    add(repo, "b", {"elsewhere": noise(1, 300_000), "small": b"x"})
    repo.artifact("a").delete(0)
    return repo


def old_pack(repo: Repository) -> str:
    """The key of the largest."""
    found = packs(repo)
    return max(found, key=lambda key: found[key])


def test_what_is_needed_is_stored_once_more_and_the_old_pack_goes(half_dead):
    """Content and digests stay, chunks are stored once for all versions, and a gc frees the old pack."""
    repo, before = half_dead, content(half_dead)
    old = old_pack(repo)
    sizes = packs(repo)
    result = done(repo, {old})
    assert [(one.address, one.skipped) for one in result] == [("a:v1", ""), ("b:v0", "")]
    assert content(repo) == before
    assert old not in needed(repo)
    new = {key: size for key, size in packs(repo).items() if key not in sizes}
    assert sum(new.values()) == 300_000 + 16 + 48 + 48
    assert sum(one.put for one in result) < 305_000
    assert old in sweep(repo)
    assert content(repo) == before
    assert fsck(repo, deep=True).findings == []


def test_nothing_to_do_writes_nothing(half_dead):
    """Packs that nothing reaches, or none: nothing is put and nothing committed."""
    repo = half_dead
    done(repo, {old_pack(repo)})
    old = old_pack(repo)
    before = {info.key for info in repo.store.list("")}
    assert done(repo, {old}) == []
    assert done(repo, set()) == []
    assert done(repo, {"packs/" + "0" * 32}) == []
    assert {info.key for info in repo.store.list("")} == before


@pytest.mark.parametrize("key", ["", "packs/", "log/" + "0" * 32, "packs/" + "A" * 32, "packs/" + "0" * 32 + "\n"])
def test_only_containers_are_emptied(half_dead, key):
    """A key of something else is refused before anything is read."""
    with pytest.raises(InvalidInputError, match="no key of a container"):
        done(half_dead, {key})


# -- all kinds of content ---------------------------------------------------------------------------------------------


def checkpoint(step: int) -> bytes:
    """72 tensors, of which three change a little with each step, and the bf16 copy of a large one."""
    rng = np.random.default_rng(0)
    tensors = {f"layer.{at:03}": torch.from_numpy(rng.normal(size=17_000).astype(np.float32)) for at in range(72)}
    for at in range(3):
        tensors[f"layer.{at:03}"] *= 1 + 1e-5 * step
    tensors["master"] = torch.from_numpy(rng.normal(size=50_000).astype(np.float32)) * (1 + 1e-5 * step)
    tensors["model"] = tensors["master"].bfloat16()
    return save(tensors)


@pytest.fixture(scope="module")
def trained() -> Repository:
    """Large files, deltas and bf16 copies, of which the bases were stored beside what nobody needs any more."""
    repo = Repository.create(MemoryObjectStore(), codec="dense", threads=2)
    artifact = repo.artifact("model")
    for step in range(3):
        with artifact.transaction() as txn:
            txn.add_bytes("checkpoint/model.safetensors", checkpoint(step))
            txn.add_bytes("gone", noise(step, 8_000_000))
            txn.add_url("data", "s3://elsewhere/data")
    with repo.artifact("copy").transaction() as txn:
        txn.copy("model:v1", "checkpoint", at="from-model")
    with artifact.transaction() as txn:
        txn.remove("gone")
    artifact.delete(0, 2)
    return repo


def test_there_is_something_of_each_kind(trained):
    """The tests below move large files, deltas, and copies that take no bytes."""
    kinds = {type(located.row) for v in trained.artifact("model").versions() for located in v.rows()}
    assert LargeFileRow in kinds
    assert {DELTA, BF16} <= {piece.codec for piece in pieces(trained)}
    assert any(piece.stored == 0 and piece.container[:1] == b"p" for piece in pieces(trained))


@pytest.mark.parametrize("threads", [0, 3])
def test_all_packs_are_emptied(trained, threads, tmp_path):
    """Every chunk, base, and copy without bytes comes from new packs; each is stored once, as it was stored before."""
    repo = Repository(copy_of(trained), threads=threads)
    before, old = content(repo), pieces(repo)
    needed_before = {(piece.hash, piece.codec, piece.stored) for piece in old if piece.container[:1] == b"p"}
    keys = set(packs(repo))
    result = done(repo, keys)
    assert [(one.address, one.skipped) for one in result] == [("copy:v0", ""), ("model:v1", ""), ("model:v3", "")]
    assert needed(repo).isdisjoint(keys)
    assert {(p.hash, p.codec, p.stored) for p in pieces(repo)} == {(p.hash, p.codec, p.stored) for p in old}
    new = sum(size for key, size in packs(repo).items() if key not in keys)
    assert new == sum(stored + 48 for _, _, stored in needed_before) + 64 * len(set(packs(repo)) - keys)
    assert sweep(repo) == keys
    assert content(repo) == before
    assert fsck(repo, deep=True).findings == []
    repo["model:v3"].download(tmp_path)
    assert (tmp_path / "checkpoint/model.safetensors").read_bytes() == checkpoint(2)
    assert {version.requires for version in Repository(repo.place).artifact("model").versions()} == {
        version.requires for version in trained.artifact("model").versions()
    }


def test_little_at_a_time(trained, monkeypatch):
    """However much is looked at before it is copied, each chunk is copied once, and all is there."""
    repo = Repository(copy_of(trained), threads=0)
    keys = set(packs(repo))
    monkeypatch.setattr(moving, "_WAITING", 5)
    monkeypatch.setattr(rewrite_module, "_GROUP_VERSIONS", 1)
    assert [one.skipped for one in done(repo, keys)] == ["", "", ""]
    assert sweep(repo) == keys
    ranges = {piece[:6] for piece in pieces(repo)}
    assert len(ranges) == len({piece[:6] for piece in pieces(trained)}) == len({r[3:] for r in ranges})
    assert content(repo) == content(trained)
    assert fsck(repo, deep=True).findings == []


def test_what_it_costs(half_dead, tmp_path):
    """Of a known repository: a listing, the nodes and bytes that move, a put and a record for each version."""
    repo = Repository(half_dead.place, threads=0, cache_dir=tmp_path)
    keys = plan(repo).keys
    store = CountingObjectStore(repo.place)
    repo = Repository(store, threads=0, cache_dir=tmp_path)
    store.requests.clear()
    assert len(done(repo, set(keys))) == 2
    # A look at the catalog; a node for each version, and all that moves; a pack and two manifests; two records.
    heads = sum(1 for info in half_dead.place.list("head/") if info.key != "head/catalog")
    assert store.requests == {"list": 1, "get": 1, "get_ranges": 3, "put": 3 + heads, "create": 2}


def test_a_base_moves_and_its_delta_stays(trained):
    """Only the pack that bases are in is emptied: deltas stay where they are, and name the base where it is now."""
    repo = Repository(copy_of(trained))
    before = content(repo)
    bases = {piece.base for piece in pieces(repo) if piece.codec == DELTA and piece.base.base is None}
    keys = {container_key(base.container) for base in bases}
    deltas = {p[:6] for p in pieces(repo) if p.codec == DELTA and container_key(p.container) not in keys}
    assert deltas
    assert all(one.skipped == "" for one in done(repo, keys))
    assert deltas <= {piece[:6] for piece in pieces(repo)}
    assert keys <= sweep(repo)
    assert content(repo) == before
    assert fsck(repo, deep=True).findings == []


def test_containers_of_manifests_can_be_emptied_too(trained):
    """Nodes and small chunks move like other chunks do."""
    repo = Repository(copy_of(trained))
    before = content(repo)
    keys = {info.key for prefix in ("meta/", "packs/") for info in repo.store.list(prefix)}
    assert all(one.skipped == "" for one in done(repo, keys))
    assert gc(repo) >= keys
    assert content(repo) == before
    assert fsck(repo, deep=True).findings == []


def test_nodes_that_versions_share_are_made_once():
    """Two versions of many files share all of their leaves but one, before and after."""
    repo = make()
    files = {f"{number:04}": b"%d" % number for number in range(3000)}
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes("0000-large", noise(1, 100_000))
        for path, data in files.items():
            txn.add_bytes(path, data)
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes("2999", b"other")
    result = done(repo, set(packs(repo)))
    assert [one.skipped for one in result] == ["", ""]
    roots = [repo.reader.load(root_of(version._state.root)) for version in repo.artifact("a").versions()]
    assert all(isinstance(root, Branch) for root in roots)
    leaves = [{(root.containers[row.container], row.offset) for row in root.rows} for root in roots]
    assert len(leaves[0] - leaves[1]) == len(leaves[1] - leaves[0]) == 1
    assert result[1].put < 2000 < result[0].put
    assert fsck(repo, deep=True).findings == []


def test_readers_and_writers_go_on(half_dead):
    """An open file reads on after the old pack is gone, and the next version names the new pack, not the old one."""
    repo, other = half_dead, Repository(half_dead.place)
    held = other["a:v1"].open("kept")
    assert held.read(10) == noise(1, 300_000)[:10]
    old = old_pack(repo)
    txn = other.artifact("a").transaction()
    txn.__enter__()
    txn.add_bytes("more", b"x")
    done(repo, {old})
    txn.__exit__(None, None, None)
    assert txn.version.number == 2
    with other.artifact("a").transaction() as txn:
        txn.add_bytes("kept again", noise(1, 300_000))
    other.artifact("a").delete(2)
    done(repo, {old})
    assert old in sweep(repo)
    assert held.read() == noise(1, 300_000)[10:]
    assert other["a:v3"].open("kept again").read() == noise(1, 300_000)
    assert fsck(repo, deep=True).findings == []


# -- what comes in between --------------------------------------------------------------------------------------------


def raced(half_dead: Repository, action: Callable[[Repository], object]) -> tuple[Repository, dict[str, str]]:
    """Rewrite the old pack while someone else does something, just before the first version is moved."""
    store = copy_of(half_dead)
    plain = MemoryObjectStore()
    plain._objects = store._objects
    other = Repository(plain)
    repo = Repository(store)
    store.before_commit = lambda: action(other)
    result = {one.address: one.skipped for one in rewrite(repo, {old_pack(repo)})}
    assert store.before_commit is None
    assert fsck(repo, deep=True).findings == []
    return repo, result


def test_a_version_that_is_deleted_meanwhile_is_skipped(half_dead):
    """It is named; the others move."""
    repo, result = raced(half_dead, lambda other: other.artifact("a").delete(1))
    assert result == {"a:v1": "it was deleted or stored otherwise meanwhile", "b:v0": ""}
    assert old_pack(half_dead) not in needed(repo)


def test_two_at_once(half_dead):
    """Each version moves once, whoever is first; the other one says so."""
    old = old_pack(half_dead)
    repo, result = raced(half_dead, lambda other: done(other, {old}))
    assert result == dict.fromkeys(["a:v1", "b:v0"], "it was deleted or stored otherwise meanwhile")
    assert content(repo) == content(half_dead)
    assert old not in needed(repo)


def test_other_commits_do_not_matter(half_dead):
    """An alias, and a new version that needs the old pack: all moves; the new version is left as it is."""

    def work(other: Repository) -> None:
        other.artifact("a").alias("best", 1)
        with other.artifact("a").transaction(base=None) as txn:
            txn.copy("b:v0", "elsewhere")

    old = old_pack(half_dead)
    repo, result = raced(half_dead, work)
    assert result == {"a:v1": "", "b:v0": ""}
    assert old in needed(repo)
    assert [(one.address, one.skipped) for one in rewrite(repo, {old})] == [("a:v2", "")]
    assert old not in needed(repo)


def fence(repo: Repository, condemned: list[str]) -> None:
    """A gc that has condemned these, and has fenced all logs."""
    repo.store.create("gc/e1", encode_gc_list("e1", condemned))
    for artifact in repo.artifacts():
        log = artifact.open_log()
        log.append(repo.author.new_id().hex(), lambda _: [FenceOp("e1")], repo.author)


def test_a_clean_up_that_took_something_else(half_dead):
    """A fence, and nothing of ours condemned: all moves."""
    _, result = raced(half_dead, lambda other: fence(other, ["packs/" + "0" * 32]))
    assert result == {"a:v1": "", "b:v0": ""}


@pytest.mark.parametrize("gone", [False, True])
def test_a_clean_up_that_condemned_what_was_put(half_dead, gone):
    """Nothing of what it has condemned, or deleted, is named: what a later version needs is copied again."""
    before = set(packs(half_dead)) | {info.key for info in half_dead.store.list("meta/")}
    listed: list[str] = []

    def condemn(other: Repository) -> None:
        keys = {info.key for prefix in ("packs/", "meta/") for info in other.store.list(prefix)} - before
        listed.extend(keys)
        fence(other, sorted(keys))
        if gone:
            other.store.delete([*keys, "gc/e1"])

    repo, result = raced(half_dead, condemn)
    assert listed
    assert result == {"a:v1": "a clean-up came in between: run it again", "b:v0": ""}
    for version in (repo["a:v1"], repo["b:v0"]):
        assert {container_key(container) for container in version.tree.containers()}.isdisjoint(listed)
    assert content(repo) == content(half_dead)
    old = old_pack(half_dead)
    assert [(one.address, one.skipped) for one in rewrite(repo, {old})] == [("a:v1", "")]
    assert old not in needed(repo)


@pytest.mark.parametrize("more", [False, True])
def test_a_clean_up_before_the_log_is_looked_at_again(half_dead, more):
    """What was put for a version that died is gone before the next one is moved, of that artifact or another one."""
    if more:
        add(half_dead, "a", {"kept": noise(1, 300_000)})
    before = content(half_dead)

    def work(other: Repository) -> None:
        other.artifact("a").delete(1)
        gc(other)

    repo, result = raced(half_dead, work)
    gone, next_one, *others = result.values()
    assert gone == "it was deleted or stored otherwise meanwhile"
    assert next_one == "a clean-up came in between: run it again"
    assert others == [""] * more
    del before["a:v1"]
    assert content(repo) == before


@pytest.mark.parametrize("step", range(8))
def test_a_clean_up_at_the_same_time(half_dead, step):
    """Whatever step of a gc without any grace comes before the first commit, and whatever after the last: all stays."""
    rest: list[Iterator[str]] = []

    def begin(other: Repository) -> None:
        steps = Collection(other, grace=0).steps()
        rest.append(steps)
        for _ in range(step):
            next(steps, None)

    repo, result = raced(half_dead, begin)
    for _ in rest[0]:
        pass
    assert content(repo) == content(half_dead)
    assert fsck(repo, deep=True).findings == []
    old = old_pack(half_dead)
    assert {one.address for one in rewrite(repo, {old})} == {address for address, why in result.items() if why}
    assert old in sweep(repo) | (packs(half_dead).keys() - packs(repo).keys())
    assert content(repo) == content(half_dead)


def test_a_crash_after_any_store_call(half_dead):
    """Every version is whole, moved or not; the next one does the rest."""
    before = content(half_dead)
    old = old_pack(half_dead)
    smooth = CrashingObjectStore(copy_of(half_dead))
    done(Repository(smooth, threads=0), {old})
    for at in range(1, smooth.calls + 1):
        for mode in ("before", "after"):
            store = copy_of(half_dead)
            with suppress(Crash):
                done(Repository(CrashingObjectStore(store, at=at, mode=mode), threads=0), {old})
                assert at == smooth.calls
            repo = Repository(store, threads=0)
            assert content(repo) == before, (at, mode)
            assert all(one.skipped == "" for one in rewrite(repo, {old}))
            assert old in sweep(repo)
            assert content(repo) == before
            assert fsck(repo, deep=True).findings == []


# -- damage -----------------------------------------------------------------------------------------------------------


def hurt(repo: Repository, piece: Piece, how: str = "altered") -> None:
    key = container_key(piece.container)
    data = bytearray(repo.store.get(key))
    middle = piece.offset + piece.stored // 2
    if how == "altered":
        data[middle] ^= 1
    else:
        del data[middle:]
    repo.store.put(key, bytes(data))


@pytest.mark.parametrize("how", ["altered", "cut"])
def test_a_damaged_chunk_does_not_move(how):
    """Versions that need it are named, with the file; it is not copied; the others move."""
    repo = make()
    add(repo, "a", {"gone": noise(3, 900_000), "kept": noise(1, 300_000), "zhurt": noise(2, 100_000)})
    add(repo, "a", {"kept": noise(1, 300_000)})
    add(repo, "a", {"kept": noise(1, 300_000), "folder/hurt": noise(2, 100_000)})
    repo.artifact("a").delete(0)
    old = old_pack(repo)
    [piece] = pieces_of(repo["a:v2"].tree.get("folder/hurt"), repo.reader.load)
    hurt(repo, piece, how)
    sizes = packs(repo)
    sound, unsound = done(repo, {old})
    assert (sound.address, sound.skipped) == ("a:v1", "")
    assert unsound.address == "a:v2"
    assert unsound.skipped.startswith("it cannot be moved: ")
    assert old in unsound.skipped
    if how == "altered":
        assert f"folder/hurt: {old}, bytes {piece.offset}+100000: " in unsound.skipped
    assert repo["a:v1"].open("kept").read() == noise(1, 300_000)
    assert sum(packs(repo).values()) - sum(sizes.values()) == 300_000 + 16 + 48 + 48
    assert repo["a:v2"].open("kept").read() == noise(1, 300_000)


def test_nodes_that_cannot_be_below_each_other():
    """A branch below one of its own level: its version is named, whatever the depth that somebody has made up."""
    repo = make()
    add(repo, "a", {"kept": noise(1, 300_000)})
    version = repo["a:v0"]._state
    with Upload(repo.store, index=Index(None), codec="raw", threads=0) as upload:
        child = root_of(version.root)
        for _ in range(3):
            row = ChildRow("kept", 0, child.offset, child.stored, child.hash, bytes(32), 1, 300_000)
            raw, stored = encode_node(Branch([child.container], 1, [row]))
            child = upload.put_node(digest(raw), stored, len(raw))
        upload.flush()
    log = repo.artifact("a").open_log()
    log.append("0" * 32, lambda _: [RepackOp(0, version.root, address_of(child), [])], repo.author)
    before = {info.key for info in repo.store.list("")}
    [one] = done(repo, set(packs(repo)))
    assert "another level" in one.skipped
    assert {info.key for info in repo.store.list("")} == before


def test_a_damaged_base_does_not_move(trained):
    """What is a delta to it is not moved either, for nobody could say whether it is sound."""
    repo = Repository(copy_of(trained))
    base = next(piece.base for piece in sorted(pieces(repo)) if piece.codec == DELTA and piece.base.base is None)
    hurt(repo, base)
    keys = set(packs(repo))
    result = done(repo, keys)
    needing = {
        version.address
        for artifact in repo.artifacts()
        for version in artifact.versions()
        for located in version.rows()
        for piece in pieces_of(located, repo.reader.load)
        if base[:6] in [one[:6] for one in piece.chain()]
    }
    assert needing
    assert {one.address for one in result if one.skipped} == needing
    stored = {(entry.hash, entry.codec) for entry in pieces(repo) if container_key(entry.container) not in keys}
    assert base.hash not in {hash_ for hash_, _ in stored}


def test_a_pack_that_is_gone(half_dead):
    """Versions that need it are named, and stay as they were."""
    repo = half_dead
    old = old_pack(repo)
    repo.store.delete([old])
    result = done(repo, {old})
    assert [one.address for one in result] == ["a:v1", "b:v0"]
    assert all(old in one.skipped and "is not there" in one.skipped for one in result)


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan(repo: Repository, **how: object) -> RewritePlan:
    return plan_rewrite(repo, **{"grace": 0, "least": 0, **how})


def test_the_plan_says_what_it_takes(half_dead):
    """What two artifacts share counts once; what is written in the end is about what the plan says."""
    repo = half_dead
    old = old_pack(repo)
    objects = {info.key for info in repo.store.list("")}
    found = plan(repo)
    assert found.packs == (HalfDead(old, packs(repo)[old], 300_048),)
    assert (found.repository, found.versions, found.freed) == (repo.id, 2, packs(repo)[old])
    assert {info.key for info in repo.store.list("")} == objects
    put = sum(one.put for one in rewrite(repo, found.keys))
    assert put == pytest.approx(found.written, abs=2500)
    assert put <= found.written
    assert plan(repo).packs == ()
    assert RewritePlan.from_json(found.to_json()) == found


def test_a_pack_of_which_more_than_half_is_needed_stays(half_dead):
    """By one artifact or by several together."""
    repo = half_dead
    assert plan(repo).packs
    add(repo, "c", {"gone": noise(2, 400_000)})
    assert plan(repo).packs == ()


def test_bases_are_needed(trained):
    """A base counts like a chunk of the version, and what nobody needs does not."""
    repo = Repository(copy_of(trained))
    for pack in plan(repo).packs:
        ranges = {p[:3] for p in pieces(repo) if container_key(p.container) == pack.key}
        assert pack.used == sum(stored + 48 for _, _, stored in ranges)
        assert 2 * pack.used <= pack.size == packs(repo)[pack.key]
    assert plan(repo).packs


def test_small_gains_are_not_worth_it(half_dead):
    """By default nothing is done for a few MiB; ``least`` says for how much."""
    found = plan(half_dead)
    gain = found.freed - found.written
    assert plan_rewrite(half_dead, grace=0).packs == ()
    assert plan(half_dead, least=gain).packs == ()
    assert plan(half_dead, least=gain - 1) == found


def test_manifests_count():
    """A pack is left alone when the manifests of the versions that need it are more than what it would free."""
    repo = make()
    add(repo, "a", {"kept": noise(0, 70_000), "gone": noise(1, 90_000)})
    for number in range(9):
        files = {f"{number}/{at:04}": b"%d %d" % (number, at) for at in range(300)}
        add(repo, "a", {"kept": noise(0, 70_000), **files})
    repo.artifact("a").delete(0, *range(2, 10))
    one = plan(repo)
    assert one.versions == 1
    assert one.manifests * 9 > 90_000
    repo.artifact("a").undelete(*range(2, 10))
    assert plan(repo).packs == ()


def test_young_packs_and_what_may_come_back_stay(half_dead):
    """A pack younger than the grace is left out, and one that a version needs which was deleted within the grace."""
    repo = half_dead
    now = datetime.now(UTC)
    assert plan(repo, now=now, grace=3600).packs == ()
    assert plan(repo, now=now + timedelta(hours=2), grace=3600).packs
    for key, (data, time) in list(repo.place._objects.items()):
        if key.startswith("packs/"):
            repo.place._objects[key] = data, time - timedelta(hours=2)
    assert plan(repo, now=now, grace=3600).packs == ()
    repo.artifact("b").remove()
    assert plan(repo, now=now + timedelta(hours=2), grace=3600).versions == 1


@pytest.mark.parametrize("what", ["log", "version"])
def test_what_only_a_newer_mandapa_can_move_stays(half_dead, what):
    """A pack that a log with unknown ops needs, or a version with an unknown feature, stays; who tries is told."""
    repo = half_dead
    assert plan(repo).packs
    log = repo.artifact("b").open_log()
    version = log.state.versions[0]
    if what == "log":
        line = {"format": 1, "seq": 1, "txn": "0" * 32, "prev": log.records[0].seal, "at": "2027-01-01T00:00:00Z"}
        line |= {"by": "", "ops": [{"op": "shine", "optional": True}]}
        repo.store.create(log_key(log.id, 1), seal(line))
    else:
        op = RepackOp(0, version.root, version.root, ["shine"])
        log.append("0" * 32, lambda _: [op], repo.author)
    repo = Repository(repo.place)
    assert plan(repo).packs == ()
    result = {one.address: one.skipped for one in rewrite(repo, {old_pack(repo)})}
    assert result["a:v1"] == ""
    assert "upgrade" in result["b:v0"]


def test_a_manifest_that_is_gone_stops_the_plan(half_dead):
    """Nobody can tell what its version needs."""
    repo = half_dead
    version = repo["b:v0"]
    repo.store.delete([version._state.root.object])
    with pytest.raises(CorruptionError, match=r"b:v0: .*run 'mandapa fsck'"):
        plan(Repository(repo.place))


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"repository":"x","packs":[],"manifests":0,"versions":0,"kind":"gc"}',
        b'{"repository":"x","packs":[],"manifests":0,"versions":0,"more":1}',
        b'{"repository":"x","packs":[{"key":"log/1","size":1,"used":0}],"manifests":0,"versions":0}',
    ],
)
def test_what_is_no_plan_is_refused(bad):
    """A file of something else, or one that names anything but containers."""
    with pytest.raises(InvalidInputError):
        RewritePlan.from_json(bad)
