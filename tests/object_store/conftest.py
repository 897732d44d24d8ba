"""The servers that the stores of this folder talk to: each started once, on the first test that needs it."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path

import pytest

pytest.register_assert_rewrite("mandapa.testing.conformance")

from mandapa.testing.server import Server, serve  # noqa: E402 - after the line above
from mandapa.testing.services import Service, ServiceMissingError, azurite, moto, seaweed  # noqa: E402

_AZURITE = Path(__file__).parents[1] / "azurite/node_modules/.bin/azurite-blob"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Our own S3 and GCS server, well behaved."""
    with serve() as running:
        yield running


@pytest.fixture(scope="session")
def moto_service() -> Iterator[Service]:
    yield from _start(moto)


@pytest.fixture(scope="session")
def azurite_service() -> Iterator[Service]:
    yield from _start(lambda: azurite(str(_AZURITE) if _AZURITE.exists() else None))


@pytest.fixture(scope="session")
def seaweed_service() -> Iterator[Service]:
    yield from _start(seaweed)


@pytest.fixture(scope="session")
def prefixes() -> Iterator[str]:
    """Prefixes that no other test uses."""
    return (f"Team A/run-{number}" for number in count())


def _start(service: Callable[[], AbstractContextManager[Service]]) -> Iterator[Service]:
    try:
        with service() as running:
            yield running
    except ServiceMissingError as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))
