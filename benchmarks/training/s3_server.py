"""The test server, which also takes uploads in parts: that is how boto3 sends a large file."""

from __future__ import annotations

from itertools import count
from xml.sax.saxutils import escape

from mandapa.testing import server


class Service(server._Service):
    """Puts parts together when the object is first read: elsewhere that takes nothing from whoever uploads."""

    def __init__(self, knobs: server.Knobs) -> None:
        super().__init__(knobs)
        self._uploads = count()
        self._parts: dict[str, dict[int, bytes | bytearray]] = {}
        self._sent: dict[tuple[str, str], dict[int, bytes | bytearray]] = {}

    def _perform(self, request: server._Request) -> server._Reply:
        name, query = (request.bucket, request.key), request.query
        match request.method:
            case "POST" if "uploads" in query:
                upload = str(next(self._uploads))
                self._parts[upload] = {}
                return _reply("InitiateMultipartUploadResult", request, f"<UploadId>{upload}</UploadId>")
            case "PUT" if "uploadId" in query:
                self._parts[query["uploadId"]][int(query["partNumber"])] = request.body
                return server._Reply(200, headers=('ETag: "part"',))
            case "POST" if "uploadId" in query:
                self._sent[name] = self._parts.pop(query["uploadId"])
                return _reply("CompleteMultipartUploadResult", request, "<ETag>whole</ETag>")
        parts = self._sent.pop(name, {})
        if parts and request.method in ("GET", "HEAD"):
            whole = b"".join(parts[number] for number in sorted(parts))
            super()._perform(server._Request("PUT", *name, {}, {}, whole))
        return super()._perform(request)


def _reply(kind: str, request: server._Request, more: str) -> server._Reply:
    names = f"<Bucket>{escape(request.bucket)}</Bucket><Key>{escape(request.key)}</Key>"
    return server._Reply(200, f"<{kind}>{names}{more}</{kind}>".encode())


if __name__ == "__main__":
    server._Service = Service
    server.main()
