"""2,000 hostile paths, the same every time: each is refused, or its bytes land inside of the folder that was named.

They come twice: by the doors of the library, and in manifests that somebody made by hand.
"""

from __future__ import annotations

import os
import random
import unicodedata
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import pytest

import mandapa
from mandapa.content import folders as folders_module
from mandapa.digest import digest
from mandapa.errors import CorruptionError, InvalidInputError, MandapaError, NotFoundError, SecurityError
from mandapa.format.keys import container_key
from mandapa.format.manifest import Chunk, FileRow, Leaf, NodeAddress, node_digest, zstd
from mandapa.format.pack import HEADER, KIND_CHUNK, KIND_NODE, PackEntry, pack_footer
from mandapa.format.records import VersionOp
from mandapa.format.strict import check_path
from mandapa.object_store import MemoryObjectStore
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository
from mandapa.repository.version import address_of

COUNT = 2000
BYTES = b"what lands"

UP = [
    "..",
    "../..",
    "../../..",
    ".",
    "./..",
    "...",
    ". .",
    ".. ",
    " ..",
    "..\u200b",
    "\uff0e\uff0e",
    "\u2025",
    "%2e%2e",
]
ROOTS = [
    "/",
    "//",
    "///",
    "\\",
    "\\\\host\\share\\",
    "C:",
    "C:\\",
    "C:/",
    "\\\\?\\",
    "file:///",
    "~/",
    "~root/",
    "/proc/",
]
DEVICES = ["con", "PRN", "aux.txt", "NUL", "nul.tar.gz", "COM1", "lpt9", "CONIN$", "COM\u00b9", "a:b", "a::$DATA"]
ENDS = [
    "a.",
    "a..",
    "a ",
    "a\t",
    " a",
    "a. .",
    "a\u00a0",
    "a\u3000",
    "-rf",
    "--",
    "*",
    "?",
    "a|b",
    "<",
    '"',
    "a;b",
    "$(a)",
]
UNICODE = [
    "caf\u00e9", "cafe\u0301", "stra\u00dfe", "STRASSE", "\u212a", "\u0130", "\ufb01", "\u1e9e", "\u202efdp.exe",
    "\ufeffa", "a\u200d", "\u00ad", "\U0001f600", "\U000e0041", "\ud800", "a\udcff", "\u0000", "\u2028", "\u2215",
    "\uff0f", "\u29f8", "\u00c0", "\u0410", "a\u0308\u0323", "a\u0323\u0308", "\u1100\u1161", "\uac00",
]  # fmt: skip
CONTROL = ["a\0", "\0a", "a\nb", "a\rb", "\x1b[2J", "\x1b]0;x\x07", "\x7f", "\x9b2J", "\x85", "a\bb"]
LONG = ["a" * 255, "a" * 256, "\u0905" * 85, "\u0905" * 86, "x" * 5000]
OURS = [
    ".mandapa", ".MANDAPA", ".mandapa ", ".mandap\u00e1", ".m\u200dandapa", ".mandapa/mandapa.json", "mandapa.json",
    ".mandapa-0123456789abcdef-0.tmp", ".mandapa-" + "0" * 32 + ".part", ".git/config", ".ssh/authorized_keys",
    "packs/" + "0" * 32, "log/../x", ".run/format.json",
]  # fmt: skip
PLAIN = ["a", "b.txt", "checkpoint", "logs", "x" * 40, "0", "_", "-", "~"]


def hostile_paths(place: str) -> list[str]:
    """Paths of one to five of the pieces above; some are absolute, and lead below ``place``."""
    rng = random.Random("paths")
    pieces = [UP, DEVICES, ENDS, UNICODE, CONTROL, LONG, OURS, PLAIN, PLAIN, PLAIN]
    found: dict[str, None] = dict.fromkeys([piece for kind in [*pieces, ROOTS] for piece in kind])
    found.update(dict.fromkeys(["", "a" * 1024, "/".join(["a"] * 513), "../" * 40 + "mandapa-evil", f"{place}/evil"]))
    while len(found) < COUNT:
        path = rng.choice(["/", "/", "/", "/", "/", "//", "\\"]).join(
            [rng.choice(rng.choice(pieces)) for _ in range(rng.choice((1, 2, 2, 3, 3, 5)))]
        )
        match rng.randrange(8):
            case 0:
                path = rng.choice(ROOTS) + path
            case 1:
                path = f"{place}/{path}"
            case 2:
                path += rng.choice(["/", "/.", "/..", "\0", " "])
        found[path] = None
    return list(found)[:COUNT]


def is_fine(path: str) -> bool:
    """Whether it may stand in a manifest, as docs/format.md §2.3 says in other words than the code."""
    if path.startswith(".mandapa/"):
        path = "x" + path[8:]
    if not path or path == ".mandapa" or any(0xD800 <= ord(char) <= 0xDFFF for char in path):
        return False
    segments = path.split("/")
    return (
        not any(unicodedata.category(char) in ("Cc", "Zl", "Zp") or char == "\\" for char in path)
        and not any(segment in ("", ".", "..") or len(segment.encode()) > 255 for segment in segments)
        and len(path.encode()) <= 1024
    )


class Box:
    """A folder with a destination deep inside, and what must not change around it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dest = folder / "deep" / "er" / "dest"
        self.dest.mkdir(parents=True)
        self.outside = folder / "outside"
        self.outside.mkdir()
        (self.outside / "keep").write_bytes(b"as it was")
        (folder / "deep" / "keep").write_bytes(b"as it was")
        self._before = self._around()

    def _around(self) -> dict[str, bytes | None]:
        """All that is beside the destination."""
        found: dict[str, bytes | None] = {}
        for top, folders, files in os.walk(self.folder):
            if top == str(self.dest):
                folders.clear()
                continue
            for name in files:
                path = os.path.join(top, name)
                found[path] = Path(path).read_bytes()
            found.update({os.path.join(top, name): None for name in folders})
        return found

    def check(self) -> None:
        """Nothing has changed but the destination."""
        assert self._around() == self._before
        assert not [name for name in os.listdir("/") if "mandapa-evil" in name]

    def landed(self) -> dict[str, bytes]:
        """Files in the destination, links not followed."""
        found = {}
        for top, _, files in os.walk(self.dest):
            for name in files:
                path = os.path.join(top, name)
                if not os.path.islink(path):
                    found[os.path.relpath(path, self.dest)] = Path(path).read_bytes()
        return found

    def empty(self) -> None:
        for top, folders, files in os.walk(self.dest, topdown=False):
            for name in files:
                os.unlink(os.path.join(top, name))
            for name in folders:
                path = os.path.join(top, name)
                (os.unlink if os.path.islink(path) else os.rmdir)(path)


class Forge:
    """A repository to which manifests are added that no writer would make."""

    def __init__(self) -> None:
        self.store = MemoryObjectStore()
        rng = random.Random(7)
        self.repo = Repository.create(self.store, threads=0, author=Author("forger", random=rng, sleep=lambda _: None))
        self.log = self.repo.register("forged")
        self._rng = rng
        self.pack = self._container("p", BYTES, BYTES, 0, KIND_CHUNK)

    def _container(self, kind: str, stored: bytes, raw: bytes, codec: int, what: int) -> bytes:
        name = kind.encode() + self._rng.randbytes(16)
        entry = PackEntry(len(HEADER), len(stored), len(raw), codec, what, digest(raw))
        self.store.put(container_key(name), HEADER + stored + pack_footer([entry], len(HEADER) + len(stored)))
        return name

    def version(self, *paths: str) -> int:
        """Commit a version with a file of `BYTES` at each path, whatever the paths are; gives its number."""
        chunk = [0, len(HEADER), len(BYTES), len(BYTES), 0]
        rows = [[0, Packed(path), len(BYTES), 0, digest(BYTES), [chunk]] for path in paths]
        raw = packed([0, [self.pack], rows])
        stored = zstd.compress(raw)
        name = self._container("m", stored, raw, 1, KIND_NODE)
        root = address_of(NodeAddress(name, len(HEADER), len(stored), digest(raw)))
        number = self.log.state.next_number
        told = "0" * 64
        with suppress(UnicodeEncodeError):
            chunks = (Chunk(0, len(HEADER), len(BYTES), len(BYTES), 0),)
            told = node_digest(
                Leaf([self.pack], [FileRow(path, len(BYTES), 0, digest(BYTES), chunks) for path in paths])
            ).hex()
        op = VersionOp(number=number, parent=None, root=root, digest=told, assets=len(paths), bytes=0, added=0)
        self.log.append(f"{self._rng.getrandbits(128):032x}", lambda _: [op], self.repo.author)
        return number


class Packed(str):
    """A string that is written as it is, surrogates included."""

    __slots__ = ()


def packed(value: object) -> bytes:
    """``value`` as msgpack, with strings that msgspec would not write."""
    if isinstance(value, list):
        return bytes([0xDC]) + len(value).to_bytes(2, "big") + b"".join(map(packed, value))
    if isinstance(value, Packed):
        data = value.encode("utf-8", "surrogatepass")
        return bytes([0xDB]) + len(data).to_bytes(4, "big") + data
    return msgspec.msgpack.encode(value)


def error_of(call: Callable[[], object], *kinds: type[MandapaError]) -> MandapaError | None:
    """The error of these kinds that a call ends with, fit for a terminal; None when it comes back."""
    try:
        call()
    except kinds as error:
        assert str(error).isprintable()  # noqa: PT017 - of any of the kinds, or none
        return error
    return None


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_there_are_2000_of_both_kinds(tmp_path: Path) -> None:
    """All different, some allowed and most not: neither test below is about one kind alone."""
    paths = hostile_paths(str(tmp_path))
    assert len(set(paths)) == COUNT
    assert 200 < sum(map(is_fine, paths)) < COUNT - 200


def test_paths_in_a_manifest_land_inside_or_not_at_all(box: Box) -> None:
    """A manifest made by hand: what the format forbids is corruption, and everything else is that file and no other."""
    for at, path in enumerate(hostile_paths(str(box.outside))):
        if at % 50 == 0:  # a long log would cost more than what is tested
            forge = Forge()
        number = forge.version(path)
        said = error_of(lambda: forge.repo[f"forged:v{number}"].download(box.dest), CorruptionError)  # noqa: B023
        assert (said is None) == is_fine(path), path
        assert box.landed() == ({path: BYTES} if said is None else {})
        box.check()
        box.empty()


class _GiveUpError(Exception):
    """Ends a transaction without a version."""


def test_paths_at_every_door_are_refused_or_kept_as_they_are(box: Box) -> None:
    """Adding, linking, removing, opening: a bad path is refused by each, before anything is done."""
    repo = mandapa.open("memory://hostile-paths", create=True)
    source = box.outside / "keep"
    with repo.artifact("net").transaction() as txn:
        txn.add_bytes("there", b"x")
    version = repo["net"]
    allowed = []
    for at, path in enumerate(hostile_paths(str(box.outside))):
        fine = is_fine(path) and not path.startswith(".mandapa/")
        if at % 50 == 0:
            stack = ExitStack()
            txn = stack.enter_context(repo.artifact("net").transaction())
        doors = [
            lambda: txn.add_bytes(path, BYTES),  # noqa: B023 - called at once
            lambda: txn.add_url(path, "https://example.org/x"),  # noqa: B023
            lambda: txn.add(source, at=path),  # noqa: B023
            lambda: txn.remove(path),  # noqa: B023
            lambda: txn.copy("net", "there", at=path),  # noqa: B023
            lambda: version.open(path),  # noqa: B023
        ]
        for door in doors:
            said = error_of(door, InvalidInputError, NotFoundError)
            assert (fine or path == "") if said is None else (not fine or isinstance(said, NotFoundError)), path
        if at % 50 == 49:
            with suppress(_GiveUpError), stack:
                raise _GiveUpError
        if fine:
            check_path(path)
            allowed.append(path)
    box.check()
    assert len(allowed) > 200


def test_links_in_the_destination_lead_nowhere(box: Box) -> None:
    """A link where a folder goes is refused, one where a file goes is replaced: nothing is written through either."""
    rng = random.Random("links")
    forge = Forge()
    nested = [
        path for path in hostile_paths(str(box.outside)) if is_fine(path) and "/" in path and "mandapa.json" not in path
    ]
    targets = ["../../../outside", str(box.outside), "..", ".", "/", "loop", "../../keep", str(box.outside / "keep")]
    refused = replaced = 0
    for path in rng.sample(nested, 150):
        segments = path.split("/")
        depth = rng.randrange(1, len(segments) + 1)
        link = box.dest.joinpath(*segments[:depth])
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(rng.choice(targets))
        version = forge.repo[f"forged:v{forge.version(path)}"]
        if depth < len(segments):
            refused += 1
            with pytest.raises(SecurityError, match="symbolic link"):
                version.download(box.dest)
            assert link.is_symlink()
            assert box.landed() == {}
        else:
            replaced += 1
            version.download(box.dest)
            assert box.landed() == {path: BYTES}
        box.check()
        box.empty()
    assert min(refused, replaced) > 20


def test_paths_that_are_one_name_somewhere_are_refused_there(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system tells neither case nor normal forms apart, twins write nothing at all."""
    monkeypatch.setattr(folders_module, "_exists", lambda *_: True)
    rng = random.Random("twins")
    forge = Forge()
    fine = [path for path in hostile_paths(str(box.outside)) if is_fine(path)]
    ways = [str.upper, str.lower, str.swapcase, *[lambda s, f=f: unicodedata.normalize(f, s) for f in ("NFD", "NFC")]]
    twins = {(path, way(path)) for path in fine for way in ways if way(path) != path and is_fine(way(path))}
    for pair in rng.sample(sorted(twins), 100):
        # Those of which one is the folder of another are broken in other ways.
        if any(one.startswith(f"{other}/") for one in pair for other in pair):
            continue
        version = forge.repo[f"forged:v{forge.version(*sorted(pair))}"]
        with pytest.raises(InvalidInputError, match="one name on the file system"):
            version.download(box.dest)
        assert box.landed() == {}
        box.check()


def test_a_file_that_is_also_a_folder_is_refused(box: Box) -> None:
    """In a manifest made by hand; the error names the one that stands in the way."""
    forge = Forge()
    number = forge.version("a", "a/b")
    with pytest.raises(InvalidInputError, match=r"a is a (file|folder), where a (file|folder) is needed"):
        forge.repo[f"forged:v{number}"].download(box.dest)
    box.check()


@pytest.mark.parametrize("path", [".mandapa/log/x", "x/.mandapa/catalog/0", "x/runs/packs/1", "x/runs/mandapa.json"])
def test_no_file_goes_into_a_repository_that_is_there(tmp_path: Path, path: str) -> None:
    """Wherever it is below the destination, whatever it is called, and by `get ADDRESS/x` too: objects stay whole."""
    inside = tmp_path / "dest" / path.removeprefix("x/").partition("/")[0]
    mandapa.open(str(inside), create=True)
    before = {one: one.read_bytes() for one in inside.rglob("*") if one.is_file()}
    forge = Forge()
    version = forge.repo[f"forged:v{forge.version(path)}"]
    short = (lambda name: name.removeprefix("x/")) if path.startswith("x/") else None
    with pytest.raises(SecurityError, match="repository"):
        version.restore(tmp_path / "dest", rename=short)
    assert {one: one.read_bytes() for one in inside.rglob("*") if one.is_file()} == before


def test_a_repository_is_no_destination(tmp_path: Path) -> None:
    """Its own folder neither."""
    mandapa.open(str(tmp_path / "repo"), create=True)
    forge = Forge()
    with pytest.raises(SecurityError, match="repository"):
        forge.repo[f"forged:v{forge.version('packs/x')}"].download(tmp_path / "repo")
    assert not (tmp_path / "repo" / "packs").exists() or not list((tmp_path / "repo" / "packs").iterdir())


def test_a_folder_with_a_repository_in_it_comes_back_twice(tmp_path: Path) -> None:
    """What a version itself has of a repository is restored, and what is equal may stand there the second time."""
    mandapa.open(str(tmp_path / "from" / "runs"), create=True)
    forge = Forge()
    with forge.repo.artifact("nested").transaction() as txn:
        txn.add(tmp_path / "from")
    first = forge.repo["nested"].download(tmp_path / "to")
    assert first.files > 1
    assert forge.repo["nested"].download(tmp_path / "to").skipped == first.files
    assert mandapa.open(str(tmp_path / "to" / "runs")).id == mandapa.open(str(tmp_path / "from" / "runs")).id


def test_files_called_like_parts_are_kept(box: Box) -> None:
    """An asset with the name of an interrupted download's part is there after each download of it."""
    forge = Forge()
    names = [".mandapa-" + "0" * 32 + ".part", ".mandapa-0123456789abcdef-0.tmp"]
    version = forge.repo[f"forged:v{forge.version(*sorted(names))}"]
    for _ in range(3):
        version.download(box.dest)
        assert box.landed() == dict.fromkeys(names, BYTES)


def test_names_of_artifacts_are_no_paths(box: Box) -> None:
    """An address whose name is a path is refused; nothing is made of it, in the store or beside it."""
    repo = mandapa.open(str(box.dest), create=True)
    for path in hostile_paths(str(box.outside)):
        if "/" in path or "\\" in path or path.startswith("."):
            with pytest.raises(MandapaError), repo.artifact(path).transaction() as txn:
                txn.add_bytes("a", b"x")
    box.check()
    assert repo.artifacts() == []
