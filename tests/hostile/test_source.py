"""What no line of the library may do, looked for in its source: run what it reads, fetch, read without a limit."""

from __future__ import annotations

import ast
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

import mandapa
from mandapa.errors import MandapaError

SOURCE = Path(mandapa.__file__).parent

RUNS_CODE = {
    "pickle": {"load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"},
    "builtins": {"eval", "exec", "compile", "__import__"},
    "yaml": {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all", "Loader"},
    "os": {"system", "popen", "execv", "execve", "execvp", "spawnv", "spawnl"},
    "sqlite3": {"enable_load_extension", "load_extension"},
    "torch": {"hub", "jit"},
}  # fmt: skip
"""Names that run what they are given, by module."""

NO_FILES = {"follower", "copy", "package", "kept_logs", "kept_nodes", "shelf", "journal", "self"}
"""What has a method ``read`` of its own, which bounds itself."""

MAY_RUN = {"repository/rehearsal.py pickle"}  # an object store, from the process that started this one

UNPICKLERS = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "dbm", "copyreg", "xmlrpc", "code", "runpy"}
NETWORK = {
    "urllib.request", "http", "requests", "httpx", "aiohttp", "urllib3", "ftplib", "smtplib", "telnetlib", "socket",
    "ssl", "asyncio", "webbrowser", "fsspec", "boto3", "botocore",
}  # fmt: skip
MAY_USE_NETWORK = {
    "environment.py": "socket",  # the name of this machine
    "loggers/tensorboard.py": "socket",
    "run/facts.py": "socket",
    "run/directory.py": "socket",
    "object_store/cloud.py": "socket",  # whether the cloud's own machine answers
    "object_store/s3.py": "boto3",  # credentials as boto3 finds them
}


@cache
def sources() -> dict[str, ast.Module]:
    """Every file of the library, but `testing`, which is a server and starts servers."""
    found = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    return {name: ast.parse(path.read_text()) for name, path in found.items() if not name.startswith("testing/")}


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Module and name of everything that is imported; the name is empty for a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and called(node).endswith("import_module"):
            yield from ((str(value.value), "") for value in node.args[:1] if isinstance(value, ast.Constant))


def called(node: ast.Call) -> str:
    """What is called, as it is written: `torch.load`."""
    return ast.unparse(node.func)


@cache
def calls() -> list[tuple[str, ast.Call]]:
    """Every call, and where it is."""
    return [
        (f"{name}:{node.lineno}", node)
        for name, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


@cache
def imported() -> list[tuple[str, str, str]]:
    """File, module and name of everything that is imported."""
    return [(name, *one) for name, tree in sources().items() for one in imports(tree)]


def keyword(node: ast.Call, name: str) -> object:
    value = next((keyword.value for keyword in node.keywords if keyword.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else value


def test_the_source_is_there() -> None:
    """All of it: what is not looked at could do anything."""
    assert len(sources()) > 120
    assert {"run/checkpoints.py", "content/fetch.py", "cli/__main__.py"} <= sources().keys()


def test_nothing_that_is_read_is_run() -> None:
    """No unpickling, no eval, no YAML that makes objects, no shell: not by any name that Python has for it."""
    found = []
    for name, module, member in imported():
        top = module.partition(".")[0]
        if top in UNPICKLERS or member in RUNS_CODE.get(top, ()):
            found.append(f"{name}: from {module} import {member or '*'}")
    for where, node in calls():
        owner, _, method = called(node).rpartition(".")
        if method in RUNS_CODE.get(owner or "builtins", ()) and f"{where.partition(':')[0]} {owner}" not in MAY_RUN:
            found.append(f"{where}: {called(node)}")
        if owner == "torch" and method == "load" and keyword(node, "weights_only") is not True:
            found.append(f"{where}: torch.load without weights_only=True")
        if method == "load" and owner in ("np", "numpy") and keyword(node, "allow_pickle") is not False:
            found.append(f"{where}: numpy.load without allow_pickle=False")
        if keyword(node, "shell") not in (None, False):
            found.append(f"{where}: a shell")
    assert found == []


def test_what_it_looks_for_is_found() -> None:
    """The search knows each of them when it stands there."""
    bad = ast.parse("import marshal\nfrom pickle import loads\nimport yaml\neval('1')\ntorch.load(f)\nyaml.load(f)\n")
    assert ("marshal", "") in set(imports(bad))
    assert ("pickle", "loads") in set(imports(bad))
    names = [called(node) for node in ast.walk(bad) if isinstance(node, ast.Call)]
    assert {"eval", "torch.load", "yaml.load"} <= set(names)
    assert "load" in RUNS_CODE["yaml"]
    assert "eval" in RUNS_CODE["builtins"]


def test_urls_are_never_fetched() -> None:
    """Nothing speaks to a network but the clients of object stores: a URL in a version is text."""
    found = []
    for name, module, _ in imported():
        hit = next((one for one in NETWORK if module == one or module.startswith(f"{one}.")), None)
        if hit is not None and MAY_USE_NETWORK.get(name) != hit:
            found.append(f"{name}: {module}")
    assert found == []


def test_objects_are_read_up_to_a_limit() -> None:
    """Each whole read of a store says how many bytes it may be; stores around stores pass that on."""
    found = []
    for where, node in calls():
        if not isinstance(node.func, ast.Attribute) or node.func.attr != "get":
            continue
        owner, _, method = called(node).rpartition(".")
        is_store = owner.rpartition(".")[2].lstrip("_") in ("store", "place", "patient", "source", "target", "dest")
        if method == "get" and is_store and not any(keyword.arg == "limit" for keyword in node.keywords):
            found.append(f"{where}: {ast.unparse(node)}")
    assert found == []


def test_files_are_read_up_to_a_limit() -> None:
    """`file.read()` without a number stands only where the file is this program's own, and small."""
    own = {
        "run/ring.py": 2,  # of the kernel, below /sys/fs/cgroup
        "run/uploader.py": 1,  # from the process that started this one
        "run/reader.py": 1,
        "run/repository_backend.py": 1,  # the facts of the run, which it wrote
        "cli/demo/story.py": 1,  # what a process that it started has said
        "repository/drill.py": 1,
    }
    found: dict[str, list[str]] = {}
    for where, node in calls():
        owner, _, method = called(node).rpartition(".")
        blind = method in ("read_bytes", "read_text", "readlines") or (method == "read" and not node.args)
        if blind and owner.rpartition(".")[2].lstrip("_") not in NO_FILES:
            found.setdefault(where.partition(":")[0], []).append(f"{where}: {ast.unparse(node)}")
    assert {name: lines for name, lines in found.items() if len(lines) > own.get(name, 0)} == {}


class Canary:
    """Unpickled by anybody who does unpickle, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def as_zip(data: bytes, path: Path) -> None:
    """As torch.save would write it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(64))
        archive.writestr("archive/version", "3\n")


def as_npy(data: bytes, path: Path) -> None:
    """As numpy writes an array of objects."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)


HOLDERS = {
    "model.pt": as_zip,
    "model.pth": as_zip,
    "old.pt": lambda data, path: path.write_bytes(data),
    "objects.npy": as_npy,
    "state.pkl": lambda data, path: path.write_bytes(data),
    ".metadata": lambda data, path: path.write_bytes(data),
    "__0_0.distcp": lambda data, path: path.write_bytes(data),
}


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_hostile_pickle_is_only_bytes(tmp_path: Path, protocol: int) -> None:
    """Stored, compared, listed, loaded, fetched: it comes back byte for byte, and nobody has run it."""
    sung = tmp_path / "sung"
    data = pickle.dumps({"w": Canary(sung)}, protocol)
    pickle.loads(data)["w"].close()
    assert sung.exists()  # it does sing
    sung.unlink()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, write in HOLDERS.items():
        write(data, folder / name)
    repo = mandapa.open(str(tmp_path / "repo"), create=True)
    for text in (b"1", b"2"):
        (folder / "old.pt").write_bytes(data + text)
        with repo.artifact("net").transaction() as txn:
            txn.add(folder, at="checkpoint")
    version = repo["net"]
    for name in HOLDERS:
        path = f"checkpoint/{name}"
        for look in (version.tensors, lambda path: version.load_tensors(path, ["w"])):
            with suppress(MandapaError):
                assert not look(path)
    assert version.diff(repo["net:latest~1"]).changed
    version.download(tmp_path / "back")
    assert {path.name: path.read_bytes() for path in (tmp_path / "back/checkpoint").iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert not sung.exists()
    assert os.listdir(tmp_path / "back") == ["checkpoint"]
