"""A state as the outline of its file and the bytes of its tensors, which lie where training has them.

What lies in memory in plain order is captured. Any other state, and one that its format cannot hold, is not:
`save_state` writes it, or says what is wrong with it.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import mmap
import os
import pickle
import threading
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import msgspec

from mandapa.digest import hexdigest
from mandapa.run.checkpoints import STATE, numpy_is_safe, take_apart
from mandapa.run.journal import InMemory
from mandapa.run.ring import HEAD, Slot
from mandapa.run.serial import Outline, offsets, size_of_file

__all__ = ["Capture", "capture"]

_PROTOCOL = 2  # of the pickles of torch.save
_DEVICES = ("cpu", "cuda")
_PART = 8 << 20  # bytes that a thread copies at a time
_THREADS = 4
_PARTS_OF_BYTES = ("F4", "F6_E2M3", "F6_E3M2")  # types of which several elements share bytes


class Capture:
    """What a state consists of; good for as long as nobody changes the state.

    Args:
        outline: Of its file.
        pieces: Of each record the bytes, or a tensor or an array of bytes.
    """

    def __init__(self, outline: Outline, pieces: list[Any]) -> None:
        self._outline = outline
        self._json = msgspec.json.encode(outline)
        self._pieces = pieces
        self.size = size_of_file(outline)
        """Bytes of the file."""
        *_, self.memory = offsets(outline, HEAD + len(self._json))
        """Bytes of the slot that it takes."""

    def fill(self, slot: Slot, name: str) -> InMemory:
        """Copy it into a slot, in the turn that the slot is in; all of it is there when this returns.

        ``name`` is what the run's journal calls the slot.

        Raises:
            OSError: The disk, on which the slot is, fails.
        """
        slot.put(HEAD, self._json)
        near: list[_Move] = []
        far: list[tuple[int, Any]] = []
        for piece, at in zip(self._pieces, offsets(self._outline, HEAD + len(self._json)), strict=False):
            if isinstance(piece, bytes):
                slot.put(at, piece)
            elif (address := _address(piece)) is None:
                far.append((at, piece))
            elif len(piece):
                near.append(_Move(at, address, len(piece)))
        memory = slot.mapping()
        if memory is None:
            for at, tensor in far:
                here = tensor.cpu()
                slot.put(at, _Move(at, here.data_ptr(), len(here)).view())
            for move in near:
                slot.put(move.at, move.view())
        else:
            if far:
                _fetch(slot, memory, far)
            _copy(memory, near)
        return InMemory(slot=name, turn=slot.turn, outline=len(self._json), digest=hexdigest(self._json))


class _Move(NamedTuple):
    """Bytes of this process that go into a slot."""

    at: int
    address: int
    size: int

    def view(self) -> memoryview:
        return memoryview((ctypes.c_char * self.size).from_address(self.address)).cast("B")


def _address(piece: Any) -> int | None:
    """Where the bytes are in this process; None: they are on a GPU."""
    if not hasattr(piece, "data_ptr"):
        return int(piece.ctypes.data)
    return int(piece.data_ptr()) if piece.device.type == "cpu" else None


def _copy(memory: mmap.mmap, moves: Iterable[_Move]) -> None:
    """Copy with several threads, which take part after part: one whose core is busy holds up nobody for long."""
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    parts = [
        (base + move.at + start, move.address + start, min(_PART, move.size - start))
        for move in moves
        for start in range(0, move.size, _PART)
    ]
    left = iter(parts)

    def work() -> None:
        for part in left:
            ctypes.memmove(*part)  # without Python's lock

    helpers = [threading.Thread(target=work, daemon=True) for _ in range(min(_THREADS, _cores(), len(parts)) - 1)]
    for helper in helpers:
        helper.start()
    try:
        work()
    finally:  # nobody writes into the slot when this is over, though it be interrupted
        for helper in helpers:
            helper.join()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _fetch(slot: Slot, memory: mmap.mmap, pieces: Iterable[tuple[int, Any]]) -> None:
    """Copy from GPUs, side by side, into memory that is pinned when this is first done."""
    torch: Any = importlib.import_module("torch")
    shared = torch.frombuffer(memory, dtype=torch.uint8)
    streams: dict[Any, Any] = {}
    for at, piece in pieces:
        with _stream(torch, piece.device, streams, slot, shared):
            shared[at : at + len(piece)].copy_(piece, non_blocking=True)
    for stream in streams.values():
        stream.synchronize()


def _stream(torch: Any, device: Any, streams: dict[Any, Any], slot: Slot, shared: Any) -> AbstractContextManager[Any]:
    """In it a copy from the device goes on while the next one is asked for."""
    if device.type != "cuda":
        return nullcontext()
    if slot.unpin is None:
        runtime, pointer = torch.cuda.cudart(), shared.data_ptr()
        runtime.cudaHostRegister(pointer, len(shared), 0)  # where it cannot be, copies are slow, and right
        slot.unpin = lambda: runtime.cudaHostUnregister(pointer)
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
        streams[device].wait_stream(torch.cuda.current_stream(device))
    stream: AbstractContextManager[Any] = torch.cuda.stream(streams[device])
    return stream


def capture(state: Any, format_: str) -> Capture | None:
    """What the state consists of; None: it is not as plain as that, or its format cannot hold it."""
    try:
        return _of_torch(state) if format_ == "torch" else _of_arrays(state)
    except Exception:  # noqa: BLE001 - whatever is wrong, `save_state` either can do it, or has the words for it
        return None


# -- torch: its own code makes the pickle and names the records, ours keeps the storages -----------------------------


class _Records:
    """Takes the place of the writer in ``torch.save``."""

    def __init__(self, storages: dict[str, Any]) -> None:
        self.found: list[tuple[str, Any, int]] = []
        self._storages = storages

    def write_record(self, name: str, data: str | bytes, size: int) -> None:
        self.found.append((name, data.encode() if isinstance(data, str) else data, size))

    def write_record_metadata(self, name: str, size: int) -> None:
        self.found.append((name, self._storages[name.rpartition("/")[2]], size))


def _pickler(storages: dict[str, Any]) -> type[pickle.Pickler]:
    """A pickler that keeps what is not pickled: torch derives one of it, which gives such things names."""

    class Pickler(pickle.Pickler):
        def __init_subclass__(cls) -> None:
            name_it: Any = cls.persistent_id

            def persistent_id(self: Pickler, value: Any) -> Any:
                found = name_it(self, value)
                if found is not None:
                    storages[found[2]] = getattr(value, "_untyped_storage", value)
                return found

            cls.persistent_id = persistent_id  # type: ignore[method-assign, assignment]

    return Pickler


class _Pickling:
    """Takes the place of the module ``pickle`` there."""

    def __init__(self, storages: dict[str, Any]) -> None:
        self.Pickler = _pickler(storages)


def _of_torch(state: Any) -> Capture | None:
    torch: Any = importlib.import_module("torch")
    library = torch.serialization
    if not library.get_crc32_options():
        return None
    storages: dict[str, Any] = {}
    records = _Records(storages)
    with library.skip_data(), warnings.catch_warnings():
        warnings.filterwarnings("error", "Serializing tensors on the meta device")
        library._save(state, records, _Pickling(storages), _PROTOCOL, False)  # noqa: SLF001 - see above
    # An archive of the same names, with nothing in the storages: what is still to know of the file, torch says of it.
    small = io.BytesIO()
    alignment = library._get_storage_alignment()  # noqa: SLF001
    writer = torch._C.PyTorchFileWriter(small, True, alignment)  # noqa: SLF001
    for name, data, size in records.found:
        writer.write_record(name, *((data, size) if isinstance(data, bytes) else (b"", 0)))
    writer.write_end_of_file()
    with numpy_is_safe(torch):
        if library.get_unsafe_globals_in_checkpoint(io.BytesIO(small.getvalue())):
            return None
    reader = torch._C.PyTorchFileReader(io.BytesIO(small.getvalue()))  # noqa: SLF001
    *names, last, _ = reader.get_all_records()
    version, number = reader.get_record("version"), reader.get_record(".data/serialization_id")
    if names != [name for name, _, _ in records.found] or last != "version" or len(number) != 40:
        return None
    pieces = []
    for _, data, size in records.found:
        piece = data if isinstance(data, bytes) else torch.empty(0, dtype=torch.uint8, device=data.device).set_(data)
        if len(piece) != size or (not isinstance(piece, bytes) and not _is_plain(torch, piece)):
            return None
        pieces.append(piece)
    outline = Outline(
        kind="zip",
        records=[*((name, size) for name, _, size in records.found), ("version", len(version))],
        names=number[:20].decode(),
        alignment=alignment,
    )
    return Capture(outline, [*pieces, version])


def _is_plain(torch: Any, tensor: Any) -> bool:
    """Whether the bytes of a tensor lie where it says that they are."""
    there = tensor.numel() == 0 or (tensor.device.type in _DEVICES and tensor.data_ptr() != 0)
    return there and type(tensor) is torch.Tensor and tensor.layout == torch.strided


# -- safetensors: the library names the types and the order -----------------------------------------------------------


def _of_arrays(state: Any) -> Capture | None:
    arrays: dict[str, Any] = {}
    skeleton = json.dumps(take_apart(state, "", arrays, 0))
    kinds = {type(array).__module__.partition(".")[0] for array in arrays.values()}
    if len(kinds) > 1:
        return None
    kind = "torch" if kinds == {"torch"} else "numpy"
    library: Any = importlib.import_module(f"safetensors.{kind}")
    made: Any = importlib.import_module(kind)
    empty = library.save({name: made.empty((0,), dtype=array.dtype) for name, array in arrays.items()})
    length = int.from_bytes(empty[:8], "little")
    found = json.loads(empty[8 : 8 + length])
    header: dict[str, Any] = {"__metadata__": {"format": "pt" if kind == "torch" else "np", STATE: skeleton}}
    pieces: list[Any] = []
    end = 0
    for name, facts in found.items():
        array = arrays[name]
        piece = _bytes_of_tensor(made, array) if kind == "torch" else _bytes_of_array(made, array)
        if piece is None or facts["dtype"] in _PARTS_OF_BYTES:
            return None
        start, end = end, end + len(piece)
        header[name] = {"dtype": facts["dtype"], "shape": list(array.shape), "data_offsets": [start, end]}
        pieces.append(piece)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces.insert(0, len(text).to_bytes(8, "little") + text)
    return Capture(Outline(kind="plain", records=[("", len(piece)) for piece in pieces]), pieces)


def _bytes_of_tensor(torch: Any, tensor: Any) -> Any:
    plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return plain if _is_plain(torch, plain) else None


def _bytes_of_array(numpy: Any, array: Any) -> Any:
    if not array.dtype.isnative or array.dtype.hasobject:
        return None
    return numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8)
