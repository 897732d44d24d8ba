"""A bench for the runs of this folder's tests; what their trainers import, the uploaders find as well."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
pytest.register_assert_rewrite("lab")

from lab import Gate, Lab  # noqa: E402 - after the lines above

from mandapa.testing.server import Server, serve  # noqa: E402


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture
def lab(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    made = Lab(tmp_path, server, f"b-{os.urandom(8).hex()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("LAB_RUNS", str(made.runs))
    monkeypatch.setenv("LAB_BUCKET", made.bucket)
    monkeypatch.setenv("LAB_URL", server.url)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH")))))
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A store that does not answer, until it is opened."""
    with contextlib.closing(Gate()) as made:
        yield made


@pytest.fixture
def dead_gate() -> Iterator[Gate]:
    """A store that nothing listens at, until it is opened."""
    with contextlib.closing(Gate(refuses=True)) as made:
        yield made
