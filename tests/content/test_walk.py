"""What a folder holds: every file once, in order, and a clear no to what a version cannot hold."""

from __future__ import annotations

import os
import socket

import pytest

from mandapa.content.walk import file_mode, walk
from mandapa.errors import InvalidInputError, NotFoundError


def make(root, *paths):
    for path in paths:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.encode())


def paths(folder, **options):
    return [found.path for found in walk(folder, **options)]


def test_all_files_sorted_by_path(tmp_path):
    """The order is that of the paths as strings, not of folders before files."""
    make(tmp_path, "b", "a/z", "a.b", "a/b/c", "ä", "a-", "Z")
    assert paths(tmp_path) == sorted(["b", "a/z", "a.b", "a/b/c", "ä", "a-", "Z"])


def test_source_and_stat_are_the_files(tmp_path):
    """A found file can be opened, and its stat is its own."""
    make(tmp_path, "a/b")
    [found] = walk(tmp_path)
    with open(found.source, "rb") as file:
        assert file.read() == b"a/b"
    assert os.path.isabs(found.source)
    assert found.stat.st_ino == os.stat(tmp_path / "a/b").st_ino


def test_empty_folder(tmp_path):
    """An empty folder has no files, nor have empty folders in it."""
    (tmp_path / "empty").mkdir()
    assert walk(tmp_path) == []


def test_no_folder(tmp_path):
    """A folder that is not there, and one that is a file, are told apart."""
    with pytest.raises(NotFoundError):
        walk(tmp_path / "nothing")
    make(tmp_path, "file")
    with pytest.raises(InvalidInputError, match="not a folder"):
        walk(tmp_path / "file")


def test_relative_folder(tmp_path, monkeypatch):
    """A relative folder is taken from the working directory; sources are absolute."""
    make(tmp_path, "x/a")
    monkeypatch.chdir(tmp_path)
    [found] = walk("x")
    assert found.source == str(tmp_path / "x" / "a")


def test_symlink_to_a_file_is_the_file(tmp_path):
    """The link's name, the target's bytes and mode."""
    make(tmp_path, "real/tool")
    os.chmod(tmp_path / "real/tool", 0o755)
    (tmp_path / "link").symlink_to("real/tool")
    found = {one.path: one for one in walk(tmp_path)}
    assert found["link"].stat.st_ino == found["real/tool"].stat.st_ino
    assert file_mode(found["link"].stat) == 1


def test_symlink_to_a_folder_is_followed(tmp_path):
    """Its files appear under the link's name too."""
    make(tmp_path, "real/a")
    (tmp_path / "link").symlink_to("real")
    assert paths(tmp_path) == ["link/a", "real/a"]


@pytest.mark.parametrize("target", [".", "..", "../x"])
def test_cycle(tmp_path, target):
    """A symlink to a folder above it is refused, and named."""
    make(tmp_path, "x/y/a")
    (tmp_path / "x/y/back").symlink_to("../../x" if target == "../x" else target)
    with pytest.raises(InvalidInputError, match="back"):
        walk(tmp_path / "x")


def test_two_folders_that_link_to_each_other(tmp_path):
    """A cycle over two links is one too."""
    make(tmp_path, "a/1", "b/2")
    (tmp_path / "a/b").symlink_to("../b")
    (tmp_path / "b/a").symlink_to("../a")
    with pytest.raises(InvalidInputError, match="above it"):
        walk(tmp_path)


def test_special_files_are_named_together(tmp_path):
    """One error names dangling links, pipes and sockets; ten of them at most."""
    make(tmp_path, "fine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # the name of a socket is short
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
        with pytest.raises(InvalidInputError) as error:
            walk(tmp_path)
        for name in ("dangling", "self", "pipe", "socket"):
            assert repr(name) in str(error.value)
        assert paths(tmp_path, skip_special=True) == ["fine"]


def test_many_special_files(tmp_path):
    """Ten are named, the rest are counted."""
    for i in range(13):
        (tmp_path / f"l{i:02}").symlink_to("nowhere")
    with pytest.raises(InvalidInputError, match="'l09' and 3 more"):
        walk(tmp_path)


def test_names_that_no_version_can_hold(tmp_path):
    """Names that are not UTF-8 and names with control characters or backslashes are named."""
    for name in (b"bad\xff", b"tab\there", b"back\\slash"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
            pass
    with pytest.raises(InvalidInputError) as error:
        walk(tmp_path)
    for part in ("bad", "tab", "back"):
        assert part in str(error.value)


def test_the_reserved_folder_is_left_out(tmp_path):
    """`.mandapa` in the walked folder itself is skipped, a repository or not; deeper, it is a folder like any other."""
    make(tmp_path, "a", ".mandapa/mandapa.json", ".mandapa/packs/x", "d/.mandapa/run.json")
    assert paths(tmp_path) == ["a", "d/.mandapa/run.json"]
    (tmp_path / ".mandapa/mandapa.json").unlink()
    assert paths(tmp_path) == ["a", "d/.mandapa/run.json"]
    assert paths(tmp_path / "d") == []
    (tmp_path / ".mandapa").rename(tmp_path / "elsewhere")
    (tmp_path / ".mandapa").symlink_to("elsewhere")
    assert paths(tmp_path) == ["a", "d/.mandapa/run.json", "elsewhere/packs/x"]


def test_a_file_cannot_have_the_reserved_name(tmp_path):
    """It is named, as other names that no version can hold."""
    make(tmp_path, "a", ".mandapa")
    with pytest.raises(InvalidInputError, match=r"'\.mandapa'"):
        walk(tmp_path)


def test_x_bit_is_the_owners():
    """Group and others do not count."""
    assert file_mode(os.stat_result([0o100644] + [0] * 9)) == 0
    assert file_mode(os.stat_result([0o100655] + [0] * 9)) == 0
    assert file_mode(os.stat_result([0o100700] + [0] * 9)) == 1
