"""What a drill does in its own process: restore a version, read every file again from the disk, load its tensors.

::

    python -m mandapa.repository.rehearsal     # started by a drill; a pickled question on standard input

The question comes from the process that started this one, and from nowhere else. When that process dies, or lets go of
the other end, this one removes what it has restored and ends.
"""

from __future__ import annotations

import os
import pickle
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import msgspec

from mandapa.content.cutters.source import FileSource
from mandapa.content.download import download
from mandapa.content.parallel import in_order
from mandapa.content.ranges import RangeReader, Target
from mandapa.content.tensors.arrays import framework
from mandapa.content.tensors.dtypes import ITEM_SIZES
from mandapa.content.tensors.load import read_tensors
from mandapa.content.tensors.structure import TensorPlace, read_structure
from mandapa.content.tree import Located
from mandapa.digest import Hasher
from mandapa.errors import CorruptionError, FormatVersionError, InvalidInputError, MandapaError, NotFoundError
from mandapa.format.manifest import Branch, ChildRow, FileRow, Leaf, NodeCutter, Row, UrlRow, node_digest
from mandapa.repository.repository import Repository
from mandapa.repository.salvage import Gap, rows_and_gaps
from mandapa.repository.version import Version

__all__ = ["Answer", "Question", "Rehearsal", "logical_digest", "main"]

_BLOCK = 4 << 20
_FROM_DISK = 1 << 20  # bytes; to wait for the disk for each of many small files takes longer than all the rest
_TOGETHER = 256 << 20  # bytes of tensors that are in memory at a time, or one tensor
_TELL = 0.1  # seconds between words about progress
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".distcp", ".npz", ".npy")
_BITS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64", 16: "complex128"}
_TRIES = 100


class Question(NamedTuple):
    """What is to be rehearsed."""

    store: Any
    artifact: str
    number: int
    digest: str
    folder: str
    """An empty one, which is removed when nobody waits for the answer any more."""
    threads: int


class Answer(msgspec.Struct, kw_only=True):
    """What came of it."""

    seconds: float = 0.0
    """From the first request until the last file was written."""
    files: int = 0
    bytes: int = 0
    urls: int = 0
    tensors: int = 0
    tensor_bytes: int = 0
    problems: list[tuple[str, str]] = []
    """(path, what is wrong); an empty path: with the version as a whole."""
    unloaded: list[tuple[str, str]] = []
    """(path, why): files that are as they were stored, but of which not all tensors can be loaded."""
    error: str = ""
    """The class of the error that kept it from a verdict."""
    message: str = ""


class Rehearsal:
    """One version, restored into an empty folder and compared with its manifest, its record and itself.

    Args:
        version: What is restored.
        folder: Where to.
        tell: Called with numbers of bytes that were written.
    """

    def __init__(self, version: Version, folder: str, tell: Callable[[int], None]) -> None:
        self._version = version
        self._repo = version.artifact.repository
        self._folder = folder
        self._tell = tell
        self._bad: set[str] = set()
        self._loading = threading.Lock()
        self.answer = Answer()

    def run(self) -> Answer:
        """Restore, compare, load.

        Raises:
            NotFoundError: The version was deleted meanwhile.
            InvalidInputError: This file system cannot hold two of its paths side by side.
            FormatVersionError: The version needs a feature that this mandapa lacks.
            StorageError: The store or the disk failed, so there is no verdict.
        """
        self._repo.check_features(self._version.requires, self._version.address)
        start = time.perf_counter()
        try:
            self._version.restore(self._folder, progress=self._tell)
        except (CorruptionError, FormatVersionError) as error:
            self._one_by_one(error)
        self.answer.seconds = time.perf_counter() - start
        self._compare()
        return self.answer

    def _problem(self, path: str, problem: object) -> None:
        self._bad.add(path)
        text = str(problem).removeprefix(f"{self._version.address}: ").removeprefix(f"{path}: ")
        self.answer.problems.append((path, text))

    # -- what is left of a damaged version ----------------------------------------------------------------------------

    def _one_by_one(self, first: MandapaError) -> None:
        """After a failure: whatever can be had alone, and a problem for everything else."""
        for found in self._restored():
            if not isinstance(found.row, UrlRow) and not os.path.lexists(self._place(found.row.path)):
                self._alone(found)
        if not self._bad:
            self._problem("", first)  # whatever it was, it was not as it should be

    def _gap(self, gap: Gap) -> None:
        if gap.path in self._bad:
            return
        if isinstance(gap.error, NotFoundError):
            self._explain(gap.path, gap.error)
            return
        more = "nothing" if gap.assets is None else f"of {gap.assets} assets from here on nothing"
        self._problem(gap.path, f"{more} can be read: {gap.error}")

    def _alone(self, located: Located) -> None:
        repo = self._repo
        try:
            download([located], self._folder, store=repo.store, load=repo.reader.load, threads=repo.threads)
        except NotFoundError as error:
            self._explain(located.row.path, error)
        except (CorruptionError, FormatVersionError) as error:
            self._problem(located.row.path, error)

    def _explain(self, path: str, error: NotFoundError) -> None:
        """An object is missing: either the version was deleted, which is raised, or that is the problem."""
        try:
            self._version.follow(error)
        except CorruptionError as problem:
            self._problem(path, problem)
        else:
            self._problem(path, f"{error}; it was stored otherwise meanwhile: drill again")

    def _place(self, path: str) -> str:
        return os.path.join(self._folder, *path.split("/"))

    # -- what is on the disk ------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        """Every file again, from the disk: its bytes, its x bit; then the version that these files make."""
        expected: set[str] = set()

        def compared() -> Iterator[Row]:
            for row, problem in in_order(self._look, self._restored(), threads=self._repo.threads):
                expected.add(row.path)
                if problem:
                    self._problem(row.path, problem)
                elif isinstance(row, FileRow):
                    self.answer.files += 1
                    self.answer.bytes += row.size
                else:
                    self.answer.urls += 1
                yield row

        made = logical_digest(compared())
        for path in sorted(set(_files(self._folder)) - expected - self._bad):
            self._problem(path, "was restored, though the version does not have it")
        if not self._bad and made.hex() != self._version.digest:
            self._problem("", f"what was restored makes the version {made.hex()}, not {self._version.digest}")

    def _restored(self) -> Iterator[Located]:
        """The rows of which nothing bad is known yet."""
        try:
            tree = self._version.tree
        except (CorruptionError, FormatVersionError, NotFoundError) as error:
            self._gap(Gap("", None, error))
            return
        for found in rows_and_gaps(tree.reader, tree.root):
            if isinstance(found, Gap):
                self._gap(found)
            elif found.row.path not in self._bad:
                yield found

    def _look(self, located: Located) -> tuple[Row, str]:
        """The row that a file on the disk makes, without chunks, and what is wrong with it."""
        row = located.row
        if isinstance(row, UrlRow):
            return row, ""
        try:
            fd = os.open(self._place(row.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return row, "was not restored"
        try:
            found = os.fstat(fd)
            hasher, size = _hashed(fd)
            real = FileRow(row.path, size, 1 if found.st_mode & stat.S_IXUSR else 0, hasher.digest(), ())
            if real.size != row.size:
                return real, f"has {real.size} bytes, not {row.size}"
            if real.digest != row.digest:
                return real, f"its bytes are {real.digest.hex()}, not {row.digest.hex()}"
            if real.mode != row.mode:
                return real, f"is {'' if real.mode else 'not '}executable"
            with self._loading:
                self._load(fd, row.path)
        finally:
            os.close(fd)
        return real, ""

    def _load(self, fd: int, path: str) -> None:
        """Load the tensors of a file; one that holds none is left alone."""
        try:
            structure = read_structure(FileSource(fd), path)
        except InvalidInputError as error:
            if path.endswith(_SUFFIXES):
                self.answer.unloaded.append((path, str(error)))
            return
        self.answer.unloaded += [(path, f"tensor {name!r}: {why}") for name, why in structure.lost.items()]
        reader = cast("RangeReader", _Disk(fd, path))  # of a reader only `fill` and `path` are asked here
        for group in _groups([_loadable(place) for place in structure.tensors]):
            try:
                loaded = read_tensors(reader, group, "numpy", None)
            except InvalidInputError as error:
                self.answer.unloaded.append((path, str(error)))
                return
            self.answer.tensors += len(loaded)
            self.answer.tensor_bytes += sum([array.nbytes for array in loaded.values()])


class _Disk:
    """A file of which tensors are loaded."""

    def __init__(self, fd: int, path: str) -> None:
        self._source = FileSource(fd)
        self.path = path

    def fill(self, targets: Iterable[Target]) -> None:
        for target in targets:
            if self._source.readinto(target.start, target.view) < len(target.view):
                raise InvalidInputError(f"{self.path} ends before byte {target.end}")


def _loadable(place: TensorPlace) -> TensorPlace:
    """The tensor, as plain bits where NumPy has no such dtype."""
    try:
        framework("numpy").check(place.dtype)
    except InvalidInputError:
        return place._replace(dtype=_BITS[ITEM_SIZES[place.dtype]])
    return place


def _groups(places: Sequence[TensorPlace]) -> Iterator[list[TensorPlace]]:
    group: list[TensorPlace] = []
    size = 0
    for place in places:
        if group and size + place.size > _TOGETHER:
            yield group
            group, size = [], 0
        group.append(place)
        size += place.size
    if group:
        yield group


def _hashed(fd: int) -> tuple[Hasher, int]:
    """The hash of a file, of a large one as the disk has it, not the memory that it was written from; and its size."""
    with suppress(OSError, AttributeError):  # where that cannot be asked for, the system's own copy has to do
        if os.fstat(fd).st_size >= _FROM_DISK:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    hasher, size = Hasher(), 0
    block = memoryview(bytearray(_BLOCK))
    while got := os.preadv(fd, [block], size):
        hasher.update(block[:got])
        size += got
    return hasher, size


def _files(folder: str) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in names)


def logical_digest(rows: Iterable[Row]) -> bytes:
    """The digest of a version with these rows, in order of path. Source: docs/format.md §6.3, §7.

    Memory: the rows of one leaf, and a summary of each leaf.
    """
    level: list[ChildRow] = []
    part: list[Row] = []
    cutter = NodeCutter(0)
    for row in rows:
        part.append(row)
        if cutter.ends_after(row.path):
            level.append(_child(Leaf([], part)))
            part = []
    if part or not level:
        level.append(_child(Leaf([], part)))
    height = 1
    while len(level) > 1:
        cutter = NodeCutter(height)
        above: list[ChildRow] = []
        children: list[ChildRow] = []
        for child in level:
            children.append(child)
            if cutter.ends_after(child.path):
                above.append(_child(Branch([], height, children)))
                children = []
        if children:
            above.append(_child(Branch([], height, children)))
        level = above
        height += 1
    return level[0].digest


def _child(node: Leaf | Branch) -> ChildRow:
    """What the node above would say of a node."""
    first = node.rows[0].path if node.rows else ""
    if isinstance(node, Leaf):
        assets, size = len(node.rows), sum([row.size or 0 for row in node.rows])
    else:
        assets, size = sum([row.assets for row in node.rows]), sum([row.size for row in node.rows])
    return ChildRow(first, 0, 0, 0, b"", node_digest(node), assets, size)


# -- the process -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer one question."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints is no answer
    asked = sys.stdin.buffer
    question = Question(*pickle.loads(asked.read(int.from_bytes(asked.read(8), "big"))))  # noqa: S301 - of our parent
    threading.Thread(target=_watch, args=(question.folder,), daemon=True).start()
    try:
        answer = _answer(question, _Teller(out))
    except (MandapaError, OSError) as error:
        answer = Answer(error=type(error).__name__, message=str(error))
    out.write(msgspec.json.encode(answer) + b"\n")


def _answer(question: Question, tell: Callable[[int], None]) -> Answer:
    repo = Repository(question.store, threads=question.threads)
    version = repo.artifact(question.artifact).version(question.number)
    if version.digest != question.digest:
        raise CorruptionError(f"the log says two things about {version.address}: run 'mandapa fsck'")
    return Rehearsal(version, question.folder, tell).run()


class _Teller:
    """Says how many bytes were written, a few times a second."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._done = 0
        self._told = time.monotonic()

    def __call__(self, more: int) -> None:
        with self._lock:
            self._done += more
            now = time.monotonic()
            if now - self._told >= _TELL:
                self._out.write(b"%d\n" % self._done)
                self._done, self._told = 0, now


def _watch(folder: str) -> None:
    """When nobody waits any more, leave nothing behind."""
    os.read(0, 1)  # the question was all that comes: this ends with the pipe
    for _ in range(_TRIES):  # other threads may still make files in folders that are not gone yet
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            break
    os._exit(1)


if __name__ == "__main__":
    main()
