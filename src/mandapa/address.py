"""The one way to name a version, or something in it: ``name[:ref[~N]][/path]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mandapa.errors import InvalidInputError
from mandapa.format.strict import check_label, check_name, check_prefix

__all__ = ["Address", "parse_address", "parse_ref"]

_REF = re.compile(r"(?P<ref>[^~]*)(?:~(?P<back>[0-9]{1,9}))?", re.ASCII)
_NUMBER = re.compile(r"v(0|[1-9][0-9]{0,17})", re.ASCII)
_DIGEST = re.compile(r"@[0-9a-f]{8,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed address; `str` gives the text that parses to it again.

    Example:
        >>> parse_address("resnet-7:best~1/checkpoint/model.pt")
        Address(name='resnet-7', ref='best', back=1, path='checkpoint/model.pt')
    """

    name: str
    ref: str = "latest"
    """``latest``, ``v12``, an alias, a tag, or ``@`` and at least 8 hex digits of a digest."""
    back: int = 0
    """So many live versions before the one that ``ref`` names."""
    path: str = ""
    """An asset or a folder in the version; empty: the whole version."""

    @property
    def number(self) -> int | None:
        """The version number when ``ref`` is one."""
        match = _NUMBER.fullmatch(self.ref)
        return int(match[1]) if match else None

    def __str__(self) -> str:
        """The address as text."""
        back = f"~{self.back}" if self.back else ""
        path = f"/{self.path}" if self.path else ""
        return f"{self.name}:{self.ref}{back}{path}"


def parse_ref(text: str) -> tuple[str, int]:
    """``ref[~N]`` as (ref, N).

    Raises:
        InvalidInputError: Neither ``latest``, ``v`` and a number, a possible alias or tag, nor ``@`` and a digest.
    """
    match = _REF.fullmatch(text)
    if match is None or not match["ref"]:
        raise InvalidInputError(
            f"{text!r} names no version: write latest, v12, an alias, a tag or @digest, then maybe ~1"
        )
    ref, back = match["ref"], int(match["back"] or 0)
    if ref.startswith("@"):
        if not _DIGEST.fullmatch(ref):
            raise InvalidInputError(f"{ref!r} is no digest: '@' and 8 to 64 lower-case hex digits")
    elif ref != "latest" and not _NUMBER.fullmatch(ref):
        check_label(ref)
    return ref, back


def parse_address(text: str) -> Address:
    """The parts of ``name[:ref[~N]][/path]``; the first ``:`` before any ``/`` ends the name.

    Raises:
        InvalidInputError: The text is no address; the message says which part.
    """
    if not isinstance(text, str):
        raise InvalidInputError(f"an address is a string such as 'resnet-7:best', not {type(text).__name__}")
    head, slash, path = text.partition("/")
    name, colon, ref = head.partition(":")
    if not colon and "~" in name:
        base, _, back = name.partition("~")
        raise InvalidInputError(f"{text!r}: '~' follows a version; write {base}:latest~{back}")
    check_name(name)
    if slash:
        check_prefix(path)
        if not path:
            raise InvalidInputError(f"{text!r} ends with '/': name an asset or a folder, or leave the '/' out")
    if not colon:
        return Address(name, path=path)
    parsed, back_ = parse_ref(ref)
    return Address(name, parsed, back_, path)
