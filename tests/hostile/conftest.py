"""Lets the tests of this folder share `failing_disk`: with pytest's importlib mode nothing else does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
