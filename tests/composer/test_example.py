"""The example: what it refuses and how it says so, what it makes versions of, and the demo that drives it."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

import mandapa

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples/run_composer_trainer.py"
CONFIG = ROOT / "examples/digits.yaml"


@pytest.fixture(scope="module")
def example():
    """The program as a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Composer's own
        spec = importlib.util.spec_from_file_location("run_composer_trainer", PROGRAM)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def run(folder, *arguments):
    command = [sys.executable, "-W", "ignore", str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


QUICK = ["trainer.progress_bar=false", "trainer.max_duration=1ep", "data.batch_size=256", "model.hidden=16"]


@pytest.mark.slow
def test_the_example_makes_versions(place):
    """Everything is in a version, without secrets; what is done is left alone when it is started again."""
    url = str(place / "repo")
    store = [f"loggers.object_store.object_store_cls={url}", "loggers.object_store.object_store_kwargs={}"]
    for _ in range(2):
        found = run(place, CONFIG, *QUICK, *store, "seed=3")
        assert found.returncode == 0, found.stderr
    versions = list(mandapa.open(url).artifact("digits").versions())
    assert [version.metadata["epoch"] for version in versions if "epoch" in version.metadata] == [1]
    version = mandapa.open(url)["digits"]
    paths = list(version.assets)
    for name in ("hparams.yaml", "checkpoints/ep1-", "/events.out.tfevents", "logs-rank0.txt"):
        assert any(name in path for path in paths), (name, paths)
    hparams = yaml.safe_load(version.open("hparams.yaml").read())
    assert (hparams["seed"], hparams["model"]) == (3, {"hidden": 16, "dropout": 0.1})
    assert hparams["loggers"]["object_store"]["object_store_cls"] == url


def test_hparams_are_logged_without_secrets(example):
    """Though the trainer gets them."""

    class Logger:
        def upload_file(self, name, path, *, overwrite):
            assert (name, overwrite) == ("{run_name}/hparams.yaml", True)
            self.text = Path(path).read_text()

    class Trainer:
        logger = Logger()

    key = "loggers.object_store.object_store_kwargs.secret_access_key"
    config = example.read_config(str(CONFIG), [f"{key}=hunter2"])
    example.log_hparams(Trainer, config)
    assert config["loggers"]["object_store"]["object_store_kwargs"]["secret_access_key"] == "hunter2"
    logged = yaml.safe_load(Trainer.logger.text)["loggers"]["object_store"]["object_store_kwargs"]
    assert logged == {"bucket": "team-bucket", "prefix": "runs", "secret_access_key": "[redacted]"}


def test_a_wrong_call_is_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    """On stderr, without a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "nowhere.yaml"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    said = capsys.readouterr()
    expected = "run_composer_trainer.py: nowhere.yaml: No such file or directory\n"
    assert (end.value.code, said.out, said.err) == (2, "", expected)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_file_it_tells_how_to_call_it(arguments, example):
    """One line, as of every other mistake."""
    with pytest.raises(example.ConfigError, match=r"^usage: run_composer_trainer\.py CONFIG\.yaml"):
        example.main(*arguments)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("modell.hidden=1", "modell: unknown; there are: run_name, seed, model"),
        ("model.hiden=1", "model.hiden: unknown; there are: hidden, dropout"),
        ("data.size=1", "data.size: unknown; there are: batch_size"),
        ("optimizer.params=1", "optimizer.params: unknown"),
        ("optimizer.lr=-1", "optimizer: Invalid learning rate"),
        ("trainer.max_durations=1ep", "trainer.max_durations: unknown"),
        ("trainer.run_name=other", "trainer.run_name: unknown"),
        ("loggers.objectstore={}", "loggers.objectstore: unknown; there are: object_store, wandb, tensorboard, file"),
        ("loggers.file.name=x", "loggers.file.name: unknown"),
        ("loggers.file=x", "loggers.file: not a mapping"),
        ("loggers.object_store.object_store_cls=mandapa.object_store.S4", "has no attribute 'S4'"),
        ("loggers.object_store.object_store_cls=nowhere.S3", "No module named 'nowhere'"),
        ("loggers.object_store.object_store_cls=collections.Counter", "Counter is no object store"),
        ("model=3", "model: not a mapping"),
        ("model.hidden.x=3", "model.hidden is a value, and has no keys"),
        ("run_name=", "run_name: every run has a name"),
        ("run_name=7", "run_name: every run has a name"),
        ("model", "model: an override is key.sub=value"),
        ("=3", "=3: an override is key.sub=value"),
        ("model.=3", "model.=3: an override is key.sub=value"),
        ("model={", "model={: the value is no YAML"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(override, says, example):
    """Where it stands, and what there is instead."""
    with pytest.raises(example.ConfigError) as error:
        example.make_trainer(example.read_config(str(CONFIG), [override]))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "a: \x00", "\xff"])
def test_a_file_that_is_no_configuration_is_told_in_one_line(text, example, tmp_path):
    """Neither YAML nor a mapping."""
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(example.ConfigError) as error:
        example.read_config(str(path))
    assert "a.yaml: " in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_are_yaml(example):
    """Values of every kind, new keys too; the last one holds; false drops a logger, null is no arguments."""
    config = example.read_config(
        str(CONFIG),
        [
            "model.hidden=1",
            "model.hidden=2",
            "trainer.device=cpu",
            "loggers={file: null, tensorboard: false}",
            "seed=null",
        ],
    )
    assert (config["model"]["hidden"], config["trainer"]["device"], config["seed"]) == (2, "cpu", None)
    assert [type(logger).__name__ for logger in example.make_loggers(config["loggers"])] == ["FileLogger"]


@pytest.mark.slow
def test_the_demo_ends_with_equal_weights(place):
    """And shows how it came to that."""
    call = [sys.executable, str(ROOT / "examples/composer_demo.py")]
    found = subprocess.run(call, cwd=place, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "killed with SIGKILL in epoch 2" in found.stdout
    assert found.stdout.splitlines()[-1].endswith("equal those of the undisturbed training.")
    assert found.stderr == ""
