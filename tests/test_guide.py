"""The guide is a program: what its pages show runs as it stands, against a server that speaks S3, and prints that."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mandapa.testing.server import serve

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["artifact-logging", "checking", "checkpointing", "logging", "mirror", "retention", "wandb"]


def blocks(page):
    """Line, language and text of each block of a page."""
    text = (DOCS / f"{page}.md").read_text()
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(2)), block[1], block[2]) for block in found]


def commands(page):
    """Name, command and shown output of each command in the consoles of a page."""
    for line, language, text in blocks(page):
        if language == "console":
            for n, part in enumerate(re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]):
                command, *shown = part.rstrip("\n").split("\n")
                yield line, f"line-{line}-{n}", command, shown


def program(page):
    """A page as one program, each line where the page has it, so that a traceback names the page's line.

    Where a console stands, its commands, `mandapa` or `python`, are called; their output and exit code go to files.
    """
    lines = []
    for line, language, text in blocks(page):
        code = text.splitlines() if language == "python" else []
        if language == "console":
            calls = []
            for at, name, command, _ in commands(page):
                if at == line:
                    tool, _, rest = command.partition(" ")
                    assert tool in ("mandapa", "python"), command
                    shell = f"{shlex.quote(sys.executable)} {'-m mandapa.cli ' if tool == 'mandapa' else ''}{rest}"
                    shell = f"({shell}) > {name}.out 2>&1; echo $? > {name}.code"
                    calls.append(f"__import__('subprocess').run({shell!r}, shell=True)")
            code = ["; ".join(calls)]
        lines += [""] * (line - len(lines)) + code
    return "\n".join(lines)


def shape(line):
    """A line without what differs from run to run: numbers, names of files that hold some, space between columns."""
    line = re.sub(r"tfevents\.\S+", "tfevents", re.sub(r"\b(?:[0-9a-f]{32}){1,2}\b", "#", line))
    line = re.sub(r"[0-9]+(\.[0-9]+)*(e-[0-9]+)?", "#", line).replace("# kB", "# B")
    # An uploader ends a moment after its run.
    return re.sub(r"\s+", " ", line).strip().replace("uploader at work", "no uploader")


def check(page, folder, *, warnings="error"):
    """Run a page from top to bottom as one program; its commands print lines like those that it shows."""
    with serve() as server:
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
        call = [sys.executable, "-W", warnings, "-c", program(page)]
        found = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert found.returncode == 0, found.stderr
    for _, name, command, shown in commands(page):
        out = (folder / f"{name}.out").read_text()
        code = int((folder / f"{name}.code").read_text())
        printed = {shape(line) for line in out.splitlines()}
        strange = [line for line in shown if line.strip() != "..." and shape(line) not in printed]
        assert not strange, f"{page}.md, {name}: {command} printed\n{out}"
        answers = {1: "mandapa status", 5: "mandapa --repo ./runs fsck"}
        assert code == 0 or answers.get(code, "\n") in command, f"{page}.md, {name}: {command} ended with {code}"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_the_guide_runs(page, tmp_path):
    """As one program, without a warning."""
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    check(page, tmp_path)


def test_every_page_is_in_the_guide():
    """Each is reachable from README."""
    readme = (DOCS.parent / "README.md").read_text()
    assert not [page for page in PAGES if f"(docs/{page}.md)" not in readme]
