"""S3, GCS and Azure: what errors mean, whose credentials are used, and what a fork may do."""

import http.server
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mandapa.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    InvalidInputError,
    NotFoundError,
    StorageError,
    StoreNotFoundError,
)
from mandapa.object_store import AzureObjectStore, GCSObjectStore, ObjectStore, S3ObjectStore
from mandapa.testing.server import Server
from mandapa.testing.services import Service

SECRET = "SECRETSECRETSECRET"
CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda store: store.get("a/b"),
    "get_ranges": lambda store: store.get_ranges("a/b", [(0, 1)]),
    "head": lambda store: store.head("a/b"),
    "list": lambda store: list(store.list("a/")),
    "put": lambda store: store.put("a/b", b"1"),
    "create": lambda store: store.create("a/b", b"1"),
    "delete": lambda store: store.delete(["a/b"]),
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of whoever runs the tests, and no metadata service."""
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def no_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def recorder() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that answers 404 and keeps the headers of each request."""
    seen: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", seen
        listening.shutdown()
        thread.join()


# Errors


@pytest.mark.parametrize("verb", CALLS)
@pytest.mark.parametrize("client", ["s3", "gcs"])
def test_missing_bucket(server: Server, client: str, verb: str) -> None:
    """Is not a missing key: a StoreNotFoundError that names the bucket."""
    with pytest.raises(StoreNotFoundError, match="bucket does not exist") as caught:
        CALLS[verb](getattr(server, client)("missing-bucket"))
    assert not caught.value.retryable
    assert "missing-bucket" in str(caught.value)


@pytest.mark.service
@pytest.mark.parametrize("verb", CALLS)
def test_missing_bucket_on_moto(moto_service: Service, verb: str) -> None:
    store = S3ObjectStore("nobody", endpoint_url=moto_service.url, access_key_id="a", secret_access_key=SECRET)
    with pytest.raises(StoreNotFoundError, match="bucket does not exist"):
        CALLS[verb](store)


@pytest.mark.service
@pytest.mark.parametrize("verb", CALLS)
def test_missing_container_on_azurite(azurite_service: Service, verb: str) -> None:
    key = pickle.loads(pickle.dumps(azurite_service.store("")))._options["account_key"]
    store = AzureObjectStore(
        "nobody", account_name="devstoreaccount1", account_key=key, endpoint_url=azurite_service.url
    )
    with pytest.raises(StoreNotFoundError, match="container does not exist"):
        CALLS[verb](store)


@pytest.mark.parametrize(
    ("client", "verb", "permission"),
    [
        ("s3", "get", "s3:ListBucket"),
        ("s3", "head", "s3:GetObject"),
        ("s3", "list", "s3:ListBucket"),
        ("s3", "put", "s3:PutObject"),
        ("s3", "create", "s3:PutObject"),
        ("s3", "delete", "s3:DeleteObject"),
        ("gcs", "get", "storage.objects.get"),
        ("gcs", "list", "storage.objects.list"),
        ("gcs", "create", "storage.objects.create"),
        ("gcs", "delete", "storage.objects.delete"),
    ],
)
def test_403_names_the_permission(server: Server, client: str, verb: str, permission: str) -> None:
    """And is never "absent"."""
    with pytest.raises(AccessDeniedError, match=permission):
        CALLS[verb](getattr(server, client)("forbidden-bucket"))


@pytest.mark.service
@pytest.mark.parametrize("verb", CALLS)
def test_wrong_key_on_azurite(azurite_service: Service, verb: str) -> None:
    """Refused credentials are AccessDeniedError, and stay secret."""
    wrong = "U0VDUkVU" * 10 + "U0VDUkU="
    store = AzureObjectStore(
        "bucket", account_name="devstoreaccount1", account_key=wrong, endpoint_url=azurite_service.url
    )
    with pytest.raises(AccessDeniedError) as caught:
        CALLS[verb](store)
    assert wrong not in f"{caught.value!r}{caught.value}"


@pytest.mark.service
def test_sas_token_stays_secret(azurite_service: Service) -> None:
    token = f"sv=2023-11-03&ss=b&srt=sco&sp=rwdl&se=2099-01-01T00%3A00%3A00Z&sig={SECRET}"
    store = AzureObjectStore(
        "bucket", account_name="devstoreaccount1", sas_token=token, endpoint_url=azurite_service.url
    )
    for call in CALLS.values():
        with pytest.raises(AccessDeniedError) as caught:
            call(store)
        assert SECRET not in f"{caught.value!r}{caught.value}{store!r}{store.url}"


@pytest.mark.parametrize("verb", CALLS)
def test_nobody_listens(verb: str) -> None:
    """A retryable StorageError that says so, within seconds."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    store = S3ObjectStore(
        "bucket", endpoint_url=f"http://127.0.0.1:{port}", access_key_id="a", secret_access_key=SECRET
    )
    begin = time.monotonic()
    with pytest.raises(StorageError, match="nothing listens there") as caught:
        CALLS[verb](store)
    assert caught.value.retryable
    assert time.monotonic() - begin < 10


def test_unknown_host() -> None:
    store = S3ObjectStore("bucket", endpoint_url="http://no.such.host.invalid", anonymous=True)
    with pytest.raises(StorageError) as caught:
        store.get("a")
    assert caught.value.retryable


@pytest.mark.parametrize(
    "store",
    [
        S3ObjectStore("bucket", config={"no_such_option": SECRET}, anonymous=True),  # type: ignore[typeddict-unknown-key]
        GCSObjectStore("bucket", service_account="{not json " + SECRET),
        GCSObjectStore("bucket", service_account="/no/such/file"),
        AzureObjectStore("container", connection_string="nonsense=" + SECRET),
        AzureObjectStore("container", account_name="x", account_key=SECRET + "!"),
        AzureObjectStore("container", account_key=SECRET),
    ],
    ids=repr,
)
def test_bad_options(store: ObjectStore) -> None:
    """What can never work is the caller's mistake, told without secrets."""
    with pytest.raises(InvalidInputError) as caught:
        store.get("a")
    assert SECRET not in f"{caught.value!r}{caught.value}"


def test_mistakes_are_not_storage_errors(server: Server) -> None:
    """What is not a buffer of contiguous bytes is a TypeError, as it would be anywhere; a string is no path either."""
    for data in ("/etc/hostname", memoryview(bytes(10))[::2], None, [b"1"]):
        for call in (server.s3().put, server.s3().create):
            with pytest.raises(TypeError):
                call("a", data)  # type: ignore[arg-type]


def test_failing_credentials(recorder: tuple[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A login that ends while we run is refused access, with its own words."""

    def expired(_: object) -> None:
        raise RuntimeError("the SSO session has expired")

    monkeypatch.setattr("mandapa.object_store.s3._StaticCredentials.__call__", expired)
    store = S3ObjectStore("bucket", endpoint_url=recorder[0], access_key_id="a", secret_access_key=SECRET)
    for call in CALLS.values():
        with pytest.raises(AccessDeniedError, match="SSO session has expired"):
            call(store)


def test_list_stops_behind_the_prefix(server: Server) -> None:
    """A prefix that ends inside a segment asks for no more pages than it has to."""
    store = server.s3(prefix="stops")
    for key in ("log/0", "log/1a", "log/1b", "log/2"):
        store.put(key, b"")
    assert [info.key for info in store.list("log/1")] == ["log/1a", "log/1b"]


# Credentials


def test_no_credentials(no_metadata: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a laptop without any: at once, with what to do."""
    monkeypatch.setitem(sys.modules, "boto3", None)
    for store, advice in (
        (S3ObjectStore("bucket"), "AWS_ACCESS_KEY_ID"),
        (GCSObjectStore("bucket"), "gcloud auth application-default login"),
        (AzureObjectStore("container", account_name="x"), "az login"),
    ):
        begin = time.monotonic()
        with pytest.raises(AccessDeniedError, match=advice):
            store.get("a")
        assert time.monotonic() - begin < 5


def test_no_credentials_with_boto3() -> None:
    with pytest.raises(AccessDeniedError, match="configure a profile"):
        S3ObjectStore("bucket").get("a")


def test_keywords_win(recorder: tuple[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over keys, tokens and endpoints of the environment, none of which is mixed in."""
    url, seen = recorder
    for name, value in {
        "AWS_ACCESS_KEY_ID": "environment",
        "AWS_SECRET_ACCESS_KEY": "environment",
        "AWS_SESSION_TOKEN": "environment",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_REGION": "environment",
    }.items():
        monkeypatch.setenv(name, value)
    given = S3ObjectStore(
        "bucket", endpoint_url=url, region="keyword", access_key_id="keyword", secret_access_key=SECRET
    )
    with pytest.raises(NotFoundError):
        given.get("a")
    assert "Credential=keyword/" in seen[-1]["authorization"]
    assert "/keyword/s3/" in seen[-1]["authorization"]
    assert "x-amz-security-token" not in seen[-1]
    with pytest.raises(NotFoundError):
        S3ObjectStore("bucket", endpoint_url=url).get("a")
    assert "Credential=environment/" in seen[-1]["authorization"]
    assert seen[-1]["x-amz-security-token"] == "environment"


def test_endpoint_of_the_environment(
    recorder: tuple[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also an http one."""
    url, seen = recorder
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(NotFoundError):
        S3ObjectStore("bucket", access_key_id="a", secret_access_key="b", session_token="token").get("a")
    assert seen[-1]["x-amz-security-token"] == "token"


def test_profile(recorder: tuple[str, list[dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By boto3: named, from AWS_PROFILE, or the default one; with its region."""
    url, seen = recorder
    (tmp_path / "config").write_text("[profile team]\nregion = eu-west-1\n")
    (tmp_path / "credentials").write_text(
        f"[team]\naws_access_key_id = team\naws_secret_access_key = {SECRET}\n"
        f"[default]\naws_access_key_id = default\naws_secret_access_key = {SECRET}\n"
    )

    def asked(store: S3ObjectStore) -> str:
        with pytest.raises(NotFoundError):
            store.get("a")
        return seen[-1]["authorization"]

    assert "Credential=default/" in asked(S3ObjectStore("bucket", endpoint_url=url))
    assert "Credential=team/" in (team := asked(S3ObjectStore("bucket", endpoint_url=url, profile="team")))
    assert "/eu-west-1/" in team
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert "Credential=team/" in asked(S3ObjectStore("bucket", endpoint_url=url))
    with pytest.raises(AccessDeniedError, match="nobody"):
        S3ObjectStore("bucket", endpoint_url=url, profile="nobody").get("a")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(InvalidInputError, match=r"mandapa\[aws\]"):
        S3ObjectStore("bucket", endpoint_url=url, profile="team").get("a")


def test_anonymous(recorder: tuple[str, list[dict[str, str]]]) -> None:
    url, seen = recorder
    for store in (
        S3ObjectStore("bucket", endpoint_url=url, anonymous=True),
        GCSObjectStore("bucket", endpoint_url=url, anonymous=True),
    ):
        with pytest.raises(NotFoundError):
            store.get("a")
        assert "credential" not in seen[-1].get("authorization", "").lower()


@pytest.mark.service
def test_azure_connection_string(azurite_service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the portal gives it, by keyword or by environment."""
    key = pickle.loads(pickle.dumps(azurite_service.store("")))._options["account_key"]
    text = (
        "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;"
        f"AccountKey={key};BlobEndpoint={azurite_service.url};"
    )
    AzureObjectStore("bucket", "by-string", connection_string=text).create("a", b"1")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    with pytest.raises(AlreadyExistsError):
        AzureObjectStore("bucket", "by-string").create("a", b"2")


def test_keys_go_together() -> None:
    with pytest.raises(InvalidInputError, match="go together"):
        S3ObjectStore("bucket", access_key_id="a")


# Clients


def test_large_uploads_are_not_cut_off() -> None:
    """A pack on a slow link takes minutes, and obstore's default is 30 s."""
    client = S3ObjectStore("bucket", anonymous=True)._connect()
    assert client.client_options is not None
    assert str(client.client_options["timeout"]) in {"0:05:00", "5m", "300s"}


def test_aws_uploads_carry_a_checksum() -> None:
    """Over TLS the body need not be signed, but what is stored is checked; other servers get the signed body."""
    config = S3ObjectStore("bucket", anonymous=True)._connect().config
    assert str(config["checksum_algorithm"]).lower() == "crc64nvme"
    other = S3ObjectStore("bucket", endpoint_url="https://minio.example", anonymous=True)._connect().config
    assert "unsigned_payload" not in other


def test_pickled_store_works_without_showing_secrets(server: Server) -> None:
    store = S3ObjectStore(
        "bucket", "pickled", endpoint_url=server.url, access_key_id="a", secret_access_key=SECRET, session_token=SECRET
    )
    store.put("a", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.get("a") == b"1"
    for text in (repr(store), repr(copy), str(store), store.url):
        assert SECRET not in text


_FORK = """
import os, sys, tempfile, time
from mandapa.errors import ClosedError
from mandapa.object_store import GCSObjectStore, LocalObjectStore, S3ObjectStore
url = sys.argv[1]
used = S3ObjectStore("bucket", "fork", endpoint_url=url, access_key_id="a", secret_access_key="b")
new = GCSObjectStore("bucket", "fork", endpoint_url=url, anonymous=True)
local = LocalObjectStore(tempfile.mkdtemp())
if sys.argv[2] == "used":
    used.put("a", b"1")
local.put("a", b"1")
children = []
for number in range(20):
    child = os.fork()
    if child == 0:
        local.put(f"b/{number}", local.get("a"))
        for store in (used, new):
            try:
                store.put("a", b"1")
                told = "works"
            except ClosedError as error:
                told = "spawn" if "spawn" in str(error) else "unclear"
            if told != sys.argv[3]:
                os._exit(1)
        os._exit(0)
    children.append(child)
deadline = time.monotonic() + 30
while children:
    child, status = os.waitpid(children[0], os.WNOHANG)
    if child:
        assert os.waitstatus_to_exitcode(status) == 0
        children.pop(0)
    assert time.monotonic() < deadline, "a child hangs"
    time.sleep(0.01)
if sys.argv[2] == "used":
    assert used.get("a") == b"1"
assert len(list(local.list("b/"))) == 20
"""


@pytest.mark.parametrize(("parent", "child"), [("used", "spawn"), ("unused", "works")])
def test_fork(server: Server, parent: str, child: str) -> None:
    """In children of a process that used a client every cloud store says what to do instead; a local one works.

    Where the parent only made the stores, children use them.
    """
    subprocess.run([sys.executable, "-c", _FORK, server.url, parent, child], check=True, timeout=60)


def test_endpoints_do_not_show_in_urls() -> None:
    store = GCSObjectStore("bucket", "p", endpoint_url="http://localhost:1", service_account=json.dumps({"k": SECRET}))
    assert store.url == "gs://bucket/p"
    assert SECRET not in repr(store)
