"""Bytes that a run owns: as they were when the call returned, whatever becomes of the file; and given up only once."""

from __future__ import annotations

import errno
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mandapa.errors import AccessDeniedError, InvalidInputError, NotFoundError, StorageError
from mandapa.run import staging as module
from mandapa.run.directory import RunDirectory
from mandapa.run.journal import ArtifactEntry, AssetEntry, CheckpointEntry, Entry, File, UrlEntry
from mandapa.run.staging import Staging, drop_links, release

WAYS = ["copy", "move", "link"]
REAL = {name: getattr(os, name) for name in ("link", "write", "sendfile", "unlink")}


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs/net", "net")


@pytest.fixture
def own(directory: RunDirectory) -> Staging:
    return Staging(directory, rank=0, attempt=1)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's directory is on another file system than the tests' other files."""

    def refuse(real: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            inside = os.fspath(target).startswith(os.fspath(tmp_path / "runs"))
            if inside and not os.fspath(source).startswith(os.fspath(tmp_path / "runs")):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            real(source, target, **options)

        return renamed

    monkeypatch.setattr(os, "rename", refuse(os.rename))
    monkeypatch.setattr(os, "link", refuse(os.link))


@pytest.fixture
def elsewhere_for_real(tmp_path: Path) -> Iterator[Path]:
    """A folder that really is on another file system than ``tmp_path``."""
    own = tmp_path.stat().st_dev
    for parent in (tempfile.gettempdir(), "/dev/shm"):
        if os.access(parent, os.W_OK) and os.stat(parent).st_dev != own:
            with tempfile.TemporaryDirectory(prefix="mandapa-staging-", dir=parent) as folder:
                yield Path(folder)
            return
    pytest.skip("no second file system")


def staged(directory: RunDirectory) -> list[str]:
    return sorted(os.listdir(directory.staged))


def contents(folder: str | Path) -> dict[str, bytes]:
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(folder: Path) -> Path:
    """A folder with files, a folder, a link to each, and a file that can be executed."""
    (folder / "in/deep").mkdir(parents=True)
    (folder / "in/a.txt").write_bytes(b"a")
    (folder / "in/deep/b.bin").write_bytes(b"bb")
    (folder / "in/run.sh").write_bytes(b"#!/bin/sh\n")
    (folder / "in/run.sh").chmod(0o755)
    (folder / "out").mkdir()
    (folder / "out/c.txt").write_bytes(b"ccc")
    (folder / "in/one.txt").symlink_to(folder / "out/c.txt")
    (folder / "in/all").symlink_to("../out")
    return folder / "in"


FILES = {
    "a.txt": b"a",
    "deep/b.bin": b"bb",
    "run.sh": b"#!/bin/sh\n",
    "one.txt": b"ccc",
    "all/c.txt": b"ccc",
}

# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("data", [b"", b"x", b"abc" * 1_000_000], ids=len)
def test_bytes_are_owned(own: Staging, directory: RunDirectory, tmp_path: Path, way: Any, data: bytes) -> None:
    """The same bytes, in the run's directory, whatever becomes of the file's name."""
    (tmp_path / "a").write_bytes(data)
    path, size = own.take(str(tmp_path / "a"), way)
    assert (Path(path).read_bytes(), size) == (data, len(data))
    assert os.path.dirname(path) == directory.staged
    assert (tmp_path / "a").exists() == (way != "move")
    if way != "move":
        (tmp_path / "a").unlink()
    (tmp_path / "a").write_bytes(b"other")
    assert Path(path).read_bytes() == data


def test_a_copy_is_not_touched_by_what_is_written_later(own: Staging, tmp_path: Path) -> None:
    """Neither by writing into the file, nor by cutting it; the copy is the owner's alone."""
    source = tmp_path / "a"
    source.write_bytes(b"before")
    source.chmod(0o644)
    path, _ = own.take(str(source), "copy")
    with source.open("r+b") as file:
        file.write(b"AFTER!!")
        file.truncate(3)
    assert Path(path).read_bytes() == b"before"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


@pytest.mark.parametrize("way", WAYS)
def test_the_executable_bit_goes_along(own: Staging, tmp_path: Path, way: Any) -> None:
    for name, mode in (("a", 0o755), ("b", 0o644)):
        (tmp_path / name).write_bytes(b"#!/bin/sh\n")
        (tmp_path / name).chmod(mode)
        path, _ = own.take(str(tmp_path / name), way)
        assert bool(os.stat(path).st_mode & stat.S_IXUSR) == (mode == 0o755)


def test_a_link_and_a_move_copy_nothing(own: Staging, tmp_path: Path) -> None:
    for way in ("link", "move"):
        (tmp_path / way).write_bytes(b"abc")
        number = (tmp_path / way).stat().st_ino
        path, _ = own.take(str(tmp_path / way), way)  # type: ignore[arg-type]
        assert os.stat(path).st_ino == number


@pytest.mark.parametrize("way", WAYS)
def test_a_symlink_is_what_it_leads_to(own: Staging, tmp_path: Path, way: Any) -> None:
    """Moved, only the link goes; linked, the file is owned, and not the link."""
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "name").symlink_to("file")
    path, size = own.take(str(tmp_path / "name"), way)
    assert not os.path.islink(path)
    assert (Path(path).read_bytes(), size) == (b"abc", 3)
    assert (tmp_path / "file").read_bytes() == b"abc"
    assert (tmp_path / "name").is_symlink() == (way != "move")


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("way", WAYS)
def test_another_file_system_is_copied_from(own: Staging, tmp_path: Path, way: Any) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    path, size = own.take(str(tmp_path / "a"), way)
    assert (Path(path).read_bytes(), size) == (b"abc", 3)
    assert (tmp_path / "a").exists() == (way != "move")


@pytest.mark.parametrize("way", WAYS)
def test_real_other_file_systems(own: Staging, elsewhere_for_real: Path, way: Any) -> None:
    """A file, a folder and a file that grows, on a disk, for a run in memory, or the other way round."""
    (elsewhere_for_real / "a").write_bytes(b"abc")
    path, _ = own.take(str(elsewhere_for_real / "a"), way)
    assert Path(path).read_bytes() == b"abc"
    path, size = own.take_folder(str(make(elsewhere_for_real)), way)
    assert (contents(path), size) == (FILES, 19)
    (elsewhere_for_real / "log").write_bytes(b"line\n")
    path, size = own.grow(str(elsewhere_for_real / "log"))
    assert (path, size) == (str(elsewhere_for_real / "log"), 5)


@pytest.mark.parametrize("way", WAYS)
def test_no_file_is_told(own: Staging, directory: RunDirectory, tmp_path: Path, way: Any) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("missing", "dangling", "missing/below"):
        with pytest.raises(NotFoundError, match=name):
            own.take(str(tmp_path / name), way)
    assert staged(directory) == []


@pytest.mark.parametrize("way", [*WAYS, "grow"])
def test_what_is_no_file_is_refused(own: Staging, directory: RunDirectory, tmp_path: Path, way: Any) -> None:
    """A pipe, a socket, a device, a folder: at once, without waiting for a writer, and nothing is left behind."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "socket", tmp_path / "folder", Path("/dev/null"), Path("/dev/zero")):
            with pytest.raises(InvalidInputError, match="is not a file"):
                own.grow(str(path)) if way == "grow" else own.take(str(path), way)
            assert path.exists()
    assert staged(directory) == []


def test_bytes_are_taken_as_they_are(own: Staging) -> None:
    """Of any kind of buffer, and as they are now."""
    data = bytearray(b"abcdef")
    for given, expected in [
        (b"", b""),
        (b"abc", b"abc"),
        (data, b"abcdef"),
        (memoryview(data)[1:3], b"bc"),
        (memoryview(data)[::2], b"ace"),
        (memoryview(data)[3:3], b""),
        (memoryview(b"abcdefgh").cast("I"), b"abcdefgh"),
        (memoryview(b"abcdef").cast("B", (2, 3)), b"abcdef"),
    ]:
        path, size = own.take_bytes(given)  # type: ignore[arg-type]
        assert (Path(path).read_bytes(), size) == (expected, len(expected))
    path, _ = own.take_bytes(data)
    data[:] = b"------"
    assert Path(path).read_bytes() == b"abcdef"


def test_names_of_ranks_and_attempts_never_meet(directory: RunDirectory) -> None:
    found = set()
    for rank in (0, 1, 11):
        for attempt in (1, 11):
            own = Staging(directory, rank, attempt)
            found |= {own.take_bytes(b"")[0] for _ in range(12)}
    assert len(found) == 72


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_is_owned(own: Staging, directory: RunDirectory, tmp_path: Path, way: Any) -> None:
    """All its files, those that links lead to included; its own name is gone."""
    source = make(tmp_path)
    path, size = own.take_folder(str(source), way)
    assert (contents(path), size) == (FILES, 19)
    assert not any(found.is_symlink() for found in Path(path).rglob("*"))
    assert os.stat(Path(path, "run.sh")).st_mode & stat.S_IXUSR
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert len(staged(directory)) == 1
    assert (tmp_path / "out/c.txt").read_bytes() == b"ccc", "what is outside of the folder is not taken away"
    if way != "link":
        with (tmp_path / "out/c.txt").open("r+b") as file:
            file.write(b"CCC")
        assert contents(path) == FILES, "and goes on being somebody else's"
        (tmp_path / "out/c.txt").write_bytes(b"ccc")
    left = {"all/c.txt": b"ccc"} if way == "move" else FILES
    assert {
        str(p.relative_to(source)): p.read_bytes() for p in [*source.rglob("*"), source / "all/c.txt"] if p.is_file()
    } == left


def test_a_moved_folder_is_not_copied(own: Staging, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_bytes(b"a")
    number = (tmp_path / "in/a").stat().st_ino
    path, _ = own.take_folder(str(tmp_path / "in"), "move")
    assert os.stat(os.path.join(path, "a")).st_ino == number


def test_an_empty_folder_is_a_folder(own: Staging, tmp_path: Path) -> None:
    (tmp_path / "in/empty").mkdir(parents=True)
    path, size = own.take_folder(str(tmp_path / "in"), "copy")
    assert (contents(path), size) == ({}, 0)


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_with_something_else_in_it_is_refused(
    own: Staging, directory: RunDirectory, tmp_path: Path, way: Any
) -> None:
    """A pipe, a dangling link, a link in a circle, a name that no version can hold: nothing was taken."""

    def circle(source: Path) -> None:
        (source / "circle").symlink_to(source)

    def badly_named(source: Path) -> None:
        (source / "back\\slash").write_bytes(b"")

    for spoil in (
        lambda source: os.mkfifo(source / "pipe"),
        lambda source: (source / "dangling").symlink_to("nowhere"),
        circle,
        badly_named,
    ):
        source = make(tmp_path / spoil.__name__.strip("<>") / str(id(spoil)))
        spoil(source)
        with pytest.raises(InvalidInputError):
            own.take_folder(str(source), way)
        assert (source / "a.txt").read_bytes() == b"a"
        assert staged(directory) == []
    with pytest.raises(NotFoundError):
        own.take_folder(str(tmp_path / "missing"), way)
    with pytest.raises(InvalidInputError, match="is not a folder"):
        own.take_folder(str(source / "a.txt"), way)
    assert staged(directory) == []


# -- errors ------------------------------------------------------------------------------------------------------------


class Full:
    """A disk that is full after so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def sendfile(self, out: int, source: int, offset: int, count: int) -> int:
        count = min(count, os.fstat(source).st_size - offset)
        if count and not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        sent = REAL["sendfile"](out, source, offset, min(count, self.room))
        self.room -= sent
        return int(sent)

    def write(self, fd: int, data: Any) -> int:
        if len(data) and not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = REAL["write"](fd, memoryview(data)[: self.room])
        self.room -= written
        return int(written)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("room", [0, 1, 5, 9])
@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_leaves_nothing_behind(
    own: Staging, directory: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Any, room: int
) -> None:
    """And takes nothing away: a file and a folder that were to be moved are as they were."""
    source = make(tmp_path)
    (tmp_path / "a").write_bytes(b"0123456789")
    for call in (
        lambda: own.take(str(tmp_path / "a"), way),
        lambda: own.take_folder(str(source), way),
        lambda: own.take_bytes(b"0123456789"),
    ):
        with monkeypatch.context() as patch:
            disk = Full(room)
            patch.setattr(os, "sendfile", disk.sendfile)
            patch.setattr(os, "write", disk.write)
            with pytest.raises(StorageError, match="No space left") as found:
                call()
        assert found.value.retryable
        assert staged(directory) == []
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    assert {name: data for name, data in contents(source).items() if not name.startswith("all/")} == {
        name: data for name, data in FILES.items() if not name.startswith("all/")
    }


def test_copies_are_whole_where_sendfile_is_not(own: Staging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems refuse it, some stop half way."""
    data = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(data)

    def refused(*given: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    def stops(out: int, source: int, offset: int, count: int) -> int:
        if offset > 1_000_000:
            raise OSError(errno.EIO, "Input/output error")
        return int(REAL["sendfile"](out, source, offset, min(count, 300_000)))

    for sendfile in (refused, stops):
        with monkeypatch.context() as patch:
            patch.setattr(os, "sendfile", sendfile)
            path, size = own.take(str(tmp_path / "a"), "copy")
        assert (Path(path).read_bytes(), size) == (data, len(data))


def test_a_file_that_may_not_be_moved_away_is_an_error(
    own: Staging, directory: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"abc")

    def refuse(*given: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(StorageError, match=r"a cannot be taken over: Permission denied"):
            own.take(str(tmp_path / "a"), "move")
    assert (tmp_path / "a").read_bytes() == b"abc"
    assert staged(directory) == []


def test_a_folder_that_may_not_be_read_says_so(
    own: Staging, directory: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of the error that it is."""

    def refuse(path: str) -> None:
        raise AccessDeniedError(f"cannot read the folder {path}: Permission denied")

    monkeypatch.setattr(module, "walk", refuse)
    with pytest.raises(AccessDeniedError, match="cannot read the folder"):
        own.take_folder(str(tmp_path), "copy")
    assert staged(directory) == []


# -- files that grow ---------------------------------------------------------------------------------------------------


def test_a_growing_file_is_linked_once(own: Staging, directory: RunDirectory, tmp_path: Path) -> None:
    """Deleted, or with another name, it stays until all is committed."""
    log = tmp_path / "log"
    log.write_bytes(b"one\n")
    path, size = own.grow(str(log))
    with log.open("ab") as file:
        file.write(b"two\n")
    assert own.grow(str(log)) == (path, 8)
    assert size == 4
    assert len(staged(directory)) == 1
    log.unlink()
    assert Path(path).read_bytes() == b"one\ntwo\n"
    drop_links(directory, [directory.relative(path)])
    assert staged(directory) == []


def test_a_new_file_of_the_same_name_is_another_one(own: Staging, tmp_path: Path) -> None:
    """Rotated logs: what was handed over before is not what is there now."""
    log = tmp_path / "log"
    log.write_bytes(b"old\n")
    first, _ = own.grow(str(log))
    log.rename(tmp_path / "log.1")
    log.write_bytes(b"new one\n")
    second, size = own.grow(str(log))
    assert Path(first).read_bytes() == b"old\n"
    assert (Path(second).read_bytes(), size) == (b"new one\n", 8)


def test_a_growing_file_behind_a_symlink_is_owned(own: Staging, tmp_path: Path) -> None:
    """The link may lead somewhere else tomorrow, or be relative to another place."""
    (tmp_path / "log-1").write_bytes(b"one\n")
    (tmp_path / "log").symlink_to("log-1")
    path, size = own.grow(str(tmp_path / "log"))
    assert (Path(path).read_bytes(), size) == (b"one\n", 4)
    (tmp_path / "log").unlink()
    (tmp_path / "log-1").unlink()
    assert Path(path).read_bytes() == b"one\n"


def test_where_nothing_can_be_linked_a_growing_file_is_on_its_own(
    own: Staging, directory: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its absolute path: the uploader stands elsewhere."""
    (tmp_path / "log").write_bytes(b"one\n")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *given: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no")))
        path, size = own.grow("log")
    assert (path, size) == (str(tmp_path / "log"), 4)
    assert staged(directory) == []
    with pytest.raises(NotFoundError):
        own.grow("missing")


def test_only_links_to_growing_files_are_dropped(own: Staging, directory: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "log.grows").write_bytes(b"one\n")
    kept, _ = own.take(str(tmp_path / "log.grows"), "copy")
    grown, _ = own.grow(str(tmp_path / "log.grows"))
    drop_links(directory, [directory.relative(grown)])
    assert staged(directory) == [os.path.basename(kept)]
    assert (tmp_path / "log.grows").exists()


# -- giving up ---------------------------------------------------------------------------------------------------------

COMMON: dict[str, Any] = {"n": 1, "time": "", "attempt": 1}


def asset(source: str, **flags: bool) -> Entry:
    return AssetEntry(**COMMON, file=File(path="a", source=source, size=1), **flags)


def checkpoint(*sources: str) -> Entry:
    return CheckpointEntry(**COMMON, step=1, files=[File(path="checkpoint/a", source=s, size=1) for s in sources])


def test_what_nobody_needs_goes(own: Staging, directory: RunDirectory, tmp_path: Path) -> None:
    path, _ = own.take_bytes(b"a")
    release(directory, asset(directory.relative(path)))
    release(directory, asset(directory.relative(path)))  # twice is once
    folder, size = own.take_folder(str(make(tmp_path)), "copy")
    release(directory, ArtifactEntry(**COMMON, name="other", source=directory.relative(folder), at=None, size=size))
    assert staged(directory) == []
    release(directory, UrlEntry(**COMMON, path="a", url="s3://a/b"))


def test_a_checkpoint_goes_with_its_empty_folders(directory: RunDirectory) -> None:
    """But not while the file of another rank is in it."""
    folder = Path(directory.checkpoints, "step-1/deep")
    folder.mkdir(parents=True)
    for rank in (0, 1):
        (folder / f"rank{rank}.pt").write_bytes(b"a")
    release(directory, checkpoint("checkpoints/step-1/deep/rank0.pt"))
    assert os.listdir(folder) == ["rank1.pt"]
    release(directory, checkpoint("checkpoints/step-1/deep/rank1.pt"))
    assert os.listdir(directory.checkpoints) == []


def test_nothing_outside_of_the_runs_directory_is_given_up(directory: RunDirectory, tmp_path: Path) -> None:
    """Whatever a journal says: not by an absolute path, by `..`, by a link, by a name that begins alike."""
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_bytes(b"a")
    (Path(directory.staged) / "link").symlink_to(outside)
    (Path(directory.staged) / "name").symlink_to(outside / "file")
    alike = Path(directory.path, ".run/staged-by-me")
    alike.mkdir()
    (alike / "file").write_bytes(b"a")
    empty = Path(f"{directory.checkpoints}-of-mine")
    (empty / "step").mkdir(parents=True)
    (Path(directory.path) / "mine.txt").write_bytes(b"a")
    for source in (
        str(outside / "file"),
        str(outside),
        "../../precious/file",
        ".run/staged/../../../../precious/file",
        ".run/staged/link/file",
        ".run/staged-by-me/file",
        ".run/format.json",
        "mine.txt",
        ".run/staged",
        ".",
        "",
        "checkpoints",
        f"{empty}/step/file",
    ):
        release(directory, asset(source))
        release(directory, ArtifactEntry(**COMMON, name="other", source=source, at=None, size=1))
        release(directory, checkpoint(source))
    release(directory, asset(str(outside / "file"), grows=True))
    assert contents(outside) == {"file": b"a"}
    assert contents(alike) == {"file": b"a"}
    assert (empty / "step").is_dir()
    assert (Path(directory.path) / "mine.txt").exists()
    assert os.path.exists(os.path.join(directory.inner, "format.json"))
    release(directory, asset(".run/staged/name"))
    assert (outside / "file").exists()


def test_a_file_that_grows_is_not_given_up_while_it_may_grow(
    own: Staging, directory: RunDirectory, tmp_path: Path
) -> None:
    (tmp_path / "log").write_bytes(b"one\n")
    path, _ = own.grow(str(tmp_path / "log"))
    release(directory, asset(directory.relative(path), grows=True))
    assert os.path.exists(path)


def test_room_is_what_the_disk_has_but_some(own: Staging, directory: RunDirectory) -> None:
    found = os.statvfs(directory.staged)
    free = found.f_bavail * found.f_frsize
    assert not own.fits(free - (200 << 20))
    assert not own.fits(1 << 60)
    assert own.fits(0) == (free >= 256 << 20)
