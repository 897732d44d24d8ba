"""The tests with the real Composer, which has an environment of its own: where it is not installed, there are none.

`make test` makes that environment, `.venv-composer`, and runs them in it.
"""

from __future__ import annotations

import importlib.util

collect_ignore_glob = ["torchvision-stub"] if importlib.util.find_spec("composer") else ["*"]
