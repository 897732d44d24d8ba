"""Our own server: like the real ones to other people's clients, and broken exactly as told."""

import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from mandapa.errors import AlreadyExistsError, StorageError
from mandapa.testing.server import Knobs, Server, serve


def test_local_only(server: Server) -> None:
    assert urlsplit(server.url).hostname == "127.0.0.1"


def test_boto3_speaks_with_it(server: Server) -> None:
    """Put, conditional put, get, ranges, list with pages, delete of many."""
    client = boto3.client(
        "s3",
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(request_checksum_calculation="when_required", retries={"max_attempts": 0}),
    )
    for number in range(5):
        client.put_object(Bucket="boto", Key=f"a/{number} & <more>", Body=b"0123456789" * 100_000, IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket="boto", Key="a/0 & <more>", Body=b"", IfNoneMatch="*")
    assert client.get_object(Bucket="boto", Key="a/0 & <more>", Range="bytes=-3")["Body"].read() == b"789"
    assert client.get_object(Bucket="boto", Key="a/0 & <more>", Range="bytes=999998-")["Body"].read() == b"89"
    assert client.head_object(Bucket="boto", Key="a/1 & <more>")["ContentLength"] == 1_000_000
    pages = list(
        client.get_paginator("list_objects_v2").paginate(Bucket="boto", Prefix="a/", PaginationConfig={"PageSize": 2})
    )
    assert [len(page["Contents"]) for page in pages] == [2, 2, 1]
    keys = [row["Key"] for page in pages for row in page["Contents"]]
    assert keys == [f"a/{number} & <more>" for number in range(5)]
    client.delete_objects(Bucket="boto", Delete={"Objects": [{"Key": key} for key in keys]})
    assert client.list_objects_v2(Bucket="boto")["KeyCount"] == 0
    client.close()


def test_s3_and_gcs_see_the_same_objects(server: Server) -> None:
    server.s3("both", "x").create("a", b"1")
    assert server.gcs("both", "x").get("a") == b"1"
    with pytest.raises(AlreadyExistsError):
        server.gcs("both", "x").create("a", b"2")


def test_latency_and_bandwidth() -> None:
    """Each reply waits; bytes share one link."""
    with serve(Knobs(latency=0.05, bandwidth=10_000_000)) as slow:
        store = slow.s3()
        store.put("a", b"")
        begin = time.monotonic()
        store.head("a")
        assert time.monotonic() - begin >= 0.05
        begin = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: store.put(f"p/{number}", bytes(1_000_000)), range(4)))
        assert time.monotonic() - begin >= 0.4


def test_errors() -> None:
    """503 is retryable; half of the writes that got one were done."""
    with serve(Knobs(error_rate=1.0)) as failing:
        store = failing.s3()
        with pytest.raises(StorageError, match="503") as caught:
            store.put("a", b"1")
        assert caught.value.retryable


def test_it_ends_with_its_user() -> None:
    with serve() as server:
        store = server.s3()
        store.put("a", b"1")
    with pytest.raises(StorageError):
        store.get("a")
