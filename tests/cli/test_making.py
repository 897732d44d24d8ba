"""``init``, ``add``, ``rm``, ``repack``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import mandapa


def test_init_makes_a_repository_here(cli):
    """The default is ./.mandapa; a second call finds it and changes nothing."""
    [made] = cli.json("init")
    [found] = cli.json("init")
    assert (made["made"], found["made"]) == (True, False)
    assert made["id"] == found["id"]
    assert made["writers"] == "many"
    assert (cli.folder / ".mandapa/mandapa.json").is_file()
    assert "already" in cli("init").out


def test_init_takes_an_address_or_the_usual_choice(cli, monkeypatch):
    """The argument goes before --repo, that before MANDAPA_REPO."""
    monkeypatch.setenv("MANDAPA_REPO", str(cli.folder / "c"))
    cli("--repo", "b", "init", "a")
    assert sorted(os.listdir(cli.folder)) == ["a"]
    cli("--repo", "b", "init")
    cli("init")
    assert sorted(os.listdir(cli.folder)) == ["a", "b", "c"]


def test_init_refuses_a_folder_with_other_things(cli):
    """What is there stays, and no repository is made of it."""
    (cli.folder / "thesis").mkdir()
    (cli.folder / "thesis/notes.txt").write_text("x")
    assert "empty prefix" in cli.error("init", "thesis", code=2)
    assert os.listdir(cli.folder / "thesis") == ["notes.txt"]


def test_init_for_one_writer_is_recorded(cli):
    """The promise holds for everybody, and cannot be made for a repository of many writers."""
    [made] = cli.json("init", "one", "--single-writer")
    assert made["writers"] == "single"
    assert "one writer at a time" in cli("init", "one").out
    assert mandapa.open("one").settings()["writers"] == "single"
    cli("init", "many")
    assert "many writers" in cli.error("init", "many", "--single-writer", code=2)


def test_add_a_folder_gives_its_contents_back(net):
    """Adding and then getting gives the folder, and the x bit, back."""
    net("get", "net", "back")
    assert (net.folder / "back/logs/a.txt").read_text() == "hello\nworld\n"
    assert os.access(net.folder / "back/run.sh", os.X_OK)
    assert sorted(p.name for p in (net.folder / "back").iterdir()) == ["hparams.yaml", "logs", "run.sh"]


def test_add_says_what_changed(net):
    """Counts against the parent, in words and in JSON."""
    (net.folder / "out/new.txt").write_text("x")
    (net.folder / "out/run.sh").unlink()
    [value] = net.json("add", "net", "out")
    assert value["changes"] == {"added": 1, "removed": 1, "changed": 0}
    assert (value["made"], value["number"], value["parent"]) == (True, 2, 1)
    (net.folder / "out/new.txt").write_text("y")
    assert "1 changed" in net("add", "net", "out").out


def test_add_without_change_makes_nothing(net):
    """The newest version stays the newest."""
    assert net("add", "net", "out").out == "nothing changed: net:v1 stays the newest\n"
    [value] = net.json("add", "net", "out")
    assert (value["made"], value["number"]) == (False, 1)


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        (["out"], ["hparams.yaml", "logs/a.txt", "run.sh"]),
        (["out", "--at", "x"], ["x/hparams.yaml", "x/logs/a.txt", "x/run.sh"]),
        (["out/run.sh"], ["run.sh"]),
        (["out/run.sh", "--at", "bin/go"], ["bin/go"]),
        (["out/run.sh", "--at", "bin/"], ["bin/run.sh"]),
        (["out/run.sh", "out/logs"], ["logs/a.txt", "run.sh"]),
        (["out/run.sh", "out/logs", "--at", "x"], ["x/logs/a.txt", "x/run.sh"]),
        (["out/logs/"], ["a.txt"]),
    ],
)
def test_where_things_go(net, arguments, paths):
    """One folder's contents, one file under its name or at --at, several under their names."""
    net("add", "other", *arguments)
    assert [entry["path"] for entry in net.json("ls", "-r", "other")] == paths


def test_add_two_of_one_name_is_refused(net):
    """Nothing is silently overwritten by its namesake."""
    (net.folder / "more").mkdir()
    (net.folder / "more/run.sh").write_text("x")
    assert "both be at 'run.sh'" in net.error("add", "net", "out/run.sh", "more/run.sh", code=2)


def test_add_metadata_is_json_or_text(net):
    """Numbers stay numbers, what is no JSON is text, and = may be in a value."""
    [value] = net.json(
        "add", "net", "-m", "m", "--meta", "loss=1.5", "--meta", "ok=true", "--meta", "name=a=b", "--meta", 's="1"'
    )
    assert value["metadata"] == {"loss": 1.5, "ok": True, "name": "a=b", "s": "1"}


@pytest.mark.parametrize("bad", ["loss", "=1", ""])
def test_add_bad_metadata(net, bad):
    """The message shows how to write it."""
    assert "KEY=VALUE" in net.error("add", "net", "out", "--meta", bad, code=2)


def test_add_metadata_twice(net):
    """One of two values would be lost."""
    assert "twice" in net.error("add", "net", "out", "--meta", "a=1", "--meta", "a=2", code=2)


def test_add_urls(net):
    """A URL is recorded as it is; what is none is refused without being repeated."""
    net("add", "net", "--url", "data/x=s3://bucket/x.parquet")
    [entry] = net.json("ls", "net/data")
    assert entry == {"path": "data/x", "kind": "url", "size": None, "url": "s3://bucket/x.parquet", "checksum": ""}
    assert "AT=URL" in net.error("add", "net", "--url", "s3://u:secret@b/x", code=2)
    assert "secret" not in net.error("add", "net", "--url", "x=https://user:hunter2@host/y", code=2).replace(
        "a secret", ""
    )


def test_add_replace_starts_from_nothing(net):
    """The version is exactly what is added."""
    net("add", "net", "out/run.sh", "--replace")
    assert [entry["path"] for entry in net.json("ls", "-r", "net")] == ["run.sh"]


def test_add_special_files(net):
    """An error that names them, or left out when asked to."""
    os.mkfifo(net.folder / "out/pipe")
    (net.folder / "out/dangling").symlink_to("nowhere")
    error = net.error("add", "net", "out", code=2)
    assert "pipe" in error
    assert "dangling" in error
    net("add", "net", "out", "--skip-special", "-m", "x")
    assert len(net.json("ls", "-r", "net")) == 3


def test_add_what_is_not_there(net):
    """Before anything is read or made."""
    assert "'nope'" in net.error("add", "net", "out", "nope", code=3)
    (net.folder / "link").symlink_to("nowhere")
    assert "dangling link" in net.error("add", "net", "link", code=3)
    assert len(net.json("log", "net")) == 2


def test_add_nothing(net):
    """A call without anything to add is a mistake."""
    assert "nothing to add" in net.error("add", "net", code=2)


def test_add_without_a_repository_makes_none(cli):
    """It says how to make one."""
    (cli.folder / "a.txt").write_text("x")
    assert "mandapa init" in cli.error("add", "net", "a.txt", code=3)
    assert os.listdir(cli.folder) == ["a.txt"]


def test_add_leaves_the_embedded_repository_out(net):
    """The folder that holds .mandapa can be added."""
    net("add", "all", ".")
    assert {entry["path"].partition("/")[0] for entry in net.json("ls", "-r", "all")} == {"out"}


def test_what_get_wrote_can_be_added(net):
    """The reserved folder of a version, which `get` writes too, is no hindrance, and nothing has changed."""
    with mandapa.open(".mandapa").artifact("net").transaction() as txn:
        txn.add_bytes(".mandapa/run.json", b"{}", reserved=True)
    net("get", "net", "copy")
    assert Path("copy/.mandapa/run.json").read_text() == "{}"
    [value] = net.json("add", "net", "copy")
    assert (value["made"], value["number"]) == (False, 2)
    Path("copy/run.sh").unlink()
    [value] = net.json("add", "net", "copy")
    assert value["changes"] == {"added": 0, "removed": 1, "changed": 0}
    assert ".mandapa/run.json" in [entry["path"] for entry in net.json("ls", "-r", "net")]


def test_rm_makes_a_version_without(net):
    """Files and folders; older versions keep them."""
    [value] = net.json("rm", "net", "logs", "run.sh", "-m", "gone", "--meta", "why=old")
    assert value["changes"] == {"added": 0, "removed": 2, "changed": 0}
    assert (value["message"], value["metadata"]) == ("gone", {"why": "old"})
    assert [entry["path"] for entry in net.json("ls", "-r", "net")] == ["hparams.yaml"]
    assert len(net.json("ls", "-r", "net:v1")) == 3


def test_rm_what_is_not_there(net):
    """Nothing is made; an artifact that is not there is not made either."""
    net.error("rm", "net", "nope", code=3)
    assert "did you mean 'net'" in net.error("rm", "nett", "run.sh", code=3)
    assert [entry["artifact"] for entry in net.json("ls")] == ["net"]
    assert len(net.json("log", "net")) == 2


def test_adding_is_atomic_with_its_alias(net):
    """A name that cannot be an alias makes no version."""
    (net.folder / "out/run.sh").write_text("changed")
    net.error("add", "net", "out", "--alias", "v7", code=2)
    assert len(net.json("log", "net")) == 2


def test_file_that_vanishes_is_an_error(net, monkeypatch):
    """One that is there when the call starts and gone when it is read."""
    real = mandapa.Transaction.add

    def add(self, path, at=None, **options):
        Path(path).unlink()
        return real(self, path, at, **options)

    monkeypatch.setattr(mandapa.Transaction, "add", add)
    net.error("add", "net", "out/run.sh", code=3)
    assert len(net.json("log", "net")) == 2


def test_results_are_json(net):
    """The same facts as in the version itself."""
    [value] = net.json("add", "net", "out", "-m", "again")
    version = mandapa.open(".mandapa")["net"]
    assert value["digest"] == version.digest
    assert value["created"].endswith("Z")
    assert json.loads(json.dumps(value)) == value


def test_repack(cli):
    """A plan, to look at, to keep, to apply; then nothing is left to do."""
    cli("init")
    for shift in range(2):
        (cli.folder / "w.safetensors").write_bytes(save({"w": torch.randn(100_000) / 50 + shift}))
        cli("add", "net", "w.safetensors")
    assert "2 versions" in cli("repack", "net").out
    [value] = cli.json("repack", "net", "--plan", "plan.json")
    assert [version["version"] for version in value["versions"]] == [0, 1]
    assert "2 versions repacked" in cli("repack", "net", "--apply", "plan.json").out
    assert "skipped" in cli("repack", "net", "--apply", "plan.json").out
    assert "nothing would be saved" in cli("repack", "net").out
    [value] = cli.json("repack", "net", "--yes")
    assert value == {"artifact": "net", "versions": []}
    cli.error("repack", "other", code=3)
    (cli.folder / "plan.json").write_text("{}")
    cli.error("repack", "net", "--apply", "plan.json", code=2)
    assert "one of" in cli("repack", "net", "--yes", "--apply", "plan.json", code=2).err
    assert cli("fsck", "--deep").out.endswith("no problems\n")
