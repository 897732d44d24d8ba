"""The tensors of a safetensors file, from its JSON header. Source: huggingface/safetensors, README "Format"."""

from __future__ import annotations

import zlib
from typing import TypeVar

import msgspec

from mandapa.content.cutters.layout import HEADER_MAX, MEMBERS_MAX, Member
from mandapa.content.cutters.source import Source, read_some

__all__ = ["Placed", "safetensors_entries", "safetensors_members"]


class Placed(msgspec.Struct, gc=False):
    """Where a tensor's bytes are, counted from the header's end; what a subclass does not add is skipped unbuilt."""

    data_offsets: tuple[int, int] | None = None
    """Only `__metadata__` has none."""


_Placed = TypeVar("_Placed", bound=Placed)
_HEADER = msgspec.json.Decoder(dict[str, Placed])


def safetensors_members(source: Source, start: int) -> list[Member] | None:
    """The tensors in the order of their bytes; None when the header is not one, or does not fit the file.

    Args:
        source: The file; its first eight bytes gave ``start``.
        start: Where the header ends and the first tensor's bytes may start.
    """
    entries = safetensors_entries(source, start, _HEADER)
    if entries is None:
        return None
    return sorted([Member(begin, begin, end, zlib.crc32(name.encode())) for begin, end, name, _ in entries])


def safetensors_entries(
    source: Source, start: int, decoder: msgspec.json.Decoder[dict[str, _Placed]]
) -> list[tuple[int, int, str, _Placed]] | None:
    """(begin, end, name, what the header says) in the order of the bytes, none overlapping, all within the file.

    Args:
        source: The file; its first eight bytes gave ``start``.
        start: Where the header ends and the first tensor's bytes may start.
        decoder: Of the header.
    """
    if start > min(source.size, HEADER_MAX):
        return None
    header = read_some(source, 8, start - 8)
    if len(header) != start - 8 or header.count(b"{") > MEMBERS_MAX + 2:
        return None
    entries = []
    try:
        for name, tensor in decoder.decode(header).items():
            if tensor.data_offsets is not None:
                begin, end = tensor.data_offsets
                name.encode()
                entries.append((start + begin, start + end, name, tensor))
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors; so are those of broken text
        return None
    entries.sort(key=lambda entry: entry[:3])
    position = start
    for begin, end, _, _ in entries:
        if not position <= begin <= end <= source.size:
            return None
        position = end
    return entries
