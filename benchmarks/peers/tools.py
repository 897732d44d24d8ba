"""What every tool that keeps versions of a folder is asked to do, and the plainest of them."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

BLOCK = 8 << 20


class UnableError(Exception):
    """The tool cannot do this."""


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below."""
    return sum((Path(root) / name).lstat().st_size for root, _, names in os.walk(folder) for name in names)


def command(name: str) -> str | None:
    """A program of this environment, or of the machine."""
    ours = Path(sys.executable).parent / name
    return str(ours) if ours.exists() else shutil.which(name)


class Tool:
    """One tool, with a place of its own; making it and `prepare` are not measured."""

    package: ClassVar[str] = ""
    """The Python package that it is."""
    program: ClassVar[str] = ""
    """The program that it is."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.source = home / "work" / "src"
        """The folder whose versions are kept."""
        self.store = home / "store"
        """All that the tool keeps, and nothing else."""
        self.requests = 0
        """How many it has made, if it counts them."""
        self.source.mkdir(parents=True)

    @classmethod
    def missing(cls) -> str:
        """What has to be installed first, or nothing."""
        if cls.program and command(cls.program) is None:
            return f"no program {cls.program}"
        if cls.package and find_spec(cls.package.replace("-", "_")) is None:
            return f"no package {cls.package}"
        return ""

    @classmethod
    def release(cls) -> str:
        """Which release it is."""
        if cls.package:
            return importlib.metadata.version(cls.package)
        if cls.program:
            done = subprocess.run([str(command(cls.program)), "version"], capture_output=True, text=True, check=False)
            done = done if not done.returncode else run_quietly(cls.program, "--version")
            return next((word for word in done.stdout.split() if word[0].isdigit()), "")
        return ""

    def prepare(self) -> None:
        """Make an empty store."""
        self.store.mkdir()

    def commit(self, number: int) -> None:
        """Keep the folder as it is now as version ``number``; returns when that is done."""
        raise NotImplementedError

    def restore(self, dest: Path) -> None:
        """Make ``dest`` the last version; raises `UnableError`."""
        raise UnableError

    def piece(self, file: str, start: int, stop: int) -> bytes:
        """These bytes of a file of the last version, by whatever way is cheapest; raises `UnableError`."""
        raise UnableError

    def stored(self) -> int:
        """Bytes that all versions take up."""
        return tree_bytes(self.store)

    def run(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """Run the program, with nothing of the user's."""
        done = subprocess.run(
            [str(command(self.program)), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{self.program} {arguments[0]}: {done.stderr[-2000:]}{done.stdout[-500:]}")
        return done.stdout

    def read_from(self, start: int, stop: int, *arguments: str | Path) -> bytes:
        """A stretch of what the program prints, which is stopped after it."""
        with subprocess.Popen(
            [str(command(self.program)), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            left = start
            while left:
                left -= len(process.stdout.read(min(BLOCK, left)))
            found = process.stdout.read(stop - start)
            process.kill()
        return found


def run_quietly(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the program says; it need not succeed."""
    return subprocess.run([str(command(program)), *arguments], capture_output=True, text=True, check=False)


class Copy(Tool):
    """A copy of the folder for each version, flushed to the disk."""

    def commit(self, number: int) -> None:
        self.last = self.store / str(number)
        for root, _, names in os.walk(self.source):
            folder = self.last / os.path.relpath(root, self.source)
            folder.mkdir(parents=True)
            for name in names:
                shutil.copyfile(os.path.join(root, name), folder / name)
                flush(folder / name)
            flush(folder)

    def restore(self, dest: Path) -> None:
        shutil.copytree(self.last, dest, copy_function=shutil.copyfile)

    def piece(self, file: str, start: int, stop: int) -> bytes:
        with (self.last / file).open("rb") as source:
            source.seek(start)
            return source.read(stop - start)


def flush(path: Path) -> None:
    """Its bytes are on the disk when this returns."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


class Obstore(Tool):
    """An object a file and version, in obstore's store of local files, which flushes nothing."""

    package = "obstore"

    def prepare(self) -> None:
        super().prepare()
        import obstore
        from obstore.store import LocalStore

        self.obstore, self.objects = obstore, LocalStore(self.store)

    def commit(self, number: int) -> None:
        self.last = str(number)
        for path in self.source.rglob("*"):
            if path.is_file():
                self.obstore.put(self.objects, f"{number}/{path.relative_to(self.source)}", path)
                self.requests += 1

    def restore(self, dest: Path) -> None:
        for page in self.obstore.list(self.objects, self.last):
            self.requests += 1
            for found in page:
                path = dest / found["path"].removeprefix(f"{self.last}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.obstore.get(self.objects, found["path"]).bytes())
                self.requests += 1

    def piece(self, file: str, start: int, stop: int) -> bytes:
        self.requests += 1
        return bytes(self.obstore.get_range(self.objects, f"{self.last}/{file}", start=start, end=stop))
