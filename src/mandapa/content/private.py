"""Folders of what this machine keeps for one user: nobody else may put anything into them."""

from __future__ import annotations

import os
import stat

__all__ = ["make_private"]


def make_private(folder: str) -> bool:
    """Make the folder, mode 0700, unless it is there; whether what it holds can be this user's work alone.

    It cannot where the folder is another user's, or all may write to it: what is kept there is believed to some extent
    (which files were hashed, what manifests reach), so others must not plant it. A folder that its owner opened to his
    group is taken as he meant it.

    Raises:
        OSError: It cannot be made, or is no folder.
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
    found = os.stat(folder)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & stat.S_IWOTH
