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


@pytest.fixture
def damaged(net):
    """The pack of a large file of ``big:v1`` is lost; ``big:v0`` and ``big:v2`` are whole."""
    (net.folder / "big").mkdir()
    for step in range(3):
        (net.folder / "big/x.bin").write_bytes(random.Random(step).randbytes(100_000 * (3 - abs(step - 1))))
        (net.folder / "big/y.txt").write_text(f"{step}\n")
        net("add", "big", "big")
    max(packs(net), key=lambda path: path.stat().st_size).unlink()
    return net


def test_fsck_says_what_can_still_be_read(damaged):
    """How many assets are whole, which are lost, and the nearest whole versions; in JSON all of it."""
    out = damaged("fsck", code=5).out.splitlines()
    [loss] = [line for line in out if line.startswith("    ")]
    assert " ".join(loss.split()) == "big:v1 1 of 2 assets whole lost: x.bin nearest whole: big:v0 and big:v2"
    assert out[0].startswith("I7  packs/")
    assert out[-1] == "1 problem"
    [value] = damaged.json("fsck", code=5)
    [told] = value["losses"]
    assert told.pop("problem").startswith("x.bin: packs/")
    expected = {
        "address": "big:v1",
        "whole": 1,
        "lost": ["x.bin"],
        "unnamed": 0,
        "more": 0,
        "older": "big:v0",
        "newer": "big:v2",
    }
    assert told == expected
    assert value["hurt"] == ["big:v1"]
    assert value["unreadable"] == []
    assert value["sample"] is None
    damaged("get", "big:v1", "back", "--only", "y.txt")
    assert (damaged.folder / "back/y.txt").read_text() == "1\n"


def test_fsck_of_a_sample(net):
    """It says how much was read and by what seed, and the same seed reads the same."""
    [value] = net.json("fsck", "--sample", "30%")
    told = value["sample"]
    assert told["share"] == 0.3
    assert 0 < told["bytes"] <= told["of_bytes"]
    assert value["checked"]["bytes read"] == told["bytes"]
    [again] = net.json("fsck", "--sample", "0.3", "--seed", told["seed"])
    assert again["sample"] == told
    out = net("fsck", "--sample", "100%").out.splitlines()
    assert out[-2].startswith("sample: 100.0% of the bytes, ")
    assert "again: --sample 100% --seed " in out[-2]
    assert out[-1] == "no problems"
    for wrong in ("0", "101%", "two", "-1%", "nan"):
        assert "share" in net.error("fsck", "--sample", wrong, code=2)
    net.error("fsck", "--sample", "1%", "--deep", code=2)
    net.error("fsck", "--seed", "1", code=2)


@pytest.mark.parametrize("damage", ["rubbish", "gone", "catalog"])
def test_fsck_of_a_repository_that_cannot_be_opened(damaged, damage):
    """A marker or a catalog that is lost is one problem of several; the others are found all the same."""
    marker = damaged.folder / ".mandapa/mandapa.json"
    if damage == "gone":
        marker.unlink()
    elif damage == "rubbish":
        marker.write_text("rubbish")
    else:
        for head in (damaged.folder / ".mandapa/head").iterdir():
            head.unlink()
        min((damaged.folder / ".mandapa/catalog").iterdir()).write_text("rubbish")
    damaged("log", "--repo", ".mandapa", code=3 if damage == "gone" else 5)
    [value] = damaged.json("fsck", "--repo", ".mandapa", code=5)
    assert {found["invariant"] for found in value["findings"]} == {"I2" if damage == "catalog" else "I1", "I7"}
    assert len(value["hurt"]) == 1
    assert value["hurt"][0].endswith(":v1")


def test_fsck_of_a_newer_repository(net):
    """It is not judged: 7, as for any other command."""
    marker = net.folder / ".mandapa/mandapa.json"
    marker.write_text(marker.read_text().replace('"format":1', '"format":2'))
    assert "newer" in net.error("fsck", code=7) or "upgrade" in net.error("fsck", code=7)


def test_fsck_of_much_damage_stays_readable(net):
    """Of hundreds of problems the first are told, and how many more there are; JSON has all."""
    for step in range(60):
        (net.folder / "x.txt").write_text(f"{step}\n")
        net("add", "many", "x.txt")
    for path in packs(net):
        path.unlink()
    out = net("fsck", code=5).out
    assert out.count("I4  ") == 50
    assert "... and 12 problems more: --json names all" in out
    assert "... and 12 versions more: --json names all" in out
    [value] = net.json("fsck", code=5)
    assert len(value["findings"]) == len(value["losses"]) == 62
    assert value["checked"]["versions"] == 62


def test_fsck_escapes_what_it_tells(net):
    """Paths of foreign versions cannot steer a terminal."""
    import mandapa

    repo = mandapa.open(".mandapa")
    with repo.artifact("odd").transaction() as txn:
        txn.add_bytes("a\u202eb.bin", random.Random(2).randbytes(100_000))
    max(packs(net), key=lambda path: path.stat().st_size).unlink()
    result = net("fsck", code=5)
    assert "\u202e" not in result.out
    assert "a\\u202eb.bin" in result.out
