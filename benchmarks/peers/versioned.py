"""Stores of versions of data: hf_xet, DVC, Oxen."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tools import Tool, tree_bytes


class Xet(Tool):
    """What the Hugging Face Hub uploads with, to a folder; who knows the files' names and hashes is left out."""

    package = "hf-xet"

    def prepare(self) -> None:
        import hf_xet

        self.store.mkdir()
        self.xet, self.session, self.place = hf_xet, hf_xet.XetSession(), f"local://{self.store}"

    def commit(self, number: int) -> None:
        paths = [path for path in self.source.rglob("*") if path.is_file()]
        with self.session.new_upload_commit(endpoint=self.place) as commit:
            uploads = [commit.start_upload_file(str(path), sha256=self.xet.SKIP_SHA256) for path in paths]
        self.files = {
            str(path.relative_to(self.source)): upload.result().xet_info
            for path, upload in zip(paths, uploads, strict=True)
        }

    def restore(self, dest: Path) -> None:
        with self.session.new_file_download_group(endpoint=self.place) as group:
            for name, info in self.files.items():
                (dest / name).parent.mkdir(parents=True, exist_ok=True)
                group.start_download_file(info, str(dest / name))

    def piece(self, file: str, start: int, stop: int) -> bytes:
        group = self.session.new_download_stream_group(endpoint=self.place)
        return b"".join(group.download_stream(self.files[file], start=start, end=stop))

    def stored(self) -> int:
        """Without the local cache beside it."""
        return sum(tree_bytes(self.store / "xet" / "xorbs" / part) for part in ("xorbs", "shards"))


class Dvc(Tool):
    """``dvc add`` and ``git commit``, without a remote: whole files, into the cache."""

    program = "dvc"

    def prepare(self) -> None:
        os.environ |= {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(self.home / "site"), "CI": "true"}
        self.work = self.source.parent
        for key, value in {"user.name": "benchmark", "user.email": "benchmark@localhost"}.items():
            self._git("config", "--global", key, value)
        self._git("init", "--quiet")
        self.run("init", "--quiet", cwd=self.work)
        self.store = self.work / ".dvc" / "cache"

    def commit(self, number: int) -> None:
        self.run("add", "--quiet", "src", cwd=self.work)
        self._git("add", "src.dvc", ".gitignore")
        self._git("commit", "--quiet", "-m", f"v{number}")

    def restore(self, dest: Path) -> None:
        aside = self.home / "aside"
        os.rename(self.source, aside)
        self.run("checkout", "--quiet", "src", cwd=self.work)
        os.rename(self.source, dest)
        os.rename(aside, self.source)

    def _git(self, *arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=self.work, check=True, capture_output=True)


class Oxen(Tool):
    """A Merkle tree over whole files."""

    package = "oxenai"

    @classmethod
    def missing(cls) -> str:
        try:
            import oxen  # noqa: F401
        except ImportError as error:
            return str(error)
        return ""

    def prepare(self) -> None:
        import oxen

        oxen.user.config_user("benchmark", "benchmark@localhost")
        self.repo = oxen.Repo(str(self.source.parent))
        self.repo.init()
        self.store = self.source.parent / ".oxen"

    def commit(self, number: int) -> None:
        self.repo.add(str(self.source))
        self.repo.commit(f"v{number}")

    def restore(self, dest: Path) -> None:
        aside = self.home / "aside"
        os.rename(self.source, aside)
        self.repo.restore("src")
        os.rename(self.source, dest)
        os.rename(aside, self.source)
