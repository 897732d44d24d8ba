"""What S3, GCS and Azure have in common, by obstore: requests, errors, forks. Each has its own file for the rest.

Clients are made at first use, so that making a store costs nothing and a store can be handed to another process.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias
from urllib.parse import urlsplit

from mandapa.errors import (
    AccessDeniedError,
    ClosedError,
    CorruptionError,
    InvalidInputError,
    MandapaError,
    NotFoundError,
    StorageError,
)
from mandapa.object_store.base import Buffer, ObjectInfo
from mandapa.object_store.cloud_errors import translate
from mandapa.object_store.keys import check_key, check_prefix, check_ranges, check_size

if TYPE_CHECKING:
    from obstore.store import AzureStore, ClientConfig, GCSStore, RetryConfig, S3Store

    Client: TypeAlias = S3Store | GCSStore | AzureStore

__all__ = ["CloudObjectStore", "check_endpoint", "environ", "require_metadata_service"]

_MAX_PREFIX_BYTES = 500
# The characters that reach all three services unchanged; obstore would percent-encode the others.
_PREFIX_SEGMENT = re.compile(r"[A-Za-z0-9 !_.'()@&$=;:+,-]+")

_CONTAINER = re.compile(r"[A-Za-z0-9$_.-]{1,255}")
_NOT_SHOWN = re.compile(r"[@?#;=]")  # of a URL with credentials, or a connection string
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BLANK = re.compile(r"[\x00-\x20\x7f]")

_GAP = 16 * 1024
"""Ranges nearer than this many bytes are one request: less than any link carries in one round trip."""
_PAGE = 1000
_METADATA_SERVICE = ("169.254.169.254", 80)  # the same in all three clouds
_METADATA_PATIENCE = 2.0  # seconds; machines that have a metadata service answer within milliseconds


class CloudObjectStore:
    """What the three have in common: requests, errors, forks."""

    _scheme: ClassVar[str]
    _place: ClassVar[str]  # what the service calls it
    _batch: ClassVar[int]  # keys in one delete
    _permissions: ClassVar[Mapping[str, str]]  # for each thing we do, what the service calls the right to do it

    def __init__(self, container: str, prefix: str, options: Mapping[str, Any]) -> None:
        prefix = prefix.strip("/")
        if not _CONTAINER.fullmatch(container or ""):
            told = "what was given" if _NOT_SHOWN.search(container or "") else repr(container)
            raise InvalidInputError(f"{told} is not the name of a {self._place}")
        for segment in prefix.split("/") if prefix else ():
            if segment in {".", ".."} or not _PREFIX_SEGMENT.fullmatch(segment) or len(prefix) > _MAX_PREFIX_BYTES:
                raise InvalidInputError(
                    f"the prefix {prefix!r} must be segments of letters, digits, space and !_.'()@&$=;:+,- joined by "
                    f"'/', {_MAX_PREFIX_BYTES} bytes at most"
                )
        self._container = container
        self._prefix = prefix
        self._options = {name: value for name, value in options.items() if value}
        for name, value in self._options.items():
            # JSON, such as the key of a service account, may have lines.
            if isinstance(value, str) and not value.lstrip().startswith("{") and _CONTROL.search(value):
                raise InvalidInputError(f"{name}= has a line end or another control character in it: take it away")
        if endpoint := self._options.get("endpoint_url"):
            check_endpoint(endpoint)
        self._client: Client | None = None
        self._place_seen = False

    @property
    def url(self) -> str:
        """``<scheme>://<container>/<prefix>``; where the endpoint is, and who asks, are not part of it."""
        return f"{self._scheme}://{self._container}" + (f"/{self._prefix}" if self._prefix else "")

    def get(self, key: str, *, limit: int | None = None) -> Buffer:
        """The whole object, not copied without a limit. Raises `NotFoundError`, `AccessDeniedError`, `StorageError`.

        Above ``limit`` it raises `CorruptionError`: by the reply's header, and by what comes, whatever that said.
        """
        import obstore

        with self._asking("read", check_key(key)) as client:
            found = obstore.get(client, key)
            if limit is None:
                return memoryview(found.bytes())
            check_size(key, found.meta["size"], limit)
            data = bytearray()
            for piece in found.stream():
                check_size(key, len(data) + len(piece), limit)
                data += piece
            return data

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """The bytes of each range; those within 16 KiB of each other share a request.

        Raises as `get`, and `CorruptionError` beyond the end.
        """
        import obstore

        check_ranges(ranges)
        check_key(key)
        wanted = [(offset, length) for offset, length in ranges if length]
        if not wanted:
            return [b"" for _ in ranges]
        with self._asking("read", key) as client:
            found = obstore.get_ranges(
                client,
                key,
                starts=[offset for offset, _ in wanted],
                lengths=[length for _, length in wanted],
                coalesce=_GAP,
            )
        for (offset, length), piece in zip(wanted, found, strict=True):
            if len(piece) != length:
                raise CorruptionError(f"{self.url}/{key} ends before byte {offset + length}", key=key)
        pieces = iter(found)
        return [memoryview(next(pieces)) if length else b"" for _, length in ranges]

    def head(self, key: str) -> ObjectInfo:
        """Size and time. Raises as `get`."""
        import obstore

        try:
            with self._asking("look for", check_key(key)) as client:
                meta = obstore.head(client, key)
        except NotFoundError:
            self._check_place()
            raise
        return ObjectInfo(key, meta["size"], meta["last_modified"])

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects under ``prefix`` in byte order; one request per 1,000. Raises `AccessDeniedError`, `StorageError`."""
        import obstore

        folder = check_prefix(prefix).rpartition("/")[0]
        # obstore lists whole folders. Starting a character before the prefix's end skips most of what lies in front.
        offset = max(start_after.rstrip("/"), prefix.rstrip("/")[:-1])
        with self._asking("list", prefix) as client:
            pages = obstore.list(client, folder or None, offset=offset or None, chunk_size=_PAGE)
        last = ""
        while True:
            with self._asking("list", prefix):
                page = next(pages, None)
            if page is None:
                return
            for meta in page:
                key = meta["path"]
                if key <= last:
                    raise StorageError(f"{self.url} lists {key!r} after {last!r}: mandapa needs lists in byte order")
                last = key
                if key.startswith(prefix):
                    if key > start_after:
                        yield ObjectInfo(key, meta["size"], meta["last_modified"])
                elif key > prefix:
                    return

    def put(self, key: str, data: Buffer) -> None:
        """Store ``data`` in one request. Raises `AccessDeniedError`, `StorageError`."""
        import obstore

        with self._asking("write", check_key(key)) as client:
            obstore.put(client, key, memoryview(data), use_multipart=False)

    def create(self, key: str, data: Buffer) -> None:
        """Store ``data`` in one request unless the key is taken. Raises as `put`, and `AlreadyExistsError`."""
        import obstore

        with self._asking("create", check_key(key)) as client:
            obstore.put(client, key, memoryview(data), mode="create", use_multipart=False)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; many in one request where the service can. Raises `AccessDeniedError`, `StorageError`."""
        import obstore

        waiting = [check_key(key) for key in keys]
        for batch in (waiting[i : i + self._batch] for i in range(0, len(waiting), self._batch)):
            try:
                with self._asking("delete", batch[0]) as client:
                    obstore.delete(client, batch)
            except NotFoundError:
                # GCS and Azure call a missing key an error, which hides what became of the others.
                for key in batch:
                    with suppress(NotFoundError), self._asking("delete", key) as client:
                        obstore.delete(client, key)

    def describe(self, url: str) -> tuple[int, str] | None:
        """Size and ``etag:...`` of any object of this service, asked for with this store's credentials.

        None when the URL is another service's, or the object cannot be seen. One request; nothing is fetched.
        """
        import obstore

        place, _, key = url.removeprefix(f"{self._scheme}://").partition("/")
        if not url.startswith(f"{self._scheme}://") or not place or not key:
            return None
        try:
            other = type(self)(place, "", **self._options)
            with other._asking("look for", key) as client:  # noqa: SLF001 - a sibling
                meta = obstore.head(client, key)
        except MandapaError:
            return None
        tag = (meta["e_tag"] or "").strip('"')
        return meta["size"], f"etag:{tag}" if tag else ""

    def __repr__(self) -> str:
        endpoint = self._options.get("endpoint_url")
        return f"{type(self).__name__}({self.url!r}" + (f", endpoint_url={endpoint!r})" if endpoint else ")")

    def __reduce__(self) -> tuple[partial[CloudObjectStore], tuple[()]]:
        return partial(type(self), self._container, self._prefix, **self._options), ()

    def _connect(self) -> Client:
        raise NotImplementedError

    @contextmanager
    def _asking(self, doing: str, key: str) -> Iterator[Client]:
        """A client that works in this process; obstore's errors become ours."""
        from obstore.exceptions import BaseError

        _claim_process(self.url)
        try:
            if self._client is None:
                self._client = self._configured()
            yield self._client
        except MandapaError:
            raise
        except (BaseError, OSError) as error:
            raise translate(
                error, doing=doing, key=key, url=self.url, place=self._place, permissions=self._permissions
            ) from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            # The client gave itself up, as it does over a line end in a secret of the environment.
            raise InvalidInputError(
                f"cannot {doing} {key!r} in {self.url}: the client cannot use its credentials or endpoint as they are: "
                "look for line ends and blanks in them"
            ) from None
        self._place_seen = True

    def _configured(self) -> Client:
        try:
            return self._connect()
        except MandapaError:
            raise
        except Exception as error:  # noqa: BLE001 - nothing was asked of a server yet: whatever it is, the options are wrong
            reason = str(error).partition("\n")[0]
            raise InvalidInputError(f"{self.url} cannot be opened with these options: {reason}") from None

    def _check_place(self) -> None:
        """A HEAD of a missing key and one in a missing bucket get the same bare 404: ask once which it was."""
        if not self._place_seen:
            with suppress(AccessDeniedError):  # to list, which the caller did not ask for
                next(self.list(""), None)
            self._place_seen = True

    def _client_options(self, endpoint: str | None) -> ClientConfig:
        defaults: ClientConfig = {
            "connect_timeout": timedelta(seconds=5),
            # For the whole request: obstore's 30 s would cut off a 32 MiB pack on any link below 1 MB/s.
            "timeout": timedelta(seconds=300),
            "allow_http": (endpoint or "").startswith("http://"),
        }
        given: ClientConfig = self._options.get("client_options", {})
        return {**defaults, **given}

    def _retry_config(self) -> RetryConfig:
        # Few and short: they smooth over a dropped connection. Patience is RetryingObjectStore's business.
        return {
            "max_retries": 2,
            "retry_timeout": timedelta(seconds=60),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2},
        }


_process: list[int] = []


def _claim_process(url: str) -> None:
    """The threads behind all clients belong to the process that first used one; a fork does not take them along."""
    pid = os.getpid()
    if not _process:
        _process.append(pid)
    if _process[0] != pid:
        raise ClosedError(
            f"{url} cannot be used in this process: it was forked from one that had used an object store client, and "
            "clients do not survive that. Start processes by 'spawn' or 'forkserver', or use stores only in the child"
        )


def check_endpoint(url: str) -> None:
    """Refuse what is no endpoint, or carries a secret, which messages would repeat.

    Raises:
        InvalidInputError: Says what is wrong, without repeating it.
    """
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and not _NOT_SHOWN.search(parts.netloc)
    except ValueError:
        fine = False
    if not fine or parts.query or parts.fragment or _BLANK.search(url):
        raise InvalidInputError(
            "endpoint_url= is http://host:port or https://host, with a path if need be: credentials have keywords of "
            "their own, and queries no place there"
        )


def require_metadata_service(url: str, advice: str) -> None:
    """Nothing, on a cloud's machine, where this service answers; elsewhere obstore would go on asking it for minutes.

    Raises:
        AccessDeniedError: it does not answer within two seconds; ``advice`` says what to do instead.
    """
    try:
        socket.create_connection(_METADATA_SERVICE, timeout=_METADATA_PATIENCE).close()
    except OSError:
        raise AccessDeniedError(f"no credentials for {url} on this machine: {advice}") from None


def environ(*names: str) -> str | None:
    """The first of these environment variables that is set and not empty."""
    return next(filter(None, map(os.environ.get, names)), None)
