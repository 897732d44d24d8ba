"""bf16 copies of fp32 tensors in one file: where they are, so that they need not be stored."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from mandapa.content.codecs.bf16 import round_to_bf16
from mandapa.content.cutters import Source
from mandapa.content.cutters.layout import PIECE
from mandapa.content.cutters.source import read_some
from mandapa.content.tensors import TensorPlace, tensors_of

__all__ = ["Copy", "cuts_for_copies"]

_LEAST = 64 << 10  # bytes of a copy that is worth looking for
_PROBE = 4 << 10
_STEP = PIECE // 2
"""A chunk of a copy belongs to one chunk of its master, which has twice as many bytes."""


class Copy(NamedTuple):
    """A chunk that may be the bf16 copy of fp32 numbers in another chunk of the same source."""

    source: Source
    start: int
    end: int
    master: int
    """Where the chunk of the numbers starts."""

    def read(self) -> bytearray:
        """The chunk again."""
        return read_some(self.source, self.start, self.end - self.start)

    def read_master(self) -> bytearray:
        """The numbers, all bytes of their chunk."""
        return read_some(self.source, self.master, 2 * (self.end - self.start))


def cuts_for_copies(source: Source, cuts: list[int]) -> tuple[list[int], dict[int, Copy]]:
    """``cuts`` with bf16 tensors cut finer that look like a copy of fp32 ones; and the copies by where they start.

    Headers and a few probes of the source are read; whoever stores a chunk compares all of it.

    Raises:
        OSError: The source cannot be read.
    """
    tensors = [t for t in tensors_of(source) or () if t.strides is None and t.size == t.end - t.start]
    masters: dict[int, list[TensorPlace]] = defaultdict(list)
    for tensor in tensors:
        if tensor.dtype == "float32":
            masters[tensor.size].append(tensor)
    edges = {0, *cuts}
    more: list[int] = []
    found: dict[int, Copy] = {}
    for tensor in tensors:
        if tensor.dtype != "bfloat16" or tensor.size < _LEAST or not edges.issuperset((tensor.start, tensor.end)):
            continue
        for master in masters[2 * tensor.size]:
            if edges.issuperset((master.start, master.end)) and _alike(source, tensor, master):
                ends = [*range(tensor.start + _STEP, tensor.end, _STEP), tensor.end]
                for start, end in zip([tensor.start, *ends], ends, strict=False):
                    found[start] = Copy(source, start, end, master.start + 2 * (start - tensor.start))
                more += ends
                break
    return (sorted({*cuts, *more}), found) if found else (cuts, found)


def _alike(source: Source, tensor: TensorPlace, master: TensorPlace) -> bool:
    """Whether three probes of a tensor are what rounding makes of the same places of another one."""
    for at in (0, tensor.size // 4 * 2, tensor.size - _PROBE):
        if round_to_bf16(read_some(source, master.start + 2 * at, 2 * _PROBE)) != bytes(
            read_some(source, tensor.start + at, _PROBE)
        ):
            return False
    return True
