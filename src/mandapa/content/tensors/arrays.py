"""Arrays of NumPy and tensors of torch over plain memory; either library is loaded when it is asked for."""

from __future__ import annotations

import ctypes
import importlib
import math
import mmap
from typing import Any, Literal, Protocol, TypeAlias

from mandapa.content.tensors.dtypes import ITEM_SIZES
from mandapa.errors import InvalidInputError

__all__ = ["Framework", "Frameworks", "allocate", "framework"]

Frameworks: TypeAlias = Literal["numpy", "torch"]

_ALIGNMENT = 64
_EXTENDED = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


class Framework(Protocol):
    """Makes arrays of memory without copying it."""

    def check(self, dtype: str) -> None:
        """Raise `InvalidInputError`, which says what to do, when it has no such dtype."""

    def over(self, memory: memoryview, dtype: str, shape: tuple[int, ...]) -> Any:
        """The array whose elements ``memory`` holds in C order; the memory lives as long as the array."""

    def strided(
        self, memory: memoryview, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], out: Any
    ) -> None:
        """Copy to ``out`` the elements that are in ``memory`` by ``strides``, in elements."""

    def memory(self, array: Any, dtype: str, shape: tuple[int, ...], name: str) -> memoryview:
        """The memory of an array that is to be filled; `InvalidInputError` when it does not fit."""


def framework(name: Frameworks) -> Framework:
    """The framework of that name.

    Raises:
        InvalidInputError: There is none, or it is not installed.
    """
    if name not in ("numpy", "torch"):
        raise InvalidInputError(f"framework={name!r}: use 'numpy' or 'torch'")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InvalidInputError(f"framework={name!r} needs {name}, which is not installed") from error
    return _NumPy(module) if name == "numpy" else _Torch(module)


def allocate(sizes: list[int]) -> list[memoryview]:
    """Places of these sizes in one new allocation, which begins at a page and lives as long as any of them."""
    starts = []
    end = 0
    for size in sizes:
        start = end + -end % (mmap.PAGESIZE if size >= mmap.PAGESIZE else _ALIGNMENT)
        starts.append(start)
        end = start + size
    view = memoryview(mmap.mmap(-1, max(end, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return [view[start : start + size] for start, size in zip(starts, sizes, strict=True)]


class _NumPy:
    def __init__(self, module: Any) -> None:
        self._numpy = module

    def check(self, dtype: str) -> None:
        self._dtype(dtype)

    def _dtype(self, dtype: str) -> Any:
        if dtype in _EXTENDED:
            try:
                return self._numpy.dtype(getattr(importlib.import_module("ml_dtypes"), dtype))
            except (ImportError, AttributeError) as error:
                raise InvalidInputError(
                    f"NumPy has no {dtype}: install a newer ml_dtypes, or load with framework='torch'"
                ) from error
        if dtype == "complex32":
            raise InvalidInputError("NumPy has no complex32: load with framework='torch'")
        return self._numpy.dtype(dtype)

    def over(self, memory: memoryview, dtype: str, shape: tuple[int, ...]) -> Any:
        if not memory:
            return self._numpy.empty(shape, self._dtype(dtype))
        return self._numpy.frombuffer(memory, self._dtype(dtype)).reshape(shape)

    def strided(
        self, memory: memoryview, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], out: Any
    ) -> None:
        span = self._numpy.frombuffer(memory, self._dtype(dtype))
        steps = [stride * ITEM_SIZES[dtype] for stride in strides]
        out[...] = self._numpy.lib.stride_tricks.as_strided(span, shape, steps)

    def memory(self, array: Any, dtype: str, shape: tuple[int, ...], name: str) -> memoryview:
        fits = (
            isinstance(array, self._numpy.ndarray)
            and array.dtype == self._dtype(dtype)
            and array.shape == shape
            and array.flags.c_contiguous
            and array.flags.writeable
        )
        if not fits:
            raise _unfit(name, "NumPy array", dtype, shape)
        return memoryview(array.reshape(-1).view(self._numpy.uint8))


class _Torch:
    def __init__(self, module: Any) -> None:
        self._torch = module

    def check(self, dtype: str) -> None:
        if not hasattr(self._torch, dtype):
            raise InvalidInputError(f"this torch has no {dtype}: upgrade torch")

    def over(self, memory: memoryview, dtype: str, shape: tuple[int, ...]) -> Any:
        kind = getattr(self._torch, dtype)
        if not memory:
            return self._torch.empty(shape, dtype=kind)
        return self._torch.frombuffer(memory, dtype=kind).reshape(shape)

    def strided(
        self, memory: memoryview, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], out: Any
    ) -> None:
        span = self._torch.frombuffer(memory, dtype=getattr(self._torch, dtype))
        out.copy_(self._torch.as_strided(span, shape, strides))

    def memory(self, array: Any, dtype: str, shape: tuple[int, ...], name: str) -> memoryview:
        fits = (
            isinstance(array, self._torch.Tensor)
            and array.dtype == getattr(self._torch, dtype)
            and tuple(array.shape) == shape
            and array.device.type == "cpu"
            and array.layout == self._torch.strided
            and array.is_contiguous()
        )
        if not fits:
            raise _unfit(name, "torch tensor on the CPU", dtype, shape)
        size = math.prod(shape) * ITEM_SIZES[dtype]
        return memoryview((ctypes.c_ubyte * size).from_address(array.data_ptr())) if size else memoryview(b"")


def _unfit(name: str, kind: str, dtype: str, shape: tuple[int, ...]) -> InvalidInputError:
    return InvalidInputError(f"into[{name!r}] must be a writable {kind} in C order, of {dtype} and shape {shape}")
