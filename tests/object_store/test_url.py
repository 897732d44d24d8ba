"""From a URL to a store."""

import subprocess
import sys
from pathlib import Path

import pytest

from mandapa.errors import InvalidInputError
from mandapa.object_store import (
    AzureObjectStore,
    GCSObjectStore,
    LocalObjectStore,
    MemoryObjectStore,
    S3ObjectStore,
    from_url,
)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("s3://bucket/pre/fix", S3ObjectStore),
        ("s3://bucket", S3ObjectStore),
        ("gs://bucket/pre/fix", GCSObjectStore),
        ("az://container/pre/fix", AzureObjectStore),
        ("memory://name", MemoryObjectStore),
        ("file:///some/where/a%20b", LocalObjectStore),
    ],
)
def test_url_goes_round(url: str, kind: type) -> None:
    """The store that a URL names has that URL."""
    store = from_url(url)
    assert isinstance(store, kind)
    assert store.url == url


def test_slashes_at_the_ends_do_not_matter() -> None:
    assert from_url("s3://bucket/pre/fix/").url == from_url("s3://bucket//pre/fix").url == "s3://bucket/pre/fix"


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute and relative ones."""
    monkeypatch.chdir(tmp_path)
    for path in (
        str(tmp_path / "store"),
        "store",
        "./store",
        f"file://{tmp_path}/store",
        f"file://localhost{tmp_path}/store",
    ):
        assert from_url(path).url == f"file://{tmp_path}/store"


def test_options_reach_the_store(tmp_path: Path) -> None:
    assert repr(from_url(str(tmp_path), fsync=False)).endswith("fsync=False)")
    assert "http://x" in repr(from_url("s3://b/p", endpoint_url="http://x"))
    assert from_url("s3://b", prefix="p").url == "s3://b/p"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("gcs://bucket", "gs://"),
        ("azure://container", "az://"),
        ("https://host/bucket", "endpoint_url="),
        ("http://host/bucket", "endpoint_url="),
        ("s3a://bucket", "s3://"),
        ("ftp://host", "not known"),
        ("", "empty"),
        ("s3://", "not the name of a bucket"),
        ("az:///x", "not the name of a container"),
        ("file://host/x", "file:///"),
        ("file://", "file:///"),
        ("s3://bucket/a/../b", "prefix"),
        ("s3://bucket/ä", "prefix"),
        ("s3://bucket/" + "x" * 600, "prefix"),
        ("s3://key:secret@bucket/a", "keywords"),
        ("s3://bucket/a?region=x", "keywords"),
    ],
)
def test_refusals_say_what_to_write(url: str, hint: str) -> None:
    with pytest.raises(InvalidInputError, match=hint) as caught:
        from_url(url)
    assert "secret" not in str(caught.value)


def test_unknown_option() -> None:
    with pytest.raises(InvalidInputError, match="does not take"):
        from_url("memory://x", fsync=True)


def test_importing_loads_no_client() -> None:
    """Neither obstore nor boto3: they would cost more than the rest of mandapa."""
    script = (
        "import sys, mandapa.object_store as o; o.from_url('s3://b/p'); o.probe\n"
        "loaded = {'obstore', 'boto3', 'botocore', 'urllib.request', 'asyncio'} & set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
