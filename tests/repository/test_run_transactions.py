"""What runs need of a transaction: a fixed base, files that grow, an alias of the best, lineage, reserved assets."""

from __future__ import annotations

import math
import os
import random
from contextlib import contextmanager

import pytest

import mandapa
from mandapa.content import upload
from mandapa.errors import ClosedError, ConflictError, InvalidInputError, NotFoundError, SecurityError
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.repository.best import Contest
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository
from mandapa.testing.faults import CountingObjectStore

TXN = "ab" * 16
MIB = 1 << 20


@pytest.fixture
def store():
    return CountingObjectStore(MemoryObjectStore())


@pytest.fixture
def repo(store):
    made = Repository.create(store, threads=0)
    yield made
    assert fsck(made, deep=True).findings == []


@pytest.fixture
def other(store, repo):
    """Another process."""
    return Repository(store, threads=0)


@pytest.fixture
def file(tmp_path):
    """Writes the one file that is added."""

    def write(data):
        path = tmp_path / "log"
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def eager(repo, monkeypatch):
    """The index believes all files, also those that were written just now."""
    remember = repo.index.remember_file
    monkeypatch.setattr(repo.index, "remember_file", lambda *known: remember(*known[:3], 4 * 10**18))


def read(version):
    """Path -> bytes of all files."""
    found = {}
    for path in version.assets:
        with version.open(path) as opened:
            found[path] = opened.read()
    return found


def put(repo, name="a", /, metadata=None, *, alias=None, if_best=None, **content):
    """One transaction that adds these assets, upon the newest version."""
    with repo.artifact(name).transaction(metadata=metadata) as txn:
        for path, data in content.items():
            txn.add_bytes(path, data)
        if alias:
            txn.alias(alias, if_best=if_best)
    return txn.version


@contextmanager
def refused(repo, error, match, **options):
    """A transaction that ends with an error and makes nothing."""
    before = repo.artifact("a").find_log()
    count = len(before.refresh().versions) if before else 0
    with pytest.raises(error, match=match) as found, repo.artifact("a").transaction(**options) as txn:
        yield txn, found
    assert (txn.version, txn.made) == (None, False)
    after = repo.artifact("a").find_log()
    assert (len(after.refresh().versions) if after else 0) == count


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)


# -- a base that stays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_version", [False, True])
def test_a_fixed_base_stays_whatever_comes_in_between(repo, other, as_version):
    """The version is the base with these changes: nothing of later versions is in it, and nothing conflicts."""
    base = put(repo, a=b"0", b=b"0")
    put(other, a=b"1", c=b"1")
    with repo.artifact("a").transaction(base=base if as_version else 0) as txn:
        txn.add_bytes("a", b"2")
        txn.add_bytes("d", b"2")
        put(other, a=b"3", d=b"3", e=b"3")
        with other.artifact("a").transaction() as removing:
            removing.remove("b")
    assert read(txn.version) == {"a": b"2", "b": b"0", "d": b"2"}
    assert (txn.version.number, txn.version.parent, txn.made) == (4, 0, True)


def test_a_version_of_another_process_can_be_the_base(repo, other):
    """A version in hand is known by its transaction, not by who read it."""
    base = put(other, a=b"0")
    put(other, b=b"1")
    with repo.artifact("a").transaction(base=base) as txn:
        txn.add_bytes("c", b"2")
    assert read(txn.version) == {"a": b"0", "c": b"2"}


def test_a_base_that_cannot_be(repo):
    """As looking it up says: never there, deleted, of another artifact; or no base at all."""
    stranger = put(repo, "b", a=b"0")
    with pytest.raises(NotFoundError), repo.artifact("a").transaction(base=0):
        pass
    assert [artifact.name for artifact in repo.artifacts()] == ["b"]
    put(repo, a=b"0")
    put(repo, a=b"1")
    repo.artifact("a").delete(0)
    for base, error, match in (
        (0, NotFoundError, "was deleted"),
        (2, NotFoundError, "no v2"),
        (-1, NotFoundError, "no v-1"),
        (stranger, InvalidInputError, "no version of a"),
        ("v1", InvalidInputError, "base='v1'"),
        ("best", InvalidInputError, "base='best'"),
        (True, InvalidInputError, "base=True"),
        (1.0, InvalidInputError, "base=1.0"),
    ):
        with pytest.raises(error, match=match), repo.artifact("a").transaction(base=base):
            pass


def test_no_change_upon_a_fixed_base(repo, store):
    """No version is made, nothing is written, and ``version`` is the base."""
    base = put(repo, a=b"0")
    put(repo, a=b"1")
    store.reset()
    with repo.artifact("a").transaction(base=0) as txn:
        txn.add_bytes("a", b"0")
        txn.uses("b:v3")
    assert txn.version == base
    assert not txn.made
    assert not store.requests["create"]
    assert not store.requests["put"]


def test_a_message_makes_a_version_of_a_fixed_base(repo):
    """It has the digest of the base, and stores nothing."""
    base = put(repo, a=b"0")
    put(repo, a=b"1")
    with repo.artifact("a").transaction("again", base=0) as txn:
        txn.alias("old")
    assert (txn.version.digest, txn.version.added, txn.version.parent) == (base.digest, 0, 0)
    assert repo.artifact("a").aliases() == {"old": 2}


@pytest.mark.parametrize("changes", [True, False])
def test_a_fixed_base_that_is_deleted_meanwhile(repo, other, changes):
    """A conflict that says so; nothing is made, even when nothing was changed but the message."""
    put(repo, a=b"0")
    put(repo, b=b"1")
    said = r"a:v0, the version .* starts from, was deleted meanwhile .* nothing was made: run it again"
    with refused(repo, ConflictError, said, message="m", base=0) as (txn, _):
        if changes:
            txn.add_bytes("c", b"2")
        other.artifact("a").delete(0)
    assert [version.number for version in repo.artifact("a").versions()] == [1]


def test_a_fixed_base_that_is_deleted_and_brought_back(repo, other):
    """It is live at the slot: that is all that is asked for."""
    put(repo, a=b"0")
    put(repo, b=b"1")
    with repo.artifact("a").transaction(base=0) as txn:
        txn.add_bytes("c", b"2")
        other.artifact("a").delete(0)
        other.artifact("a").undelete(0)
    assert read(txn.version) == {"a": b"0", "c": b"2"}


def test_the_same_id_upon_a_fixed_base(repo, other):
    """A second try finds the first one's version, even when the base was deleted since."""
    put(repo, a=b"0")
    with repo.artifact("a").transaction(base=0, txn_id=TXN) as first:
        first.add_bytes("b", b"1")
    other.artifact("a").delete(0)
    with other.artifact("a").transaction(base=0, txn_id=TXN) as second:
        second.add_bytes("b", b"other")
    assert second.version == first.version
    assert second.made
    assert read(second.version) == {"a": b"0", "b": b"1"}


# -- files that grow --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 1000, 256 << 10, MIB, 5 * MIB + 3])
@pytest.mark.parametrize("more", [0, 1, 2 * MIB])
def test_the_first_bytes_of_a_file(repo, file, length, more):
    """Exactly so many are put, however many there are."""
    data = noise(length + more)
    with repo.artifact("a").transaction() as txn:
        txn.add(file(data), length=length)
    assert read(txn.version) == {"log": data[:length]}
    assert txn.version.size == length


def appending(monkeypatch, path, real=os.preadv):
    """Every read of a file is followed by a write at its end."""

    def call(fd, *arguments):
        got = real(fd, *arguments)
        with open(path, "ab") as opened:
            opened.write(b"and more")
        return got

    monkeypatch.setattr(os, "preadv", call)
    monkeypatch.setattr(os, "read", call)


@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_a_file_may_grow_while_it_is_added_by_length(repo, file, eager, size):
    """What comes meanwhile is not taken, is no error, and the index does not take the start for the whole."""
    data = noise(size)
    path = file(data)
    with pytest.MonkeyPatch.context() as patch, repo.artifact("a").transaction() as txn:
        appending(patch, path)
        txn.add(path, length=size)
    assert read(txn.version) == {"log": data}
    assert path.stat().st_size > size
    assert repo.index.known_file(str(path), path.stat()) is None
    with repo.artifact("a").transaction() as whole:
        whole.add(path)
    assert read(whole.version) == {"log": path.read_bytes()}


def test_the_index_knows_only_whole_files(repo, file, eager):
    """A file is remembered when its length is all it has, and then it is not read again."""
    data = noise(1000)
    path = file(data)
    for length in (999, 1000):
        with repo.artifact("a").transaction() as txn:
            txn.add(path, length=length)
        assert read(txn.version) == {"log": data[:length]}
        assert (repo.index.known_file(str(path), path.stat()) is None) == (length < 1000)
    with pytest.MonkeyPatch.context() as patch, repo.artifact("a").transaction() as txn:
        patch.setattr(os, "preadv", None)
        txn.add(path, length=1000)
    assert not txn.made
    with repo.artifact("a").transaction() as txn:
        txn.add(path, length=10)
    assert read(txn.version) == {"log": data[:10]}


@pytest.mark.parametrize("size", [5, 3 * MIB])
def test_a_file_of_fewer_bytes(repo, file, size):
    """An error that names it and both numbers, and nothing is made."""
    path = file(noise(size))
    said = f"{path} has {size} bytes, fewer than the {size + 1}"
    with refused(repo, InvalidInputError, said) as (txn, _):
        txn.add(path, length=size + 1)


@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_a_file_that_is_cut_short_while_it_is_added_by_length(repo, file, monkeypatch, size):
    """The same error: no byte is made up."""
    path = file(noise(size))
    real = os.preadv

    def cutting(fd, *arguments):
        os.truncate(path, 7)
        return real(fd, *arguments)

    with refused(repo, InvalidInputError, f"{path} has 7 bytes, fewer than the {size}") as (txn, _):
        monkeypatch.setattr(os, "preadv", cutting)
        txn.add(path, length=size)


@pytest.mark.parametrize("length", [-1, True, 1.5, "7"])
def test_a_length_that_is_none(repo, file, length):
    """Refused, whatever the file holds."""
    with pytest.raises(InvalidInputError, match="length="), repo.artifact("a").transaction() as txn:
        txn.add(file(b"12345678"), length=length)


def test_a_length_goes_with_a_file(repo, tmp_path):
    """A folder has none."""
    with pytest.raises(InvalidInputError, match="folder"), repo.artifact("a").transaction() as txn:
        txn.add(tmp_path, length=1)


def test_only_the_tail_of_a_log_that_is_written_to_is_stored(store, repo, file):
    """Each version adds what is new up to its length, little more, and what was stored before stays where it is."""
    repo = Repository(store, threads=0, codec="raw")
    data = noise(9 * MIB)
    ends = [4 * MIB, 5 * MIB, 5 * MIB + 10_000, 5 * MIB + 20_000, 8 * MIB]
    before = 0
    for end in ends:
        with repo.artifact("a").transaction() as txn:
            txn.add(file(data[: end + 100_000]), length=end)
        assert read(txn.version) == {"log": data[:end]}
        assert txn.version.added < end - before + 20_000 + 5000
        before = end


def test_what_is_hashed_is_what_is_stored(store, repo, file, monkeypatch):
    """A byte that changes after it was compared with the base, and is stored again, is hashed as it is stored."""
    repo = Repository(store, threads=0, codec="raw")
    data = noise(2 * MIB)
    ends = [*range(MIB, MIB + 170_000, 10_000)]  # so many small pieces that the last ones are joined
    for end in ends:
        with repo.artifact("a").transaction() as txn:
            txn.add(file(data[:end]), length=end)
    path = file(data)
    last = ends[-1] - 1

    def then_changes(*arguments, real=upload.growth_since):
        growth = real(*arguments)
        assert 0 < growth.start <= last
        with open(path, "r+b") as opened:
            opened.seek(last)
            opened.write(bytes([data[last] ^ 1]))
        return growth

    monkeypatch.setattr(upload, "growth_since", then_changes)
    with repo.artifact("a").transaction() as txn:
        txn.add(path, length=last + 10_000)
    assert read(txn.version) == {"log": path.read_bytes()[: last + 10_000]}


def test_the_first_bytes_are_stored_again(store, repo, other, file):
    """Found elsewhere, and gone before the commit: read from the file again, up to the length."""
    data = noise(3 * MIB)
    put(repo, "b", x=data)
    gone = [info.key for info in store.list("packs/")]
    path = file(data + b"and more")
    with repo.artifact("a").transaction() as txn:
        txn.add(path, length=len(data))
        other.artifact("b").remove()
        store.delete(gone)
    assert read(txn.version) == {"log": data}


def test_the_first_bytes_that_are_gone(store, repo, other, file):
    """When the file has them no more, it is a conflict that names the asset and the file."""
    data = noise(3 * MIB)
    put(repo, "b", x=data)
    gone = [info.key for info in store.list("packs/")]
    path = file(data)
    with refused(repo, ConflictError, str(path)) as (txn, error):
        txn.add(path, length=len(data))
        path.write_bytes(data[:-1])
        other.artifact("b").remove()
        store.delete(gone)
    assert error.value.paths == ("log",)


# -- an alias of the best ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("min", [3, 2.5, 2.5, 4, 1], [0, 1, 1, 1, 4]),
        ("max", [3, 2.5, 3.0, 4, 4], [0, 0, 0, 3, 3]),
        ("min", [math.nan, 5, math.inf, -math.inf, None, True, "1", 4], [None, 1, 1, 1, 1, 1, 1, 7]),
        ("max", [2**53, 2**53 + 1, float(2**53)], [0, 1, 1]),
    ],
)
def test_an_alias_moves_to_what_is_better(repo, mode, values, best):
    """Better by a finite number; ties and everything else leave it where it is."""
    for value, number in zip(values, best, strict=True):
        put(repo, metadata={"loss": value, "n": repr(value)}, alias="best", if_best=("loss", mode))
        assert repo.artifact("a").aliases() == ({} if number is None else {"best": number})


def test_an_alias_of_something_without_a_number_is_beaten(repo):
    """What it names now is no rival: nothing, or a version that was never measured by this."""
    put(repo, metadata={"other": 0}, alias="best")
    put(repo, metadata={"loss": 9}, alias="best", if_best=("loss", "min"))
    assert repo.artifact("a").aliases() == {"best": 1}
    put(repo, metadata={"loss": 1}, x=b"1")
    repo.artifact("a").alias("best", None)
    put(repo, metadata={"loss": 10}, alias="best", if_best=("loss", "min"))
    assert repo.artifact("a").aliases() == {"best": 3}


def test_a_deleted_version_is_no_rival(repo):
    """Whatever its number says."""
    put(repo, metadata={"loss": 0})
    put(repo, metadata={"loss": 1})
    assert not Contest.of("loss", "min").wins({"loss": 2}, repo.artifact("a").state().versions[0])
    repo.artifact("a").delete(0)
    assert Contest.of("loss", "min").wins({"loss": 2}, repo.artifact("a").state().versions[0])


@pytest.mark.parametrize(("theirs", "best"), [(3, 2), (1, 1), (2, 1)])
def test_the_best_is_decided_for_the_slot_that_is_won(repo, other, theirs, best):
    """What the alias names by then counts, not what it named when the transaction began."""
    put(repo, metadata={"loss": 5}, alias="best")
    with repo.artifact("a").transaction(metadata={"loss": 2}) as txn:
        txn.alias("best", if_best=("loss", "min"))
        txn.alias("last")
        put(other, metadata={"loss": theirs}, alias="best", if_best=("loss", "min"))
    assert repo.artifact("a").aliases() == {"best": best, "last": 2}


@pytest.mark.parametrize(
    "if_best", [("loss", "least"), ("loss", None), ("loss",), "loss", ("loss", "min", 0), (1, "min"), ["loss", "min"]]
)
def test_a_contest_that_makes_no_sense(repo, if_best):
    """Refused at the call."""
    with pytest.raises(InvalidInputError), repo.artifact("a").transaction(metadata={"loss": 1}) as txn:
        txn.alias("best", if_best=if_best)
    assert not repo.artifact("a").exists()


def test_the_best_version(repo):
    """Of the live ones, by a finite number, the oldest of equals."""
    artifact = repo.artifact("a")
    for metadata in ({"loss": 0}, {"loss": 2.5, "acc": 1}, {"loss": 2.5, "acc": 3}, {"loss": "NaN"}, {}, {"acc": 3.0}):
        put(repo, metadata={"n": True, **metadata}, x=repr(metadata).encode())
    artifact.delete(0)
    assert artifact.best("loss", "min").number == artifact.best("loss", "max").number == 1
    assert artifact.best("acc", "max").number == 2
    assert artifact.best("acc", "min").metadata["acc"] == 1
    with pytest.raises(NotFoundError, match=r"a has a number for 'n'; there are: 'acc', 'loss'$"):
        artifact.best("n", "min")
    with pytest.raises(InvalidInputError, match="mode"):
        artifact.best("acc", "most")


def test_no_best_version(repo):
    """Without a version that was measured, without a version, without an artifact."""
    with pytest.raises(NotFoundError, match="no artifact"):
        repo.artifact("a").best("loss", "min")
    put(repo, x=b"1")
    with pytest.raises(NotFoundError, match="there are: none"):
        repo.artifact("a").best("loss", "min")
    put(repo, metadata={f"m{number:02}": number for number in range(25)})
    with pytest.raises(NotFoundError, match=r"'m00', .* 'm19' and 5 more"):
        repo.artifact("a").best("loss", "min")


# -- lineage ----------------------------------------------------------------------------------------------------------


def test_uses(repo, store):
    """Each address stands once, in the order in which they came, copies among them; nothing is asked for."""
    put(repo, "b", x=b"1")
    with repo.artifact("a").transaction() as txn:
        txn.uses("resnet-7:v3")
        txn.uses("data:v1/train")
        txn.copy("b:v0", "x")
        txn.uses("resnet-7:v3")
        store.reset()
        txn.uses("b:v0")
        txn.uses("tokenizer:v0")
        assert not store.requests.total()
    assert txn.version.used == ("resnet-7:v3", "data:v1/train", "b:v0", "tokenizer:v0")


@pytest.mark.parametrize("address", ["", "a b", "a:", "s3://bucket/x", "a:v1/../x", None])
def test_uses_no_address(repo, address):
    """Refused at the call."""
    with pytest.raises(InvalidInputError), repo.artifact("a").transaction() as txn:
        txn.uses(address)


def test_uses_needs_an_open_transaction(repo):
    """As every change."""
    with pytest.raises(ClosedError):
        repo.artifact("a").transaction().uses("b:v0")


# -- reserved assets --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(repo):
    """A version with a reserved asset."""
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes("x", b"1")
        txn.add_bytes(".mandapa/run.json", b"{}", reserved=True)
    return txn.version


def test_a_reserved_asset_is_read_like_any_other(repo, run, tmp_path):
    """Listed, opened, compared, written by a download."""
    assert read(run) == {".mandapa/run.json": b"{}", "x": b"1"}
    assert repo["a:v0/.mandapa/run.json"].path == ".mandapa/run.json"
    run.download(tmp_path)
    assert (tmp_path / ".mandapa/run.json").read_bytes() == b"{}"
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes(".mandapa/run.json", b"[]", reserved=True)
    diff = run.diff(txn.version)
    assert [(old.path, new.path) for old, new in diff.changed] == [(".mandapa/run.json",) * 2]
    assert not diff.added + diff.removed


@pytest.mark.parametrize(
    "path", ["run.json", ".mandapa", ".mandapa/", "x/.mandapa/run.json", ".mandapa/../x", ".mandapas/x", "", None]
)
def test_only_the_reserved_folder_is_reserved(repo, path):
    """Other paths are refused with ``reserved``."""
    with pytest.raises(InvalidInputError), repo.artifact("a").transaction() as txn:
        txn.add_bytes(path, b"1", reserved=True)


def test_a_downloaded_version_can_be_added_again(repo, run, tmp_path):
    """Nothing has changed then; and what is changed is a version that keeps the reserved assets."""
    folder = tmp_path / "out"
    run.download(folder)
    with repo.artifact("a").transaction() as txn:
        txn.add(folder)
    assert txn.version == run
    (folder / "x").write_bytes(b"2")
    with repo.artifact("a").transaction() as txn:
        txn.add(folder)
    assert read(txn.version) == {".mandapa/run.json": b"{}", "x": b"2"}
    with repo.artifact("b").transaction() as txn:
        txn.add(folder)
        txn.add(folder, at="d")
    assert read(txn.version) == {"d/x": b"2", "x": b"2"}


def test_reserved_assets_are_put_and_dropped_in_order(repo, run, tmp_path):
    """What the transaction says about them comes before what a folder leaves alone."""
    (tmp_path / "y").write_bytes(b"3")
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes(".mandapa/run.json", b"[]", reserved=True)
        txn.add(tmp_path)
    assert read(txn.version) == {".mandapa/run.json": b"[]", "y": b"3"}
    with repo.artifact("a").transaction() as txn:
        txn.remove(".mandapa")
        txn.add(tmp_path)
    assert read(txn.version) == {"y": b"3"}
    with repo.artifact("b").transaction() as txn:
        txn.copy("a:v0")
    assert read(txn.version) == read(run)
    with repo.artifact("a").transaction(base=None) as txn:
        txn.add(tmp_path)
    assert read(txn.version) == {"y": b"3"}


def test_reserved_assets_are_not_restored_into_a_repository(tmp_path):
    """A version's ``.mandapa`` and a repository in the folder's would mix: nothing is written."""
    repo = mandapa.open(tmp_path / ".mandapa", create=True)
    with repo.artifact("net").transaction() as txn:
        txn.add_bytes("-first", b"sorts before it")
        txn.add_bytes(".mandapa/mandapa.json", b"hostile", reserved=True)
    before = (tmp_path / ".mandapa/mandapa.json").read_bytes()
    with pytest.raises(SecurityError, match="is a repository"):
        repo["net"].download(tmp_path)
    assert (tmp_path / ".mandapa/mandapa.json").read_bytes() == before
    assert not (tmp_path / "-first").exists()
    repo["net"].download(tmp_path, only="-first")
    repo["net"].download(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/.mandapa/mandapa.json").read_bytes() == b"hostile"
