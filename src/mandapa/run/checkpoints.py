"""Checkpoints: when one is due, how a state becomes files, and how files become a state again. Never by a pickle.

Every format is loaded by code that cannot run what a file says: ``torch.load(weights_only=True)``, or safetensors with
the structure of the state as JSON in its header. What could not be loaded so is refused when it is saved.
"""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import re
import string
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pickle import PicklingError
from typing import Any, Literal

from mandapa.errors import CorruptionError, InvalidInputError, MandapaError
from mandapa.format.strict import check_path
from mandapa.run.logger import Logger

__all__ = ["STATE", "Checkpoint", "CheckpointSaver", "Every", "load_state", "numpy_is_safe", "save_state", "take_apart"]

STATE = "mandapa.state"
"""Where in a safetensors header the structure of the state is, as JSON."""
_REF = "$tensor"
_SAFETENSORS = ".safetensors"


class Every:
    """How often a checkpoint is due: after so many steps, or so many seconds, whichever is given.

    Example:
        >>> due = Every(steps=500)
        >>> [step for step in range(1, 1501) if due(step)]
        [500, 1000, 1500]
    """

    def __init__(self, *, steps: int | None = None, seconds: float | None = None) -> None:
        if (steps is None) == (seconds is None):
            raise InvalidInputError("Every takes steps= or seconds=, one of them")
        if (steps is not None and not _is_count(steps)) or (seconds is not None and not _is_duration(seconds)):
            raise InvalidInputError("Every: steps= is an integer, 1 or more; seconds= a number above 0")
        self.steps = steps
        self.seconds = seconds
        self._last_step = 0
        self._last_time = time.monotonic()

    def start(self, step: int) -> None:
        """Count from here: a run that goes on from a checkpoint of ``step``."""
        self._last_step = step
        self._last_time = time.monotonic()

    def __call__(self, step: int) -> bool:
        """Whether one is due at that step; then the next is due as much later."""
        if self.steps is not None:
            due = step // self.steps > self._last_step // self.steps
        else:
            assert self.seconds is not None
            due = time.monotonic() - self._last_time >= self.seconds
        if due:
            self.start(step)
        return due

    def __repr__(self) -> str:
        return f"Every(steps={self.steps})" if self.steps is not None else f"Every(seconds={self.seconds})"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_duration(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


class CheckpointSaver(Logger):
    """How a run saves checkpoints; one of the loggers of a run, which has a default one.

    Args:
        every: When `Run.maybe_checkpoint` saves; None: at each call.
        filename: Of the file in the version's folder ``checkpoint``; may hold ``{rank}``, ``{step}``, ``{epoch}``,
            ``{run_name}``. By default ``state.pt`` (or ``.safetensors``), ``state-rank{rank}.pt`` where a run has
            several ranks. Without ``{step}`` the place is the same each time: history is in the versions.
        format: ``torch``: ``torch.save`` of tensors, numpy arrays, numbers, strings, bytes, lists, tuples, sets and
            dicts. ``safetensors``: tensors, or numpy arrays, in safetensors, the rest of the state (numbers, strings,
            lists, tuples, dicts) as JSON in its header.
        keep_local: Checkpoints that stay in the run's directory after every backend has them.
        best: A metric and which way is better, ``("val/loss", "min")``: the alias ``best`` follows it.

    Example:
        >>> saver = CheckpointSaver(every=Every(steps=500), best=("val/loss", "min"))
    """

    def __init__(
        self,
        *,
        every: Every | None = None,
        filename: str | None = None,
        format: Literal["torch", "safetensors"] = "torch",  # noqa: A002 - the word of the field
        keep_local: int = 1,
        best: tuple[str, Literal["min", "max"]] | None = None,
    ) -> None:
        if format not in ("torch", "safetensors"):
            raise InvalidInputError(f"format={format!r}: use 'torch' or 'safetensors'")
        if not _is_count(keep_local):
            raise InvalidInputError(f"keep_local={keep_local!r}: keep 1 checkpoint or more, to resume from")
        pair = isinstance(best, tuple | list) and len(best) == 2 and isinstance(best[0], str)
        if best is not None and (not pair or best[1] not in ("min", "max")):
            raise InvalidInputError(f"best={best!r}: name a metric and which way is better, as in ('val/loss', 'min')")
        self.every = every
        self.format = format
        self.keep_local = keep_local
        self.best = None if best is None else (best[0], best[1])
        self._filename = filename
        if filename is not None:
            self.name(run_name="run", rank=0, world_size=1, step=0, epoch=0)

    def name(self, *, run_name: str, rank: int, world_size: int, step: int, epoch: int | None) -> str:
        """The name of a rank's file in the folder ``checkpoint``.

        Raises:
            InvalidInputError: The pattern has unknown fields, or does not make a path.
        """
        suffix = "pt" if self.format == "torch" else "safetensors"
        pattern = self._filename or (f"state-rank{{rank}}.{suffix}" if world_size > 1 else f"state.{suffix}")
        fields = {"run_name": run_name, "rank": rank, "step": step, "epoch": 0 if epoch is None else epoch}
        try:
            used = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
            found = pattern.format(**fields)
        except (KeyError, ValueError, IndexError, AttributeError, TypeError):
            raise InvalidInputError(
                f"filename={pattern!r}: it may hold {', '.join('{' + name + '}' for name in fields)}"
            ) from None
        if world_size > 1 and "rank" not in used:
            raise InvalidInputError(f"filename={pattern!r}: the run has {world_size} ranks, so it needs {{rank}}")
        return check_path(found)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint to go on from: in the run's directory, or in a version.

    Example:
        >>> from mandapa.run.checkpoints import Checkpoint
        >>> Checkpoint(step=20, metrics={"loss": 0.5}).step
        20
    """

    step: int
    epoch: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    """The address of the version that holds it; empty for one that is only in the run's directory yet."""
    place: str = "checkpoint"
    """The file or folder of the version that is the checkpoint."""
    file: str = ""
    """The name of this rank's file in the folder that `download` gives; empty when the rank has none, or several."""
    fetch: Callable[[str | os.PathLike[str] | None], str] = field(default=lambda dest: "", repr=False)

    def download(self, dest: str | os.PathLike[str] | None = None) -> str:
        """The folder with the checkpoint's files, those of all ranks; fetched when it is not here. Gives its path.

        Their names are those below `place`; of a checkpoint that is one file there, the last part of its name.

        Ranks of one machine share one download. Files that are there and equal are not fetched again.

        Args:
            dest: Where to; by default a folder in the run's directory.

        Raises:
            StorageError: The store failed.
            NotFoundError: The version was deleted meanwhile.
            CorruptionError: There is nothing at `place`.
        """
        return self.fetch(dest)

    def load(self) -> Any:
        """This rank's state, on the CPU; nothing is unpickled. Where one rank saved for all, that one's.

        Raises:
            CorruptionError: The file is not what `Run.save_checkpoint` wrote.
            InvalidInputError: It needs torch or safetensors, which are not installed; it has no file of this rank; or
                it has several, which `download` gives.
            StorageError, NotFoundError: As `download`.
        """
        folder = self.download()
        path = os.path.join(folder, self.file)
        if not os.path.isfile(path):
            files = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
            if not self.file and len(files) > 1:
                raise InvalidInputError(
                    f"the checkpoint has {len(files)} files, and none is this rank's alone: download() gives them"
                )
            path = files[0] if len(files) == 1 else path
        return load_state(path)


def save_state(state: Any, path: str, format_: str, scratch: str = "") -> int:
    """Write a state to a new file, whole or not at all; gives its bytes.

    It is written in the folder ``scratch`` first, which is made and is on the same disk; by default beside ``path``.

    Raises:
        InvalidInputError: The format cannot hold it (the message names what and where), or its library is not
            installed.
        StorageError, OSError: The disk is full or fails.
    """
    if scratch:
        os.makedirs(scratch, mode=0o700, exist_ok=True)
    temporary = os.path.join(scratch or os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))  # in the system's words where it fails
    try:
        if format_ == "safetensors":
            os.unlink(temporary)  # a file that was truncated, ext4 begins to write out when it is closed
            _save_safetensors(state, temporary)
            os.chmod(temporary, 0o600)
        else:
            _save_torch(state, temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return os.stat(path).st_size


def load_state(path: str) -> Any:
    """What `save_state` wrote; see `Checkpoint.load`."""
    if not os.path.isfile(path):
        raise InvalidInputError(
            f"the checkpoint has no file {os.path.basename(path)!r}: it was saved with other ranks, or by a "
            "CheckpointSaver with another format or filename"
        )
    return _load_safetensors(path) if _is_safetensors(path) else _load_torch(path)


def _is_safetensors(path: str) -> bool:
    """By what is in it; where that says nothing, by its name."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" or (path.endswith(_SAFETENSORS) and not head.startswith(b"PK"))


# -- torch -------------------------------------------------------------------------------------------------------------


def _save_torch(state: Any, path: str) -> None:
    torch = _torch()
    try:
        with open(path, "r+b") as file:  # not by name, which would truncate it, and would be in its bytes
            torch.save(state, file)
    except (AttributeError, TypeError, PicklingError, RecursionError) as error:
        raise InvalidInputError(f"format='torch' cannot hold {_stranger(state) or f'the state ({error})'}") from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise OSError(errno.EIO, f"torch could not write all of it ({reason})", path) from error
    look = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    if look is not None:
        with numpy_is_safe(torch):
            refused = look(path)
        if refused:
            raise InvalidInputError(
                f"format='torch' cannot hold {_stranger(state) or ', '.join(sorted(refused))}: whoever loads it would "
                "have to run code; it takes tensors, numpy arrays, numbers, strings, bytes, lists, tuples, sets and "
                "dicts, and of modules and optimizers their state_dict()"
            )


def _load_torch(path: str) -> Any:
    torch = _torch()
    try:
        with numpy_is_safe(torch), open(path, "rb") as file:  # of a path it may make something of its ending
            return torch.load(file, map_location="cpu", weights_only=True)
    except MandapaError:
        raise
    except Exception as error:
        code = re.search(r"(?i)unsupported global:?(?: global)? (\S+)", str(error))
        reason = f"it needs {code[1]}" if code else str(error).partition("\n")[0][:300].replace("\x1b", "")
        raise CorruptionError(f"{path} cannot be loaded without unpickling: {reason}", key=path) from error


def numpy_is_safe(torch: Any) -> AbstractContextManager[Any]:
    """Arrays and scalars of numpy hold bytes, and no code; the states of random generators are such."""
    allow = getattr(torch.serialization, "safe_globals", None)
    try:
        numpy: Any = importlib.import_module("numpy")
        core: Any = importlib.import_module(
            "numpy._core.multiarray" if hasattr(numpy, "_core") else "numpy.core.multiarray"
        )
    except ImportError:
        return nullcontext()
    if allow is None:
        return nullcontext()
    dtypes = [kind for kind in vars(getattr(numpy, "dtypes", None) or object).values() if isinstance(kind, type)]
    names = [core._reconstruct, core.scalar, numpy.ndarray, numpy.dtype, *dtypes, bytes]  # noqa: SLF001 - in pickles
    safe: AbstractContextManager[Any] = allow(names)
    return safe


_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray)


def _stranger(value: Any, at: str = "", depth: int = 0) -> str:
    """The first thing in a state that is neither plain, nor torch's or numpy's, and its place; empty: there is none."""
    kind = type(value)
    if depth > _DEPTH:
        return f"what is nested so deep at {_shorter(at)}"
    if kind in _PLAIN or (kind.__module__.partition(".")[0] in ("torch", "numpy")):
        return ""
    if isinstance(value, Mapping) and kind.__module__ in ("builtins", "collections"):
        return next((found for k, v in value.items() if (found := _stranger(v, _join(at, k), depth + 1))), "")
    if kind in (list, tuple, set):
        return next((found for n, v in enumerate(value) if (found := _stranger(v, _join(at, n), depth + 1))), "")
    return f"the {kind.__name__} at {_shorter(at)}"


def _shorter(at: str) -> str:
    if not at:
        return "the top"
    return repr(at if len(at) <= 200 else f"{at[:100]}...{at[-97:]}")


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise InvalidInputError(
            "checkpoints of format 'torch' need torch: install it, or use CheckpointSaver(format='safetensors')"
        ) from None


# -- safetensors: tensors as they are, the structure as JSON ----------------------------------------------------------


_DEPTH = 64


def _save_safetensors(state: Any, path: str) -> None:
    tensors: dict[str, Any] = {}
    skeleton = json.dumps(take_apart(state, "", tensors, 0))
    kinds = {type(tensor).__module__.partition(".")[0] for tensor in tensors.values()}
    if len(kinds) > 1:
        raise InvalidInputError("format='safetensors': all arrays of a state are torch's, or all are numpy's")
    torch = kinds == {"torch"}
    try:
        library: Any = importlib.import_module("safetensors.torch" if torch else "safetensors.numpy")
    except ImportError as error:
        raise InvalidInputError(f"format='safetensors' needs {error.name}: pip install safetensors") from None
    try:
        tensors = _unshared(tensors) if torch else _in_order(tensors)
        library.save_file(tensors, path, metadata={STATE: skeleton, "format": "pt" if torch else "np"})
    except (
        importlib.import_module("safetensors").SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:
        if system := re.search(r"os error ([0-9]+)", str(error)):
            raise OSError(int(system[1]), os.strerror(int(system[1])), path) from error
        for name, tensor in tensors.items():
            if not _is_held(library, tensor):
                what = f"{type(tensor).__name__} of {tensor.dtype} at {_shorter(name)}"
                raise InvalidInputError(
                    f"format='safetensors' cannot hold the {what}: it takes dense tensors of numbers"
                ) from error
        raise


def _is_held(library: Any, tensor: Any) -> bool:
    """Whether the library takes tensors of that kind: it is asked to take an empty part of it."""
    try:
        part = tensor.reshape(-1)[:0]
        library.save({"": part.copy() if hasattr(part, "copy") else part.clone()})
    except Exception:  # noqa: BLE001 - the libraries have many ways to say no
        return False
    return True


def take_apart(value: Any, at: str, tensors: dict[str, Any], depth: int) -> Any:
    """The structure of a state as JSON, its tensors put into ``tensors`` under their place."""
    if depth > _DEPTH:
        raise InvalidInputError(f"the state is nested too deep at {_shorter(at)}")
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return {"$float": value.hex()}
    if _is_tensor(value):
        name = at or "state"
        while name in tensors or name == "__metadata__":  # the keys "a.b", and "b" in "a", have one place
            name += "'"
        tensors[name] = value
        return {_REF: name}
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 and type(value.item()) in _PLAIN:
        return take_apart(value.item(), at, tensors, depth + 1)
    if isinstance(value, Mapping):
        return {"$dict": [[_key(k, at), take_apart(v, _join(at, k), tensors, depth + 1)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [take_apart(item, _join(at, n), tensors, depth + 1) for n, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    raise InvalidInputError(
        f"format='safetensors' cannot hold the {type(value).__name__} at {_shorter(at)}: it takes tensors, numbers, "
        "strings, lists, tuples and dicts"
    )


def _is_tensor(value: Any) -> bool:
    module, _, _ = type(value).__module__.partition(".")
    if module == "numpy":  # but no masked arrays, whose mask would be lost
        return type(value).__name__ in ("ndarray", "memmap")
    return module == "torch" and hasattr(value, "dtype") and hasattr(value, "shape")


def _key(key: Any, at: str) -> str | int:
    if isinstance(key, str) or type(key) is int:
        return key
    raise InvalidInputError(
        f"format='safetensors': the key {key!r} at {_shorter(at)} is neither a string nor an integer"
    )


def _join(at: str, key: Any) -> str:
    return f"{at}.{key}" if at else str(key)


def _unshared(tensors: dict[str, Any]) -> dict[str, Any]:
    """Contiguous tensors that share no memory, as safetensors demands: tied weights are written twice."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if pointer in seen else plain
        seen.add(pointer)
    return found


def _in_order(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays whose rows lie one after the other: of others safetensors would mix up the elements."""
    return {name: array if array.flags.c_contiguous else array.copy(order="C") for name, array in arrays.items()}


def _load_safetensors(path: str) -> Any:
    try:
        library: Any = importlib.import_module("safetensors")
    except ImportError:
        raise InvalidInputError("this checkpoint needs safetensors: pip install safetensors") from None
    safe_open = library.safe_open
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        framework = "pt" if metadata.get("format") == "pt" else "np"
        if framework == "pt":
            _torch()
        with safe_open(path, framework=framework) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if STATE not in metadata:
            return tensors
        return _put_together(json.loads(metadata[STATE]), tensors)
    except MandapaError:
        raise
    except (library.SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CorruptionError(f"{path} is not a checkpoint that mandapa wrote: {error}", key=path) from error


def _put_together(value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_put_together(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _REF:
        return tensors[content]
    if kind == "$float":
        return float.fromhex(content)
    if kind == "$tuple":
        return tuple(_put_together(item, tensors) for item in content)
    if kind == "$dict":
        return {key: _put_together(item, tensors) for key, item in content}
    raise ValueError(f"unknown kind {kind!r}")
