"""Every name is there, as an empty class."""

from torchvision import holder

__getattr__ = holder(__name__)
