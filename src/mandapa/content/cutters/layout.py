"""From the members of a structured file to cuts: large ones alone, small ones in groups that keep their edges."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["HEADER_MAX", "MEMBERS_MAX", "PIECE", "SMALLEST", "Member", "layout_cuts", "pieces"]

PIECE = 4 << 20
"""Bytes of a tensor's chunks, all but its last."""

SMALLEST = 512
"""No member below this is ever alone: a chunk costs about 100 bytes of its own in the manifest and the pack."""

LARGE = 64 << 10
"""Every member from this on is alone."""

GROUP = 64 << 10
"""Small members are grouped to about this."""

GROUP_MAX = 256 << 10

HEADER_MAX = 32 << 20
"""More bytes than this that belong to no member are not a header of anything: such a file is opaque."""

MEMBERS_MAX = 200_000
"""A file with more members is opaque: bounds time and memory."""


class Member(NamedTuple):
    """One tensor or archive member, and what stands before it."""

    record: int
    """Where its local header starts; its data's start where there is none."""
    start: int
    end: int
    key: int
    """32 bits that stay the same as long as the member does; they decide where a group of small members ends."""


def layout_cuts(members: list[Member], start: int, size: int) -> list[int] | None:
    """The ends of the chunks of ``[start, size)``, or None when too much of it belongs to no member.

    A member is a chunk, or pieces of 4 MiB from its own start, when it has 64 KiB or more, and down to 512 bytes as
    long as there is at most one such member for every 64 KiB of the file; so what it shares a chunk with never makes
    it be stored again. Smaller neighbours, and the headers between them, are grouped up to 256 KiB; where a group
    ends is decided by the member that ends it, so a member that comes or goes changes the groups next to it only.

    Args:
        members: Sorted, without overlap, all in ``[start, size)``.
        start: Where the first chunk starts.
        size: Where the last chunk ends.
    """
    alone = _alone_from(members, size)
    cuts: list[int] = []
    position = start
    ended = False
    for record, begin, end, key in members:
        if end - begin >= alone:
            if begin - position > HEADER_MAX:
                return None
            cuts += pieces(position, begin)
            cuts += pieces(begin, end)
            position = end
            ended = False
            continue
        if record > position and (ended or end - position > GROUP_MAX):
            if record - position > HEADER_MAX:
                return None
            cuts += pieces(position, record)
            position = record
        # Larger members are likelier to end a group, so that groups have one size whatever they are made of.
        ended = (key * 0x9E3779B1 & 0xFFFFFFFF) * GROUP < (end - record) << 32
    if size - position > HEADER_MAX:
        return None
    cuts += pieces(position, size)
    return cuts


def pieces(start: int, end: int) -> list[int]:
    """The ends of the pieces of ``[start, end)``, each of 4 MiB but the last; none when it is empty."""
    if start >= end:
        return []
    return [*range(start + PIECE, end, PIECE), end]


def _alone_from(members: list[Member], size: int) -> int:
    """The least power of two, from 512 to 64 KiB, such that at most one member a 64 KiB of the file is as large."""
    by_power = [0] * (LARGE.bit_length() + 1)
    for member in members:
        by_power[min((member.end - member.start).bit_length(), LARGE.bit_length())] += 1
    allowed = size // LARGE
    power = LARGE.bit_length()
    count = by_power[power]
    while power > SMALLEST.bit_length() and count + by_power[power - 1] <= allowed:
        power -= 1
        count += by_power[power]
    return 1 << power - 1
