"""``expire``, ``policy``."""

from __future__ import annotations

import json
import shlex

import pytest
from click.testing import CliRunner

import mandapa
from mandapa.cli import main


@pytest.fixture
def series(cli):
    """Six versions of ``net`` with steps and losses, the second one ``prod``; two of ``data``."""
    cli("init")
    for n in range(6):
        (cli.folder / "x").write_text(f"{n}" * 1000)
        cli("add", "net", "x", "--meta", f"step={n * 500}", "--meta", f"loss={abs(n - 2)}.5")
    cli("alias", "net", "prod", "v1")
    cli("add", "data", "x")
    (cli.folder / "x").write_text("more")
    cli("add", "data", "x")
    return cli


RULES = ("--keep-last", "2", "--keep-best", "1:loss:min", "--keep-every", "1000")


def live(cli, name="net"):
    return sorted(version["number"] for version in cli.json("log", name))


def test_a_plan_is_only_shown(series):
    """What goes, what stays and why, the bytes, and the line that does it."""
    lines = [" ".join(line.split()) for line in series("expire", "net", *RULES).out.splitlines()]
    assert lines[:7] == [
        "net",
        "goes v3",
        "stays v5 newest, keep-last 2",
        "stays v4 keep-last 2, keep-every 1000",
        "stays v2 keep-best 1:loss:min, keep-every 1000",
        "stays v1 alias prod",
        "stays v0 keep-every 1000",
    ]
    assert lines[7] == "1 version would go, 5 stay; nothing was done"
    assert lines[8].endswith(" B are theirs alone")
    assert lines[9:] == ["do it: mandapa expire net --keep-last 2 --keep-best 1:loss:min --keep-every 1000 --yes"]
    assert live(series) == [0, 1, 2, 3, 4, 5]


def test_plan_then_apply(series):
    """The file holds the plan; what got a name meanwhile is skipped; the way back is told, and works."""
    [value] = series.json("expire", "net", "--keep-last", "2", "--no-keep-aliased", "--plan", "plan.json")
    plan = json.loads((series.folder / "plan.json").read_text())
    assert value == {**plan, "requests": 2, "month": 0, "currency": "USD"}
    [part] = value["artifacts"]
    assert [one["version"] for one in part["goes"]] == [0, 1, 2, 3]
    assert [one["aliases"] for one in part["goes"]] == [[], ["prod"], [], []]
    assert all(one["alone"] > 0 for one in part["goes"])
    assert value["freed"] == sum(one["alone"] for one in part["goes"]) == value["object_bytes"]
    assert (value["shared"], value["unread"]) == (0, [])
    series("alias", "net", "keep", "v2")
    out = series("expire", "--apply", "plan.json").out
    assert "skipped net:v2: it got the name 'keep' since the plan was made" in out
    assert "deleted 3 versions of net: v0-v1, v3, and dropped prod (v1)" in out
    [undo] = [line for line in out.splitlines() if line.startswith("undo: mandapa ")]
    assert "then: mandapa alias net prod v1" in out
    assert live(series) == [2, 4, 5]
    series(*undo.removeprefix("undo: mandapa ").split())
    assert live(series) == [0, 1, 2, 3, 4, 5]
    values = series.json("expire", "--apply", "plan.json")[0]["versions"]
    assert {one["address"]: one["deleted"] for one in values} == {f"net:v{n}": False for n in range(4)}
    assert all("brought back" in one["skipped"] or "'keep'" in one["skipped"] for one in values)
    assert "nothing was deleted" in series("expire", "--apply", "plan.json").out


def test_names_that_go_are_told_first(series):
    """A tag is never used again."""
    series("tag", "net", "paper", "v0")
    out = series("expire", "net", "--keep-last", "1", "--no-keep-aliased", "--no-keep-tagged").out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "drops paper a tag, for ever, with v0" in lines
    assert "drops prod an alias, with v1" in lines


def test_yes_plans_and_does(series):
    """In one go; the values say what became of each."""
    [value] = series.json("expire", "net", *RULES[:2], "--yes")
    assert [one["address"] for one in value["versions"]] == ["net:v0", "net:v2", "net:v3"]
    assert all(one["deleted"] and one["until"].endswith("Z") and not one["skipped"] for one in value["versions"])
    assert live(series) == [1, 4, 5]
    assert "nothing to delete" in series("expire", "net", *RULES[:2]).out
    assert "nothing was deleted" in series("expire", "net", *RULES[:2], "--yes").out
    assert [version["number"] for version in series.json("log", "--deleted", "net")] == [3, 2, 0]
    series("fsck", "--deep")


def test_the_line_that_does_it(series):
    """It is what was asked for, ready to be typed."""
    out = series("expire", "net", "data", *RULES, "--no-keep-tagged", "--no-keep-used").out
    [line] = [line for line in out.splitlines() if line.startswith("do it: mandapa ")]
    words = shlex.split(line.removeprefix("do it: mandapa "))
    assert words == ["expire", "net", "data", *RULES, "--no-keep-tagged", "--no-keep-used", "--yes"]
    out = series("expire", "--all", "--keep-best", "1:my loss:min", "--plan", "my plan").out
    [line] = [line for line in out.splitlines() if line.startswith("do it: mandapa ")]
    assert shlex.split(line) == ["do", "it:", "mandapa", "expire", "--apply", "my plan"]
    out = series("expire", "--all", "--keep-best", "1:my loss:min").out
    assert out.endswith("do it: mandapa expire --all --keep-best '1:my loss:min' --yes\n")


def test_what_it_costs(series, monkeypatch):
    """By prices in a file: what the bytes that would be free cost a month."""
    (series.folder / "prices.toml").write_text('storage_gb_month = 1000\ncurrency = "INR"\n')
    [value] = series.json("expire", "net", "--keep-last", "1", "--prices", "prices.toml")
    assert value["month"] == pytest.approx(value["freed"] / 2**30 * 1000)
    assert value["currency"] == "INR"
    monkeypatch.setenv("MANDAPA_PRICES", "prices.toml")
    assert " INR a month" in series("expire", "net", "--keep-last", "1").out


def test_policies_are_stored(series):
    """Set, shown, used by ``expire --all``, a floor for other rules, dropped."""
    assert "none is stored" in series("policy", "show").out
    assert series.json("policy", "show", "net") == [{"artifact": "net", "policy": None, "source": None}]
    assert series("policy", "set", "net", "--keep-last", "4", "--no-keep-aliased").out == (
        "net: --keep-last 4 --no-keep-aliased\n"
    )
    series("policy", "set", "--default", "--keep-last", "1")
    assert [(one["artifact"], one["policy"]["keep_last"]) for one in series.json("policy", "show")] == [
        (None, 1),
        ("net", 4),
    ]
    [held] = series.json("policy", "show", "data")
    assert (held["source"], held["policy"]["keep_last"]) == ("default", 1)
    assert series("policy", "show", "data").out == "data: --keep-last 1 (the default)\n"
    assert "keep-last 4 (stored policy)" in series("expire", "net", "--keep-last", "1").out
    [value] = series.json("expire", "--all", "--yes")
    assert [one["address"] for one in value["versions"]] == ["data:v0", "net:v0", "net:v1"]
    assert (value["versions"][2]["aliases"], value["versions"][2]["tags"]) == (["prod"], [])
    series("policy", "drop", "--default")
    out = series("expire", "--all").out
    assert out == "nothing to delete: a rule keeps all 4 versions\n1 artifact without a policy: left alone\n"
    series("policy", "drop", "net")
    assert series.json("policy", "show") == []
    assert "no policy is stored" in series.error("policy", "drop", "net", code=3)
    assert "keep-last 5" in series.error("expire", "--all", code=2)


@pytest.mark.parametrize(
    ("call", "code", "says"),
    [
        (["expire"], 2, "name artifacts, or say --all"),
        (["expire", "net", "--all"], 2, "name artifacts, or say --all"),
        (["expire", "net"], 2, "nearly all would go"),
        (["expire", "net", "--no-keep-aliased"], 2, "nearly all would go"),
        (["expire", "net", "--keep-last", "0"], 2, "x>=1"),
        (["expire", "net", "--keep-best", "loss:min"], 2, "3:val/loss:min"),
        (["expire", "net", "--newer-than", "2 weeks"], 2, "90m, 12h, 14d, 2w"),
        (["expire", "nett", "--keep-last", "1"], 3, "did you mean 'net'"),
        (["expire", "net:v1", "--keep-last", "1"], 2, "cannot name an artifact"),
        (["expire", "net", "--keep-last", "1", "--yes", "--plan", "p"], 2, "one of --plan, --apply, --yes"),
        (["expire", "--apply", "missing.json"], 3, "missing.json"),
        (["expire", "--apply", "x"], 2, "not a plan"),
        (["expire", "net", "--apply", "x"], 2, "--apply takes a plan"),
        (["expire", "--keep-last", "3", "--apply", "x"], 2, "--apply takes a plan"),
        (["policy", "set", "net"], 2, "give a rule"),
        (["policy", "set", "--keep-last", "1"], 2, "--default"),
        (["policy", "set", "net", "--default", "--keep-last", "1"], 2, "--default"),
        (["policy", "set", "nobody", "--keep-last", "1"], 3, "nobody"),
        (["policy", "show", "nobody"], 3, "nobody"),
        (["policy", "drop"], 2, "--default"),
    ],
)
def test_what_cannot_be_asked(series, call, code, says):
    """One line says what can; nothing is deleted."""
    assert says in series.error(*call, code=code)
    assert live(series) == [0, 1, 2, 3, 4, 5]


def test_a_plan_of_elsewhere(series, tmp_path):
    """Another repository's plan is refused; so is one of another command."""
    series("expire", "net", *RULES[:2], "--plan", "p.json")
    series("init", tmp_path / "other")
    assert "is for repository" in series.error("--repo", tmp_path / "other", "expire", "--apply", "p.json", code=2)
    series("repack", "net", "--plan", "r.json")
    assert "not a plan of 'mandapa expire" in series.error("expire", "--apply", "r.json", code=2)


def test_what_is_printed_steers_no_terminal(series):
    """A metric of a stored policy, and a plan file, can come from anybody."""
    repo = mandapa.open(".mandapa")
    repo.set_policy("net", mandapa.Policy(keep_best=("1:\x1b[2Jloss:min",)))
    for call in (["policy", "show"], ["policy", "show", "net"], ["expire", "net"]):
        out = series(*call).out
        assert "\x1b" not in out
        assert "x1b[2J" in out or call[0] == "expire"
    series("expire", "net", "--keep-last", "1", "--plan", "p.json")
    text = (series.folder / "p.json").read_text().replace('"name":"net"', '"name":"\\u001b[2J"')
    (series.folder / "p.json").write_text(text)
    assert "\x1b" not in series("expire", "--apply", "p.json").out


def test_many_that_stay(cli):
    """The newest twenty are listed, the rest is counted."""
    cli("init")
    repo = mandapa.open(".mandapa")
    for n in range(26):
        with repo.artifact("net").transaction(metadata={"step": n}) as txn:
            txn.add_bytes("x", bytes([n]))
    lines = cli("expire", "net", "--keep-last", "25").out.splitlines()
    assert sum(line.split()[0] == "stays" for line in lines) == 20
    assert "  ... and 5 more stay: --json lists them" in lines
    cli("expire", "net", "--keep-last", "24", "--yes")
    out = cli("expire", "net", "--keep-last", "1", "--yes").out
    assert "deleted 23 versions of net: v2-v24" in out
    assert "undo: mandapa undelete net:v2 ... ('mandapa log --deleted ARTIFACT' lists them)" in out


def test_many_with_gaps(cli):
    """The first twenty runs of numbers are shown, and how many there are in all."""
    cli("init")
    repo = mandapa.open(".mandapa")
    for n in range(50):
        with repo.artifact("net").transaction(metadata={"step": n + 1}) as txn:
            txn.add_bytes("x", bytes([n]))
    goes = cli("expire", "net", "--keep-every", "2").out.splitlines()[1]
    assert goes.split(maxsplit=1)[1].startswith("v0, v2, v4, ")
    assert goes.endswith(", v38, ... (25 in all)")


def test_a_failure_in_between(series, monkeypatch):
    """What was deleted until then is told, with the way back, and then the error."""
    from mandapa.errors import StorageError
    from mandapa.object_store import LocalObjectStore

    log = mandapa.open(".mandapa").artifact("net").open_log().id
    create = LocalObjectStore.create

    def failing(store, key, data):
        if key.startswith(f"log/{log}/"):
            raise StorageError("the cable was pulled")
        create(store, key, data)

    monkeypatch.setattr(LocalObjectStore, "create", failing)
    found = CliRunner().invoke(main, ["expire", "--all", "--keep-last", "1", "--yes"])
    assert found.exit_code == 7
    assert "undo: mandapa undelete data:v0" in found.stdout
    assert found.stderr.endswith("the cable was pulled\n")
    assert (live(series), live(series, "data")) == ([0, 1, 2, 3, 4, 5], [1])
