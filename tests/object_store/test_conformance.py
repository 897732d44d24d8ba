"""One suite for all object stores."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mandapa.errors import StorageError
from mandapa.object_store import LocalObjectStore, MemoryObjectStore, ObjectStore, RetryingObjectStore
from mandapa.testing.conformance import ObjectStoreConformance
from mandapa.testing.faults import CountingObjectStore, CrashingObjectStore
from mandapa.testing.server import Server
from mandapa.testing.services import Service


class TestLocal(ObjectStoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return LocalObjectStore(tmp_path / "not yet there" / "root")


class TestLocalWithoutFsync(ObjectStoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return LocalObjectStore(tmp_path, fsync=False)


class TestMemory(ObjectStoreConformance):
    @pytest.fixture
    def store(self) -> ObjectStore:
        return MemoryObjectStore()


class TestWrapped(ObjectStoreConformance):
    """The wrappers change nothing while nothing goes wrong."""

    @pytest.fixture
    def store(self) -> ObjectStore:
        return RetryingObjectStore(CountingObjectStore(CrashingObjectStore(MemoryObjectStore())))


class TestS3(ObjectStoreConformance):
    @pytest.fixture
    def store(self, server: Server, prefixes: Iterator[str]) -> ObjectStore:
        return server.s3(prefix=next(prefixes))


class TestGCS(ObjectStoreConformance):
    @pytest.fixture
    def store(self, server: Server, prefixes: Iterator[str]) -> ObjectStore:
        return server.gcs(prefix=next(prefixes))


@pytest.mark.service
class TestS3OnMoto(ObjectStoreConformance):
    @pytest.fixture
    def store(self, moto_service: Service, prefixes: Iterator[str]) -> ObjectStore:
        return moto_service.store(next(prefixes))


@pytest.mark.service
class TestAzureOnAzurite(ObjectStoreConformance):
    @pytest.fixture
    def store(self, azurite_service: Service, prefixes: Iterator[str]) -> ObjectStore:
        return azurite_service.store(next(prefixes))


@pytest.mark.service
@pytest.mark.slow
class TestS3OnSeaweed(ObjectStoreConformance):
    """It lists folder by folder, so that 'b/c' comes before 'b.c'; mandapa's own keys have no such neighbours.

    Whoever meets it is told, before a key is skipped.
    """

    racers = 4

    def test_list_is_in_byte_order(self, store: ObjectStore) -> None:
        with pytest.raises(StorageError, match="byte order"):
            super().test_list_is_in_byte_order(store)

    def test_list_prefix_is_a_plain_string(self, store: ObjectStore) -> None:
        with pytest.raises(StorageError, match="byte order"):
            super().test_list_prefix_is_a_plain_string(store)

    def test_list_start_after(self, store: ObjectStore) -> None:
        with pytest.raises(StorageError, match="byte order"):
            super().test_list_start_after(store)

    @pytest.fixture
    def store(self, seaweed_service: Service, prefixes: Iterator[str]) -> ObjectStore:
        return seaweed_service.store(next(prefixes))
