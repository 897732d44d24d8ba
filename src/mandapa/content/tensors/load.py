"""Values of tensors, by ranges, straight to where they stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mandapa.content.cutters.archive import LOCAL_SIZE, Refused, local_data_start
from mandapa.content.ranges import RangeReader, Target
from mandapa.content.tensors.arrays import Frameworks, allocate, framework
from mandapa.content.tensors.structure import TensorPlace
from mandapa.errors import InvalidInputError

__all__ = ["read_tensors"]


def read_tensors(
    reader: RangeReader, places: Sequence[TensorPlace], name: Frameworks, into: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The tensors at these places, bit for bit, by name and in that order.

    What ``into`` does not hold shares one new allocation, in C order, each tensor at a multiple of 64 bytes, and those
    of a page or more at a page's start.

    Raises:
        InvalidInputError: The framework is not installed or lacks a dtype; something in ``into`` does not fit; or an
            archive says two things about where a tensor is.
        NotFoundError: A container is not there (any more).
        CorruptionError: The store's bytes are not those that were written.
    """
    made = framework(name)
    into = {} if into is None else into
    for dtype in {place.dtype for place in places}:
        made.check(dtype)
    found: dict[str, Any] = {}
    new = [place for place in places if place.name not in into]
    memories = dict(zip([place.name for place in new], allocate([place.size for place in new]), strict=True))
    for place in places:
        if place.name in into:
            found[place.name] = into[place.name]
            memories[place.name] = made.memory(into[place.name], place.dtype, place.shape, place.name)
        else:
            found[place.name] = made.over(memories[place.name], place.dtype, place.shape)
    spans = {place.name: memoryview(bytearray(place.end - place.start)) for place in places if place.strides}
    _fill(reader, places, [spans.get(place.name, memories[place.name]) for place in places])
    for place in places:
        if place.strides and place.size:
            made.strided(spans[place.name], place.dtype, place.shape, place.strides, found[place.name])
    return found


def _fill(reader: RangeReader, places: Sequence[TensorPlace], views: Sequence[memoryview]) -> None:
    """Read the ranges of these places, and see that the local headers of their archive agree with its directory."""
    members = {place.member for place in places if place.member is not None}
    headers = {member: bytearray(LOCAL_SIZE) for member in members}
    targets = [Target(member[0], memoryview(header)) for member, header in headers.items()]
    targets += [Target(place.start, view) for place, view in zip(places, views, strict=True)]
    reader.fill(targets)
    for (record, start), header in headers.items():
        try:
            told = local_data_start(header, record)
        except Refused:
            told = -1
        if told != start:
            raise InvalidInputError(
                f"{reader.path} says two things about where the member at byte {record} is: it is damaged, or made to "
                "deceive"
            )
