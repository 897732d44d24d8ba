"""What is refused before it is believed: limits, names, paths, sealed JSON, frames. Source: docs/format.md §2, §4."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import msgspec

from mandapa.digest import hexdigest
from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = [
    "BAD_BYTES",
    "CHECKSUM_MAX",
    "CHUNK_MAX",
    "CONTAINER_MAX",
    "FORMAT",
    "INT_MAX",
    "MESSAGE_MAX",
    "METADATA_MAX",
    "NAME_MAX",
    "PATH_MAX",
    "RECORD_MAX",
    "RESERVED",
    "URL_MAX",
    "check_label",
    "check_name",
    "check_path",
    "check_prefix",
    "check_reserved",
    "check_url",
    "is_id",
    "open_frame",
    "open_sealed",
    "read_json",
    "seal",
    "shown",
    "told",
]

FORMAT = 1
"""The version of the format that this package writes, and the only one that it reads."""

CHUNK_MAX = 16 << 20
CONTAINER_MAX = 32 << 20
RECORD_MAX = 64 << 10
MESSAGE_MAX = 4 << 10
METADATA_MAX = 16 << 10
NAME_MAX = 128
PATH_MAX = 1024
SEGMENT_MAX = 255
URL_MAX = 4096
CHECKSUM_MAX = 255
INT_MAX = (1 << 53) - 1
"""The largest integer of the format: every JSON reader holds it exactly."""

RESERVED = ".mandapa"
"""The folder of a version that holds what the format, or a feature of it, defines, and no assets of users."""

BAD_BYTES = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no value of the type asked for."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_VERSION = re.compile(r"[vV][0-9]+", re.ASCII)
_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_BAD_PATH = re.compile(r"[\x00-\x1f\x7f\x80-\x9f\\\u2028\u2029\ud800-\udfff]")
_DOTS = frozenset(("", ".", ".."))
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x80-\x9f\u2028\u2029\ud800-\udfff]")
_SEAL = b',"blake3":"'
_FRAME = b"\x28\xb5\x2f\xfd"


def shown(value: object) -> str:
    """How a value from outside stands in a message: as its repr, 100 characters of it at most."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def told(error: Exception) -> str:
    """What a parser said about bytes from outside: 300 characters at most, and none that a terminal would obey."""
    text = str(error)[:300]
    return text if text.isprintable() else ascii(text)[1:-1]


def is_id(text: str) -> bool:
    """Whether ``text`` is an id of the format: 128 random bits as 32 lower-case hex digits."""
    return _ID.fullmatch(text) is not None


def check_name(name: str) -> str:
    """``name`` if it can name an artifact, else `InvalidInputError`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"{shown(name)} cannot name an artifact: use 1 to {NAME_MAX} letters, digits, '.', '_' or '-', "
            "the first a letter, digit or '_'"
        )
    return name


def check_label(name: str) -> str:
    """``name`` if it can name an alias or a tag, else `InvalidInputError`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"{shown(name)} cannot name an alias or a tag: use 1 to {NAME_MAX} letters, digits, '.', '_' or '-', "
            "the first a letter, digit or '_'"
        )
    if name.lower() == "latest" or _VERSION.fullmatch(name):
        raise InvalidInputError(
            f"{shown(name)} cannot be an alias or a tag: it always means a version by its number or age"
        )
    return name


def check_path(path: str) -> str:
    """``path`` if it can be the path of an asset, else `InvalidInputError` that says why.

    Relative, ``/`` between segments, no empty, ``.`` or ``..`` segment, no control character or backslash, UTF-8,
    255 bytes a segment and 1,024 in all, and not under ``.mandapa/``, which is reserved.
    """
    check_prefix(path)
    if not path:
        raise InvalidInputError("a path must not be empty")
    if path == RESERVED or path.startswith(f"{RESERVED}/"):
        raise InvalidInputError(f"{shown(path)}: the folder '{RESERVED}' is reserved")
    return path


def check_reserved(path: str) -> str:
    """``path`` if it can be the path of an asset in the reserved folder, else `InvalidInputError`."""
    if not check_prefix(path).startswith(f"{RESERVED}/"):
        raise InvalidInputError(f"{shown(path)} is not inside the reserved folder '{RESERVED}'")
    return path


def check_prefix(path: str) -> str:
    """``path`` if it can be a folder of assets (``""`` is the root), else `InvalidInputError`; allows ``.mandapa``."""
    if not isinstance(path, str):
        raise InvalidInputError(f"a path must be a string, not {type(path).__name__}")
    if not path:
        return path
    if _BAD_PATH.search(path):
        raise InvalidInputError(
            f"{shown(path)} cannot be a path: control characters, backslashes and bytes that are not UTF-8 are refused"
        )
    if path[0] == "/":
        raise InvalidInputError(f"{shown(path)} is absolute: paths in a version are relative")
    segments = path.split("/")
    if not _DOTS.isdisjoint(segments):
        raise InvalidInputError(f"{shown(path)} has an empty, '.' or '..' segment")
    if len(path) * 4 > SEGMENT_MAX:
        if len(path.encode()) > PATH_MAX:
            raise InvalidInputError(f"{shown(path)} is longer than {PATH_MAX} bytes")
        for segment in segments:
            if len(segment.encode()) > SEGMENT_MAX:
                raise InvalidInputError(f"the segment {shown(segment)} is longer than {SEGMENT_MAX} bytes")
    return path


def check_url(url: str, checksum: str = "") -> str:
    """``url`` if it can be recorded with ``checksum``, else `InvalidInputError`: no control characters, bounded."""
    if not url or _CONTROL.search(url) or len(url.encode()) > URL_MAX:
        raise InvalidInputError(f"{shown(url)} cannot be a URL here: 1 to {URL_MAX} bytes, no control characters")
    if _CONTROL.search(checksum) or len(checksum.encode()) > CHECKSUM_MAX:
        raise InvalidInputError(
            f"the checksum {shown(checksum)} is longer than {CHECKSUM_MAX} bytes, or has control characters"
        )
    return url


def seal(value: Any) -> bytes:
    """One line of JSON with the BLAKE3 of everything before it as its last member.

    ``value`` encodes to a JSON object with at least one member.
    """
    body = msgspec.json.encode(value)[:-1]
    return b'%b%b%b"}\n' % (body, _SEAL, hexdigest(body).encode())


def open_sealed(line: bytes | bytearray | memoryview, *, key: str, limit: int) -> tuple[bytes, str]:
    """The JSON object of a sealed line without its seal, and the seal as hex.

    Raises:
        CorruptionError: Too long, not one line, or the seal does not fit the bytes.
        FormatVersionError: The seal fits, or there is none to check, and the line names another format.
    """
    data = bytes(line)
    if len(data) > limit:
        raise CorruptionError(f"{key}: {len(data)} bytes, more than the {limit} that the format allows", key=key)
    cut = len(data) - len(_SEAL) - 67
    if cut < 1 or data[cut : cut + len(_SEAL)] != _SEAL or data[-3:] != b'"}\n':
        raise CorruptionError(f"{key}: not a sealed line of JSON", key=key)
    if b"\r" in data or data.count(b"\n") > 1:
        raise CorruptionError(f"{key}: not a sealed line of JSON", key=key)
    body, seal_ = data[:cut], data[cut + len(_SEAL) : -3].decode("ascii", "replace")
    if hexdigest(body) != seal_:
        raise CorruptionError(f"{key}: its BLAKE3 does not fit its bytes", key=key)
    body += b"}"
    read_json(body, key=key)
    return body, seal_


def read_json(data: bytes, *, key: str) -> dict[str, Any]:
    """The JSON object in ``data``, which says that it is of this format.

    Raises:
        CorruptionError: Not JSON, not an object, a member twice in one object, or no format.
        FormatVersionError: Another format.
    """
    try:
        value = msgspec.json.decode(data)
        # What encodes to the same bytes has no member twice; other ways to write JSON take the slower look.
        if msgspec.json.encode(value) != data:
            json.loads(data, object_pairs_hook=_no_twins)
    except (*BAD_BYTES, ValueError) as error:
        raise CorruptionError(f"{key}: {told(error)}", key=key) from None
    found = value.get("format") if isinstance(value, dict) else None
    if type(found) is not int:
        raise CorruptionError(f"{key}: does not say which format it is of", key=key)
    if found != FORMAT:
        raise FormatVersionError(f"{key} is of format {shown(found)}; this mandapa reads format {FORMAT}: upgrade it")
    assert isinstance(value, dict)
    return value


def _no_twins(members: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in members]
    if len(set(names)) < len(names):
        raise ValueError("a member stands there twice")


def open_frame(stored: bytes | bytearray | memoryview, *, key: str, limit: int) -> bytes:
    """The bytes in one zstd frame that declares their number, at most ``limit``; no more are ever made.

    Raises:
        CorruptionError: Not exactly one frame, or one that lies about its size.
    """
    try:
        size = zstd.get_frame_info(stored).decompressed_size
        if bytes(stored[:4]) != _FRAME or size is None or size > limit or zstd.get_frame_size(stored) != len(stored):
            raise CorruptionError(f"{key}: not one zstd frame of {limit} bytes at most", key=key)
        decompressor = zstd.ZstdDecompressor()
        # One byte more than declared lets a sound frame reach its end and stops one that goes on: libzstd itself
        # notices only at the end of the frame, after any amount of memory.
        raw: bytes = decompressor.decompress(stored, max_length=size + 1)
    except zstd.ZstdError as error:
        raise CorruptionError(f"{key}: does not decompress: {told(error)}", key=key) from None
    if len(raw) != size or not decompressor.eof:
        raise CorruptionError(f"{key}: a zstd frame that does not hold what it declares", key=key)
    return raw
