"""From a URL to an object store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from mandapa.errors import InvalidInputError
from mandapa.object_store.azure import AzureObjectStore
from mandapa.object_store.base import ObjectStore
from mandapa.object_store.gcs import GCSObjectStore
from mandapa.object_store.local import LocalObjectStore
from mandapa.object_store.memory import MemoryObjectStore
from mandapa.object_store.s3 import S3ObjectStore

__all__ = ["from_url"]

_KNOWN = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///path, memory://name, or a path"
_HINTS = {
    "gcs": "write gs://",
    "azure": "write az://",
    "abfs": "write az://",
    "abfss": "write az://",
    "wasb": "write az://",
    "http": "pass it as endpoint_url= and write s3://bucket/prefix",
    "https": "pass it as endpoint_url= and write s3://bucket/prefix",
    "s3a": "write s3://",
    "s3n": "write s3://",
}


def from_url(url: str, **options: Any) -> ObjectStore:
    """The object store that a URL or a path names; nothing is opened, read or written yet.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``, ``memory://name``,
            ``file:///path`` or a path, which may be relative.
        options: Keywords of that store's class, such as ``endpoint_url`` or ``fsync``.

    Raises:
        InvalidInputError: the scheme is not one of these, a part is missing, or the store has no such option.

    Example:
        >>> from_url("s3://team/runs", region="eu-west-1").url
        's3://team/runs'
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return _make(LocalObjectStore, url, options) if url else _refuse(url, "it is empty")
    if "?" in rest or "#" in rest or "@" in rest.partition("/")[0]:
        # A password in a URL would end up in logs.
        return _refuse(f"{scheme}://...", "give options and credentials as keywords, not in the URL")
    match scheme:
        case "file":
            parts = urlsplit(url)
            if parts.netloc not in {"", "localhost"} or not parts.path:
                return _refuse(url, "write file:///absolute/path")
            return _make(LocalObjectStore, unquote(parts.path), options)
        case "memory":
            return _make(MemoryObjectStore, rest or None, options)
        case "s3" | "gs" | "az":
            place, _, prefix = rest.partition("/")
            options = {"prefix": prefix, **options}
            return _make({"s3": S3ObjectStore, "gs": GCSObjectStore, "az": AzureObjectStore}[scheme], place, options)
    return _refuse(url, _HINTS.get(scheme, "this scheme is not known"))


def _make(store: Callable[..., ObjectStore], place: str | None, options: dict[str, Any]) -> ObjectStore:
    try:
        return store(place, **options)
    except TypeError as error:
        raise InvalidInputError(f"{store.__name__} does not take these options: {error}") from None


def _refuse(url: str, why: str) -> ObjectStore:
    raise InvalidInputError(f"{url!r} names no object store: {why}. Known are {_KNOWN}")
