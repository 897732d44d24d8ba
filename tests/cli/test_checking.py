"""``fsck``, ``doctor``."""

from __future__ import annotations

import random

import pytest


def packs(net):
    return sorted(path for path in (net.folder / ".mandapa").rglob("*") if path.parent.name in ("packs", "meta"))


def test_fsck_of_a_whole_repository(net):
    """It says what was looked at."""
    assert net("fsck").out.splitlines()[-1].startswith("no problems")
    [value] = net.json("fsck", "--deep")
    assert (value["ok"], value["deep"], value["findings"], value["hurt"]) == (True, True, [], [])
    assert value["checked"]["versions"] == 2
    assert value["checked"]["bytes read"] > 0


def test_fsck_finds_what_is_missing(net):
    """Ends with 5, names the version that it hurts."""
    packs(net)[0].unlink()
    result = net("fsck", code=5)
    assert "problem" in result.out
    [value] = net.json("fsck", code=5)
    assert value["ok"] is False
    assert value["hurt"]
    assert set(value["findings"][0]) == {"invariant", "where", "problem"}


def test_fsck_deep_finds_a_flipped_bit(net):
    """And reading it is refused, with 5."""
    (net.folder / "x.bin").write_bytes(random.Random(1).randbytes(300_000))
    net("add", "big", "x.bin")
    victim = max(packs(net), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(data)
    net("fsck", "--deep", code=5)
    assert "packs/" in net.error("cat", "big/x.bin", code=5)
    net("get", "big", "back", code=5)
    assert not (net.folder / "back/x.bin").exists()


def test_doctor(net):
    """Everything that a repository needs of its place, by name; and nothing is left behind."""
    before = sorted(net.folder.rglob("*"))
    out = net("doctor").out
    assert "FAIL" not in out
    assert out.splitlines()[-1] == "all is well"
    [value] = net.json("doctor")
    assert value["ok"] is True
    assert [check["check"] for check in value["checks"]] == [
        "versions",
        "repository",
        "read",
        "list",
        "writers",
        "write and delete",
        "create-if-absent",
    ]
    assert sorted(net.folder.rglob("*")) == before


def test_doctor_of_one_writer(cli):
    """The promise is told, and create-if-absent is not asked for."""
    cli("init", "--single-writer")
    [value] = cli.json("doctor")
    assert value["writers"] == "single"
    assert "not needed" in value["checks"][-1]["detail"]


def test_doctor_says_what_lacks(net, monkeypatch):
    """A store that takes a lie for an answer is not trusted: 1; one that refuses: 6."""
    from mandapa.errors import AccessDeniedError
    from mandapa.object_store import LocalObjectStore

    real = LocalObjectStore.create
    monkeypatch.setattr(LocalObjectStore, "create", LocalObjectStore.put)
    result = net("doctor", code=1)
    assert "FAIL  create-if-absent" in result.out
    monkeypatch.setattr(LocalObjectStore, "create", real)

    def put(self, key, data):
        raise AccessDeniedError("s3:PutObject is not allowed")

    monkeypatch.setattr(LocalObjectStore, "put", put)
    result = net("doctor", code=6)
    assert "FAIL  write and delete" in result.out
    assert "s3:PutObject" in result.out


@pytest.mark.parametrize("command", ["fsck", "doctor"])
def test_checks_need_a_repository(cli, command):
    """They make none."""
    assert "mandapa init" in cli.error(command, code=3)
