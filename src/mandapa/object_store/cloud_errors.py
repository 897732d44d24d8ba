"""What obstore says went wrong, in the words of `mandapa.errors`.

obstore tells most failures apart only in the text of a `GenericError`, so that text is read here, and nowhere else.
Only the HTTP status, the service's error code and its message go on: never a URL's query or a signature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mandapa.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    CorruptionError,
    MandapaError,
    NotFoundError,
    StorageError,
    StoreNotFoundError,
)

__all__ = ["translate"]

_STATUS = re.compile(r"status code: (\d{3}[\w ]*)|\(code: (\d{3})\)")
_CODE = re.compile(r"<Code>\s*(\w+)")
_MESSAGE = re.compile(r"<Message>\s*([^<\n]+)")
_QUERY = re.compile(r"\?[^\s\"',)]*")

_NO_PLACE = {"NoSuchBucket", "ContainerNotFound", "AccountNotFound"}
_NO_PLACE_TEXT = "The specified container does not exist"  # Azure's bulk delete gives no code
_BAD_CREDENTIALS = {
    "ExpiredToken": "the credentials have expired: get new ones",
    "InvalidAccessKeyId": "the access key id is not known there: check it, and the endpoint",
    "InvalidToken": "the session token is not valid: get new credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "SignatureDoesNotMatch": "the secret access key does not belong to the access key id: check both",
    "AuthenticationFailed": "the account key or token is not valid: check it",
    "AuthorizationFailure": "the account key or token is not valid: check it",
    "InvalidAuthenticationInfo": "the account key or token is not valid: check it",
}
_ELSEWHERE = ("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "incorrectly configured region")
_SHORT = ("CONTENT_RANGE", "but object was only")  # said by obstore itself of a 206 with too little, or nothing, in it
_METADATA = ("169.254.169.254", "metadata.google.internal", "token request", "fetching instance", "Instance Metadata")
_TRANSPORT = {
    "Connection refused": "nothing listens there (connection refused)",
    "dns error": "the host name is not known",
    "certificate": "its certificate is not trusted",
    "TimedOut": "timed out",
    "timed out": "timed out",
    "URL scheme is not allowed": "an http:// endpoint has to be given as endpoint_url",
}
_PASSING_STATUS = {"408", "409", "425", "429"}


def translate(
    error: Exception, *, doing: str, key: str, url: str, place: str, permissions: Mapping[str, str]
) -> MandapaError:
    """The error of ours that tells the caller what to do about obstore's ``error``.

    Args:
        error: What obstore raised.
        doing: ``read``, ``look for``, ``list``, ``write``, ``create`` or ``delete``.
        key: Of the object, or the prefix of a list.
        url: The store's.
        place: ``bucket`` or ``container``.
        permissions: For each ``doing``, what the service calls the permission.
    """
    text = str(error)
    status = next((found for match in [_STATUS.search(text)] if match for found in match.groups() if found), "").strip()
    code = _first(_CODE, text)
    summary = text.partition("\n\nDebug source")[0].partition("\n")[0]
    said = " ".join(filter(None, (status, code, _first(_MESSAGE, text)))) or _QUERY.sub("", summary)
    what = f"cannot {doing} {key!r} in {url}"

    if code in _NO_PLACE or _NO_PLACE_TEXT in text:
        return StoreNotFoundError(
            f"{what}: the {place} does not exist; create it, or check its name, region and endpoint"
        )
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{url}/{key} is not there")
    if code in _BAD_CREDENTIALS:
        return AccessDeniedError(f"{what}: {_BAD_CREDENTIALS[code]} ({said})")
    if any(sign in text for sign in _ELSEWHERE):
        return StorageError(f"{what}: the {place} is in another region; pass region= ({said})")
    if any(hint in summary for hint in _METADATA):
        return AccessDeniedError(f"{what}: no credentials were found, and the machine's metadata service gave none")
    if not status and type(error).__name__ == "UnauthenticatedError":
        return AccessDeniedError(f"{what}: no credentials could be got ({said})")
    if status[:3] in {"401", "403"}:
        return AccessDeniedError(f"{what}: the store refused ({said}); probably {permissions[doing]} is missing")
    if doing == "create" and (status[:3] in {"409", "412"} or type(error).__name__ == "AlreadyExistsError"):
        return AlreadyExistsError(f"{url}/{key} is there already, as the store says ({said})")
    if doing == "read" and (status.startswith("416") or any(sign in text for sign in _SHORT)):
        return CorruptionError(f"{url}/{key} ends before the range that was asked for", key=key)
    if status:
        retryable = status[0] == "5" or status[:3] in _PASSING_STATUS
        return StorageError(f"{what}: the store answered {said}", retryable=retryable)
    for sign, meaning in _TRANSPORT.items():
        if sign in text:
            return StorageError(f"{what}: {meaning}", retryable=True)
    return StorageError(f"{what}: {said}", retryable=True)


def _first(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1].strip() if match else ""
