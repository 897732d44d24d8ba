"""``alias``, ``tag``, ``artifact``, ``delete``, ``undelete``."""

from __future__ import annotations

import pytest


def test_alias_moves(net):
    """To the newest by default; it says what it was."""
    assert net("alias", "net", "prod", "v0").out == "net:prod is v0\n"
    assert net("alias", "net", "prod").out == "net:prod is v1; it was v0\n"
    assert net.json("alias", "net", "prod", "best~1") == [{"artifact": "net", "name": "prod", "version": 0, "was": 1}]
    assert net.json("alias", "net") == [{"name": "best", "version": 1}, {"name": "prod", "version": 0}]
    assert net("alias", "net").out == "best  v1\nprod  v0\n"


def test_alias_is_dropped(net):
    """Its history stays."""
    net("alias", "net", "prod", "v0")
    assert net("alias", "net", "-d", "prod").out == "net:prod is dropped; it was v0\n"
    history = net.json("alias", "net", "prod", "--history")
    assert [step["version"] for step in history] == [0, None]
    assert set(history[0]) == {"kind", "name", "version", "at", "by"}
    assert "dropped" in net("alias", "net", "--history").out
    net.error("alias", "net", "-d", "prod", code=3)


def test_tag_never_moves(net):
    """A second one of the name is a conflict, even after it was dropped, even for an alias."""
    net("tag", "net", "paper", "v0")
    net.error("tag", "net", "paper", "v1", code=4)
    net.error("alias", "net", "paper", "v1", code=4)
    assert net.json("tag", "net") == [{"name": "paper", "version": 0}]
    net("tag", "net", "-d", "paper")
    net.error("tag", "net", "paper", "v1", code=4)
    assert [step["version"] for step in net.json("tag", "net", "--history")] == [0, None]
    assert [step["name"] for step in net.json("alias", "net", "--history")] == ["best"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["net", "latest"], 2),
        (["net", "v3"], 2),
        (["net", "a b"], 2),
        (["net", "prod", "v9"], 3),
        (["net", "prod", "nope"], 3),
        (["nope", "prod"], 3),
        (["nope"], 3),
        (["net", "-d"], 2),
        (["net", "prod", "v0", "-d"], 2),
        (["net", "prod", "v0", "--history"], 2),
    ],
)
@pytest.mark.parametrize("command", ["alias", "tag"])
def test_names_that_cannot_be(net, command, arguments, code):
    """Nothing is named."""
    net.error(command, *arguments, code=code)
    assert net.json("alias", "net") == [{"name": "best", "version": 1}]


def test_delete_can_be_undone(net):
    """It says how, and the same command brings it back."""
    out = net("delete", "net:v0").out
    assert "undo: mandapa undelete net:v0" in out
    assert "deleted" in net.error("show", "net:v0", code=3)
    assert net("undelete", "net:v0").out == "brought back net:v0\n"
    net("show", "net:v0")


def test_delete_is_all_or_nothing(net):
    """A mistake in one address stops all, of other artifacts too."""
    net("add", "other", "out")
    net.error("delete", "other:v0", "net:v0", "net:v9", code=3)
    assert "best" in net.error("delete", "net:v0", "net:v1", code=4)
    assert len(net.json("log", "net")) == 2
    assert net.json("delete", "net:v0", "other:latest") == [{"deleted": ["net:v0", "other:v0"]}]
    assert net.json("undelete", "other:v0", "net:v0") == [{"undeleted": ["other:v0", "net:v0"]}]


@pytest.mark.parametrize("command", ["delete", "undelete"])
def test_delete_wants_a_version(net, command):
    """Never 'the newest one' by omission, never a file."""
    assert "net:v3" in net.error(command, "net", code=2)
    assert "mandapa rm" in net.error(command, "net:v0/run.sh", code=2)
    net.error(command, code=2)


def test_undelete_what_is_not_deleted(net):
    """It says so."""
    net.error("undelete", "net:v0", code=2)
    net.error("undelete", "net:v9", code=3)


def test_artifact_rename(net):
    """The history goes with it."""
    net("artifact", "rename", "net", "web")
    assert len(net.json("log", "web")) == 2
    net.error("log", "net", code=3)
    net("add", "data", "out")
    net.error("artifact", "rename", "web", "DATA", code=4)
    net.error("artifact", "rename", "net", "x", code=3)
    assert net.json("artifact", "rename", "web", "net") == [{"artifact": "net", "was": "web"}]


def test_artifact_remove_asks(net):
    """Without --yes it says what would go, does nothing, and ends with 1."""
    out = net("artifact", "remove", "net", code=1).out
    assert "2 versions" in out
    assert "--yes" in out
    assert net.json("artifact", "remove", "net", code=1)[0]["removed"] is False
    assert len(net.json("log", "net")) == 2
    [value] = net.json("artifact", "remove", "net", "--yes")
    assert (value["removed"], value["versions"], value["names"]) == (True, 2, ["best"])
    assert net.json("log") == []
    net.error("artifact", "remove", "net", "--yes", code=3)
