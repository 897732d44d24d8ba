"""What is taken from the user's environment, in one place: a cache folder, and who it is."""

from __future__ import annotations

import os

__all__ = ["cache_dir", "who"]


def cache_dir() -> str:
    """The folder of the local index: ``MANDAPA_CACHE``, else ``mandapa`` in the user's cache folder."""
    explicit = os.environ.get("MANDAPA_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return explicit or os.path.join(home, "mandapa")


def who() -> str:
    """``user@host``, as commits are signed."""
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"[:256]
