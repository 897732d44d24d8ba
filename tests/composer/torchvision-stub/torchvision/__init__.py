"""Stands where Composer imports torchvision, and holds nothing.

Composer 0.32 imports torchvision whatever one does with it, and the torchvision of the package index does not load
beside the torch that the tests are written against. Nothing that they do needs an image, so this package gives the
modules that Composer imports, and in them an empty class for every name that it asks for.

It is a package, and not a hook in one program, so that the processes which that program starts have it too. Its version
is 0.0.0: torchmetrics, which asks for 0.8 or newer, is told that there is none.
"""

from collections.abc import Callable

__version__ = "0.0.0"


def holder(module: str) -> Callable[[str], type]:
    """A `__getattr__` for a module: every name but a private one is an empty class."""

    def get(name: str) -> type:
        if name.startswith("_"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return type(name, (), {"__module__": module})

    return get


from torchvision import datasets, models, ops, transforms, utils  # noqa: E402 - they take holder() from here

__all__ = ["datasets", "models", "ops", "transforms", "utils"]
