"""What a run notes of its program."""

from importlib import metadata

from mandapa.run.facts import gather


def test_versions_of_packages_are_those_that_python_gives() -> None:
    """They are read without its slow parser, and are the same."""
    facts = gather(run="r", attempt=1, started="2026-11-24T22:01:02Z", ranks={"rank": 0})
    assert facts["packages"] == {package.metadata["Name"]: package.version for package in metadata.distributions()}
