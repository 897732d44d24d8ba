"""Secrets that a store is given, wherever somebody may put one: no message, no name and no log repeats them."""

from __future__ import annotations

import http.server
import io
import os
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import mandapa
from mandapa.cli import main
from mandapa.errors import InvalidInputError, MandapaError
from mandapa.object_store import AzureObjectStore, GCSObjectStore, S3ObjectStore, from_url

SECRET = "Hunter2Hunter2Hunter2"
CLOSED = "http://127.0.0.1:9"  # nothing listens there
KEYS = {"region": "x", "access_key_id": "a", "secret_access_key": "b"}

STORES: dict[str, Callable[[], Any]] = {
    "password in an endpoint": lambda: S3ObjectStore("b", endpoint_url=f"http://u:{SECRET}@127.0.0.1:9", **KEYS),
    "user in an endpoint": lambda: S3ObjectStore("b", endpoint_url=f"http://{SECRET}@127.0.0.1:9", **KEYS),
    "query of an endpoint": lambda: S3ObjectStore("b", endpoint_url=f"{CLOSED}/?token={SECRET}", **KEYS),
    "fragment of an endpoint": lambda: S3ObjectStore("b", endpoint_url=f"{CLOSED}/#{SECRET}", **KEYS),
    "an endpoint that is none": lambda: S3ObjectStore("b", endpoint_url=f"u:{SECRET}@host", **KEYS),
    "a blank in an endpoint": lambda: S3ObjectStore("b", endpoint_url=f"http://u:{SECRET}@ba d", **KEYS),
    "bucket": lambda: S3ObjectStore(f"key:{SECRET}@b"),
    "bucket that is a query": lambda: S3ObjectStore(f"b?sig={SECRET}"),
    "a connection string as container": lambda: AzureObjectStore(f"AccountName=a;AccountKey={SECRET}"),
    "secret key": lambda: S3ObjectStore(
        "b", endpoint_url=CLOSED, region="x", access_key_id="a", secret_access_key=SECRET
    ),
    "session token": lambda: S3ObjectStore("b", endpoint_url=CLOSED, session_token=SECRET, **KEYS),
    "secret key with a line end": lambda: S3ObjectStore("b", access_key_id="a", secret_access_key=f"{SECRET}\n"),
    "session token with a line end": lambda: S3ObjectStore("b", session_token=f"{SECRET}\n", **KEYS),
    "proxy": lambda: S3ObjectStore(
        "b", endpoint_url=CLOSED, client_options={"proxy_url": f"http://u:{SECRET}@127.0.0.1:9"}, **KEYS
    ),
    "account key": lambda: AzureObjectStore("c", account_name="a", account_key=f"{SECRET}!!"),
    "account key with a line end": lambda: AzureObjectStore("c", account_name="a", account_key=f"{SECRET}\n"),
    "SAS token": lambda: AzureObjectStore(
        "c", account_name="a", endpoint_url=f"{CLOSED}/a", sas_token=f"sv=1&sig={SECRET}"
    ),
    "SAS token that is none": lambda: AzureObjectStore("c", account_name="a", sas_token=SECRET),
    "SAS in an endpoint": lambda: AzureObjectStore(
        "c", account_name="a", account_key="c2VjcmV0", endpoint_url=f"{CLOSED}/?sig={SECRET}"
    ),
    "connection string": lambda: AzureObjectStore("c", connection_string=f"AccountName=a;AccountKey={SECRET}!"),
    "connection string that is none": lambda: AzureObjectStore("c", connection_string=SECRET),
    "service account": lambda: GCSObjectStore("b", service_account=f'{{"private_key": "{SECRET}"}}'),
    "service account of several lines": lambda: GCSObjectStore(
        "b", service_account=f'{{\n"private_key":\n"{SECRET}"}}'
    ),
    "password in a URL": lambda: from_url(f"s3://key:{SECRET}@b/p"),
    "password in a URL of no store": lambda: from_url(f"https://key:{SECRET}@b/p"),
    "query of a URL": lambda: from_url(f"s3://b/p?secret={SECRET}"),
    "fragment of a URL": lambda: from_url(f"gs://b/p#{SECRET}"),
    "an option that is none": lambda: from_url("s3://b/p", password=SECRET),
    "open": lambda: mandapa.open(f"s3://key:{SECRET}@b/p"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of whoever runs the tests, and no metadata service."""
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)


def said_of(error: BaseException) -> str:
    """All that is said of an error, by whoever prints it."""
    shown = "".join(traceback.format_exception(error))
    # The lines of source that a traceback shows are this file's, where the secret has no value.
    return "\n".join([str(error), repr(error), repr(error.args), shown])


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
def test_stores_keep_what_they_are_given_to_themselves(make: Callable[[], Any]) -> None:
    """In their name, their URL, and the error of each request; a line end in a secret is told of and ends nothing."""
    said = []
    try:
        store = make()
    except MandapaError as error:
        said.append(said_of(error))
    else:
        said += [repr(store), str(store), store.url]
        for ask in (lambda: store.get("k"), lambda: list(store.list("")), lambda: store.create("k", b"x")):
            with pytest.raises(MandapaError) as caught:
                ask()
            said.append(said_of(caught.value))
    assert [text for text in said if SECRET in text] == []


def test_a_line_end_in_a_secret_of_the_environment_is_an_error_of_ours(tmp_path: Path) -> None:
    """The client would give itself up, which ends a program; in a process of its own, as it prints a lot."""
    code = (
        "import mandapa.object_store as s; s.S3ObjectStore('b', endpoint_url='http://127.0.0.1:9', region='x').get('k')"
    )
    env = {**os.environ, "AWS_ACCESS_KEY_ID": "a\n", "AWS_SECRET_ACCESS_KEY": f"{SECRET}\n", "HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "InvalidInputError: cannot read 'k' in s3://b" in found.stderr
    assert "line ends" in found.stderr
    assert SECRET not in found.stderr


class Telling(http.server.BaseHTTPRequestHandler):
    """A server that repeats, in its error, all that it was asked with."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        told = f"{self.path} {self.headers.get('Authorization')} {self.headers.get('x-amz-security-token')}"
        body = f"<Error><Code>AccessDenied</Code><Resource>{told}</Resource><Message>no</Message></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def telling() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Telling)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("kind", ["session", "sas"])
def test_what_a_server_repeats_is_not_passed_on(telling: str, kind: str) -> None:
    """Tokens and queries in the text of its refusal: only its code and its message are."""
    store: Any = S3ObjectStore("b", endpoint_url=telling, session_token=SECRET, **KEYS)
    if kind == "sas":
        store = AzureObjectStore("c", account_name="a", endpoint_url=f"{telling}/a", sas_token=f"sv=1&sig={SECRET}")
    calls = [
        lambda: store.get("k"), lambda: store.get_ranges("k", [(0, 1)]), lambda: store.head("k"),
        lambda: list(store.list("")), lambda: store.put("k", b""), lambda: store.create("k", b""),
        lambda: store.delete(["k"]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(MandapaError) as caught:
            call()
        assert SECRET not in said_of(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--repo", f"s3://key:{SECRET}@b/p", "log"],
        ["--repo", f"s3://b/p?X-Amz-Signature={SECRET}", "ls"],
        ["--repo", f"https://u:{SECRET}@b/p", "doctor"],
        ["--repo", "memory://x", "add", "net", "--url", f"x=https://u:{SECRET}@h/y"],
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_commands_say_nothing_of_it(arguments: list[str], as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On either output, with tracebacks too."""
    monkeypatch.setenv("MANDAPA_DEBUG", "1")
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["mandapa", *arguments, *["--json"] * as_json])
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code
    assert "Error" in err.getvalue()
    assert SECRET not in out.getvalue() + err.getvalue()


def test_references_refuse_secrets_and_strange_schemes() -> None:
    """By every door by which a URL gets into a version; no message repeats the secret."""
    repo = mandapa.open("memory://references", create=True)
    bad = [
        f"https://u:{SECRET}@h/x", f"https://{SECRET}@h/x", f"https://h/x?X-Amz-Signature={SECRET}",
        f"https://h/x?sig={SECRET}", f"https://h/x?access_token={SECRET}", f"https://h/x?AWSAccessKeyId={SECRET}",
        f"s3://k:{SECRET}@b/x", "javascript:alert(1)", "data:text/html,x", "ftp://h/x", "gopher://h/x",
        "file+ssh://h/x", "FILE+X:///etc/passwd", "ssh://h/x", "ext::sh -c x", "-oProxyCommand=x", "//h/x", "x", "",
    ]  # fmt: skip
    with repo.artifact("a").transaction() as txn, warnings.catch_warnings():
        for url in bad:
            with pytest.raises(InvalidInputError) as caught:
                txn.add_url("x", url)
            assert SECRET not in said_of(caught.value)
        txn.add_url("fine", "https://example.org/x?versionId=3")
    assert [asset.url for asset in repo["a"].assets.values()] == ["https://example.org/x?versionId=3"]
