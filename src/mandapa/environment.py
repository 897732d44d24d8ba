"""What is taken from the user's environment, in one place: a cache folder and its size, and who it is."""

from __future__ import annotations

import os
import re

from mandapa.errors import InvalidInputError

__all__ = ["cache_dir", "cache_size", "who"]

_CACHE_SIZE = 10 << 30
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def cache_dir() -> str:
    """The folder of index and cached chunks: ``MANDAPA_CACHE``, else ``mandapa`` in the user's cache folder."""
    explicit = os.environ.get("MANDAPA_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return explicit or os.path.join(home, "mandapa")


def cache_size() -> int:
    """Bytes of chunks that are kept in the cache folder: ``MANDAPA_CACHE_SIZE``, as ``20G`` or ``500M``, else 10 GiB.

    Raises:
        InvalidInputError: The variable is no size.
    """
    text = os.environ.get("MANDAPA_CACHE_SIZE", "").strip()
    if not text:
        return _CACHE_SIZE
    found = re.fullmatch(r"([0-9]{1,15})\s*([KMGT]?)(i?B)?", text, re.ASCII | re.IGNORECASE)
    if found is None:
        raise InvalidInputError(
            f"MANDAPA_CACHE_SIZE={text!r} is no size: set it to bytes, or to 500M, 20G, or 0 for none"
        )
    return int(found[1]) << _UNITS[found[2].upper()]


def who() -> str:
    """``user@host``, as commits are signed."""
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"[:256]
