"""What others wrote, shown by every command: no byte of it steers the terminal, on either output, in text or JSON."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import mandapa
from mandapa.cli import main
from mandapa.cli.text import clean
from mandapa.format.records import AnnotateOp, SettingsOp, VersionOp

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\r\u2028"
PATH = "a\u202egnp.exe"

LOOKING = [
    ["log"], ["log", "evil"], ["log", "evil", "--deleted"], ["show", "evil"], ["show", f"evil/{PATH}"], ["ls", "evil"],
    ["ls", "-r", "evil"], ["diff", "evil:v0", "evil:v2"], ["diff", "evil:v0", "evil:v2", "--stat"],
    ["alias", "evil", "--history"], ["tag", "evil"], ["best", "evil", "--by", EVIL], ["best", "evil", "--by", "n"],
    ["du"], ["du", "evil"], ["gc"], ["gc", "--grace", "0"], ["expire", "evil", "--keep-last", "1"], ["policy", "show"],
    ["policy", "show", "evil"], ["repack", "evil"], ["fsck", "--deep"], ["doctor"], ["drill", "evil"],
    ["status"], ["get", "evil", "back"], ["cat", f"evil/{EVIL}"], ["log", EVIL], ["show", EVIL],
    ["delete", f"evil:{EVIL}"], ["gc", "--apply", "plan"], ["expire", "--apply", "plan"],
    ["repack", "evil", "--apply", "plan"], ["du", "--prices", "plan"],
    ["mirror", EVIL, "copy"],
    ["mirror", ".mandapa", "copy"],
    ["artifact", "rename", "evil", EVIL], ["undelete", f"evil:{EVIL}"], ["--repo", EVIL, "log"],
]  # fmt: skip


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository whose every text is hostile, and files called plans, in the working directory."""
    monkeypatch.chdir(tmp_path)
    repo = mandapa.open(".mandapa", create=True)
    for number in range(3):
        with repo.artifact("evil").transaction(
            message=f"{EVIL}\n{EVIL}", metadata={EVIL: {EVIL: [EVIL]}, "n": f"{number}{EVIL}"}
        ) as txn:
            txn.add_bytes(PATH, f"{number}{EVIL}".encode())
            txn.add_bytes(f"f\u202e/{PATH}.npy", b"\x93NUMPY" + bytes([number]))
            txn.add_url(f"u\u202e{number}", "https://example.org/\u202e\u2066x")
            txn.alias("good")
            txn.add_bytes(f"only\u202e{number}", b"y" * 70_000)
    artifact = repo.artifact("evil")
    artifact.delete("v1")
    # What no command of ours would write: facts, settings, a record's author.
    repo.author.by = f"me{EVIL}"
    repo.catalog.append("1" * 32, lambda _: [SettingsOp({EVIL: EVIL, "probe": {EVIL: EVIL}})], repo.author)
    log = repo.find_log("evil")
    assert log is not None
    log.append("3" * 32, lambda _: [AnnotateOp(2, {EVIL: EVIL})], repo.author)
    was = log.refresh().versions[2].op
    op = VersionOp(
        number=3, parent=2, root=was.root, digest=was.digest, assets=was.assets, bytes=was.bytes, added=0,
        message=EVIL, metadata={EVIL: float("1e308")}, requires=[],
    )  # fmt: skip
    log.append("2" * 32, lambda _: [op], repo.author)
    Path("plan").write_text(json.dumps({"kind": EVIL, "repository": EVIL, EVIL: EVIL}))


@pytest.mark.usefixtures("evil")
def test_no_command_passes_on_what_steers_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it ends with: what it says, of good and of bad, is harmless; and it does not die of a bug."""
    shown = 0
    for arguments in LOOKING:
        for more in ([], ["--json"]):
            out, err = io.StringIO(), io.StringIO()
            monkeypatch.setattr(sys, "argv", ["mandapa", *arguments, *more])
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
                main()
            said = (out.getvalue() + err.getvalue()).replace("\n", "")
            assert clean(said) == said, arguments
            assert "This is a bug" not in said, arguments
            assert ended.value.code in (0, 1, 2, 3, 4, 5, 6), (arguments, said[-300:])
            shown += "u202e" in said
    assert shown > 20
