"""A fast server in memory that speaks the parts of S3 and of GCS's XML API that an object store needs.

::

    python -m mandapa.testing.server --port 0 --latency 0.02        # prints http://127.0.0.1:PORT, and nothing else

It listens on 127.0.0.1 only, checks no signatures, and every bucket exists, but for those whose name starts with
``missing`` (404) or ``forbidden`` (403). Knobs make it slow, flaky or broken in the ways of real servers.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from email.utils import formatdate
from typing import Literal, TypeAlias, get_args
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

from mandapa.object_store import GCSObjectStore, S3ObjectStore

__all__ = ["Condition", "Knobs", "Server", "serve"]

Condition: TypeAlias = Literal["right", "ignored", "inverted", "check-then-put", "always-409"]
"""What becomes of ``If-None-Match: *`` and of generation 0; all but ``right`` are what broken servers do."""

_CHECK_THEN_PUT = 0.02  # seconds between the check and the put of a server that does not do them together
_REASONS = {200: "OK", 204: "No Content", 206: "Partial Content", 403: "Forbidden", 404: "Not Found", 409: "Conflict"}
_REASONS |= {412: "Precondition Failed", 416: "Range Not Satisfiable", 501: "Not Implemented", 503: "Slow Down"}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_DELETED_KEY = re.compile(rb"<Key>(.*?)</Key>")


@dataclass(frozen=True, slots=True)
class Knobs:
    """How the server misbehaves."""

    latency: float = 0.0
    """Seconds before each reply."""
    bandwidth: float = 0.0
    """Bytes a second, each way, shared by all connections; 0: no limit."""
    conflict_rate: float = 0.0
    """Part of the conditional puts that are answered 409 though nothing is there."""
    error_rate: float = 0.0
    """Part of the requests that are answered 503; every other of these was done."""
    condition: Condition = "right"
    seed: int = 0


class Server:
    """A running server: its address, and object stores that talk to it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def s3(self, bucket: str = "bucket", prefix: str = "") -> S3ObjectStore:
        """A new S3 client of one bucket."""
        return S3ObjectStore(
            bucket, prefix, endpoint_url=self.url, region="us-east-1", access_key_id="test", secret_access_key="test"
        )

    def gcs(self, bucket: str = "bucket", prefix: str = "") -> GCSObjectStore:
        """A new GCS client of one bucket."""
        return GCSObjectStore(bucket, prefix, endpoint_url=self.url, anonymous=True)


@contextmanager
def serve(knobs: Knobs | None = None) -> Iterator[Server]:
    """A server in a process of its own, that ends with the block or with this process, whichever ends first.

    Example:
        >>> with serve(Knobs(latency=0.001)) as server:
        ...     server.s3().create("log/0", b"first")
    """
    knobs = knobs or Knobs()
    options = [f"--{field.name.replace('_', '-')}={getattr(knobs, field.name)}" for field in fields(knobs)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mandapa.testing.server", "--end-with-stdin", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin, process.stdout:
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError(f"the test server ended with exit code {process.wait()} instead of printing its URL")
            yield Server(url)
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes | bytearray
    generation: int
    at: float


class _Bucket:
    def __init__(self) -> None:
        self.objects: dict[str, _Object] = {}
        self.keys: list[str] = []  # sorted

    def put(self, key: str, obj: _Object) -> None:
        if key not in self.objects:
            insort(self.keys, key)
        self.objects[key] = obj

    def delete(self, key: str) -> None:
        if self.objects.pop(key, None):
            del self.keys[bisect_left(self.keys, key)]


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes | bytearray


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    body: bytes | bytearray | memoryview = b""
    headers: tuple[str, ...] = ()


class _Link:
    """Lets ``bandwidth`` bytes a second through, whoever sends them."""

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._lock = threading.Lock()
        self._free_at = 0.0

    def carry(self, size: int) -> None:
        if self._bandwidth:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + size / self._bandwidth
                free_at = self._free_at
            time.sleep(max(0.0, free_at - time.monotonic()))


class _Service:
    """The stored objects and what each request does to them."""

    def __init__(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self.up = _Link(knobs.bandwidth)
        self.down = _Link(knobs.bandwidth)
        self._random = random.Random(knobs.seed)
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}
        self._generation = 0
        self._errors = 0

    def answer(self, request: _Request) -> _Reply:
        self.up.carry(len(request.body))
        if self.knobs.latency:
            time.sleep(self.knobs.latency)
        if self._random.random() < self.knobs.error_rate:
            self._errors += 1
            if self._errors % 2:
                self._perform(request)
            return _error(503, "SlowDown")
        reply = self._perform(request)
        self.down.carry(len(reply.body))
        return reply

    def _perform(self, request: _Request) -> _Reply:
        if request.bucket.startswith("missing"):
            return _error(404, "NoSuchBucket")
        if request.bucket.startswith("forbidden"):
            return _error(403, "AccessDenied")
        match request.method:
            case "PUT" if request.key and not request.query:
                return self._put(request)
            case "GET" | "HEAD" if request.key:
                return self._get(request)
            case "GET":
                return self._list(request)
            case "DELETE" if request.key:
                with self._lock:
                    self._bucket(request).delete(request.key)
                return _Reply(204)
            case "POST" if "delete" in request.query:
                keys = _DELETED_KEY.findall(request.body)
                with self._lock:
                    for key in keys:
                        self._bucket(request).delete(unescape(key.decode()))
                deleted = b"".join(b"<Deleted><Key>%s</Key></Deleted>" % key for key in keys)
                return _Reply(200, b"<DeleteResult>%s</DeleteResult>" % deleted)
        return _error(501, "NotImplemented")

    def _bucket(self, request: _Request) -> _Bucket:
        return self._buckets.setdefault(request.bucket, _Bucket())

    def _put(self, request: _Request) -> _Reply:
        only_new = (
            request.headers.get("if-none-match") == "*" or request.headers.get("x-goog-if-generation-match") == "0"
        )
        condition = self.knobs.condition if only_new else "ignored"
        if condition == "always-409" or (only_new and self._random.random() < self.knobs.conflict_rate):
            return _error(409, "ConditionalRequestConflict")
        if condition == "check-then-put":
            taken = request.key in self._bucket(request).objects
            time.sleep(_CHECK_THEN_PUT)
            if taken:
                return _error(412, "PreconditionFailed")
        with self._lock:
            bucket = self._bucket(request)
            taken = request.key in bucket.objects
            if (condition == "right" and taken) or (condition == "inverted" and not taken):
                return _error(412, "PreconditionFailed")
            self._generation += 1
            generation = self._generation
            bucket.put(request.key, _Object(request.body, generation, time.time()))
        return _Reply(200, headers=(f'ETag: "{generation:032x}"', f"x-goog-generation: {generation}"))

    def _get(self, request: _Request) -> _Reply:
        obj = self._bucket(request).objects.get(request.key)
        if obj is None:
            return _error(404, "NoSuchKey")
        headers: tuple[str, ...] = (
            f'ETag: "{obj.generation:032x}"',
            f"x-goog-generation: {obj.generation}",
            f"Last-Modified: {formatdate(obj.at, usegmt=True)}",
            "Accept-Ranges: bytes",
        )
        size = len(obj.data)
        asked = _RANGE.fullmatch(request.headers.get("range", ""))
        if asked is None:
            return _Reply(200, obj.data, headers)
        first, last = asked.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if start >= end:
            return _error(416, "InvalidRange")
        headers = (*headers, f"Content-Range: bytes {start}-{end - 1}/{size}")
        return _Reply(206, memoryview(obj.data)[start:end], headers)

    def _list(self, request: _Request) -> _Reply:
        query = request.query
        if "delimiter" in query:
            return _error(501, "NotImplemented")
        prefix = query.get("prefix", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        most = int(query.get("max-keys", "1000"))
        with self._lock:
            bucket = self._bucket(request)
            begin = max(bisect_left(bucket.keys, prefix), bisect_right(bucket.keys, after) if after else 0)
            found = bucket.keys[begin : begin + most + 1]
            objects = [(key, bucket.objects[key]) for key in found if key.startswith(prefix)]
        more = len(objects) > most
        objects = objects[:most]
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_iso(obj.at)}</LastModified>"
            f'<ETag>"{obj.generation:032x}"</ETag><Size>{len(obj.data)}</Size></Contents>'
            for key, obj in objects
        )
        token = f"<NextContinuationToken>{escape(objects[-1][0])}</NextContinuationToken>" if more else ""
        return _Reply(
            200,
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>{escape(request.bucket)}</Name>'
            f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(objects)}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{rows}</ListBucketResult>".encode(),
        )


class _Connection:
    """One client's socket, served by one thread: blocking calls move large bodies without copies or the GIL."""

    def __init__(self, connection: socket.socket, service: _Service) -> None:
        self._socket = connection
        self._service = service
        self._ahead = b""  # received beyond the current request

    def run(self) -> None:
        with self._socket:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                while request := self._receive():
                    self._send(request, self._service.answer(request))
            except OSError:
                return  # the client went away

    def _receive(self) -> _Request | None:
        while (end := self._ahead.find(b"\r\n\r\n")) < 0:
            data = self._socket.recv(65_536)
            if not data:
                return None
            self._ahead += data
        head, self._ahead = self._ahead[:end].decode("latin-1"), self._ahead[end + 4 :]
        line, *lines = head.split("\r\n")
        method, target, _ = line.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("expect", "").lower() == "100-continue":
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self._receive_body(int(headers.get("content-length", "0")))
        url = urlsplit(target)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        return _Request(method, bucket, key, query, headers, body)

    def _receive_body(self, size: int) -> bytes | bytearray:
        if size <= len(self._ahead):
            body, self._ahead = self._ahead[:size], self._ahead[size:]
            return body
        buffer = bytearray(size)
        view = memoryview(buffer)
        done = len(self._ahead)
        view[:done] = self._ahead
        self._ahead = b""
        while done < size:
            received = self._socket.recv_into(view[done:], 0, socket.MSG_WAITALL)
            if not received:
                raise ConnectionResetError
            done += received
        return buffer

    def _send(self, request: _Request, reply: _Reply) -> None:
        head = "\r\n".join(
            (
                f"HTTP/1.1 {reply.status} {_REASONS[reply.status]}",
                f"Content-Length: {len(reply.body)}",
                *reply.headers,
                "\r\n",
            )
        ).encode("latin-1")
        body = b"" if request.method == "HEAD" else reply.body
        sent = self._socket.sendmsg([head, body]) - len(head)
        if sent < 0:
            self._socket.sendall(head[sent:])
        if sent < len(body):
            self._socket.sendall(memoryview(body)[max(0, sent) :])


def _error(status: int, code: str) -> _Reply:
    return _Reply(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())


def _iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03}Z"


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Serve until killed; the only line on stdout is the URL."""
    parser = argparse.ArgumentParser(prog="python -m mandapa.testing.server", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each reply")
    parser.add_argument("--bandwidth", type=float, default=0.0, help="bytes a second each way; 0: no limit")
    parser.add_argument("--conflict-rate", type=float, default=0.0, help="part of conditional puts answered 409")
    parser.add_argument("--error-rate", type=float, default=0.0, help="part of requests answered 503")
    parser.add_argument("--condition", choices=get_args(Condition), default="right", help="how create-if-absent works")
    parser.add_argument("--seed", type=int, default=0, help="of the random faults")
    parser.add_argument("--end-with-stdin", action="store_true", help="end when stdin closes")
    options = vars(parser.parse_args())
    port = options.pop("port")
    if options.pop("end_with_stdin"):
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    service = _Service(Knobs(**options))
    with socket.create_server(("127.0.0.1", port), backlog=1024) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)  # noqa: T201 - this line is the interface
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_Connection(connection, service).run, daemon=True).start()


if __name__ == "__main__":
    main()
