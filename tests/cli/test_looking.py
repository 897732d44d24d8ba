"""``log``, ``show``, ``ls``, ``diff``, ``best``."""

from __future__ import annotations

import torch
from safetensors.torch import save


def test_log_lists_newest_first(net):
    """Names, sizes, message or metadata."""
    lines = net("log", "net").out.splitlines()
    assert [line.split()[0] for line in lines] == ["v1", "v0"]
    assert "latest, best" in lines[0]
    assert "loss=0.5" in lines[0]
    assert lines[1].endswith("first")
    assert [value["number"] for value in net.json("log", "net", "-n", "1")] == [1]


def test_log_of_a_path_and_from_a_version(net):
    """Only where it changed; only from there back."""
    assert [value["number"] for value in net.json("log", "net/hparams.yaml")] == [0]
    assert [value["number"] for value in net.json("log", "net/logs")] == [1, 0]
    assert [value["number"] for value in net.json("log", "net:v0")] == [0]
    assert [value["number"] for value in net.json("log", "net:best~1")] == [0]
    net.error("log", "net/nope", code=3)
    net.error("log", "net:v9", code=3)


def test_log_of_all(net):
    """One line an artifact; what commits stored counts deleted versions too."""
    net("add", "data", "out/run.sh")
    [data, value] = net.json("log")
    assert (data["artifact"], value["artifact"]) == ("data", "net")
    assert (value["versions"], value["aliases"], value["latest"]["number"]) == (2, {"best": 1}, 1)
    stored = value["stored"]
    net("delete", "net:v0")
    assert net.json("log")[1]["stored"] == stored
    assert "best=v1" in net("log").out


def test_log_of_deleted(net):
    """What undelete could bring back."""
    assert net("log", "net", "--deleted").out == "no versions\n"
    net("delete", "net:v0")
    assert [value["number"] for value in net.json("log", "net", "--deleted")] == [0]
    assert [value["number"] for value in net.json("log", "net")] == [1]
    net.error("log", "--deleted", code=2)


def test_log_when_all_versions_are_deleted(net):
    """The artifact is still there, with nothing in it."""
    net("alias", "net", "-d", "best")
    net("delete", "net:v0", "net:v1")
    assert net("log", "net").out == "no versions\n"
    assert "net" in net("log").out
    assert net.json("log")[0]["latest"] is None


def test_log_of_nothing(cli):
    """An empty repository says what to do."""
    cli("init")
    assert "mandapa add" in cli("log").out
    assert cli.json("log") == []
    assert "no artifact 'x'" in cli.error("log", "x", code=3)


def test_show_a_version(net):
    """Message, metadata, digest, and what changed since the parent."""
    out = net("show", "net").out
    for expected in ("net:v1", "latest, best", "loss  0.5", "changes since v0: 1 changed", "~ logs/a.txt  6 B -> 12 B"):
        assert expected in out
    [value] = net.json("show", "net:v0")
    assert (value["message"], value["changes"], value["parent"]) == ("first", None, None)
    assert net.json("show", "net")[0]["changes"] == {"added": 0, "removed": 0, "changed": 1}


def test_show_a_version_whose_parent_is_deleted(net):
    """It says so, and shows the rest."""
    net("delete", "net:v0")
    assert "not known" in net("show", "net").out


def test_show_a_file(net):
    """Size and digest; a folder is for ls."""
    [value] = net.json("show", "net/run.sh")
    assert value["address"] == "net:v1/run.sh"
    assert (value["size"], value["executable"]) == (10, True)
    assert value["digest"] in net("show", "net:best/run.sh").out
    assert "mandapa ls" in net.error("show", "net/logs", code=2)


def test_ls(net):
    """One level, or all; files, folders, URLs."""
    net("add", "net", "--url", "x=s3://b/x")
    assert net("ls", "net").out.splitlines() == [
        " 6 B  hparams.yaml",
        "12 B  logs/  (1 asset)",
        "10 B  run.sh*",
        "   ?  x -> s3://b/x",
    ]
    assert [entry["path"] for entry in net.json("ls", "net/logs")] == ["logs/a.txt"]
    assert [entry["path"] for entry in net.json("ls", "net/run.sh")] == ["run.sh"]
    assert [entry["path"] for entry in net.json("ls", "--recursive", "net:v0")] == [
        "hparams.yaml",
        "logs/a.txt",
        "run.sh",
    ]
    assert net("ls").out == "net\n"
    net.error("ls", "net/nope", code=3)


def test_ls_keeps_files_beside_folders_of_a_similar_name(net):
    """'a.b' sorts between 'a' and 'a/': each folder still shows once."""
    (net.folder / "tree/a").mkdir(parents=True)
    for name in ("a/1", "a.b", "a/2", "a-"):
        (net.folder / "tree" / name).write_text("x")
    net("add", "tree", "tree")
    assert [(entry["path"], entry["kind"]) for entry in net.json("ls", "tree")] == [
        ("a-", "file"),
        ("a.b", "file"),
        ("a", "folder"),
    ]


def test_tensors(net):
    """Of one file or of all; what became of them, and by how much, for people and programs."""
    weights = {"a": torch.zeros(100, 3), "b": torch.ones(2).bfloat16()}
    (net.folder / "w.safetensors").write_bytes(save(weights))
    net("add", "net", "w.safetensors")
    assert net("ls", "--tensors", "net/w.safetensors").out.splitlines() == [
        "a  float32   100x3  1.20 kB",
        "b  bfloat16  2          4 B",
    ]
    assert [line.split()[0] for line in net("ls", "--tensors", "net").out.splitlines()] == ["w.safetensors"] * 2
    assert "cannot be read by tensors" in net("ls", "--tensors", "net/run.sh", code=2).err
    assert net.json("ls", "--tensors", "net/w.safetensors")[1]["shape"] == [2]
    weights["a"][0] = 2
    (net.folder / "w.safetensors").write_bytes(save({"a": weights["a"], "c": torch.tensor(1.0)}))
    net("add", "net", "w.safetensors")
    shown = net("diff", "net:latest~1", "net").out.splitlines()[1:]
    assert [line.split()[:2] for line in shown] == [["~", "a"], ["-", "b"], ["+", "c"]]
    assert "L2 3.46 (inf%)  max 2  cosine nan" in net("diff", "--stat", "net:latest~1", "net").out
    [value] = net.json("diff", "--stat", "net:latest~1", "net")
    changes = value["tensors"]["w.safetensors"]
    assert [change["kind"] for change in changes] == ["values", "removed", "added"]
    assert changes[0]["stat"] | {"l2": 0} == {
        "l2": 0,
        "relative": "inf",
        "max": 2.0,
        "cosine": "nan",
        "changed": 3,
        "nan": [0, 0],
        "inf": [0, 0],
    }


def test_diff(net):
    """Files and metadata, both ways."""
    assert net("diff", "net:v0", "net:v1").out.splitlines() == [
        "~ logs/a.txt  6 B -> 12 B",
        "metadata",
        "  loss  1.5 -> 0.5",
    ]
    net("rm", "net", "run.sh")
    [value] = net.json("diff", "net:v1", "net:v2")
    assert [asset["path"] for asset in value["removed"]] == ["run.sh"]
    assert value["metadata"] == {"loss": {"before": 0.5, "after": None}}
    [back] = net.json("diff", "net:v2", "net:v1")
    assert [asset["path"] for asset in back["added"]] == ["run.sh"]


def test_diff_answers_by_its_exit_code(net):
    """Only when asked to."""
    net("diff", "net:v0", "net:v1", "--exit-code", code=1)
    net("diff", "net:v0", "net:v1")
    assert net("diff", "net:v1", "net:best", "--exit-code").out == "no difference\n"
    assert net.json("diff", "net:v0", "net:v1", "--exit-code", code=1)[0]["differs"] is True


def test_diff_of_a_folder(net):
    """Only that; metadata belongs to the whole."""
    assert net("diff", "net:v0/logs", "net:v1/logs").out == "~ logs/a.txt  6 B -> 12 B\n"
    net("diff", "net:v0/run.sh", "net:v1/run.sh", "--exit-code")
    assert "same path" in net.error("diff", "net:v0/logs", "net:v1", code=2)


def test_diff_of_the_x_bit(net):
    """Equal bytes, another mode."""
    (net.folder / "out/run.sh").chmod(0o644)
    net("add", "net", "out")
    assert "no longer executable" in net("diff", "net:v1", "net").out


def test_best_by_a_metric(net):
    """Address and value on one line; the version with --json."""
    assert net("best", "net", "--by", "loss", "--min").out == "net:v1  loss 0.5\n"
    assert net("best", "net", "--by", "loss", "--max").out == "net:v0  loss 1.5\n"
    [found] = net.json("best", "net", "--by", "loss", "--min")
    assert [found] == net.json("log", "net", "-n", "1")
    assert (found["address"], found["metadata"]) == ("net:v1", {"loss": 0.5})


def test_best_of_what_is_not_there(net):
    """Which metrics there are is said; so is that there is no such artifact."""
    assert "there are: 'loss'" in net.error("best", "net", "--by", "acc", "--max", code=3)
    net.error("best", "nothing", "--by", "loss", "--max", code=3)


def test_best_needs_to_know_what_is_best(net):
    """Exactly one of --min and --max, and a metric."""
    assert "--min or --max" in net.error("best", "net", "--by", "loss", code=2)
    assert "--min or --max" in net.error("best", "net", "--by", "loss", "--min", "--max", code=2)
    net.error("best", "net", "--min", code=2)
