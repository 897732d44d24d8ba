"""What stores charge: a small table that anyone may replace by their own, and what follows from it."""

from __future__ import annotations

import json
import os
import tomllib
from typing import Annotated, TypeAlias

import msgspec

from mandapa.errors import InvalidInputError, NotFoundError
from mandapa.format.strict import told

__all__ = ["Cost", "Prices"]

GB = 1 << 30
"""Bytes that stores charge for as one GB."""

_FILE_MAX = 64 << 10

Price: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Words: TypeAlias = Annotated[str, msgspec.Meta(max_length=200)]


class Cost(msgspec.Struct, frozen=True):
    """What something costs, in the currency of its prices."""

    month: float
    """To keep it for a month."""
    writes: float
    """What it cost to put it there."""
    read: float
    """To read it once, over the internet."""


class Prices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one store charges. Discounts, minimum durations, taxes and free tiers are left out.

    Example:
        >>> Prices(storage_gb_month=0.023, writes_1000=0.005).cost(stored=100 << 30, writes=20_000).month
        2.3
    """

    storage_gb_month: Price = 0.0
    """To keep a GB (2^30 bytes) for a month."""
    writes_1000: Price = 0.0
    """For 1,000 puts, creates or lists."""
    reads_1000: Price = 0.0
    """For 1,000 gets."""
    egress_gb: Price = 0.0
    """For a GB that leaves the store's region."""
    currency: Words = "USD"
    source: Words = ""
    """Whose prices, of what place and class."""
    date: Words = ""
    """As of when."""

    def cost(self, *, stored: int, writes: int = 0, reads: int = 0) -> Cost:
        """What ``stored`` bytes cost that took ``writes`` puts, and take ``reads`` gets to read."""
        return Cost(
            month=stored / GB * self.storage_gb_month,
            writes=writes / 1000 * self.writes_1000,
            read=reads / 1000 * self.reads_1000 + stored / GB * self.egress_gb,
        )

    @classmethod
    def of(cls, url: str) -> Prices:
        """The list prices for a store of that URL's kind; nothing for a folder.

        They are those of one common region and class, and serve to compare: `load` takes your own.
        """
        return _TABLE.get(url.partition(":")[0], _NOTHING)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prices:
        """Prices from a file of TOML, or of JSON if its name ends so; what it leaves out is 0.

        Raises:
            NotFoundError: There is no such file.
            InvalidInputError: It is no table of prices.
        """
        path = os.fspath(path)
        try:
            with open(path, "rb") as file:
                data = file.read(_FILE_MAX + 1)
        except FileNotFoundError:
            raise NotFoundError(f"there is no file of prices {path!r}") from None
        try:
            if len(data) > _FILE_MAX:
                raise ValueError(f"more than {_FILE_MAX:,} bytes")
            text = data.decode()
            table = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
            if isinstance(table, dict):  # a date is a value of its own in TOML
                table = {key: str(value) if key == "date" else value for key, value in table.items()}
            return msgspec.convert(table, cls)
        except (ValueError, RecursionError, msgspec.ValidationError) as error:
            names = ", ".join([f.name for f in msgspec.structs.fields(cls)])
            raise InvalidInputError(f"{path!r} is no table of prices ({told(error)}); it may hold: {names}") from None


_NOTHING = Prices(source="a folder: no prices")
_TABLE = {
    "s3": Prices(
        storage_gb_month=0.023,
        writes_1000=0.005,
        reads_1000=0.0004,
        egress_gb=0.09,
        source="Amazon S3 Standard, us-east-1, first 50 TB, list price",
        date="2026-03",
    ),
    "gs": Prices(
        storage_gb_month=0.020,
        writes_1000=0.005,
        reads_1000=0.0004,
        egress_gb=0.12,
        source="Google Cloud Storage Standard, us-east1, list price",
        date="2024",
    ),
    "az": Prices(
        storage_gb_month=0.0184,
        writes_1000=0.005,
        reads_1000=0.0004,
        egress_gb=0.087,
        source="Azure Blob Storage Hot LRS, US, list price",
        date="2023",
    ),
}
