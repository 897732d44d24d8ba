"""``drill``."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from mandapa.repository.repository import Repository
from mandapa.testing.server import serve


def largest(net):
    files = [path for path in (net.folder / ".mandapa").rglob("*") if path.parent.name in ("packs", "meta")]
    return max(files, key=lambda path: path.stat().st_size)


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.fixture
def big(net):
    """With an artifact of one large file and a small one, too."""
    (net.folder / "big").mkdir()
    (net.folder / "big/x.bin").write_bytes(random.Random(1).randbytes(300_000))
    (net.folder / "big/y.txt").write_text("small\n")
    net("add", "big", "big")
    return net


def test_a_drill_says_what_it_proved(net):
    """Files, bytes and time; that it was recorded; and show tells when, and by whom."""
    out = net("drill", "net:v0").out.splitlines()
    assert out[0].startswith("net:v0 is restorable: 3 files, ")
    assert out[-1].startswith("recorded: mandapa/restored ")
    [shown] = net.json("show", "net:v0")
    fact = shown["facts"]["mandapa/restored"]
    assert out[-1] == f"recorded: mandapa/restored {fact['at']}"
    assert "@" in fact["by"]
    assert "mandapa/restored" in net("show", "net:v0").out


def test_a_drill_as_json(net):
    """The keys of docs/cli.md; nothing is recorded when that is not wanted."""
    [value] = net.json("drill", "net", "--no-record", "--dir", str(net.folder))
    assert (value["address"], value["ok"], value["recorded"], value["unrecorded"]) == ("net:v1", True, False, "")
    assert (value["files"], value["problems"], value["unloaded"]) == (3, [], [])
    assert net.json("show", "net")[0]["facts"] == {}
    assert not [path for path in net.folder.iterdir() if path.name.startswith("mandapa-drill")]


def test_a_drill_names_what_differs(big):
    """Ends with 5; the file that cannot be had is named, what is whole is counted, nothing is recorded."""
    spoil(largest(big))
    out = big("drill", "big", code=5).out.splitlines()
    assert out[0] == "big:v0 cannot be restored in full: 1 problem"
    assert out[1].startswith("    x.bin: ")
    assert "packs/" in out[1]
    assert out[2].startswith("what is whole: 1 file, ")
    [value] = big.json("drill", "big", code=5)
    assert [one["path"] for one in value["problems"]] == ["x.bin"]
    assert big.json("show", "big")[0]["facts"] == {}


def test_a_failed_drill_says_when_it_last_went_well(big):
    """What was proven once stays a fact, and is told beside the damage."""
    proven = big.json("drill", "big")[0]["at"]
    spoil(largest(big))
    out = big("drill", "big", code=5).out.splitlines()
    assert out[-1].startswith(f"last proven restorable: {proven}, by ")
    assert big.json("show", "big")[0]["facts"]["mandapa/restored"]["at"] == proven


def test_a_drill_of_all(big):
    """Every artifact's newest version, whatever becomes of the others; 5 when one is hurt."""
    out = big("drill", "--all", "--no-record").out.splitlines()
    assert [line.split()[0] for line in out] == ["big:v0", "net:v1", "2"]
    assert out[-1] == "2 of 2 versions restorable"
    spoil(largest(big))
    out = big("drill", "--all", code=5).out.splitlines()
    assert "NOT restorable: x.bin" in out[0]
    assert out[-1] == "1 of 2 versions restorable"
    values = big.json("drill", "--all", code=5)
    assert [(value["address"], value["ok"]) for value in values] == [("big:v0", False), ("net:v1", True)]


def test_a_drill_of_all_with_an_unreadable_log(big):
    """No verdict for that artifact, the others are drilled."""
    records = sorted((big.folder / ".mandapa/log").rglob("0000*"))
    victim = next(path for path in records if b'"first"' in path.read_bytes())
    for head in (big.folder / ".mandapa/head").iterdir():
        head.unlink()
    spoil(victim)
    out = big("drill", "--all", "--no-record", code=5).out
    assert "net  " in out
    assert "no verdict: " in out
    [lost] = [value for value in big.json("drill", "--all", "--no-record", code=5) if not value["ok"]]
    assert (lost["address"], lost["error"], lost["exit_code"]) == ("net", "CorruptionError", 5)


def test_a_drill_that_may_not_be_recorded(net, monkeypatch):
    """What it proved is printed all the same; ends with 6 and says which permission lacks."""
    from mandapa.errors import AccessDeniedError
    from mandapa.object_store import LocalObjectStore

    def create(self, key, data):
        raise AccessDeniedError("s3:PutObject is not allowed")

    monkeypatch.setattr(LocalObjectStore, "create", create)
    result = net("drill", "net", code=6)
    assert "is restorable" in result.out
    assert "not recorded" in result.out
    assert result.err == "mandapa: error: s3:PutObject is not allowed\n"
    assert net("drill", "net", "--no-record").err == ""
    assert "not recorded: s3:PutObject" in net("drill", "--all", code=6).out


def test_a_drill_needs_one_whole_version(net):
    """Not a file in it, not nothing, not both."""
    assert "whole version" in net.error("drill", "net/hparams.yaml", code=2)
    assert "--all" in net.error("drill", code=2)
    net.error("drill", "net", "--all", code=2)
    net.error("drill", "nett", code=3)
    net("rm", "net", "logs")
    net("delete", "net:v0")
    assert "deleted" in net.error("drill", "net:v0", code=3)


def test_a_drill_of_nothing(cli):
    """A repository without artifacts is no failure."""
    cli("init")
    assert cli("drill", "--all").out == "no artifacts yet\n"


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_checks_of_a_bucket(tmp_path, damage):
    """The commands as they are typed, at a server that speaks S3: damage is found, named, and told by the exit code."""
    with serve() as server:
        store = server.s3(prefix="runs")
        repo = Repository.create(store, codec="raw")
        for step in range(2):
            with repo.artifact("net").transaction() as txn:
                txn.add_bytes("model.bin", random.Random(step).randbytes(200_000))
                txn.add_bytes("notes.txt", b"a note")
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": server.url}

        def run(*arguments):
            command = [sys.executable, "-m", "mandapa.cli", *arguments, "--repo", "s3://bucket/runs", "--json"]
            environment = {**os.environ, **keys, "TMPDIR": str(tmp_path)}
            found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert found.stderr == ""
            return found.returncode, json.loads(found.stdout)

        assert [run("fsck", "--deep")[0], run("drill", "net", "--no-record")[0]] == [0, 0]
        key = max(store.list("packs/"), key=lambda info: info.size).key
        data = bytearray(store.get(key))
        data[len(data) // 2] ^= 1
        if damage == "lost":
            store.delete([key])
        else:
            store.put(key, data if damage == "flipped" else data[: len(data) // 2])
        code, report = run("fsck", "--deep")
        assert code == 5
        [hurt] = report["losses"]
        assert (hurt["lost"], hurt["whole"]) == (["model.bin"], 1)
        code, report = run("drill", hurt["address"])
        assert code == 5
        assert [one["path"] for one in report["problems"]] == ["model.bin"]
        assert report["files"] == 1
        assert run("drill", hurt["older"] or hurt["newer"])[0] == 0
        assert os.listdir(tmp_path) == []
