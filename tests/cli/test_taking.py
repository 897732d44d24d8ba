"""``get``, ``cat``."""

from __future__ import annotations

import base64
import os


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_get_a_version(net):
    """Equal files stay, different ones are replaced, others are left alone."""
    (net.folder / "back").mkdir()
    (net.folder / "back/mine.txt").write_text("mine")
    (net.folder / "back/run.sh").write_text("other")
    [value] = net.json("get", "net:best", "back")
    assert (value["files"], value["written"], value["skipped"], value["size"]) == (3, 3, 0, 28)
    assert files(net.folder / "back") == ["hparams.yaml", "logs/a.txt", "mine.txt", "run.sh"]
    assert (net.folder / "back/run.sh").read_text() == "#!/bin/sh\n"
    assert net.json("get", "net:best", "back")[0]["skipped"] == 3


def test_get_a_folder(net):
    """Its contents become DEST's."""
    net("get", "net/logs", "back")
    assert files(net.folder / "back") == ["a.txt"]


def test_get_a_file(net):
    """As DEST, or into it when it is a folder or ends with a slash."""
    net("get", "net/logs/a.txt", "one.txt")
    net("get", "net/logs/a.txt", "new/")
    net("get", "net/logs/a.txt", "new")
    net("get", "net/logs/a.txt", "new/deep/b.txt")
    assert (net.folder / "one.txt").read_text() == "hello\nworld\n"
    assert files(net.folder / "new") == ["a.txt", "deep/b.txt"]


def test_get_only(net):
    """Patterns over the whole path; * matches / too."""
    net("get", "net", "back", "--only", "*.txt", "--only", "hparams.yaml")
    assert files(net.folder / "back") == ["hparams.yaml", "logs/a.txt"]
    net.error("get", "net", "none", "--only", "*.zip", code=3)
    assert not os.path.exists("none")


def test_get_what_is_not_there(net):
    """Nothing is made."""
    net.error("get", "net/nope", "back", code=3)
    net.error("get", "net:v9", "back", code=3)
    net.error("get", "nope", "back", code=3)
    assert not os.path.exists("back")


def test_get_names_urls(net):
    """They are not fetched."""
    net("add", "net", "--url", "x=s3://b/x")
    assert "not fetched: x is at s3://b/x" in net("get", "net", "back").out
    assert net.json("get", "net", "back")[0]["urls"] == [{"path": "x", "url": "s3://b/x"}]


def test_get_does_not_follow_links_out(net):
    """A symlink where a folder should be is not written through."""
    (net.folder / "back").mkdir()
    (net.folder / "elsewhere").mkdir()
    (net.folder / "back/logs").symlink_to(net.folder / "elsewhere")
    assert "logs" in net.error("get", "net", "back", code=2)
    assert os.listdir(net.folder / "elsewhere") == []


def test_cat(net):
    """Byte for byte, as bytes or as JSON."""
    assert net("cat", "net/logs/a.txt").raw == b"hello\nworld\n"
    [value] = net.json("cat", "net:v0/logs/a.txt")
    assert value == {"address": "net:v0/logs/a.txt", "encoding": "utf-8", "content": "hello\n"}
    data = bytes(range(256)) * 20_000
    (net.folder / "x.bin").write_bytes(data)
    net("add", "net", "x.bin")
    assert net("cat", "net/x.bin").raw == data
    assert base64.b64decode(net.json("cat", "net/x.bin")[0]["content"]) == data


def test_cat_what_is_no_file(net):
    """A folder, a URL, nothing, or a whole version."""
    net("add", "net", "--url", "x=s3://b/x")
    assert "name a file" in net.error("cat", "net", code=2)
    net.error("cat", "net/logs", code=2)
    assert "s3://b/x" in net.error("cat", "net/x", code=2)
    net.error("cat", "net/nope", code=3)
