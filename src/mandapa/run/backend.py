"""Where versions of a run go, as plain values, with secrets kept apart from what reaches the disk; and what goes in."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from mandapa.digest import hexdigest
from mandapa.environment import cache_dir, cache_size, who
from mandapa.errors import InvalidInputError
from mandapa.format.strict import check_path
from mandapa.object_store import ObjectStore, from_url
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository
from mandapa.run.directory import RunDirectory
from mandapa.run.journal import ArtifactEntry, AssetEntry, CheckpointEntry, Entry, UrlEntry
from mandapa.run.logger import BackendSpec
from mandapa.run.secrets import is_secret_key

__all__ = [
    "CHECKPOINT",
    "INCOMPLETE",
    "WANDB",
    "Backend",
    "FolderCommit",
    "Put",
    "checkpoint_place",
    "key_of",
    "name_below",
    "open_repository",
    "open_store",
    "public",
    "spec_from",
    "value_of",
]

CHECKPOINT = "checkpoint"
"""The folder of a version in which its checkpoint is, unless it was handed over for another place."""
INCOMPLETE = "incomplete-checkpoint"
"""The folder for the parts of a checkpoint whose other parts were never handed over."""
WANDB = "wandb"
"""The store of a backend to which the training process itself commits: a W&B run belongs to the program."""

THREADS = 2
"""Of a repository in the uploader: what training can spare, and 150 MB of memory."""


def value_of(spec: BackendSpec) -> dict[str, Any]:
    """The backend as a JSON object, secrets included: for a pipe, never for a disk.

    Raises:
        InvalidInputError: An option that is no plain value.
    """
    value = {"store": spec.store, "options": dict(spec.options), "artifact": spec.artifact}
    for name, option in spec.options.items():
        try:
            same = msgspec.json.decode(msgspec.json.encode(option)) == option
        except (TypeError, msgspec.DecodeError, OverflowError):
            same = False
        if not same:
            raise InvalidInputError(
                f"object_store_kwargs[{name!r}] is a {type(option).__name__}: the store is made by another process, so "
                "its arguments are strings, numbers, booleans, and lists and dicts of them"
            )
    return value


def public(value: Mapping[str, Any]) -> dict[str, Any]:
    """The same without secrets, and with the names of those that are left out."""
    options = value["options"]
    kept, withheld = _split(options, "")
    return {"store": value["store"], "options": kept, "artifact": value["artifact"], "withheld": withheld}


def _split(options: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], list[str]]:
    kept: dict[str, Any] = {}
    withheld = []
    for name, option in options.items():
        if is_secret_key(name) and option not in (None, "", False):
            withheld.append(prefix + name)
        elif isinstance(option, Mapping):
            kept[name], more = _split(option, f"{prefix}{name}.")
            withheld += more
        else:
            kept[name] = option
    return kept, withheld


def spec_from(value: Mapping[str, Any]) -> BackendSpec:
    """The backend that `value_of` or `public` gave."""
    return BackendSpec(str(value["store"]), dict(value["options"]), str(value["artifact"]))


def key_of(spec: BackendSpec) -> str:
    """The name of the backend in the run's directory: the same place and artifact have the same one."""
    where = {name: option for name, option in public(value_of(spec))["options"].items() if name in _PLACE}
    text = msgspec.json.encode([spec.store, where, spec.artifact], order="sorted")
    return hexdigest(text)[:16]


_PLACE = frozenset(
    ("bucket", "container", "prefix", "endpoint_url", "account_name", "path", "url", "project", "entity")
)


def open_store(spec: BackendSpec) -> ObjectStore:
    """The object store that the backend names.

    Raises:
        InvalidInputError: No such class or module here, or it does not take these options.
    """
    if "://" in spec.store or ":" not in spec.store:
        return from_url(spec.store, **spec.options)
    module, _, name = spec.store.partition(":")
    try:
        made: Any = importlib.import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInputError(
            f"the uploader process cannot import {name} from {module!r} ({error}): define the object store's class in "
            "a "
            "module that can be imported, not in the script itself, a notebook or a function"
        ) from None
    try:
        store = made(**spec.options)
    except TypeError as error:
        raise InvalidInputError(f"{name} does not take these object_store_kwargs: {error}") from None
    if not isinstance(store, ObjectStore):
        raise InvalidInputError(
            f"{module}.{name} is no object store: it lacks methods of mandapa.object_store.ObjectStore"
        )
    return store


def open_repository(spec: BackendSpec, *, create: bool) -> Repository:
    """The repository that the backend names; made in an empty prefix with ``create``.

    Raises:
        NotFoundError: There is none, and ``create`` is False.
        InvalidInputError: As `open_store`, or something else is under the prefix.
        StorageError: The store refused, failed, or cannot be trusted with several writers.
    """
    make = Repository.create if create else Repository
    return make(open_store(spec), cache_dir=cache_dir(), cache_size=cache_size(), threads=THREADS, author=Author(who()))


# -- what is committed -------------------------------------------------------------------------------------------------


class Put(NamedTuple):
    """A file that goes into a version."""

    path: str
    source: str
    """The absolute path of its bytes."""
    size: int
    grows: bool = False
    """Only the first ``size`` bytes belong to it."""
    reserved: bool = False


@dataclass(frozen=True)
class FolderCommit:
    """A version of the run's folder that is to be made."""

    directory: RunDirectory
    txn: str
    """The same when it is tried again, by another process, too."""
    base: int | None
    """The version that the folder is from; None: an empty folder."""
    entries: list[Entry]
    incomplete: bool
    """Its checkpoint lacks parts."""
    message: str
    metadata: dict[str, Any]
    used: list[str]
    """Addresses of versions that went into the run."""
    best: tuple[str, Literal["min", "max"]] | None
    """By what the alias ``best`` moves to this version."""

    @property
    def parts(self) -> list[CheckpointEntry]:
        """The parts of its checkpoint."""
        return [entry for entry in self.entries if isinstance(entry, CheckpointEntry)]

    def leaves(self, former: str) -> list[str]:
        """Files and folders that go before anything is put; ``former``: the place of the checkpoint there is."""
        if not self.parts:
            return []
        return [INCOMPLETE] if self.incomplete else list(dict.fromkeys((INCOMPLETE, former, self.parts[0].place)))

    def urls(self) -> list[UrlEntry]:
        """The URLs that are put."""
        return [entry for entry in self.entries if isinstance(entry, UrlEntry)]

    def files(self) -> Iterator[Put]:
        """The files that are put, no path twice."""
        source = self.directory.source
        assets = [entry for entry in self.entries if isinstance(entry, AssetEntry)]
        grown = {entry.file.path: entry for entry in assets if entry.grows}
        for entry in assets:
            file = entry.file
            if grown.get(file.path, entry) is entry:
                yield Put(file.path, source(file.source), file.size, entry.grows, entry.reserved)
        for part in self.parts:
            for file in part.files:
                path = file.path
                if self.incomplete:
                    path = f"{INCOMPLETE}/step-{part.step}/{name_below(path, part.place)}"
                yield Put(path, source(file.source), file.size)


def name_below(path: str, place: str) -> str:
    """The name of a file in the folder ``place``; of the file ``place`` itself the last part of its name."""
    return path.rpartition("/")[2] if path == place else path.removeprefix(f"{place}/")


def checkpoint_place(metadata: Mapping[str, Any]) -> str:
    """Where the checkpoint is that a version was made for; empty: it was made for another reason, or says no path."""
    if type(metadata.get("step")) is not int:
        return ""
    place = metadata.get("checkpoint")
    if not isinstance(place, str):
        return CHECKPOINT
    with suppress(InvalidInputError):  # written by whoever
        return check_path(place)
    return ""


class Backend(Protocol):
    """Makes versions somewhere. A call that fails, with a `MandapaError`, is made again with the same arguments."""

    facts: dict[str, Any]
    """What is known of the place, for ``status.json``: ``url``, ``opened``, ``strangers``."""

    @property
    def is_open(self) -> bool:
        """Whether it can commit."""

    def open(self) -> None:
        """Reach the place; who may not write there is told so."""

    def commit_folder(self, commit: FolderCommit) -> tuple[str, int | None]:
        """Make a version of the run's folder; gives its address ("": nothing had changed), and its number."""

    def commit_artifact(self, entry: ArtifactEntry, txn_id: str, used: list[str]) -> str:
        """Make a version of another artifact; gives its address, "" when nothing had changed."""

    def close(self) -> None:
        """Let go of the place; `open` comes before the next commit."""
