"""The command line as tests call it: in this process, in a folder of its own, with a small repository to look at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mandapa.cli import main


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str
    raw: bytes


class Cli:
    """Runs commands and checks how they end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str | Path, code: int = 0) -> Result:
        found = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="mandapa")
        result = Result(found.exit_code, found.stdout, found.stderr, found.stdout_bytes)
        assert result.code == code, f"{arguments}: {result.code}, {result.err[-500:]} {result.out[:500]!a}"
        assert "Traceback" not in result.err
        if code > 1:
            told = {"doctor", "drill", "mirror", "sync"}
            assert result.out == "" or code == 5 or not told.isdisjoint(map(str, arguments))
        return result

    def json(self, *arguments: str | Path, code: int = 0) -> list[dict[str, Any]]:
        """What a command prints with ``--json``, an object a line."""
        lines = self(*arguments, "--json", code=code).out.splitlines()
        assert all(line.isascii() for line in lines)
        return [json.loads(line) for line in lines]

    def error(self, *arguments: str | Path, code: int) -> str:
        """The one line that a failing command prints."""
        err = self(*arguments, code=code).err
        assert err.startswith("mandapa: error: ")
        assert err.count("\n") == 1
        return err


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Commands in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return Cli(work)


@pytest.fixture
def net(cli: Cli) -> Cli:
    """Commands in a folder with a repository: the artifact ``net`` with two versions, the second one ``best``."""
    (cli.folder / "out/logs").mkdir(parents=True)
    (cli.folder / "out/hparams.yaml").write_text("lr: 1\n")
    (cli.folder / "out/logs/a.txt").write_text("hello\n")
    (cli.folder / "out/run.sh").write_text("#!/bin/sh\n")
    (cli.folder / "out/run.sh").chmod(0o755)
    cli("init")
    cli("add", "net", "out", "-m", "first", "--meta", "loss=1.5")
    (cli.folder / "out/logs/a.txt").write_text("hello\nworld\n")
    cli("add", "net", "out", "--meta", "loss=0.5", "--alias", "best")
    return cli
