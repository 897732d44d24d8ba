"""A run's text log holds what was logged and printed, and the program's own streams notice nothing."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest

from mandapa.errors import InvalidInputError
from mandapa.loggers import FileLogger
from mandapa.loggers import file as module


class Run:
    """What a logger may use of a run; remembers what was handed over, with its bytes at that moment."""

    def __init__(self, folder: Path, *, rank: int = 0, world_size: int = 1, attempt: int = 1) -> None:
        self.name, self.dir, self.rank, self.world_size, self.attempt = (
            "resnet-7",
            str(folder),
            rank,
            world_size,
            attempt,
        )
        self.assets: list[tuple[str, str | None, str, bytes]] = []

    def log_asset(self, path: str, at: str | None = None, *, take: str = "copy") -> None:
        self.assets.append((path, at, take, Path(path).read_bytes()))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


@pytest.fixture
def own_streams(monkeypatch):
    """Makes and installs streams of the test's own; only while it runs, as pytest installs its own before."""

    def install():
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        return sys.stdout, sys.stderr

    return install


def start(run, *args, **kwargs):
    logger = FileLogger(*args, **kwargs)
    logger.open(run)
    return logger


def text(run, name="logs-rank0.txt"):
    return Path(run.dir, name).read_text()


# -- what is logged ----------------------------------------------------------------------------------------------------


def test_metrics_are_lines(run, monkeypatch):
    """UTC time, step, and each number so that it can be read back."""
    monkeypatch.setattr(module, "gmtime", lambda: time.gmtime(1_795_557_662))
    logger = start(run)
    logger.log_metrics({"train/loss": 0.125, "lr": 0.001}, 20)
    logger.log_metrics({"a": float("nan"), "b": float("inf"), "c": 3, "d": 1 / 3}, 21)
    logger.log_metrics({}, 22)
    logger.close()
    assert text(run) == (
        "2026-11-24T22:01:02Z step 20  train/loss: 0.125  lr: 0.001\n"
        "2026-11-24T22:01:02Z step 21  a: nan  b: inf  c: 3.0  d: 0.3333333333333333\n"
    )


def test_hyperparameters_are_lines(run):
    """Nested ones by dotted path, values as JSON, so that each stays on its line."""
    logger = start(run)
    logger.log_hparams(
        {"lr": 0.001, "model": {"depth": {"x": 1}, "names": ["a", "ü"], "none": {}}, "note": "a\nb", "n": None}
    )
    logger.log_hparams({})
    logger.close()
    assert text(run).splitlines() == [
        "hparams  lr: 0.001",
        "hparams  model.depth.x: 1",
        'hparams  model.names: ["a", "ü"]',
        "hparams  model.none: {}",
        'hparams  note: "a\\nb"',
        "hparams  n: null",
    ]


def test_a_line_is_in_the_file_when_the_call_returns(run):
    """So it outlives a killed process."""
    logger = start(run)
    logger.log_metrics({"x": 1.0}, 1)
    print("printed")
    assert re.fullmatch(r"\S+ step 1  x: 1\.0\n\[stdout\] printed\n", text(run))
    logger.close()


# -- what is printed ---------------------------------------------------------------------------------------------------


def test_printed_lines_are_kept(run, own_streams):
    """With the stream that they went to; the stream has them too, unchanged."""
    streams = own_streams()
    logger = start(run)
    print("one", 1)
    print("warned", file=sys.stderr)
    print("three\n\nfive")
    sys.stdout.writelines(["a\n", "b\n"])
    logger.close()
    print("after")
    assert text(run) == (
        "[stdout] one 1\n[stderr] warned\n[stdout] three\n[stdout] \n[stdout] five\n[stdout] a\n[stdout] b\n"
    )
    assert [stream.getvalue() for stream in streams] == ["one 1\nthree\n\nfive\na\nb\nafter\n", "warned\n"]
    assert (sys.stdout, sys.stderr) == streams


def test_a_line_is_written_when_it_ends(run):
    """By a newline or by the end of the run; lines of the two streams do not mix."""
    logger = start(run)
    print("a", end="")
    print("e", end="", file=sys.stderr)
    logger.flush()
    assert text(run) == ""
    print("b")
    print("c", end="")
    assert text(run) == "[stdout] ab\n"
    logger.close()
    assert sorted(text(run).splitlines()) == ["[stderr] e", "[stdout] ab", "[stdout] c"]
    assert run.assets[-1][3] == text(run).encode()


def test_of_a_progress_bar_the_last_state_is_kept(run):
    """Whatever redraws it; a line that ends as on Windows is a line."""
    logger = start(run, capture_stderr=False)
    for percent in range(101):
        sys.stdout.write(f"\r{percent}%")
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.write("windows\r\n")
    sys.stdout.write("split\r")
    sys.stdout.write("\n")
    sys.stdout.write("10%\r20%\r")
    sys.stdout.write("\r   \rmessage\n")
    sys.stdout.write("50%\rdone\nnext 1%")
    sys.stdout.write("\rnext 2%\r")
    logger.close()
    assert text(run).splitlines() == [
        "[stdout] 100%",
        "[stdout] windows",
        "[stdout] split",
        "[stdout] message",
        "[stdout] done",
        "[stdout] next 2%",
    ]


def test_a_bar_of_any_length_needs_no_memory(run):
    """States that were drawn over are dropped at once, and a line without an end is broken."""
    logger = start(run)
    for step in range(10_000):
        sys.stdout.write(f"\rstep {step}")
        assert len(sys.stdout._rest) < 20
    sys.stdout.write("\n")
    for _ in range(1000):
        sys.stdout.write("." * 100)
    print()
    logger.close()
    first, *rest = text(run).splitlines()
    assert first == "[stdout] step 9999"
    assert "".join([line.removeprefix("[stdout] ") for line in rest]) == "." * 100_000
    assert len(rest) == 2


def test_any_text_can_be_logged(run):
    """Also what is not UTF-8."""
    logger = start(run)
    print("größe 損失", "bad \udcff name")
    logger.close()
    assert text(run) == "[stdout] größe 損失 bad \\udcff name\n"


@pytest.mark.parametrize(("out", "err"), [(True, False), (False, True), (False, False)])
def test_streams_to_capture_can_be_chosen(run, own_streams, out, err):
    """The others stay as they are."""
    streams = own_streams()
    logger = start(run, capture_stdout=out, capture_stderr=err)
    assert [sys.stdout is streams[0], sys.stderr is streams[1]] == [not out, not err]
    print("o")
    print("e", file=sys.stderr)
    logger.close()
    assert text(run) == "[stdout] o\n" * out + "[stderr] e\n" * err


def test_a_program_without_streams(run, monkeypatch):
    """It has none afterwards either."""
    monkeypatch.setattr(sys, "stdout", None)
    logger = start(run)
    logger.log_metrics({"x": 1.0}, 1)
    logger.close()
    assert sys.stdout is None


def test_the_stream_behaves_as_before(run, monkeypatch, tmp_path):
    """All but writing is the stream's own, and so are its errors."""
    with open(tmp_path / "out", "w", encoding="latin-1") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        logger = start(run)
        out = sys.stdout
        assert out is not stream
        assert (out.fileno(), out.isatty(), out.encoding, out.errors) == (stream.fileno(), False, "latin-1", "strict")
        assert out.buffer is stream.buffer
        assert out.write("four") == 4
        out.reconfigure(line_buffering=True)
        assert stream.line_buffering
        with pytest.raises(UnicodeEncodeError):
            print("損失")
        with pytest.raises(TypeError):
            out.write(b"bytes")
        with pytest.raises(AttributeError):
            out.no_such_thing  # noqa: B018
        assert not hasattr(object.__new__(type(out)), "anything")
        logger.close()
        assert sys.stdout is stream
    assert (tmp_path / "out").read_bytes() == b"four"
    assert text(run) == "[stdout] four\n"


# -- who else replaces streams -----------------------------------------------------------------------------------------


def test_nested_captures(run, tmp_path, own_streams):
    """The inner one sees its part, the outer one all."""
    streams = own_streams()
    other = Run(tmp_path / "other")
    outer = start(run)
    print("1")
    inner = start(other)
    print("2")
    inner.close()
    print("3")
    outer.close()
    print("4")
    assert text(run) == "[stdout] 1\n[stdout] 2\n[stdout] 3\n"
    assert text(other) == "[stdout] 2\n"
    assert (sys.stdout, sys.stderr) == streams
    assert streams[0].getvalue() == "1\n2\n3\n4\n"


def test_captures_that_end_out_of_order(run, tmp_path, own_streams):
    """The one below becomes a pass-through, and is gone with the one above."""
    streams = own_streams()
    other = Run(tmp_path / "other")
    outer = start(run)
    inner = start(other)
    print("1")
    outer.close()
    print("2")
    assert sys.stdout is not streams[0]
    inner.close()
    print("3")
    assert text(run) == "[stdout] 1\n"
    assert text(other) == "[stdout] 1\n[stdout] 2\n"
    assert (sys.stdout, sys.stderr) == streams
    assert streams[0].getvalue() == "1\n2\n3\n"


def test_a_stream_that_somebody_else_put_there_stays(run, own_streams):
    """And who kept the stand-in can go on printing to it."""
    streams = own_streams()
    logger = start(run)
    kept = sys.stdout
    with contextlib.redirect_stdout(io.StringIO()) as theirs:
        print("theirs")
        logger.close()
        assert sys.stdout is theirs
    assert sys.stdout is kept
    print("late")
    assert theirs.getvalue() == "theirs\n"
    assert streams[0].getvalue() == "late\n"
    assert text(run) == ""


def test_lines_of_threads_are_whole(run, own_streams):
    """Each in the log exactly once, in any order, while metrics are logged and files handed over."""
    streams = own_streams()
    logger = start(run, flush_interval=10)

    def talk(number):
        for line in range(200):
            sys.stdout.write(f"{number}-{line}\n")
            logger.log_metrics({"x": 1.0}, line)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logger.close()
    printed = [line for line in text(run).splitlines() if line.startswith("[stdout] ")]
    assert sorted(printed) == sorted(f"[stdout] {number}-{line}" for number in range(4) for line in range(200))
    assert text(run).count(" step ") == 800
    assert sorted(streams[0].getvalue().split()) == sorted(line.removeprefix("[stdout] ") for line in printed)


def test_a_signal_handler_may_print_at_any_moment(run):
    """Also when it comes while its own thread writes a line."""
    logger = start(run)

    def interrupted():
        with logger._log.appending():
            print("handler")
            logger._log.write("line\n")

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    logger.close()
    assert text(run) == "[stdout] handler\nline\n"


def test_printing_while_it_closes_never_writes_to_another_file(run, tmp_path):
    """A thread that is on its way to the log finds it closed, though its descriptor has a new owner."""
    logger = start(run)
    log, out = logger._log, sys.stdout
    logger.close()
    with open(tmp_path / "other", "w") as other:
        out._log = log  # as the thread saw it
        print("late", file=out)
        log.write("late\n")
        other.flush()
    assert (tmp_path / "other").read_text() == text(run) == ""


# -- handing over ------------------------------------------------------------------------------------------------------


def test_hand_overs(run):
    """After so many metrics, at a flush and at the end, each a longer prefix of the file; none when nothing is new."""
    logger = start(run, flush_interval=3)
    logger.flush()
    for step in range(7):
        logger.log_metrics({"x": 1.0}, step)
    assert len(run.assets) == 2
    logger.flush()
    logger.flush()
    for step in range(2):
        logger.log_metrics({"x": 1.0}, step)
    assert len(run.assets) == 3
    logger.log_metrics({"x": 1.0}, 2)
    logger.close()
    assert [asset[:3] for asset in run.assets] == [(f"{run.dir}/logs-rank0.txt", "logs-rank0.txt", "grow")] * 4
    contents = [asset[3] for asset in run.assets]
    for before, after in itertools.pairwise(contents):
        assert after.startswith(before)
        assert len(after) > len(before)
    assert [data.count(b"\n") for data in contents] == [3, 6, 7, 10]
    assert contents[-1] == text(run).encode()


def test_a_hand_over_may_print_and_warn(run):
    """In its own thread or another's; what it says comes with the next."""
    logger = start(run, flush_interval=1)
    log_asset = run.log_asset

    def loud(path, at=None, *, take="copy"):
        log_asset(path, at, take=take)
        warnings.warn("the store is slow", RuntimeWarning, stacklevel=1)
        print("mine")
        thread = threading.Thread(target=print, args=("another's",), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        run.log_asset = log_asset

    run.log_asset = loud
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)
        logger.log_metrics({"x": 1.0}, 1)
    assert text(run).splitlines()[1:] == ["[stderr] the store is slow", "[stdout] mine", "[stdout] another's"]
    logger.close()
    assert run.assets[-1][3] == text(run).encode()


def test_a_hand_over_that_fails_at_the_end_lets_go_of_everything(run, own_streams):
    """Streams and file."""
    streams = own_streams()
    logger = start(run)
    print("x")
    run.log_asset = None
    fd = logger._log._fd
    with pytest.raises(TypeError):
        logger.close()
    assert (sys.stdout, sys.stderr) == streams
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_after_close_nothing_happens(run):
    """Late calls do no harm."""
    logger = start(run, flush_interval=1)
    logger.close()
    logger.log_metrics({"x": 1.0}, 2)
    logger.log_hparams({"lr": 1})
    logger.flush()
    logger.close()
    assert text(run) == ""
    assert run.assets == []


# -- a full disk -------------------------------------------------------------------------------------------------------


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_ends_the_log_but_no_print(run, own_streams, monkeypatch):
    """It is told of once; what was written before is handed over."""
    streams = own_streams()
    logger = start(run)
    print("before")
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "write", full)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            print("now")
            print("later")
            print("later", file=sys.stderr)
            logger.log_metrics({"x": 1.0}, 1)
            logger.log_hparams({"x": 1.0})
    ((category, message),) = [(warning.category, str(warning.message)) for warning in told]
    assert category is RuntimeWarning
    assert f"{run.dir}/logs-rank0.txt cannot be written (No space left on device)" in message
    print("room again")
    logger.close()
    assert text(run) == "[stdout] before\n"
    assert run.assets[-1][3] == b"[stdout] before\n"
    assert streams[0].getvalue() == "before\nnow\nlater\nroom again\n"


def test_a_full_disk_where_warnings_are_errors(run, own_streams, monkeypatch):
    """Print goes on all the same; a hook says so."""
    streams = own_streams()
    logger = start(run)
    monkeypatch.setattr(module.os, "write", full)
    print("now")
    assert streams[0].getvalue() == "now\n"
    logger.close()
    logger = start(run)
    with pytest.raises(RuntimeWarning, match="No space left"):
        logger.log_metrics({"x": 1.0}, 1)
    print("rest", end="")
    logger.close()
    assert (sys.stdout, sys.stderr) == streams


def test_a_warning_that_is_shown_on_a_captured_stream(run, own_streams, monkeypatch):
    """Does not go round in circles, and takes no lock with it."""
    streams = own_streams()
    logger = start(run)
    monkeypatch.setattr(module.os, "write", full)
    with warnings.catch_warnings():
        warnings.simplefilter("always")

        def show(message, *_):
            thread = threading.Thread(target=print, args=(message,), kwargs={"file": sys.stderr}, daemon=True)
            thread.start()
            thread.join(20)
            assert not thread.is_alive()

        warnings.showwarning = show
        print("now")
    logger.close()
    assert streams[1].getvalue().count("No space left") == 1


def test_short_writes_are_completed(run, monkeypatch):
    """A file system may take less than it is given."""
    write = os.write
    logger = start(run)
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "write", lambda fd, data: write(fd, data[:3]))
        print("a line of some length")
    logger.close()
    assert text(run) == "[stdout] a line of some length\n"


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filename", "attempt", "expected"),
    [
        ("logs-rank{rank}.txt", 1, "logs-rank3.txt"),
        ("logs-rank{rank}.txt", 2, "logs-rank3.attempt-2.txt"),
        ("{run_name}/{rank}-{world_size}.{attempt}.log", 2, "resnet-7/3-8.2.log"),
        ("a.b/rank{rank}", 12, "a.b/rank3.attempt-12"),
        ("{{x}}-{rank:04}.txt", 1, "{x}-0003.txt"),
    ],
)
def test_names(tmp_path, filename, attempt, expected):
    """Placeholders are filled in; a later attempt has a file of its own."""
    run = Run(tmp_path / "run", rank=3, world_size=8, attempt=attempt)
    logger = start(run, filename)
    print("x")
    logger.close()
    ((path, at, _, _),) = run.assets
    assert (path, at) == (os.path.join(run.dir, expected), expected)
    assert text(run, expected) == "[stdout] x\n"


@pytest.mark.parametrize(
    ("filename", "message"),
    [
        ("logs-{node}.txt", r"\{node\}.*\{run_name\}, \{rank\}, \{world_size\} and \{attempt\}"),
        ("logs-{rank.real}.txt", "placeholder"),
        ("logs-{}.txt", "placeholder"),
        ("logs-{rank:{x}}.txt", "cannot be filled in"),
        ("logs-{rank:{rank.x}}.txt", "cannot be filled in"),
        ("logs-{rank", "cannot be filled in"),
        ("logs-{rank:x.y}", "cannot be filled in"),
        ("/logs-{rank}.txt", "logs-0"),
        ("../logs-{rank}.txt", "logs-0"),
        ("a/../../logs-{rank}.txt", "logs-0"),
        ("a//logs-{rank}.txt", "logs-0"),
        ("", "empty"),
        ("logs/", "logs"),
        (".mandapa/logs.txt", "reserved"),
        (".run/rank{rank}.journal", "the run's own"),
    ],
)
@pytest.mark.parametrize("attempt", [1, 2])
def test_names_that_cannot_be(tmp_path, own_streams, filename, message, attempt):
    """Said at once; nothing is made and nothing captured."""
    streams = own_streams()
    run = Run(tmp_path / "run", attempt=attempt)
    with pytest.raises(InvalidInputError, match=message):
        start(run, filename)
    assert not os.path.exists(run.dir)
    assert (sys.stdout, sys.stderr) == streams


def test_ranks_need_names_of_their_own(tmp_path):
    """The first may have it, the others may not; one alone always may."""
    logger = start(Run(tmp_path, rank=0, world_size=2), "logs.txt")
    logger.close()
    with pytest.raises(InvalidInputError, match=r"every rank would write 'logs\.txt': add \{rank\}"):
        start(Run(tmp_path, rank=1, world_size=2), "logs.txt")


def test_a_file_that_is_there_is_gone_on_with(run):
    """Nothing of it is lost, a torn line is ended, and the whole of it is handed over."""
    for line in ("one", "two"):
        logger = start(run)
        print(line)
        logger.close()
    assert run.assets[-1][3] == b"[stdout] one\n[stdout] two\n"
    with open(run.assets[-1][0], "a") as file:
        file.write("to")
    logger = start(run)
    print("three")
    logger.close()
    assert text(run) == "[stdout] one\n[stdout] two\nto\n[stdout] three\n"


def test_a_file_that_cannot_be_opened(run, own_streams):
    """The hook raises, and the streams stay as they are."""
    streams = own_streams()
    os.makedirs(os.path.join(run.dir, "logs-rank0.txt"))
    with pytest.raises(IsADirectoryError):
        start(run)
    assert (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize("interval", [0, -1, 1.5, "1", None])
def test_an_interval_that_cannot_be(interval):
    with pytest.raises(InvalidInputError, match="flush_interval"):
        FileLogger(flush_interval=interval)


# -- whole programs ----------------------------------------------------------------------------------------------------


PRELUDE = """
import os, sys, threading
from mandapa.loggers import FileLogger

class Run:
    name, dir, rank, world_size, attempt = "r", sys.argv[1], 0, 1, 1
    def log_asset(self, path, at=None, *, take="copy"):
        pass
"""


def program(code, folder, *options):
    script = PRELUDE + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, *options, "-c", script, str(folder)], capture_output=True, timeout=60, check=False
    )


def test_a_forked_child_prints_without_the_lock(tmp_path):
    """Though a thread that it does not have holds it; the log is its parent's, and goes on."""
    done = program(
        """
        logger = FileLogger()
        logger.open(Run())
        held, free = threading.Event(), threading.Event()

        def hold():
            with logger._log._lock:
                held.set()
                free.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            print("child", flush=True)
            print("child warns", file=sys.stderr, flush=True)
            os._exit(7)
        _, status = os.waitpid(child, 0)
        free.set()
        thread.join()
        print("parent", os.waitstatus_to_exitcode(status))
        logger.close()
        """,
        tmp_path,
        "-W",
        "ignore::DeprecationWarning",
    )
    assert (done.stdout, done.stderr) == (b"child\nparent 7\n", b"child warns\n")
    assert (tmp_path / "logs-rank0.txt").read_text() == "[stdout] parent 7\n"


TALK = """
for step in range(50):
    sys.stdout.write(f"\\r{step}%")
sys.stdout.write("\\r\\n")
print("größe", "損失", sep="\\t", end="|")
sys.stdout.flush()
sys.stdout.buffer.write(b"raw\\xff\\n")
sys.stdout.writelines(["a", "b\\n"])
print("no end", end="", flush=True)
print("warned", file=sys.stderr)
os.system("echo from a child")
"""


def test_the_programs_own_output_is_unchanged_byte_for_byte(tmp_path):
    """With the log and without."""
    plain = program(TALK, tmp_path / "plain", "-X", "utf8")
    logged = program(
        "logger = FileLogger(); logger.open(Run())" + TALK + "logger.close()", tmp_path / "logged", "-X", "utf8"
    )
    assert (logged.returncode, logged.stdout, logged.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert plain.returncode == 0
    assert len(plain.stdout) > 200
    assert sorted((tmp_path / "logged/logs-rank0.txt").read_text().splitlines()) == [
        "[stderr] warned",
        "[stdout] 49%",
        "[stdout] größe\t損失|ab",
        "[stdout] no end",
    ]


def test_a_program_that_forgets_to_close_ends_as_before(tmp_path):
    """Lines that ended are in the log."""
    done = program('FileLogger().open(Run()); print("x"); print("y", end="")', tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"x\ny", b"")
    assert (tmp_path / "logs-rank0.txt").read_text() == "[stdout] x\n"


def test_a_killed_program_leaves_what_it_printed(tmp_path):
    """Up to the last line."""
    program('FileLogger().open(Run()); print("x"); os.kill(os.getpid(), 9)', tmp_path)
    assert (tmp_path / "logs-rank0.txt").read_text() == "[stdout] x\n"


def test_a_traceback_that_ends_the_attempt_is_kept(run):
    """Line by line, as the last thing in the file."""
    logger = start(run, capture_stdout=False, capture_stderr=False)
    logger.log_failure("Traceback\n  here\nValueError: no")
    logger.close()
    assert text(run) == "[failed] Traceback\n[failed]   here\n[failed] ValueError: no\n"
