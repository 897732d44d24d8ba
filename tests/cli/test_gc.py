"""``gc``."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest


def containers(net):
    return {path.name for path in (net.folder / ".mandapa").rglob("*") if path.parent.name in ("packs", "meta")}


@pytest.fixture
def big(net):
    """With an artifact of two versions, the first of which is deleted."""
    for seed in (1, 2):
        (net.folder / "x.bin").write_bytes(random.Random(seed).randbytes(300_000))
        net("add", "big", "x.bin")
    net("delete", "big:v0")
    return net


def test_it_says_what_would_go_and_stops(big):
    """By artifact, with the versions that could not be brought back, and how to do it."""
    before = containers(big)
    assert big("gc").out == "nothing to free yet: 300 kB were deleted less than 7 days ago\n"
    result = big("gc", "--grace", "0")
    assert result.out.splitlines() == [
        "big  2 objects  300 kB  v0 cannot be brought back then",
        "2 objects, 300 kB, would be freed; nothing was done",
        "do it: mandapa gc --yes --grace 0",
    ]
    assert result.err.count("\n") == 1
    assert "a grace of 0 seconds" in result.err
    assert containers(big) == before
    assert big("undelete", "big:v0")


def test_it_frees(big):
    """What it said, no more; the rest is whole, and the version says why it cannot come back."""
    before = containers(big)
    result = big("gc", "--grace", "0", "--yes")
    assert result.out.splitlines() == [
        "big  2 objects  300 kB  v0 cannot be brought back any more",
        "2 objects, 300 kB, freed",
    ]
    assert len(before - containers(big)) == 2
    big("fsck", "--deep")
    assert "its bytes are gone" in big.error("undelete", "big:v0", code=3)
    assert big("gc", "--grace", "0", "--yes").out == "nothing was freed\n"
    assert big("gc").err == ""


def test_a_plan_is_written_and_applied(big):
    """What came back meanwhile stays, and is named; the grace is that of the plan."""
    big("add", "--replace", "big", "x.bin", "-m", "again")
    (big.folder / "x.bin").write_bytes(random.Random(3).randbytes(300_000))
    big("add", "big", "x.bin")
    big("delete", "big:v3")
    out = big("gc", "--grace", "0", "--plan", "it's a plan.json").out
    assert out.endswith("do it: mandapa gc --apply 'it'\"'\"'s a plan.json'\n")
    big("undelete", "big:v3")
    result = big("gc", "--apply", "it's a plan.json")
    assert "a grace of 0 seconds" in result.err
    lines = result.out.splitlines()
    assert lines[0] == "big  2 objects  300 kB  v0 cannot be brought back any more"
    assert lines[1].startswith("2 objects skipped, such as ")
    assert lines[1].endswith(": is in use")
    assert lines[2] == "2 objects, 300 kB, freed"
    big("fsck", "--deep")


def test_json(big):
    """Of a plan and of what was done."""
    [plan] = big.json("gc", "--grace", "0")
    share = {"artifact": "big", "objects": 2, "bytes": plan["freed"], "lost": [0]}
    assert plan["shares"] == [share]
    assert (plan["grace"], plan["objects"], plan["half_dead"], plan["rewritten"], plan["later"]) == (0, 2, 0, 0, 0)
    [done] = big.json("gc", "--grace", "0", "--yes")
    assert done == {"objects": 2, "freed": plan["freed"], "shares": [share], "skipped": [], "rewritten": []}


def test_what_it_saves(big, monkeypatch):
    """By the prices that are given: nothing for a folder, unless told."""
    Path("prices.toml").write_text('storage_gb_month = 1000.0\ncurrency = "EUR"\n')
    line = "2 objects, 300 kB, 0.28 EUR a month, would be freed; nothing was done"
    assert big("gc", "--grace", "0", "--prices", "prices.toml").out.splitlines()[1] == line
    monkeypatch.setenv("MANDAPA_PRICES", "prices.toml")
    assert big("gc", "--grace", "0").out.splitlines()[1] == line
    [plan] = big.json("gc", "--grace", "0")
    assert (round(plan["month"], 2), plan["currency"]) == (0.28, "EUR")


def test_bytes_of_nobody(net):
    """What was put and never committed is called that."""
    (net.folder / ".mandapa/meta" / ("0" * 32)).write_bytes(b"123")
    assert net("gc", "--grace", "0").out.splitlines()[0] == "never committed  1 object  3 B"
    [done] = net.json("gc", "--grace", "0", "--yes")
    assert done["shares"] == [{"artifact": None, "objects": 1, "bytes": 3, "lost": []}]


def test_usage(big):
    """One way at a time, a grace that is one, a file that is a plan."""
    big.error("gc", "--yes", "--plan", "x", code=2)
    big.error("gc", "--grace", "-1", code=2)
    big.error("gc", "--grace", "inf", "--yes", code=2)
    big.error("gc", "--apply", "missing", code=3)
    Path("plan").write_text(json.dumps({"kind": "gc"}))
    assert "not a plan" in big.error("gc", "--apply", "plan", code=2)
