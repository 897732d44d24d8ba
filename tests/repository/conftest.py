"""Lets the tests of this folder share `expiring`: with pytest's importlib mode nothing else does."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("expiring")
