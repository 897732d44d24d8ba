"""What bytes cost: the option that names prices, the prices, and amounts in words."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from mandapa.cli.text import clean

if TYPE_CHECKING:
    from mandapa.repository.prices import Prices

__all__ = ["money", "prices_of", "prices_option"]

prices_option = click.option(
    "--prices",
    "prices_file",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Prices in TOML or JSON (else MANDAPA_PRICES, else list prices).",
)


def prices_of(path: str | None) -> Prices | None:
    """The prices of a file, else of the one that ``MANDAPA_PRICES`` names, if any."""
    from mandapa.repository.prices import Prices

    path = path or os.environ.get("MANDAPA_PRICES")
    return Prices.load(path) if path else None


def money(amount: float, prices: Prices) -> str:
    """An amount in the currency of prices."""
    number = f"{amount:,.2f}" if amount >= 0.995 or amount == 0 else f"{amount:.2g}" if amount >= 1e-4 else "0.00"
    return f"{number} {clean(prices.currency)}"
