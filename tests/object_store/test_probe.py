"""The probe: stores that fake create-if-absent are refused, those that are only odd are not."""

import threading
import time
from collections.abc import Iterator
from random import Random

import pytest

from mandapa.errors import AccessDeniedError, AlreadyExistsError, NotFoundError, StorageError
from mandapa.object_store import Buffer, MemoryObjectStore, ObjectInfo, RetryingObjectStore, probe
from mandapa.repository.repository import Repository
from mandapa.testing.faults import CountingObjectStore, FaultyObjectStore
from mandapa.testing.server import Knobs, Server, serve
from mandapa.testing.services import Service


class Ignores(MemoryObjectStore):
    def create(self, key: str, data: Buffer) -> None:
        self.put(key, data)


class Inverts(MemoryObjectStore):
    def create(self, key: str, data: Buffer) -> None:
        if key not in self._objects:
            raise AlreadyExistsError("inverted")
        self.put(key, data)


class ChecksThenPuts(MemoryObjectStore):
    pause = 0.02

    def create(self, key: str, data: Buffer) -> None:
        if key in self._objects:
            raise AlreadyExistsError(key)
        time.sleep(self.pause)
        self.put(key, data)


class AlwaysRefuses(MemoryObjectStore):
    def create(self, key: str, data: Buffer) -> None:
        raise AlreadyExistsError(key)


class SaysYesToAll(MemoryObjectStore):
    """Keeps the first bytes, but tells every racer that it won."""

    def create(self, key: str, data: Buffer) -> None:
        try:
            super().create(key, data)
        except AlreadyExistsError:
            if "race" not in key:
                raise


class ListsLate(MemoryObjectStore):
    """Lists do not show the newest object."""

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        yield from list(super().list(prefix, start_after=start_after))[:-1]


class ReadsLate(MemoryObjectStore):
    """The first read of a key finds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._read: set[str] = set()

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        if key not in self._read:
            self._read.add(key)
            raise NotFoundError(key)
        return super().get(key, limit=limit)


class ReadsOld(MemoryObjectStore):
    """A replaced object is still read as it was."""

    def put(self, key: str, data: Buffer) -> None:
        if key not in self._objects:
            super().put(key, data)


class AltersKeys(MemoryObjectStore):
    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        for info in super().list(prefix, start_after=start_after):
            yield ObjectInfo(info.key.replace("_", "%5f"), info.size, info.last_modified)


class IgnoresRanges(MemoryObjectStore):
    def get_ranges(self, key: str, ranges: object) -> list[Buffer]:
        return [self.get(key)]


class ListsUnordered(MemoryObjectStore):
    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        return reversed(list(super().list(prefix, start_after=start_after)))


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        (Ignores, "although an object was there"),
        (Inverts, "although nothing was there"),
        (Inverts, "replaced an object"),
        (ChecksThenPuts, "racing writers"),
        (AlwaysRefuses, "although nothing was there"),
        (SaysYesToAll, "acknowledged is gone"),
        (ListsLate, "list does not show"),
        (ReadsLate, "get does not see"),
        (ReadsOld, "get does not see"),
        (AltersKeys, "nobody wrote"),
        (IgnoresRanges, "range read"),
        (ListsUnordered, "byte order"),
    ],
)
def test_refused(store: type[MemoryObjectStore], reason: str) -> None:
    """Each with a reason that says what is wrong."""
    result = probe(store())
    assert result.verdict == "refused"
    assert any(reason in text for text in result.reasons), result.reasons


def test_check_then_put_never_slips_through() -> None:
    """Of 20 probes, each with its own racers, none calls it ok."""
    assert {probe(ChecksThenPuts(), rounds=1).verdict for _ in range(20)} == {"refused"}


def test_a_store_that_would_lose_versions_holds_no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole probe refuses it, and leaves nothing behind; who promises to write alone may have it."""
    monkeypatch.setattr("mandapa.repository.repository.probe", probe)
    store = ChecksThenPuts()
    with pytest.raises(StorageError, match=r"racing writers.*--single-writer"):
        Repository.create(store)
    assert [*store.list("")] == []
    repo = Repository.create(store, single_writer=True)
    assert repo.settings()["writers"] == "single"
    assert repo.settings()["probe"]["verdict"] == "refused"
    with repo.artifact("net").transaction() as txn:
        txn.add_bytes("w", b"w")
    assert repo["net:latest"].open("w").read() == b"w"


@pytest.mark.parametrize("condition", ["ignored", "inverted", "check-then-put", "always-409"])
def test_refused_over_http(condition: str) -> None:
    """The same fakes as servers, through S3 and GCS clients."""
    with serve(Knobs(condition=condition)) as broken:  # type: ignore[arg-type]
        for store in (broken.s3(prefix="a"), broken.gcs(prefix="b")):
            assert probe(store).verdict == "refused"


def test_accepted(server: Server) -> None:
    """Good stores, over http in a moment, within the requests that the docstring names; nothing is left."""
    for store in (MemoryObjectStore(), server.s3(prefix="probed"), server.gcs(prefix="probed too")):
        counting = CountingObjectStore(store)
        begin = time.monotonic()
        result = probe(counting)
        assert time.monotonic() - begin < 5.0
        assert (result.verdict, result.reasons, result.rounds) == ("ok", (), 3)
        assert result.spurious_conflicts == 0
        assert 100 <= result.requests <= 150
        assert counting.requests.total() <= 150
        assert list(store.list("")) == []


def test_sometimes_409_is_accepted() -> None:
    """As S3 does: a conflict while nothing is there is answered by trying the same again."""
    store = FaultyObjectStore(MemoryObjectStore(), Random(0), conflicts=0.2)
    result = probe(store, rounds=10)
    assert result.verdict == "ok"
    assert result.spurious_conflicts > 0
    with serve(Knobs(conflict_rate=0.8)) as odd:
        result = probe(odd.s3())
    assert result.verdict == "ok"
    assert result.spurious_conflicts > 0


def test_lost_replies_are_accepted() -> None:
    """A create whose outcome is unknown, and one that won and is told it lost, are settled by reading."""
    memory = MemoryObjectStore()
    for seed in range(20):
        flaky = FaultyObjectStore(memory, Random(seed), lost=0.05, doubled=0.1)
        result = probe(RetryingObjectStore(flaky, attempts=20, sleep=lambda _: None), random=Random(seed))
        assert result.verdict == "ok", (seed, result.reasons)


@pytest.mark.service
@pytest.mark.parametrize("name", ["moto_service", "azurite_service"])
def test_real_servers_are_accepted(request: pytest.FixtureRequest, name: str) -> None:
    """They create only if absent."""
    result = probe(request.getfixturevalue(name).store("probed"))
    assert (result.verdict, result.reasons) == ("ok", ())


@pytest.mark.service
@pytest.mark.slow
def test_seaweed_is_accepted(seaweed_service: Service) -> None:
    """Right, though slow: racing creates take seconds there."""
    result = probe(seaweed_service.store("probed"), rounds=1)
    assert (result.verdict, result.reasons) == ("ok", ())


def test_no_verdict_when_the_store_fails(server: Server) -> None:
    """Refused access, a missing bucket and a dead server are errors, not verdicts."""
    with pytest.raises(AccessDeniedError):
        probe(server.s3("forbidden"))
    with pytest.raises(StorageError, match="does not exist"):
        probe(server.s3("missing"))


def test_all_racers_are_in_the_race() -> None:
    """They are released together, not one by one."""

    class Watching(MemoryObjectStore):
        def __init__(self) -> None:
            super().__init__()
            self.now = 0
            self.most = 0
            self.lock = threading.Lock()

        def create(self, key: str, data: Buffer) -> None:
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(0.02)
            try:
                super().create(key, data)
            finally:
                with self.lock:
                    self.now -= 1

    store = Watching()
    probe(store, racers=8, rounds=2)
    assert store.most == 8
