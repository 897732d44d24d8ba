"""Backup programs: restic and borg."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from tools import Tool


class Restic(Tool):
    """Chunks by content, zstd, encryption."""

    program = "restic"

    def prepare(self) -> None:
        os.environ |= {
            "RESTIC_PASSWORD": "benchmark",
            "RESTIC_REPOSITORY": str(self.store),
            "RESTIC_CACHE_DIR": str(self.home / "cache"),
        }
        self.run("init")

    def commit(self, number: int) -> None:
        self.run("backup", "--quiet", "src", cwd=self.source.parent)

    def restore(self, dest: Path) -> None:
        self.run("restore", "latest", "--target", dest.with_suffix(".all"))
        os.rename(dest.with_suffix(".all") / "src", dest)

    def piece(self, file: str, start: int, stop: int) -> bytes:
        return self.read_from(start, stop, "dump", "latest", f"/src/{file}")


class Borg(Tool):
    """Chunks by content, without encryption, and here without compression."""

    program = "borg"
    compression: ClassVar[str] = "none"

    def prepare(self) -> None:
        os.environ |= {"BORG_BASE_DIR": str(self.home / "base"), "BORG_REPO": str(self.store)}
        os.environ["BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"] = "yes"
        self.run("init", "--encryption", "none")

    def commit(self, number: int) -> None:
        self.last = f"::v{number}"
        self.run("create", "--compression", self.compression, self.last, "src", cwd=self.source.parent)

    def restore(self, dest: Path) -> None:
        dest.mkdir()
        self.run("extract", "--strip-components", "1", self.last, cwd=dest)

    def piece(self, file: str, start: int, stop: int) -> bytes:
        return self.read_from(start, stop, "extract", "--stdout", self.last, f"src/{file}")


class BorgZstd(Borg):
    """The same with zstd at level 1."""

    compression = "zstd,1"
