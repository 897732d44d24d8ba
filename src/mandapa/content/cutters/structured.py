"""Which format a file is of, by its own bytes, and where that format says to cut."""

from __future__ import annotations

from mandapa.content.cutters.archive import archive_members
from mandapa.content.cutters.layout import layout_cuts, pieces
from mandapa.content.cutters.safetensors import safetensors_members
from mandapa.content.cutters.source import Source, read_some

__all__ = ["STRUCTURED_MIN", "structured_cuts"]

STRUCTURED_MIN = 256 << 10
"""A smaller file is one chunk: its tensors would be grouped anyway."""


def structured_cuts(source: Source) -> list[int] | None:
    """The ends of the chunks of a file whose format says where its tensors are; None when it says nothing, or lies.

    Sorted, without repeats, the last one ``source.size``, no chunk above 4 MiB. Names are not looked at, only bytes.
    Never raises for what the bytes say; reads at most 32 MiB of headers and 200,000 members, else gives None.

    Raises:
        OSError: The source cannot be read.

    Example:
        >>> from mandapa.content.cutters import BytesSource
        >>> structured_cuts(BytesSource(b"no format that is known")) is None
        True
    """
    if source.size < STRUCTURED_MIN:
        return None
    head = bytes(read_some(source, 0, 9))
    if head[:4] == b"PK\x03\x04":
        members = archive_members(source)
        start = 0
    elif head[8:] == b"{":
        start = 8 + int.from_bytes(head[:8], "little")
        members = safetensors_members(source, start)
    else:
        return None
    if members is None:
        return None
    rest = layout_cuts(members, start, source.size)
    # The header of a safetensors file is cut off: it changes when a tensor is added or a step number goes up.
    return None if rest is None else pieces(0, start) + rest
