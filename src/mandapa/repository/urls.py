"""URLs as assets: which are kept, and what is known of them without fetching anything."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from urllib.parse import parse_qsl, unquote, urlsplit

from mandapa.errors import InvalidInputError
from mandapa.format import strict
from mandapa.object_store.base import ObjectStore
from mandapa.object_store.cloud import CloudObjectStore

__all__ = ["SCHEMES", "check_facts", "check_url", "url_facts"]

SCHEMES = frozenset(("s3", "gs", "az", "abfs", "abfss", "https", "http", "hf", "file"))
"""Schemes of URLs that can be assets."""

URL_MAX = 4096

_SECRET = re.compile(
    r"signature|credential|token|secret|password|passwd|api[-_]?key|access[-_]?key|^sig$|^key$", re.IGNORECASE
)
_BAD = re.compile(r"[\x00-\x20\x7f-\x9f\ud800-\udfff\u2028\u2029]")
_CHECKSUM = re.compile(r"[a-z0-9]+:.+")


def check_url(url: str) -> None:
    """Refuse what is no URL of an allowed scheme, or carries a secret: records are read by many and kept for ever.

    Raises:
        InvalidInputError: Says what is wrong, without repeating a secret.
    """
    if not isinstance(url, str) or not url or len(url.encode(errors="replace")) > URL_MAX or _BAD.search(url):
        raise InvalidInputError(f"a URL is a string of 1 to {URL_MAX} bytes without blanks and control characters")
    try:
        parts = urlsplit(url)
        secret = parts.password is not None or (parts.username is not None and parts.scheme not in ("abfs", "abfss"))
    except ValueError as error:
        raise InvalidInputError(f"not a URL: {error}") from None
    if parts.scheme not in SCHEMES:
        raise InvalidInputError(f"the scheme {parts.scheme!r} is not allowed: use one of {', '.join(sorted(SCHEMES))}")
    if not (parts.netloc or parts.path):
        raise InvalidInputError(f"{url!r} names nothing")
    secret = secret or any(_SECRET.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True))
    if secret:
        raise InvalidInputError(
            f"the {parts.scheme} URL on {parts.hostname!r} carries a secret (user, password or signed query): "
            "record it without, and give credentials where it is read"
        )


def check_facts(url: str, size: int | None, checksum: str) -> None:
    """Refuse a size or checksum that cannot be recorded of a URL.

    Raises:
        InvalidInputError: A size below 0 or above what the format holds, or a checksum that is not ``scheme:value``.
    """
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= strict.INT_MAX):
        raise InvalidInputError(f"size={size!r}: bytes, 0 or more")
    if not isinstance(checksum, str):
        raise InvalidInputError(f"a checksum is a string, not {type(checksum).__name__}")
    strict.check_url(url, checksum)
    if checksum and not _CHECKSUM.fullmatch(checksum):
        raise InvalidInputError(f"checksum={checksum!r}: write its kind first, as in 'sha256:9f86d08...' or 'etag:...'")


def url_facts(url: str, size: int | None, checksum: str, store: ObjectStore) -> tuple[int | None, str]:
    """Size and checksum to record: those given, else what can be had without fetching anything.

    That is the size of a ``file://``, and size and etag of an object of the cloud service that ``store`` is of.

    Raises:
        InvalidInputError: A size below 0, or a checksum that is not ``scheme:value``.
    """
    check_facts(url, size, checksum)
    parts = urlsplit(url)
    if size is None and parts.scheme == "file" and parts.netloc in ("", "localhost"):
        with suppress(OSError):
            size = os.stat(unquote(parts.path)).st_size
    if (size is None or not checksum) and isinstance(store, CloudObjectStore):
        found_size, found_checksum = store.describe(url) or (None, "")
        size = found_size if size is None else size
        checksum = checksum or found_checksum
    return size, checksum
