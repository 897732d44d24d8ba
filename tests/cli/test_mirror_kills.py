"""``mandapa mirror`` killed for real: what had arrived is not sent again, and the end is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import mandapa
from mandapa.repository.fsck import fsck
from mandapa.repository.repository import Repository
from mandapa.testing.server import Knobs, serve

UNDER_WAY = 5  # packs that may have landed unnoticed: one more than the threads that put


@pytest.mark.slow
def test_kills(tmp_path):
    """To a slow bucket, killed when a part has arrived: the next call sends what had not arrived before."""
    repo = mandapa.open(tmp_path / "runs", create=True, codec="raw")
    total = 200 << 20
    with repo.artifact("net").transaction() as txn:
        txn.add_bytes("w", np.random.default_rng(0).bytes(total))
        txn.alias("best")
    with serve(Knobs(bandwidth=80 << 20)) as server:
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "MANDAPA_CACHE": str(tmp_path / "cache"),
        }
        call = [sys.executable, "-m", "mandapa.cli", "mirror", str(tmp_path / "runs"), "s3://bucket/there", "--json"]
        store = server.s3(prefix="there")

        def arrived() -> int:
            return len(list(store.list("packs/")))

        kills = 0
        while True:
            before = arrived()
            process = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE)
            while process.poll() is None and (kills or arrived() < UNDER_WAY + 3):
                time.sleep(0.01)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
        out, _ = process.communicate()
        assert process.returncode == 0, out
        assert kills == 1
        there = Repository(store)
        assert there["net:best"].digest == repo["net:best"].digest
        assert fsck(there, deep=True).findings == []
        [done] = map(json.loads, out.splitlines())
        # What landed in the very moment of the kill is not known to have landed.
        assert done["added"] < total - (before - UNDER_WAY) * (15 << 20)
