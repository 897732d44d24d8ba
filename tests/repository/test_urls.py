"""URLs as assets: what is recorded, what is looked up, what is refused."""

from __future__ import annotations

import pytest

from mandapa.errors import InvalidInputError
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.repository import Repository
from mandapa.testing.server import serve


def add(repo, url, **facts):
    with repo.artifact("a").transaction() as txn:
        txn.add_url("u", url, **facts)
    return repo["a"].assets["u"]


@pytest.fixture
def repo():
    return Repository.create(MemoryObjectStore(), threads=0)


def test_what_the_caller_knows_is_recorded(repo):
    """Size and checksum stand as given; nothing is asked."""
    asset = add(repo, "s3://elsewhere/train.parquet", size=7, checksum="sha256:ab")
    assert (asset.kind, asset.url, asset.size, asset.checksum) == (
        "url",
        "s3://elsewhere/train.parquet",
        7,
        "sha256:ab",
    )


def test_the_size_of_a_local_file_is_looked_up(repo, tmp_path):
    """A file:// URL has the size of the file, or none when there is no file."""
    (tmp_path / "x y.bin").write_bytes(b"12345")
    assert add(repo, (tmp_path / "x y.bin").as_uri()).size == 5
    assert add(repo, (tmp_path / "nothing").as_uri()).size is None


def test_size_and_etag_come_from_the_repository_s_own_service():
    """An object of the same service is described by one request; one that cannot be seen is recorded without."""
    with serve() as server:
        server.s3("other").put("data/x.parquet", b"x" * 1000)
        repo = Repository.create(server.s3("bucket", "repo"), threads=0)
        asset = add(repo, "s3://other/data/x.parquet")
        assert asset.size == 1000
        assert asset.checksum.startswith("etag:")
        missing = add(repo, "s3://other/data/nothing.parquet")
        assert (missing.size, missing.checksum) == (None, "")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "no-scheme",
        "ftp://host/file",
        "javascript:alert(1)",
        "https://user:pw@host/file",
        "https://host/file?X-Amz-Signature=abc",
        "https://host/file?sig=abc&se=2026",
        "https://host/a b",
        "https://host/\x1b[31m",
        "https://[broken",
        "s3://bucket/" + "x" * 5000,
    ],
)
def test_what_is_no_url_or_carries_a_secret_is_refused(repo, url):
    """The error repeats no secret, and no version is made."""
    with pytest.raises(InvalidInputError) as caught:
        add(repo, url)
    assert "pw" not in str(caught.value)
    assert "abc" not in str(caught.value)
    assert not repo.artifact("a").exists()


@pytest.mark.parametrize("facts", [{"size": -1}, {"size": "7"}, {"checksum": "abc"}, {"checksum": "md5:\n"}])
def test_facts_that_are_none_are_refused(repo, facts):
    """A size below 0 and a checksum without its kind are errors."""
    with pytest.raises(InvalidInputError):
        add(repo, "s3://b/k", **facts)
