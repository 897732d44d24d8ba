"""Objects in memory."""

import pickle

import pytest

from mandapa.object_store import MemoryObjectStore, from_url


def test_stores_of_one_name_are_one() -> None:
    """Also by URL; those without a name are alone."""
    MemoryObjectStore("shared").put("a", b"1")
    assert MemoryObjectStore("shared").get("a") == b"1"
    assert from_url("memory://shared").get("a") == b"1"
    assert list(MemoryObjectStore("other").list("")) == []
    assert MemoryObjectStore().url != MemoryObjectStore().url
    assert list(from_url("memory://").list("")) == []


def test_it_cannot_go_to_another_process() -> None:
    """An empty copy there would look like lost data."""
    with pytest.raises(TypeError, match="one process"):
        pickle.dumps(MemoryObjectStore("shared"))
