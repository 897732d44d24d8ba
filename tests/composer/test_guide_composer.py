"""The pages of the guide that train with Composer run as they stand, against a server that speaks S3."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["composer", "putting-it-all-together"]


@pytest.fixture(scope="module")
def guide():
    """What runs the other pages."""
    spec = importlib.util.spec_from_file_location("guide", ROOT / "tests/test_guide.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_the_guide_runs(page, guide, place):
    """As one program; Composer warns of this and that."""
    (place / "examples").symlink_to(ROOT / "examples")
    guide.check(page, place, warnings="ignore")


def test_every_page_is_in_the_guide():
    """Each is reachable from README."""
    readme = (ROOT / "README.md").read_text()
    assert not [page for page in PAGES if f"(docs/{page}.md)" not in readme]
