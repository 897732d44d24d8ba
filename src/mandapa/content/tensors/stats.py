"""By how much the elements of a tensor changed, block by block in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from mandapa.content.tensors.dtypes import ITEM_SIZES
from mandapa.object_store.base import Buffer

__all__ = ["Meter", "TensorStat", "as_floats"]


@dataclass(frozen=True, slots=True)
class TensorStat:
    """By how much a tensor changed; of complex numbers each half counts as an element, but in `changed`.

    Elements that are NaN or infinite, before or after, are left out of norms, maximum and cosine.
    """

    l2: float
    """Of the difference."""
    relative: float
    """`l2` by that of the tensor before; infinite where that is 0 and the difference is not."""
    max: float
    """The largest absolute difference of an element."""
    cosine: float
    """Of the angle between before and after; NaN where one of them is 0."""
    changed: int
    """Elements of which any bit changed."""
    nan: tuple[int, int]
    """Elements that are NaN, before and after."""
    inf: tuple[int, int]
    """Elements that are infinite, before and after."""


class Meter:
    """Takes a tensor before and after, in blocks of the same elements; computes in float64, about 50 bytes an element.

    Args:
        dtype: Of both.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._difference = self._before = self._after = self._product = self._largest = 0.0
        self._changed = 0
        self._nan = [0, 0]
        self._inf = [0, 0]

    def add(self, before: Buffer, after: Buffer) -> None:
        """Take the next elements: as many bytes of both."""
        import numpy as np

        with np.errstate(all="ignore"):  # norms above 1e308 are infinite
            bits = np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)
            self._changed += int(bits.reshape(-1, ITEM_SIZES[self._dtype]).any(1).sum())
            x, y = as_floats(before, self._dtype), as_floats(after, self._dtype)
            for i, values in enumerate((x, y)):
                self._nan[i] += int(np.isnan(values).sum())
                self._inf[i] += int(np.isinf(values).sum())
            finite = np.isfinite(x) & np.isfinite(y)
            if not finite.all():
                x, y = np.where(finite, x, 0), np.where(finite, y, 0)
            self._before += float(x @ x)
            self._after += float(y @ y)
            self._product += float(x @ y)
            difference = np.subtract(y, x)
            self._difference += float(difference @ difference)
            self._largest = max(self._largest, float(np.abs(difference, out=difference).max(initial=0)))

    def stat(self) -> TensorStat:
        """What was found."""
        norms = math.sqrt(self._before) * math.sqrt(self._after)
        l2 = math.sqrt(self._difference)
        return TensorStat(
            l2=l2,
            relative=l2 / math.sqrt(self._before) if self._before else math.inf if l2 else 0.0,
            max=self._largest,
            # Rounding must not lead beyond what a cosine can be.
            cosine=max(-1.0, min(1.0, self._product / norms)) if norms else math.nan,
            changed=self._changed,
            nan=(self._nan[0], self._nan[1]),
            inf=(self._inf[0], self._inf[1]),
        )


def as_floats(raw: Buffer, dtype: str) -> Any:
    """The elements as a NumPy array of float64; integers above 2**53 lose their last bits."""
    import numpy as np

    if dtype in _EIGHT_BITS:
        return _table(dtype)[np.frombuffer(raw, np.uint8)]
    if dtype == "bfloat16":
        values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        halves = {"complex32": "<f2", "complex64": "<f4", "complex128": "<f8"}
        values = np.frombuffer(raw, halves.get(dtype, dtype))
    with np.errstate(invalid="ignore"):  # some NaNs signal
        return values.astype(np.float64)


@cache
def _table(dtype: str) -> Any:
    """The 256 values of an eight-bit float."""
    import numpy as np

    return np.array([_EIGHT_BITS[dtype](code) for code in range(256)])


def _value(code: int, mantissa_bits: int, bias: int) -> float:
    """Of a float without infinities or NaN."""
    exponent, mantissa = divmod(code & 0x7F, 1 << mantissa_bits)
    part = mantissa / (1 << mantissa_bits)
    value = math.ldexp(1 + part, exponent - bias) if exponent else math.ldexp(part, 1 - bias)
    return -value if code & 0x80 else value


def _e5m2(code: int) -> float:
    if code & 0x7C == 0x7C:
        return math.nan if code & 3 else math.copysign(math.inf, _value(code, 2, 15))
    return _value(code, 2, 15)


# Source: OCP 8-bit floating point specification 1.0; arXiv 2206.02915 for those of which -0 is the only NaN; OCP
# microscaling formats 1.0 for e8m0.
_EIGHT_BITS: dict[str, Callable[[int], float]] = {
    "float8_e4m3fn": lambda code: math.nan if code & 0x7F == 0x7F else _value(code, 3, 7),
    "float8_e4m3fnuz": lambda code: math.nan if code == 0x80 else _value(code, 3, 8),
    "float8_e5m2": _e5m2,
    "float8_e5m2fnuz": lambda code: math.nan if code == 0x80 else _value(code, 2, 16),
    "float8_e8m0fnu": lambda code: math.nan if code == 0xFF else math.ldexp(1.0, code - 127),
}
