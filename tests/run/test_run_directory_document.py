"""docs/run-directory.md names what there is: every kind of line with its members, and every file."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from mandapa.run import journal
from mandapa.run.directory import RunDirectory

TEXT = (Path(__file__).parents[2] / "docs/run-directory.md").read_text()
COMMON = {"format", "n", "time", "attempt", "txn"}


def kinds(union):
    return {info.__struct_config__.tag: info for info in union.__args__}


def test_every_kind_of_line_and_its_members_are_documented():
    """In the tables, none left out and none made up."""
    rows = {
        kind: set(re.findall(r"`([a-z_]+)`", members))
        for kind, members in re.findall(r"^\| `([a-z]+)` \| ([^|]*)\|", TEXT, re.MULTILINE)
    }
    known = {**kinds(journal.Any_), **kinds(journal.Started | journal.Made | journal.Refused)}
    assert rows.keys() == known.keys()
    for kind, struct in known.items():
        fields = {field.encode_name for field in msgspec.structs.fields(struct)}
        own = fields - (COMMON if kind != "started" else COMMON - {"attempt"})
        nested = {"path", "source", "size"} if kind == "asset" else set()
        assert rows[kind] == own | nested, kind


def test_every_file_is_documented(tmp_path):
    """Those that the directory knows by name."""
    directory = RunDirectory(tmp_path / "net", "net")
    paths = [directory.status, directory.log, directory.launches, directory.request, directory.journal(0)]
    paths += [directory.outcomes("<key>"), directory.backend("<key>"), directory.staged, directory.uploader_lock().path]
    for path in paths:
        name = directory.relative(path).replace("rank0", "rank<r>")
        assert f"{name}" in TEXT, name
