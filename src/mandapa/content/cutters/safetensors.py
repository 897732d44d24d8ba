"""The tensors of a safetensors file, from its JSON header. Source: huggingface/safetensors, README "Format"."""

from __future__ import annotations

import zlib

import msgspec

from mandapa.content.cutters.layout import HEADER_MAX, MEMBERS_MAX, Member
from mandapa.content.cutters.source import Source, read_some

__all__ = ["safetensors_members"]


class _Tensor(msgspec.Struct, gc=False):
    # Only `__metadata__` has none. What is not declared here is skipped without being built.
    data_offsets: tuple[int, int] | None = None


_HEADER = msgspec.json.Decoder(dict[str, _Tensor])


def safetensors_members(source: Source, start: int) -> list[Member] | None:
    """The tensors in the order of their bytes; None when the header is not one, or does not fit the file.

    Args:
        source: The file; its first eight bytes gave ``start``.
        start: Where the header ends and the first tensor's bytes may start.
    """
    if start > min(source.size, HEADER_MAX):
        return None
    header = read_some(source, 8, start - 8)
    if len(header) != start - 8 or header.count(b"{") > MEMBERS_MAX + 2:
        return None
    members = []
    try:
        for name, tensor in _HEADER.decode(header).items():
            if tensor.data_offsets is not None:
                begin, end = tensor.data_offsets
                members.append(Member(start + begin, start + begin, start + end, zlib.crc32(name.encode())))
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors; so are those of broken text
        return None
    members.sort()
    position = start
    for member in members:
        if not position <= member.start <= member.end <= source.size:
            return None
        position = member.end
    return members
