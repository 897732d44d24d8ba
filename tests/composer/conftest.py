"""The tests with the real Composer, which has an environment of its own: where it is not installed, there are none.

`make test` makes that environment, `.venv-composer`, and runs them in it.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings

collect_ignore_glob = ["torchvision-stub"] if importlib.util.find_spec("composer") else ["*"]

if importlib.util.find_spec("composer"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Composer, which is frozen, imports: others go on
        importlib.import_module("composer")
        importlib.import_module("composer.callbacks")
        importlib.import_module("composer.loggers")
