"""Where versions of a run go: told as plain values, with the secrets kept apart from what reaches the disk."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import msgspec

from mandapa.digest import hexdigest
from mandapa.environment import cache_dir, who
from mandapa.errors import InvalidInputError
from mandapa.object_store import ObjectStore, from_url
from mandapa.repository.log import Author
from mandapa.repository.repository import Repository
from mandapa.run.logger import BackendSpec
from mandapa.run.secrets import is_secret_key

__all__ = ["key_of", "open_repository", "open_store", "public", "spec_from", "value_of"]

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


_PLACE = frozenset(("bucket", "container", "prefix", "endpoint_url", "account_name", "path", "url"))


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
    return make(open_store(spec), cache_dir=cache_dir(), threads=THREADS, author=Author(who()))
