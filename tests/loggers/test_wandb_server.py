"""The real Weights & Biases SDK logs runs and artifacts to the server that tests use in place of W&B's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from wandb_server import wandb_server

PRELUDE = """
import base64, hashlib, json, os, sys, time
import wandb
from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

def start(**settings):
    # Seconds between retries are whole ones, at least 1; with less the SDK takes its default, 2 and more.
    quick = {"x_graphql_retry_wait_min_seconds": 1, "x_graphql_retry_wait_max_seconds": 1, "x_disable_stats": True}
    settings = wandb.Settings(**quick, **settings)
    return wandb.init(project="vision", id="resnet-7", resume="allow", dir=os.environ["RUN_DIR"], settings=settings)

def artifact(**files):
    made = wandb.Artifact("resnet-7", type="commit", metadata={"files": sorted(files)})
    for name, content in files.items():
        path = os.path.join(os.environ["RUN_DIR"], name)
        with open(path, "w") as file:
            file.write(content)
        digest = base64.b64encode(hashlib.md5(content.encode()).digest()).decode()
        made.manifest.add_entry(
            ArtifactManifestEntry(path=name, digest=digest, size=len(content), local_path=path, skip_cache=True)
        )
    made.manifest.add_entry(ArtifactManifestEntry(path="big", digest="b1", ref="s3://bucket/object", size=7))
    return made

def raised(call):
    begun = time.monotonic()
    try:
        call()
    except Exception as error:
        name = type(error).__name__
        print(json.dumps([name, str(error), time.monotonic() - begun]))
    else:
        print(json.dumps(["", "", time.monotonic() - begun]))
"""


@pytest.fixture
def server():
    with wandb_server() as server:
        yield server


@pytest.fixture
def environment(tmp_path, server):
    """Of a child: nothing of the user's own, and all of wandb's folders in the test's."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "TMPDIR") if name in os.environ}
    folders = {"HOME": home, "RUN_DIR": tmp_path, "WANDB_DIR": tmp_path, "WANDB_CACHE_DIR": tmp_path / "cache"}
    folders |= {"WANDB_DATA_DIR": tmp_path / "data", "WANDB_CONFIG_DIR": tmp_path / "config"}
    return kept | {name: str(folder) for name, folder in folders.items()} | server.env() | {"WANDB_SILENT": "true"}


def run(environment, script, **changes):
    """What a program that uses the SDK printed, a value of JSON a line."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script)]
    done = subprocess.run(command, env=environment | changes, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", "{", '"'))]


def test_a_run_and_its_artifacts_arrive_and_can_be_read_back(server, environment, tmp_path):
    """Metrics, config, versions with files and references; of a second version only what changed is uploaded."""
    (read,) = run(
        environment,
        """
        with start() as run:
            run.config.update({"lr": 0.5})
            run.log({"loss": 2.0}, step=1)
            run.log({"loss": 1.0}, step=4)
            first = run.log_artifact(artifact(weights="one", config="same"), aliases=["c1"]).wait(timeout=20)
            second = run.log_artifact(artifact(weights="two", config="same"), aliases=["c2"]).wait(timeout=20)
            again = run.log_artifact(artifact(weights="two", config="same"), aliases=["c3"]).wait(timeout=20)
        versions = [first.version, second.version, again.version]
        latest = wandb.Api().artifact("vision/resnet-7:latest")
        path = latest.get_entry("weights").download(os.environ["RUN_DIR"] + "/got")
        logged = [each.version for each in wandb.Api().run("vision/resnet-7").logged_artifacts()]
        print(json.dumps([versions, open(path).read(), latest.manifest.entries["big"].ref, latest.metadata, logged]))
        """,
    )

    assert read == [["v0", "v1", "v1"], "two", "s3://bucket/object", {"files": ["config", "weights"]}, ["v0", "v1"]]
    logged = server.runs["vision/resnet-7"]
    assert [(row["_step"], row["loss"]) for row in logged.history] == [(1, 2.0), (4, 1.0)]
    assert (logged.config["lr"], logged.summary["loss"], logged.state, logged.exit_code) == (0.5, 1.0, "finished", 0)
    first, second = server.artifacts["vision/resnet-7"]
    assert sorted(server.uploads) == ["config", "weights", "weights"]
    assert (first.aliases, second.aliases) == ({"c1"}, {"c2", "c3", "latest"})
    assert [server.read(first, "weights"), server.read(second, "config")] == [b"one", b"same"]
    assert {"digest": "b1", "ref": "s3://bucket/object", "size": 7}.items() <= second.contents["big"].items()
    assert list(Path(environment["HOME"]).iterdir()) == []


def test_a_run_that_is_resumed_goes_on(server, environment):
    """A second process with the id of the first continues its history and its versions."""
    script = """
        run = start()
        print(json.dumps([run.resumed, run.starting_step]))
        run.log({{"loss": 1.0}}, step={step})
        run.log_artifact(artifact(weights="{step}"), aliases=["c{step}"]).wait(timeout=20)
        run.finish()
    """
    assert run(environment, script.format(step=3)) == [[False, 0]]
    assert run(environment, script.format(step=5)) == [[True, 4]]

    logged = server.runs["vision/resnet-7"]
    assert [row["_step"] for row in logged.history] == [3, 5]
    assert logged.attempts == 2
    assert [(version.index, version.run) for version in server.artifacts["vision/resnet-7"]] == [
        (0, "resnet-7"),
        (1, "resnet-7"),
    ]


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_is_an_error_at_once(server, environment, status):
    """Nothing is tried again when the key is wrong."""
    server.refuse = status

    ((error, message, seconds),) = run(environment, "raised(start)")

    assert error == "CommError"
    assert f"returned error {status}" in message
    assert seconds < 5


def test_a_server_that_dies_in_the_middle_is_waited_for_only_as_long_as_asked(server, environment):
    """Waiting has an end of its own, and so has the end of the run; the program is never held up for ever."""
    server.before["CreateArtifact"] = server.down

    waited, ended = run(
        environment,
        """
        run = start(finish_timeout=0.5)
        logged = run.log_artifact(artifact(weights="one"))
        raised(lambda: logged.wait(timeout=1))
        raised(run.finish)
        """,
    )

    assert waited[0] == "WaitTimeoutError"
    assert 0.9 < waited[2] < 5
    assert ended[0] == ""
    assert ended[2] < 5
    assert server.artifacts == {}


def test_errors_of_the_server_are_tried_again(server, environment):
    """After an error here and there the version is there, once."""
    server.fail_next(1, event="CommitArtifact")
    server.fail_next(1, event="CreateArtifactFiles", status=502)

    run(environment, "with start() as run: run.log_artifact(artifact(weights='one')).wait(timeout=20)")

    assert [version.index for version in server.artifacts["vision/resnet-7"]] == [0]
    assert server.events.count("CommitArtifact") == 2
    assert server.uploads == ["weights"]


def test_what_was_logged_offline_is_uploaded_by_sync(server, environment, tmp_path):
    """`wandb sync` brings the metrics and the artifact of an offline run, and no local file goes."""
    run(
        environment,
        """
        with start() as run:
            run.log({"loss": 2.0}, step=1)
            run.log_artifact(artifact(weights="one"), aliases=["c1"])
        """,
        WANDB_MODE="offline",
    )
    assert server.events == []
    (folder,) = tmp_path.glob("wandb/offline-run-*")

    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)

    (version,) = server.artifacts["vision/resnet-7"]
    assert (version.aliases, server.read(version, "weights")) == ({"c1", "latest"}, b"one")
    assert [row["loss"] for row in server.runs["vision/resnet-7"].history] == [2.0]
    assert (tmp_path / "weights").read_text() == "one"
    assert (folder / "run-resnet-7.wandb.synced").exists()


def test_a_server_that_is_down_refuses_connections_and_comes_back_as_it_was(server):
    """The port and what was logged stay."""
    import urllib.error
    import urllib.request

    url = server.url
    server.down()
    begun = time.monotonic()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)
    assert time.monotonic() - begun < 1
    server.up()
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(url, timeout=5)
    with answer.value:
        assert (answer.value.code, server.url) == (404, url)
