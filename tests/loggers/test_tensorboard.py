"""TensorBoard's own readers find in an event file what was logged."""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import threading
import time
from pathlib import Path

import pytest

from mandapa.errors import InvalidInputError
from mandapa.loggers import TensorboardLogger
from mandapa.loggers import tensorboard as module
from mandapa.loggers.tensorboard import crc32c, event, record, scalar

# TensorBoard and what it imports warn of their own future.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


class Run:
    """What a logger may use of a run; remembers what was handed over, with its bytes at that moment."""

    def __init__(self, folder: Path, *, rank: int = 0, attempt: int = 1) -> None:
        self.name, self.dir, self.rank, self.world_size, self.attempt = "resnet-7", str(folder), rank, 2, attempt
        self.assets: list[tuple[str, str | None, str, bytes]] = []

    def log_asset(self, path: str, at: str | None = None, *, take: str = "copy") -> None:
        self.assets.append((path, at, take, Path(path).read_bytes()))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def start(run, *args, **kwargs):
    logger = TensorboardLogger(*args, **kwargs)
    logger.open(run)
    return logger


def files(run):
    return sorted(Path(run.dir, "tensorboard").glob("*"))


def load(folder):
    """As TensorBoard itself loads a folder."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator


def load_scalars(folder):
    """``{name: [(step, value)]}`` by the reader that scripts use."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        name: [(item.step, item.value) for item in accumulator.Scalars(name)] for name in accumulator.Tags()["scalars"]
    }


def events(path):
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return list(LegacyEventFileLoader(str(path)).Load())


def texts(folder, name="hparams"):
    return [item.tensor_proto.string_val[0].decode() for item in load(folder).Tensors(name)]


def test_checksum():
    """Of the bytes that RFC 3720 gives in B.4."""
    assert crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C


def test_first_record_byte_for_byte(run, monkeypatch):
    """Length 24 and its masked checksum, the time, the version of the format, the masked checksum of these."""
    monkeypatch.setattr(module, "time", lambda: 1.5)
    logger = start(run)
    logger.log_metrics({"x": 0.5}, 3)
    logger.close()
    (path,) = files(run)
    data = path.read_bytes()
    first, marker, last = data[:40], data[40:69], data[69:]
    content = b"\x09" + struct.pack("<d", 1.5) + b"\x1a\x0dbrain.Event:2"
    assert first == b"\x18" + bytes(7) + b"\xa3\x7fK\x22" + content + bytes.fromhex("2a28646c")
    assert marker[12:-4] == b"\x09" + struct.pack("<d", 1.5) + b":\x02\x08\x01"
    assert last[12:-4] == b"\x09" + struct.pack("<d", 1.5) + b"\x10\x03*\x0a\x0a\x08\x0a\x01x\x15\x00\x00\x00\x3f"


def test_every_scalar_is_read_back(run):
    """Names, steps and values as given, with all that a float can be; what 32 bits cannot hold is infinite."""
    values = {
        "train/loss": 0.125,
        "zero": 0.0,
        "nan": math.nan,
        "up": math.inf,
        "down": -math.inf,
        "large": 1e300,
        "small": -1e300,
        "int": 7,
        "größe/µ 損失": 3.5,
    }
    logger = start(run)
    for step in (0, 1, 127, 128, 2**40, 2**63 - 1):
        logger.log_metrics(values, step)
    logger.log_metrics({"before": 1.0}, -2)
    logger.close()
    found = load_scalars(files(run)[0])
    assert found.pop("before") == [(-2, 1.0)]
    assert found.keys() == values.keys()
    for name, value in values.items():
        expected = math.copysign(math.inf, value) if abs(value) == 1e300 else value
        assert [step for step, _ in found[name]] == [0, 1, 127, 128, 2**40, 2**63 - 1]
        assert [repr(got) for _, got in found[name]] == [repr(float(expected))] * 6
    through_plugin = load(run.dir + "/tensorboard")
    assert set(through_plugin.PluginTagToContent("scalars")) == values.keys() | {"before"}


def test_scalars_of_one_step_are_one_event(run):
    """With the time of the call."""
    logger = start(run)
    before = time.time()
    logger.log_metrics({"a": 1.0, "b": 2.0}, 5)
    after = time.time()
    logger.close()
    version, _, both = events(files(run)[0])
    assert version.file_version == "brain.Event:2"
    assert [(value.tag, value.simple_value) for value in both.summary.value] == [("a", 1.0), ("b", 2.0)]
    assert before <= both.wall_time <= after
    assert version.wall_time <= both.wall_time


def test_hyperparameters_are_text(run):
    """In the Text tab: JSON in an indented block, so that Markdown changes nothing."""
    hparams = {
        "optimizer": {"lr": 0.001, "name": "adam|w"},
        "layers": [1, 2],
        "__note__": "größer\nals\u2028x",
        "none": None,
    }
    logger = start(run)
    logger.log_hparams(hparams)
    logger.close()
    (text,) = texts(files(run)[0])
    lines = text.removesuffix("\n").split("\n")
    assert json.loads(text) == hparams
    assert all(line.startswith("    ") for line in lines)
    accumulator = load(files(run)[0])
    assert accumulator.PluginTagToContent("text") == {"hparams": b""}
    assert accumulator.SummaryMetadata("hparams").data_class == 2  # DATA_CLASS_TENSOR
    from tensorboard.util import tensor_util

    assert tensor_util.make_ndarray(accumulator.Tensors("hparams")[0].tensor_proto).shape == ()


def test_the_text_tab_shows_hyperparameters(run):
    """What the plugin renders of them is a block of code."""
    from tensorboard.plugins.text.text_plugin import text_array_to_html
    from tensorboard.util import tensor_util

    logger = start(run)
    logger.log_hparams({"lr": 0.001, "__init__": "*a*"})
    logger.close()
    array = tensor_util.make_ndarray(load(files(run)[0]).Tensors("hparams")[0].tensor_proto)
    html = text_array_to_html(array, enable_markdown=True)
    assert "<code>" in html
    assert '"__init__": "*a*"' in html.replace("&quot;", '"')


def test_a_cut_file_is_read_up_to_the_cut(run, tmp_path):
    """Wherever a copy ends, all whole records before are there."""
    logger = start(run)
    for step in range(20):
        logger.log_metrics({"x": float(step)}, step)
    logger.close()
    data = files(run)[0].read_bytes()
    size = (len(data) - 69) // 20  # step 0 is left out of its event
    for cut in (len(data) - 1, len(data) - 13, len(data) // 2, 75):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / files(run)[0].name).write_bytes(data[:cut])
        found = load_scalars(folder).get("x", [])
        assert found == [(step, float(step)) for step in range(len(found))]
        assert abs(len(found) - (cut - 69) // size) <= 1
        assert len(found) < 20


def test_each_hand_over_is_a_readable_prefix(run, tmp_path):
    """Of the next: nothing that was handed over is ever changed."""
    logger = start(run, flush_interval=3)
    logger.log_hparams({"lr": 1})
    for step in range(10):
        logger.log_metrics({"x": float(step)}, step)
    logger.close()
    (path,) = files(run)
    assert [(at, take) for _, at, take, _ in run.assets] == [(f"tensorboard/{path.name}", "grow")] * 4
    assert {source for source, *_ in run.assets} == {str(path)}
    contents = [data for *_, data in run.assets]
    for before, after in itertools.pairwise(contents):
        assert after.startswith(before)
        assert len(after) > len(before)
    assert contents[-1] == path.read_bytes()
    for count, data in zip((3, 6, 9, 10), contents, strict=True):
        (tmp_path / path.name).write_bytes(data)
        assert load_scalars(tmp_path / path.name)["x"] == [(step, float(step)) for step in range(count)]


def test_nothing_new_is_not_handed_over(run):
    """Nor is a file made of nothing."""
    logger = start(run, flush_interval=1)
    logger.flush()
    logger.log_metrics({}, 0)
    assert files(run) == []
    assert run.assets == []
    logger.log_metrics({"x": 1.0}, 1)
    logger.flush()
    logger.flush()
    logger.close()
    assert len(run.assets) == 1


def test_an_interval_counts_from_the_last_flush(run):
    """Metrics are buffered until then, and a flush writes them all."""
    logger = start(run, flush_interval=4)
    for step in range(3):
        logger.log_metrics({"x": 1.0}, step)
    assert files(run) == []
    logger.flush()
    assert len(load_scalars(files(run)[0])["x"]) == 3
    for step in range(3, 6):
        logger.log_metrics({"x": 1.0}, step)
    assert len(run.assets) == 1
    logger.log_metrics({"x": 1.0}, 6)
    assert len(run.assets) == 2
    logger.close()


def test_a_hand_over_that_failed_is_made_again(run):
    """What was written before it is not written twice."""
    logger = start(run)
    log_asset, run.log_asset = run.log_asset, None
    logger.log_metrics({"x": 1.0}, 1)
    with pytest.raises(TypeError):
        logger.flush()
    run.log_asset = log_asset
    logger.close()
    assert len(run.assets) == 1
    assert load_scalars(files(run)[0])["x"] == [(1, 1.0)]


def test_a_full_disk_leaves_no_torn_record_behind(run, monkeypatch):
    """When it has room again, the file goes on where it stopped."""
    logger = start(run)
    for step in range(50):
        logger.log_metrics({"x": float(step)}, step)
    write = os.write
    room = [100, 7]

    def full(fd, data):
        if not room:
            raise OSError(28, "No space left on device")
        return write(fd, bytes(data)[: room.pop()])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            logger.flush()
    assert files(run)[0].stat().st_size == 107
    logger.log_metrics({"x": 50.0}, 50)
    logger.close()
    assert load_scalars(files(run)[0])["x"] == [(step, float(step)) for step in range(51)]


def test_other_ranks_write_nothing(tmp_path):
    """Every hook does nothing there."""
    run = Run(tmp_path / "run", rank=1)
    logger = start(run, flush_interval=1)
    logger.log_hparams({"lr": 1})
    logger.log_metrics({"x": 1.0}, 1)
    logger.flush()
    logger.close()
    assert run.assets == []
    assert not os.path.exists(run.dir)


def test_a_later_attempt_purges_what_the_killed_one_logged_after(tmp_path):
    """From the first step that it logs on; its hyperparameters stay, and so do earlier steps."""
    folder = tmp_path / "run"
    first = start(Run(folder), flush_interval=1)
    first.log_hparams({"lr": 1})
    for step in range(10):
        first.log_metrics({"x": 1.0, "gone": 1.0}, step)
    second = start(Run(folder, attempt=2), flush_interval=1)
    second.log_hparams({"lr": 2})
    for step in range(6, 8):
        second.log_metrics({"x": 2.0}, step)
    second.close()
    assert len(files(Run(folder))) == 2
    found = load_scalars(folder / "tensorboard")
    assert found["x"] == [(step, 1.0) for step in range(6)] + [(6, 2.0), (7, 2.0)]
    assert found["gone"] == [(step, 1.0) for step in range(6)]
    shown = load(folder / "tensorboard")
    assert [item.step for item in shown.Tensors("x")] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [item.step for item in shown.Tensors("gone")] == [0, 1, 2, 3, 4, 5]
    assert [json.loads(text) for text in texts(folder / "tensorboard")] == [{"lr": 1}, {"lr": 2}]
    version, hparams, purge, *rest = events(files(Run(folder))[1])
    assert version.file_version
    assert hparams.summary.value[0].tag == "hparams"
    assert (purge.session_log.status, purge.step) == (1, 6)  # SessionLog.START
    assert [item.step for item in rest] == [6, 7]


def test_an_attempt_that_starts_over_keeps_its_own_hyperparameters(tmp_path):
    """The marker at step 0 covers all that came before it."""
    folder = tmp_path / "run"
    first = start(Run(folder))
    first.log_hparams({"lr": 1})
    first.log_metrics({"x": 1.0}, 0)
    first.log_metrics({"x": 1.0}, 1)
    first.close()
    second = start(Run(folder, attempt=2))
    second.log_hparams({"lr": 2})
    second.log_metrics({"x": 2.0}, 0)
    second.close()
    assert load_scalars(folder / "tensorboard") == {"x": [(0, 2.0)]}
    assert [json.loads(text) for text in texts(folder / "tensorboard")] == [{"lr": 2}]


def test_the_first_attempt_purges_nothing(run):
    """Its marker comes before everything: TensorBoard counts them, and takes no first one for a restart."""
    logger = start(run)
    logger.log_hparams({"lr": 1})
    logger.log_metrics({"x": 1.0}, -5)
    logger.log_metrics({"x": 1.0}, 5)
    logger.close()
    assert [item.HasField("session_log") for item in events(files(run)[0])] == [False, True, False, False, False]
    assert load_scalars(files(run)[0]) == {"x": [(-5, 1.0), (5, 1.0)]}
    assert len(texts(files(run)[0])) == 1


def test_names_of_files(run, monkeypatch):
    """Seconds, host, process and attempt; never one that is there, and always after those that are."""
    monkeypatch.setattr(module, "time", lambda: 1_800_000_000.25)
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node/7 ü")
    names = []
    for attempt in (1, 1, 12):
        run.attempt = attempt
        logger = start(run)
        logger.log_metrics({"x": 1.0}, 1)
        logger.close()
        names.append(os.path.basename(run.assets[-1][0]))
    host = f"node-7--.{os.getpid()}"
    assert names == [
        f"events.out.tfevents.1800000000.{host}.1",
        f"events.out.tfevents.1800000001.{host}.1",
        f"events.out.tfevents.1800000002.{host}.12",
    ]
    assert names == [path.name for path in files(run)]


def test_a_name_taken_meanwhile_is_left_alone(run, monkeypatch):
    """Created by somebody else after the folder was listed."""
    monkeypatch.setattr(module, "time", lambda: 1_800_000_000.25)
    first, second = start(run), start(run)
    for logger in (first, second):
        monkeypatch.setattr(module.os, "listdir", lambda _: [])
        logger.log_metrics({"x": 1.0}, 1)
        logger.flush()
    monkeypatch.undo()
    first.close()
    second.close()
    assert [load_scalars(path) for path in files(run)] == [{"x": [(1, 1.0)]}] * 2


def test_a_folder_of_your_own(run, tmp_path, monkeypatch):
    """It is made, relative to where the logger was; the place in the version stays the same."""
    monkeypatch.chdir(tmp_path)
    logger = TensorboardLogger(Path("a/b"))
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    logger.open(run)
    logger.log_metrics({"x": 1.0}, 1)
    logger.close()
    ((path, at, _, _),) = run.assets
    assert Path(path).parent == tmp_path / "a/b"
    assert at == f"tensorboard/{Path(path).name}"
    assert not os.path.exists(run.dir)


def test_threads_log_whole_events(run):
    """Nothing is lost or mixed."""
    logger = start(run, flush_interval=7)

    def log(name):
        for step in range(300):
            logger.log_metrics({name: float(step)}, step)

    threads = [threading.Thread(target=log, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logger.close()
    expected = [(step, float(step)) for step in range(300)]
    assert load_scalars(files(run)[0]) == {f"t{number}": expected for number in range(4)}


def test_metrics_logged_by_a_hand_over_do_not_block(run):
    """The run is called without a lock; another thread may log meanwhile."""
    logger = start(run, flush_interval=1)
    log_asset = run.log_asset

    def log_and_hand_over(path, at=None, *, take="copy"):
        run.log_asset = log_asset
        thread = threading.Thread(target=logger.log_metrics, args=({"y": 1.0}, 2), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        log_asset(path, at, take=take)

    run.log_asset = log_and_hand_over
    logger.log_metrics({"x": 1.0}, 1)
    logger.close()
    assert run.assets[-1][3] == files(run)[0].read_bytes()
    assert load_scalars(files(run)[0]) == {"x": [(1, 1.0)], "y": [(2, 1.0)]}


def test_after_close_nothing_happens(run):
    """Late calls do no harm."""
    logger = start(run, flush_interval=1)
    logger.log_metrics({"x": 1.0}, 1)
    logger.close()
    logger.log_metrics({"x": 1.0}, 2)
    logger.log_hparams({"lr": 1})
    logger.flush()
    logger.close()
    assert len(run.assets) == 1


def test_a_scalar_costs_microseconds():
    """10,000 of them well below a second, by processor time."""
    start = time.process_time()
    for step in range(10_000):
        record(event(1.0, step, scalar("train/loss", 0.5)))
    assert time.process_time() - start < 0.7


@pytest.mark.parametrize("interval", [0, -1, 1.5, "1", None])
def test_an_interval_that_cannot_be(interval):
    with pytest.raises(InvalidInputError, match="flush_interval"):
        TensorboardLogger(flush_interval=interval)
