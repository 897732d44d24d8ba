"""What all tests share: nothing of the user's own repositories, caches or settings reaches a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No repository from the environment, and a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MANDAPA_REPO", raising=False)
        patch.delenv("MANDAPA_DEBUG", raising=False)
        patch.setenv("MANDAPA_CACHE", str(tmp_path_factory.mktemp("mandapa-cache")))
        yield
