"""What a command would do, as JSON that can be kept, read and applied later."""

from __future__ import annotations

from typing import ClassVar, Self

import msgspec

from mandapa.errors import InvalidInputError
from mandapa.format.strict import told

__all__ = ["Plan"]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """A plan. Each kind has a tag of its own, and says in ``of`` what makes it, in words."""

    of: ClassVar[str]

    def to_json(self) -> bytes:
        """One line of JSON."""
        return msgspec.json.encode(self) + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """A plan from what `to_json` gave.

        Raises:
            InvalidInputError: It is none, or names what no such plan may name.
        """
        try:
            plan = msgspec.json.decode(data, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInputError(f"not a plan of {cls.of}: {told(error)}") from None
        plan.check()
        return plan

    def check(self) -> None:
        """Refuse a plan that names what no such plan may name."""
