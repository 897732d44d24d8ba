"""A Weights & Biases server in memory, as little of one as the real SDK and its wandb-core need to log a run.

No W&B server may be carried along with the tests, so this one is ours; what talks to it is real. It answers the GraphQL
operations that SDK 0.31 sends for runs, resuming, artifacts and `wandb sync`, by their names and with all the fields
that any of them asks for; an operation that it does not know is an error that names it. Of the server's own rules it
keeps those that a client notices: versions are numbered when they are committed, content that a collection already
holds makes no new version, files whose MD5 is known are not asked for, an upload must have the MD5 announced for it,
and history is put where the client says it belongs, so that what is sent twice is there once.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

__all__ = ["API_KEY", "ENTITY", "Run", "Version", "WandbServer", "wandb_server"]

API_KEY = "0123456789abcdef" * 2 + "01234567"
ENTITY = "team"
_TIME = "2026-01-01T00:00:00Z"
_OPERATION = re.compile(r"\b(?:query|mutation)\s+(\w+)")


@dataclass
class Run:
    """A run as it was logged; `lines` holds the files of the stream, `files` what was uploaded for it."""

    project: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    display_name: str = ""
    state: str = "running"
    exit_code: int | None = None
    lines: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    attempts: int = 0  # how often a process began or resumed it

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of `run.log`, in their order."""
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    @property
    def summary(self) -> dict[str, Any]:
        """The last value of everything."""
        return json.loads((self.lines.get("wandb-summary.json") or ["{}"])[-1])


@dataclass
class Version:
    """An artifact version; `index` is its place in the collection from the moment that it is committed."""

    id: str
    project: str
    name: str
    type: str
    digest: str
    run: str
    description: str | None
    metadata: dict[str, Any]
    aliases: set[str]
    index: int | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def contents(self) -> dict[str, dict[str, Any]]:
        """The entries of the manifest by their paths."""
        return self.manifest["contents"]


class _Refused(Exception):
    """An answer that is none: its status and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class WandbServer:
    """What a test sees of the server; `wandb_server` starts one.

    Attributes:
        url: What `WANDB_BASE_URL` has to be; it stays the same after `down` and `up`.
        runs: By ``project/id``.
        artifacts: Versions that were committed, oldest first, by ``project/name``.
        events: Everything asked of the server, in order: names of GraphQL operations, ``file_stream``, ``PUT file``,
            ``PUT manifest``, ``PUT run-file``, ``GET file``, ``GET manifest``.
        uploads: Paths of the artifact files that were uploaded, in order.
        before: Called with nothing when an event of this name begins, before it has any effect; the server may be
            brought down there, and the client gets no answer then.
        refuse: A status, as 401 or 403, which everything is answered with while it is set.
        hang: While clear, nothing is answered.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, list[Version]] = {}
        self.events: list[str] = []
        self.uploads: list[str] = []
        self.before: dict[str, Callable[[], object]] = {}
        self.refuse = 0
        self.hang = threading.Event()
        self.hang.set()
        self._lock = threading.RLock()
        self._versions: dict[str, Version] = {}
        self._blobs: dict[str, bytes] = {}
        self._failing: list[tuple[str | None, int]] = []
        self._http: ThreadingHTTPServer | None = None
        self._port = 0
        self.up()
        self.url = f"http://127.0.0.1:{self._port}"

    def env(self) -> dict[str, str]:
        """Environment variables that lead wandb here; none of its folders are among them."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": API_KEY,
            "WANDB_ERROR_REPORTING": "false",
        }

    def fail_next(self, count: int, *, event: str | None = None, status: int = 500) -> None:
        """The next so many events, of that name if one is given, are answered with this status."""
        with self._lock:
            self._failing += [(event, status)] * count

    def up(self) -> None:
        """Listens, on the same port as ever; what was logged is still there."""
        if self._http is None:
            self._http = _Listener(("127.0.0.1", self._port), self)
            self._port = self._http.server_port
            threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Connections are refused, and those that are open end without an answer."""
        http, self._http = self._http, None
        if http is not None:
            http.shutdown()
            http.server_close()

    def read(self, version: Version, path: str) -> bytes:
        """The bytes of a file of a version."""
        return self._blobs[base64.b64decode(version.contents[path]["digest"]).hex()]

    # What follows is called by the threads of requests.

    def answer(self, event: str, act: Callable[[], Any]) -> Any:
        """The event's effect, at most one at a time, unless the test wants something else to happen."""
        self.events.append(event)
        if hook := self.before.get(event):
            hook()
        self.hang.wait()
        if self.refuse:
            raise _Refused(self.refuse, "the server refuses this key")
        with self._lock:
            for failing in self._failing:
                if failing[0] in (None, event):
                    self._failing.remove(failing)
                    raise _Refused(failing[1], "the server fails because it was told to")
            if self._http is None:
                raise ConnectionAbortedError
            try:
                return act()
            except (KeyError, TypeError, ValueError) as error:  # clients do not try again after this answer
                raise _Refused(400, f"this server cannot answer {event}: {error!r}") from error

    def graphql(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        operation = getattr(self, f"_{name}", None)
        if operation is None:
            raise _Refused(400, f"this server does not know the operation {name}")
        return operation(variables)

    def stream(self, project: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[f"{project}/{name}"]
        for file, chunk in body.get("files", {}).items():
            lines, offset = run.lines.setdefault(file, []), chunk["offset"]
            lines += [""] * (offset - len(lines))
            lines[offset : offset + len(chunk["content"])] = chunk["content"]
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
            run.state = "failed" if run.exit_code else "finished"
        return {"exitcode": None, "limits": {}, "stopped": False}

    def put(self, kind: str, key: str, path: str, body: bytes) -> None:
        if kind == "file":
            if hashlib.md5(body).hexdigest() != key:
                raise _Refused(400, "BadDigest: these are not the bytes announced")
            self._blobs[key] = body
            self.uploads.append(path)
        elif kind == "manifest":
            self._versions[key].manifest = json.loads(body)
        else:
            self.runs[key].files[path] = body

    def get(self, kind: str, key: str) -> bytes:
        if kind == "manifest":
            return json.dumps(self._versions[key].manifest).encode()
        return self._blobs[key]

    def _link(self, kind: str, key: str, path: str = "") -> str:
        return f"{self.url}/storage/{kind}?key={quote(key, safe='')}&path={quote(path, safe='')}"

    # The operations, each under the name that clients give it.

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        known = {"id": "User:1", "name": ENTITY, "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
        empty = {"admin": False, "deletedAt": None, "apiKeys": {"edges": []}, "teams": {"edges": []}}
        return {"viewer": known | empty}

    _GetViewer = _GetDefaultEntity = _Viewer

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _XXHashDigestsEnabled(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _FetchArtifactDigestAlgorithm(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def _OrgFeatureFlags(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"organization": None}

    def _OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": None}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(f"{variables['project']}/{variables['name']}")
        return {"model": {**_project(variables["project"]), "bucket": None if run is None else _bucket(run)}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        key = f"{variables['project']}/{variables['name']}"
        inserted = key not in self.runs
        run = self.runs.setdefault(key, Run(variables["project"], variables["name"]))
        if variables.get("host"):  # only the first one of a process says where it runs
            run.attempts += 1
            run.state, run.exit_code = "running", None
        run.display_name = variables.get("displayName") or run.display_name or run.name
        run.tags = variables.get("tags") or run.tags
        if variables.get("config"):
            run.config = {key: item["value"] for key, item in json.loads(variables["config"]).items()}
        return {"upsertBucket": {"bucket": _bucket(run), "inserted": inserted}}

    def _RunState(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(f"{variables['project']}/{variables['name']}")
        return {"project": {"run": None if run is None else _bucket(run)}}

    _Run = _RunState

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        key = f"{variables['project']}/{variables['run']}"
        files = [{"name": name, "uploadUrl": self._link("run-file", key, name)} for name in variables["files"]]
        return {"createRunFiles": {"runID": key, "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        versions = self.artifacts.get(f"{variables['project']}/{variables['name'].partition(':')[0]}")
        artifact = {"artifactType": {"name": versions[0].type}} if versions else None
        return {"project": {"artifact": artifact}}

    def _CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        new = variables["input"]
        project, name, digest = new["projectName"], new["artifactCollectionName"], new["digest"]
        versions = self.artifacts.setdefault(f"{project}/{name}", [])
        aliases = {alias["alias"] for alias in new.get("aliases") or []}
        version = next((version for version in versions if version.digest == digest), None)
        if version is None:
            metadata = json.loads(new.get("metadata") or "{}")
            about = (new["artifactTypeName"], digest, new.get("runName"), new.get("description"), metadata, aliases)
            version = Version(_id("Artifact", len(self._versions) + 1), project, name, *about)
            self._versions[version.id] = version
        else:
            _name(version, aliases, versions)
        latest = {"id": versions[-1].id} if versions else None
        state = "PENDING" if version.index is None else "COMMITTED"
        sequence = {"latestArtifact": latest}
        return {"createArtifact": {"artifact": {"id": version.id, "state": state, "artifactSequence": sequence}}}

    def _CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = variables["artifactID"]
        file = {"id": artifact, "uploadUrl": self._link("manifest", artifact), "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": artifact, "file": file}}}

    def _CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for spec in variables["input"]["artifactFiles"]:
            key = base64.b64decode(spec["md5"]).hex()
            node = {"storagePath": key, "uploadUrl": None, "uploadHeaders": [], "uploadMultipartUrls": None}
            if key not in self._blobs:
                node["uploadUrl"] = self._link("file", key, spec["name"])
                node["uploadHeaders"] = [f"Content-MD5:{spec['md5']}"]
            edges.append({"node": node | {"artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        version = self._versions[variables["artifactID"]]
        if not version.manifest:
            raise _Refused(400, "the manifest is not there")
        versions = self.artifacts[f"{version.project}/{version.name}"]
        if version.index is None:
            version.index = len(versions)
            versions.append(version)
            _name(version, version.aliases | {"latest"}, versions)
        return {"commitArtifact": {"artifact": {"id": version.id, "digest": version.digest}}}

    def _ArtifactByID(self, variables: dict[str, Any]) -> dict[str, Any]:
        version = self._versions.get(variables["id"])
        return {"artifact": None if version is None else _artifact(version)}

    def _FetchArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"artifact": {"currentManifest": {"file": {"directUrl": self._link("manifest", variables["id"])}}}}

    def _ArtifactMembershipByName(self, variables: dict[str, Any]) -> dict[str, Any]:
        name, _, alias = variables["name"].partition(":")
        version = self._find(variables["project"], name, alias)
        return {"project": {"artifactCollectionMembership": None if version is None else _membership(version)}}

    def _GetArtifactMembershipFileUrls(self, variables: dict[str, Any]) -> dict[str, Any]:
        version = self._find(variables["project"], variables["collection"], variables["alias"])
        nodes = []
        for path, entry in version.contents.items() if version else ():
            if "ref" not in entry:
                url = self._link("file", base64.b64decode(entry["digest"]).hex(), path)
                nodes.append({"__typename": "File", "name": path, "directUrl": url})
        membership = {"files": _page(nodes)}
        return {"project": {"artifactCollection": _collection("", "") | {"artifactMembership": membership}}}

    def _RunOutputArtifacts(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = (variables["project"], variables["run"])
        versions = [version for versions in self.artifacts.values() for version in versions]
        nodes = [_artifact(version) for version in versions if (version.project, version.run) == run]
        return {"project": {"run": {"artifacts": _page(nodes)}}}

    def _find(self, project: str, name: str, alias: str) -> Version | None:
        versions = self.artifacts.get(f"{project}/{name}", [])
        return next((version for version in versions if alias in {*version.aliases, f"v{version.index}"}), None)


def _id(kind: str, number: int) -> str:
    return base64.b64encode(f"{kind}:{number}".encode()).decode()


def _name(version: Version, aliases: set[str], versions: list[Version]) -> None:
    for other in versions:
        other.aliases -= aliases
    version.aliases |= aliases


def _project(name: str) -> dict[str, Any]:
    return {"id": "UHJvamVjdDox", "internalId": "1", "name": name, "entity": {"id": "RW50aXR5OjE=", "name": ENTITY}}


def _bucket(run: Run) -> dict[str, Any]:
    count = {key: len(run.lines.get(file, [])) for key, file in _STREAM.items()}
    events = run.lines.get("wandb-events.jsonl", [])[-1:]
    named = {"id": run.name, "name": run.name, "displayName": run.display_name, "tags": run.tags, "state": run.state}
    return {
        **named,
        **count,
        **dict.fromkeys(("description", "sweepName", "notes", "group", "jobType", "commit", "systemMetrics")),
        "projectId": "1",
        "readOnly": False,
        "createdAt": _TIME,
        "heartbeatAt": _TIME,
        "historyKeys": None,
        "user": {"name": ENTITY, "username": ENTITY},
        "project": _project(run.project),
        "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
        "wandbConfig": json.dumps({key: run.config["_wandb"][key] for key in ["t"] if "_wandb" in run.config}),
        "summaryMetrics": json.dumps(run.summary),
        "historyTail": json.dumps(run.lines.get("wandb-history.jsonl", [])[-1:]),
        "eventsTail": json.dumps(events),
    }


_STREAM = {
    "historyLineCount": "wandb-history.jsonl",
    "eventsLineCount": "wandb-events.jsonl",
    "logLineCount": "output.log",
}


def _collection(project: str, name: str) -> dict[str, Any]:
    return {"__typename": "ArtifactSequence", "name": name, "project": _project(project)}


def _artifact(version: Version) -> dict[str, Any]:
    collection = _collection(version.project, version.name)
    entries = version.manifest.get("contents", {}).values()
    aliases = [{"__typename": "ArtifactAlias", "id": alias, "alias": alias} for alias in sorted(version.aliases)]
    return {
        "__typename": "Artifact",
        "id": version.id,
        "artifactSequence": collection,
        "versionIndex": version.index,
        "artifactType": {"name": version.type},
        "description": version.description,
        "metadata": json.dumps(version.metadata),
        "ttlDurationSeconds": -2,
        "ttlIsInherited": True,
        "tags": [],
        "historyStep": None,
        "state": "PENDING" if version.index is None else "COMMITTED",
        "size": sum(entry.get("size", 0) for entry in entries),
        "digest": version.digest,
        "commitHash": None,
        "fileCount": len(entries),
        "createdAt": _TIME,
        "updatedAt": _TIME,
        "aliases": [alias | {"artifactCollection": collection} for alias in aliases],
    }


def _membership(version: Version) -> dict[str, Any]:
    artifact = _artifact(version)
    shared = {"versionIndex": version.index, "createdAt": _TIME, "aliases": artifact["aliases"], "artifact": artifact}
    collection = _collection(version.project, version.name)
    return {"__typename": "ArtifactCollectionMembership", "id": version.id, "artifactCollection": collection} | shared


def _page(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    info = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
    return {"totalCount": len(nodes), "pageInfo": info, "edges": [{"node": node, "cursor": ""} for node in nodes]}


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], server: WandbServer) -> None:
        super().__init__(address, _Handler)
        self.wandb = server

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error of the server; anything else is shown."""
        import sys

        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Listener

    def _handle(self) -> None:
        wandb = self.server.wandb
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        try:
            status, answer = 200, self._answer(wandb, body)
        except _Refused as error:
            status, answer = error.status, {"errors": [{"message": str(error)}], "data": None}
        except ConnectionAbortedError:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _answer(self, wandb: WandbServer, body: bytes) -> Any:
        url = urlsplit(self.path)
        parts = url.path.strip("/").split("/")
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == "/graphql":
            if self.headers.get("Authorization") != "Basic " + base64.b64encode(f"api:{API_KEY}".encode()).decode():
                raise _Refused(401, "user is not logged in")
            request = json.loads(body)
            match = _OPERATION.search(request["query"])
            name = request.get("operationName") or (match[1] if match else "")
            variables = request.get("variables") or {}
            return wandb.answer(name, lambda: {"data": wandb.graphql(name, variables)})
        if parts[0] == "files" and parts[-1] == "file_stream":
            return wandb.answer("file_stream", lambda: wandb.stream(parts[2], parts[3], json.loads(body)))
        if parts[0] == "storage":
            kind = parts[1]
            if self.command == "PUT":
                put = (kind, query["key"], query.get("path", ""), body)
                return wandb.answer(f"PUT {kind}", lambda: wandb.put(*put)) or b""
            return wandb.answer(f"GET {kind}", lambda: wandb.get(kind, query["key"]))
        if parts[0] == "artifactsV2":
            return wandb.answer("GET file", lambda: wandb.get("file", parts[-2]))
        raise _Refused(404, "there is nothing here")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Says nothing: what is asked is in the events."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server on a free port of this machine, which ends with the block."""
    server = WandbServer()
    try:
        yield server
    finally:
        server.hang.set()
        server.down()
