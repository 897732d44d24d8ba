"""Memory that outlives the trainer: a state is copied into a slot of it, and becomes a file when training goes on.

A slot is a file in ``/dev/shm``, or in the run's directory where that is too small. Its pages are taken when it is
made and used again for each state, which is what makes a copy fast. Whoever needs the file of a state makes it with
`settle`, the uploader first; the next state may go into the slot then.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress

from mandapa.digest import hexdigest
from mandapa.errors import CorruptionError, FormatVersionError, StorageError
from mandapa.run.directory import Lock, RunDirectory, read_json, write_json
from mandapa.run.journal import ENTRIES, CheckpointEntry, Entry, File, InMemory, JournalReader
from mandapa.run.serial import INDEX_MAX, offsets, read_outline, size_of_file, write_file

__all__ = [
    "HEAD",
    "Ring",
    "Slot",
    "drop_slots",
    "free_memory",
    "is_held",
    "memory_of",
    "remove_free",
    "settle",
    "turns_in",
]

SHARED = "/dev/shm"  # noqa: S108 - names in it cannot be guessed, and are made with O_EXCL
HEAD = 4096
"""Bytes of a slot before the outline: what it is, of which boot, its turn, and the turn that was settled last."""
SLOTS = 2
"""Of a rank at most: one is filled while the other becomes a file."""

_MAGIC = b"mdpslot1"
_TURN_AT, _SETTLED_AT = 24, 32  # behind the name of the format and the boot's id
_NAME = re.compile(r"mandapa-[0-9a-f]{32}\.slot")
_NONE = bytes(8)
_PART = 4 << 20  # bytes that `settle` has in memory
_GRAIN = 2 << 20
_PATIENCE = 600.0  # seconds for another process to write a file
_SHARE = 0.5  # of the free memory that a slot may take
_RESERVE = 256 << 20  # bytes of the disk that are left to others

_settling = threading.Lock()


class Slot:
    """A slot, open in this process.

    Args:
        path: Of its file.

    Raises:
        OSError: It is not there.
        CorruptionError: It is no slot, another user's, or of before the machine's last start.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self.unpin: Callable[[], object] | None = None
        """Called before the memory is given up, once somebody has told a GPU of it."""
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(self._fd)
            head = os.pread(self._fd, HEAD, 0)
            if (
                not stat.S_ISREG(found.st_mode)
                or found.st_uid != os.geteuid()
                or found.st_size <= HEAD
                or head[:_TURN_AT] != _MAGIC + _boot()
            ):
                raise CorruptionError(f"{path} holds no state of this machine since it was started", key=path)
            self.size = found.st_size
            """Bytes of the file."""
            self._identity = (found.st_dev, found.st_ino)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def turn(self) -> str:
        """Which use it is in."""
        return os.pread(self._fd, 8, _TURN_AT).hex()

    @property
    def is_free(self) -> bool:
        """Whether the state in it, if there is one, is in a file."""
        head = os.pread(self._fd, 16, _TURN_AT)
        return head[:8] == head[8:]

    @property
    def is_there(self) -> bool:
        """Whether others can open it: somebody may have removed it."""
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def begin(self) -> None:
        """A new turn, of which nothing is settled."""
        os.pwrite(self._fd, os.urandom(7) + b"\1" + _NONE, _TURN_AT)  # a turn is never eight zeros

    def free(self) -> None:
        """What is in it is needed no more."""
        os.pwrite(self._fd, bytes.fromhex(self.turn), _SETTLED_AT)

    def mapping(self) -> mmap.mmap | None:
        """Its memory, for the process that fills it; None when it is no memory, but a file on a disk.

        A file is not mapped: where its disk is full, or goes away, that would kill the process.
        """
        if self._map is None and self.path.startswith(SHARED + os.sep):
            self._map = mmap.mmap(self._fd, self.size)
            with suppress(OSError):
                self._map.madvise(mmap.MADV_DONTFORK)  # a forked child has no use for it, and forks faster
        return self._map

    def put(self, at: int, data: bytes | memoryview) -> None:
        """Write bytes at an offset; raises `OSError`."""
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self._fd, rest[: 64 << 20], at)
            rest, at = rest[done:], at + done

    def read(self, at: int, size: int) -> Iterator[memoryview]:
        """So many bytes, in parts that are good until the next one is asked for; raises `CorruptionError`."""
        buffer = memoryview(bytearray(min(size, _PART)))
        while size:
            count = os.preadv(self._fd, [buffer[:size]], at)
            if not count:
                raise CorruptionError(f"{self.path} is shorter than what it holds", key=self.path)
            yield buffer[:count]
            at, size = at + count, size - count

    def close(self) -> None:
        """Let go of it; the file stays."""
        if self.unpin is not None:
            self.unpin()
            self.unpin = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._map is not None:
            with suppress(BufferError):  # views of it are left, which go with it
                self._map.close()
            self._map = None


class Ring:
    """The slots of one rank, for its trainer, whose lock the caller holds.

    Args:
        directory: The run's.
        rank: Of the trainer.
        named: The turns that the rank's journal speaks of; None: it cannot be read.
    """

    def __init__(self, directory: RunDirectory, rank: int, named: Collection[str] | None) -> None:
        self._directory = directory
        self._list = _list_of(directory, rank)
        self._slots: list[Slot] = []
        for path in _listed(self._list):
            try:
                slot = Slot(directory.source(path))
            except (OSError, CorruptionError):
                _unlink(directory.source(path))
                continue
            self._slots.append(slot)
            if named is not None and not slot.is_free and slot.turn not in named:
                slot.free()  # the trainer died before it had handed it over

    def take(self, size: int) -> Slot | None:
        """A slot for so many bytes, in a new turn; None when all are in use, or there is no memory for one."""
        slots, self._slots = self._slots, []
        for slot in slots:  # one that was removed may still be read by who has it open
            if slot.is_there:
                self._slots.append(slot)
            else:
                slot.close()
        for slot in self._slots:
            if slot.is_free and slot.size >= size:
                slot.begin()
                return slot
        for slot in [slot for slot in self._slots if slot.is_free]:
            self._slots.remove(slot)
            slot.close()
            _unlink(slot.path)
        made = None
        if len(self._slots) < SLOTS:
            made = self._make(size + size // 64)
        if made is not None:
            made.begin()
        return made

    def close(self) -> None:
        """Let go of the memory; what is in it stays until it is settled."""
        for slot in self._slots:
            slot.close()
        self._slots.clear()

    def _make(self, size: int) -> Slot | None:
        size += -size % _GRAIN
        name = f"mandapa-{os.urandom(16).hex()}.slot"
        places = [SHARED] if size <= _SHARE * free_memory() else []
        disk = os.statvfs(self._directory.inner)
        if disk.f_bavail * disk.f_frsize >= 2 * size + _RESERVE:  # the file of the state has to go there, too
            places.append(self._directory.inner)
        for folder in places:
            path = os.path.join(folder, name)
            known = [self._directory.relative(slot.path) for slot in self._slots]
            try:
                # First its name: nobody would find, and remove, what is not in the list.
                write_json(self._list, {"slots": [*known, self._directory.relative(path)]})
                _make_file(path, size)
                slot = Slot(path)
            except (OSError, AttributeError):  # a system that cannot reserve
                _unlink(path)
                continue
            self._slots.append(slot)
            return slot
        return None


def _make_file(path: str, size: int) -> None:
    """A slot that is free, all of its bytes reserved."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
        os.pwrite(fd, _MAGIC + _boot() + _NONE + _NONE, 0)
    finally:
        os.close(fd)


def remove_free(directory: RunDirectory, rank: int) -> None:
    """Remove the slots of a rank that is not being trained, but those with a state that is in no file yet."""
    lock = directory.rank_lock(rank)
    if not os.path.exists(_list_of(directory, rank)) or not lock.take():
        return  # its next trainer goes on with them
    try:
        kept = []
        reader = JournalReader(directory.journal(rank), ENTRIES)
        named = turns_in(reader.new())
        for path in _listed(_list_of(directory, rank)):
            try:
                slot = Slot(directory.source(path))
            except (OSError, CorruptionError):
                _unlink(directory.source(path))
                continue
            if slot.is_free or (slot.turn not in named and not reader.damaged):
                _unlink(slot.path)
            else:
                kept.append(path)
            slot.close()
        if kept:
            write_json(_list_of(directory, rank), {"slots": kept})
        else:
            _unlink(_list_of(directory, rank))
    except (StorageError, FormatVersionError) as error:
        directory.note(str(error))
    except OSError as error:
        directory.note(f"the memory of rank {rank} cannot be given back: {error.strerror}")
    finally:
        lock.release()


def turns_in(entries: Iterable[Entry]) -> set[str]:
    """The turns that these lines of a journal speak of."""
    files = [file for entry in entries if isinstance(entry, CheckpointEntry) for file in entry.files]
    return {file.memory.turn for file in files if file.memory is not None}


def drop_slots(paths: Iterable[str]) -> None:
    """Remove slots of a run whose directory was removed."""
    for path in paths:
        if _NAME.fullmatch(os.path.basename(path)):
            _unlink(path)


def memory_of(directory: RunDirectory, rank: int) -> int:
    """Bytes of the slots of a rank."""
    size = 0
    for path in _listed(_list_of(directory, rank)):
        with suppress(OSError):
            size += os.stat(directory.source(path)).st_size
    return size


def settle(directory: RunDirectory, file: File) -> bool:
    """See to it that bytes that were handed over in memory are in their file; whether they are.

    They are in the page cache then, as those of any file that a run owns: somebody else brings them to the disk. Any
    number of processes and threads may call it at the same time: one writes, with 4 MiB of memory, and the others wait.
    False: the memory is gone, with the machine's last start; or the file is, which once was there.

    Raises:
        StorageError: The disk is full or fails; or another process has been writing for ten minutes.
    """
    path, memory = directory.source(file.source), file.memory
    if memory is None:
        return _has(path, file.size)
    try:
        slot = Slot(directory.source(memory.slot))
    except (OSError, CorruptionError):
        return _has(path, file.size)
    try:
        if slot.turn != memory.turn or slot.is_free:
            return _has(path, file.size)
        with _one_at_a_time(directory):
            if slot.turn != memory.turn or slot.is_free:  # meanwhile
                return _has(path, file.size)
            if not _has(path, file.size):
                _write(directory, slot, memory, path, file.size)
            slot.free()
        return True
    except CorruptionError as error:
        directory.note(str(error))
        return False
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(f"{path} cannot be written: {error.strerror}", retryable=full) from error
    finally:
        slot.close()


def is_held(directory: RunDirectory, file: File) -> bool:
    """Whether bytes are in memory yet, and in no file."""
    if file.memory is None or _has(directory.source(file.source), file.size):
        return False
    try:
        slot = Slot(directory.source(file.memory.slot))
    except (OSError, CorruptionError):
        return False
    held = slot.turn == file.memory.turn and not slot.is_free
    slot.close()
    return held


def _write(directory: RunDirectory, slot: Slot, memory: InMemory, path: str, size: int) -> None:
    """Make the file, whole or not at all."""
    if not 0 <= memory.outline <= INDEX_MAX:
        raise CorruptionError(f"{slot.path}: an outline of {memory.outline:,} bytes")
    data = b"".join(slot.read(HEAD, memory.outline))
    if hexdigest(data) != memory.digest:
        raise CorruptionError(f"{slot.path}: its outline is damaged", key=slot.path)
    outline = read_outline(data)
    start = HEAD + memory.outline
    *_, end = offsets(outline, start)
    if end > slot.size or size_of_file(outline) != size:
        raise CorruptionError(f"{slot.path}: its outline does not fit", key=slot.path)
    temporary = os.path.join(directory.inner, "settling.tmp")
    disk = os.statvfs(directory.inner)
    if disk.f_bavail * disk.f_frsize < size:  # before all that there is has been taken away from others
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb", buffering=1 << 16) as target:
            write_file(outline, slot.read, start, target.write)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        os.replace(temporary, path)
    except BaseException:
        _unlink(temporary)
        raise


@contextmanager
def _one_at_a_time(directory: RunDirectory) -> Iterator[None]:
    """Of all threads and processes. A lock of the system ends with its process, and does not know of threads."""
    with _settling:
        lock = Lock(os.path.join(directory.inner, "settling.lock"))
        if not lock.take(patience=_PATIENCE):
            raise StorageError(f"another process (pid, host: {lock.holder()}) has been writing a checkpoint for long")
        try:
            yield
        finally:
            lock.release()


def free_memory() -> int:
    """Bytes of memory that this process may still take, as the system and its control group say."""
    found = [_number("/proc/meminfo", "MemAvailable:") * 1024]
    group = "/sys/fs/cgroup"
    with suppress(OSError), open("/proc/self/cgroup", encoding="ascii") as file:
        own = [line[3:].strip() for line in file if line.startswith("0::")]
        group += own[0].rstrip("/") if own else ""
    for folder, limit, used, prefix in (
        (group, "memory.max", "memory.current", ""),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        with suppress(OSError, ValueError):
            with open(f"{folder}/{limit}", encoding="ascii") as file:
                most = int(file.read())
            with open(f"{folder}/{used}", encoding="ascii") as file:
                taken = int(file.read())
            cached = sum(_number(f"{folder}/memory.stat", f"{prefix}{kind}active_file") for kind in ("", "in"))
            found.append(most - taken + cached)
    return max(0, min(found))


def _number(path: str, name: str) -> int:
    """Of the line with that name; 0 when there is none."""
    with suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        return next((int(words[1]) for words in map(str.split, file) if words[0] == name), 0)
    return 0


def _boot() -> bytes:
    """16 bytes of the machine's last start: what was in memory before is not there any more."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read(36).replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


def _list_of(directory: RunDirectory, rank: int) -> str:
    return os.path.join(directory.inner, f"rank{rank}.slots")


def _listed(path: str) -> list[str]:
    """The slots in a list, as far as they are called as slots are."""
    found = read_json(path).get("slots", [])
    return [slot for slot in found if isinstance(slot, str) and _NAME.fullmatch(os.path.basename(slot))]


def _has(path: str, size: int) -> bool:
    try:
        return os.stat(path).st_size == size
    except OSError:
        return False


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
