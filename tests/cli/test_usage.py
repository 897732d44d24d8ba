"""``du``."""

from __future__ import annotations

import json

import pytest

import mandapa


@pytest.fixture
def shared(net):
    """With ``copy``, which has content of ``net``, and a version that was deleted."""
    repo = mandapa.open(str(net.folder / ".mandapa"))
    with repo.artifact("copy").transaction() as txn:
        txn.copy("net", "run.sh", at="run.sh")
    net("delete", "net:v0")
    return net


def lines(result):
    return [line.split() for line in result.out.splitlines()]


def test_a_table_with_totals(shared):
    """Largest first; a folder has no prices; what can go, and what to run."""
    head, first, second, total, *rest = lines(shared("du"))
    assert head == ["artifact", "versions", "logical", "stored", "shared", "exclusive", "reclaimable", "objects"]
    assert (first[0], second[0], total[0]) == ("net", "copy", "total")
    assert (first[1], second[1], total[1]) == ("1", "1", "2")
    assert rest[0][2:4] == ["can", "go:"]
    text = shared("du").out
    assert "mandapa gc" in text
    assert "mandapa expire" in text
    assert "USD" not in text


def test_the_same_as_json(shared):
    """Numbers as the library tells them."""
    [value] = shared.json("du")
    usage = mandapa.open(str(shared.folder / ".mandapa")).usage()
    assert set(value) == {"by", "rows", "total", "unreached", "unreadable", "prices"}
    assert value["by"] == "artifact"
    assert [row["name"] for row in value["rows"]] == ["net", "copy"]
    for found, row in zip([*value["rows"], value["total"]], [*usage.rows, usage.total], strict=True):
        for key in (
            "versions",
            "deleted",
            "logical",
            "stored",
            "shared",
            "exclusive",
            "reclaimable",
            "objects",
            "writes",
        ):
            assert found[key] == getattr(row, key)
        assert found["cost"] == {"month": 0, "writes": 0, "read": 0}
    assert value["rows"][0]["shared"] > 0
    assert value["rows"][0]["reclaimable"] > 0
    assert value["unreached"] == {"objects": usage.unreached, "bytes": usage.unreached_bytes}


def test_by_run_and_month(shared):
    """The first column says by what."""
    assert lines(shared("du", "--by", "run"))[0][0] == "run"
    [value] = shared.json("du", "--by", "month")
    assert len(value["rows"]) == 1
    assert "artifact" in shared("du", "--by", "color", code=2).err


def test_nothing_to_reclaim(net):
    """Nothing is advised; an empty repository is a table of zeros."""
    assert "can go" not in net("du").out
    net("--repo", "empty", "init")
    assert lines(net("--repo", "empty", "du"))[1][:3] == ["total", "0", "0"]


def test_prices(shared, monkeypatch):
    """From a file, or the environment; the file of the option goes first. Money of each row, and of all."""
    prices = shared.folder / "prices.toml"
    prices.write_text(
        'storage_gb_month = 1e6\nwrites_1000 = 100\negress_gb = 1e6\ncurrency = "EUR"\nsource = "ours\\u001b"\n'
    )
    out = shared("du", "--prices", prices).out
    head, first, *_ = lines(shared("du", "--prices", prices))
    assert head[-2:] == ["a", "month"]
    assert first[-1] == "EUR"
    assert "prices: ours\\x1b" in out
    assert "writes were needed" in out
    other = shared.folder / "other.json"
    other.write_text(json.dumps({"storage_gb_month": 1, "currency": "INR"}))
    monkeypatch.setenv("MANDAPA_PRICES", str(other))
    assert "INR" in shared("du").out
    assert shared.json("du")[0]["prices"]["currency"] == "INR"
    assert "EUR" in shared("du", "--prices", prices).out
    other.write_text("no json")
    assert "no table of prices" in shared.error("du", code=2)
    monkeypatch.setenv("MANDAPA_PRICES", "missing.toml")
    assert "missing.toml" in shared.error("du", code=3)


def test_long_tables_are_cut(net):
    """At 40 rows, with the number of the others; ``--all`` and ``--json`` have them all."""
    repo = mandapa.open(str(net.folder / ".mandapa"))
    for number in range(45):
        with repo.artifact(f"a{number}").transaction() as txn:
            txn.add_bytes("x", b"%d" % number)
    table = lines(net("du"))
    assert len(table) == 1 + 40 + 1 + 1
    assert table[-2][:2] == ["6", "more"]
    assert len(lines(net("du", "--all"))) == 1 + 46 + 1
    assert len(net.json("du")[0]["rows"]) == 46


def test_what_cannot_be_read_is_named(shared):
    """And is not counted; names are made harmless."""
    repo = mandapa.open(str(shared.folder / ".mandapa"))
    version = repo["copy"]
    (shared.folder / ".mandapa" / version._state.root.object).unlink()
    out = shared("du").out
    assert "cannot be read, and is not counted: copy:v0: " in out
    [value] = shared.json("du")
    assert value["unreadable"][0]["address"] == "copy:v0"


def test_names_cannot_steer_a_terminal(net):
    """Of runs, which may be any text."""
    repo = mandapa.open(str(net.folder / ".mandapa"))
    artifact = repo.artifact("a")
    artifact.run = "bad\x1b[2J"
    with artifact.transaction() as txn:
        txn.add_bytes("x", b"x")
    out = net("du", "--by", "run").out
    assert "\x1b" not in out
    assert "bad\\x1b[2J" in out
