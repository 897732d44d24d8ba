"""The documents say everything, and what they say is true."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

import mandapa
from mandapa import errors, loggers, object_store
from mandapa.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CLI = (ROOT / "docs/cli.md").read_text()
PYTHON = (ROOT / "docs/python.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def commands(group=main, path="mandapa"):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def section(command):
    """What docs/cli.md says under the heading of a command."""
    found = re.search(rf"^### `{re.escape(command)}\b.*?(?=^##)", CLI + "\n## ", re.MULTILINE | re.DOTALL)
    assert found, f"docs/cli.md has no heading for {command}"
    return found[0]


@pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_and_option_is_documented(path, command):
    """Under its heading, every spelling."""
    text = section(path)
    for option in command.params:
        if isinstance(option, click.Option) and option.name not in ("as_json", "repo"):
            for spelling in option.opts:
                assert f"`{spelling}" in text, f"{path}: {spelling}"


def test_no_command_is_made_up():
    """Each heading and each example names a command that there is."""
    known = {path for path, _ in commands()}
    for page in PAGES:
        for line in re.findall(r"`(mandapa [a-z]+(?: (?:rename|remove|set|show|drop)\b)?)", page.read_text()):
            assert line in known, f"{page.name}: {line}"


def shown():
    """Calls that a page shows as they are typed: in a console, or in README's table."""
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield from re.findall(r"^\$ (mandapa .*)", block, re.MULTILINE)
    for row in re.findall(r"^\| [^|]*\| (`mandapa .*)\|$", README, re.MULTILINE):
        yield from re.findall(r"`(mandapa [^`]*)`", row)


@pytest.mark.parametrize("call", sorted(set(shown())))
def test_commands_that_are_shown_can_be_typed(call):
    """Each argument and option is one that its command takes; nothing is done."""
    _, *words = shlex.split(call)
    group, context = main, main.make_context("mandapa", words)
    while True:
        name, command, words = group.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, words, parent=context)
        if not isinstance(command, click.Group):
            return
        group = command


def test_commands_are_shown():
    """The test above has something to look at."""
    assert len(set(shown())) > 30


def test_keys_of_json_are_documented(tmp_path, monkeypatch):
    """Those of versions, assets and errors."""
    monkeypatch.chdir(tmp_path)
    from mandapa.cli.values import asset_value, version_value

    repo = mandapa.open("memory://keys", create=True)
    with repo.artifact("a").transaction() as txn:
        txn.add_bytes("x", b"x")
        txn.add_url("y", "s3://b/y")
    version = repo["a"]
    keys = {*version_value(version), *asset_value(version.assets["x"]), *asset_value(version.assets["y"])}
    assert not [key for key in keys if f"`{key}`" not in CLI]


@pytest.mark.parametrize("name", [*mandapa.__all__, *object_store.__all__, *errors.__all__, *loggers.__all__])
def test_every_public_name_is_documented(name):
    """In docs/python.md, and it is there."""
    assert re.search(rf"`(mandapa\.)?{name}[(`]", PYTHON)
    assert any(hasattr(module, name) for module in (mandapa, object_store, errors, loggers))


def rows():
    """Classes and what a table of docs/python.md says of them."""
    for name, text in re.findall(r"^\| `([A-Z]\w+)` \|(.*)\|$", PYTHON, re.MULTILINE):
        for module in (mandapa, loggers):
            if name in module.__all__:
                yield getattr(module, name), text


@pytest.mark.parametrize(("cls", "text"), list(rows()), ids=lambda value: getattr(value, "__name__", ""))
def test_members_that_are_named_exist(cls, text):
    """What docs/python.md lists for a class, members or arguments, is not made up."""
    members = {*dir(cls), *getattr(cls, "__annotations__", {}), *inspect.signature(cls).parameters}
    if cls is mandapa.Run:
        members |= {"name", "dir", "rank", "world_size", "attempt"}
    for word in re.findall(r"`([a-z_]+)(?:\([a-z]*\))?`", text):
        assert word in members, f"{cls.__name__}.{word}"


def test_public_members_are_named():
    """Of what a training program uses, every method, and every argument of the loggers."""
    for cls, text in rows():
        if cls in (mandapa.Run, mandapa.Handle, loggers.Logger, loggers.BackendLogger):
            inherited = dir(loggers.Logger) if cls is loggers.BackendLogger else []
            for word in {word for word in dir(cls) if not word.startswith("_")} - {*inherited}:
                assert f"`{word}`" in text, f"{cls.__name__}.{word}"
        elif cls in (mandapa.CheckpointSaver, mandapa.Limits, mandapa.Every):
            for word in inspect.signature(cls).parameters:
                assert f"`{word}`" in text, f"{cls.__name__}({word}=)"
    for cls in (mandapa.Run, loggers.FileLogger, loggers.TensorboardLogger, loggers.ObjectStoreLogger):
        row = re.search(rf"^\| `{cls.__name__}\(([^`]*)\)`", PYTHON, re.MULTILINE)
        assert row is not None
        parameters = inspect.signature(cls).parameters.values()
        written = [p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace("'", '"') for p in parameters]
        assert row[1] == ", ".join(written)


def test_extras_variables_and_codes_are_documented():
    """Each extra, each environment variable that the code reads, each exit code."""
    for extra in PROJECT["project"]["optional-dependencies"]:
        assert f"`{extra}`" in PYTHON
    source = "".join(path.read_text() for path in (ROOT / "src/mandapa").rglob("*.py") if path.parent.name != "testing")
    for variable in set(re.findall(r"\"(MANDAPA_[A-Z_]+)\"", source)):
        assert f"`{variable}`" in PYTHON, variable
    for code in (*range(8), "130, 141"):
        assert f"\n| {code} |" in CLI


def test_links_lead_somewhere():
    """Within the repository."""
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


STUBS = """
import os
import torch
config = {"lr": 0.1}
steps = 1700
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.Adam(model.parameters())
losses = iter([3.0, 1.0, 2.0])
trained = 0

def train_step(model, optimizer):
    global trained
    trained += 1
    loss = model(torch.ones(2)).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss

def validate(model):
    return next(losses)
"""

CHECKS = """
assert trained == 200 and start == 1501, (trained, start)
assert best.metadata == {"step": 1000, "val/loss": 1.0} and best.number == 1
assert state["optimizer"]["state"][0]["step"] == 1000
assert os.listdir("model") == ["checkpoint"]
assert repo["corpus"].assets["raw.parquet"].kind == "url" and len(repo["corpus"].assets) == 2
"""


def test_snippets_of_the_readme_run(tmp_path):
    """Train, start again from the last checkpoint, read: in a folder instead of a bucket."""
    pytest.importorskip("torch")
    train, read, plain = (block.replace("s3://team-bucket/runs", "repo") for block in blocks(README))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("a")
    program = "\n".join([STUBS, train, STUBS, train, read, plain, CHECKS])
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_snippets_of_the_python_page_run(tmp_path):
    """As they stand."""
    program = "\n".join(blocks(PYTHON))
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "runs" in os.listdir(tmp_path)


def test_imports_have_no_cycle():
    """Between modules; imports that only a type checker sees do not count."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("mandapa", exclude_type_checking_imports=True, cache_dir=None)
    left = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    while done := [module for module, below in left.items() if not below & left.keys()]:
        for module in done:
            del left[module]
    assert not left


def test_layers_hold(tmp_path):
    """The contracts of pyproject.toml."""
    pytest.importorskip("importlinter")
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache", "--no-logo"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_makefile_is_what_the_readme_says():
    """Its targets, and continuous integration runs one of them."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\$ make ([a-z]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("make test")
    assert os.access(ROOT / ".ci/run", os.X_OK)
