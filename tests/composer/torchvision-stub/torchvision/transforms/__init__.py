"""Every name is there, as an empty class."""

from torchvision import holder
from torchvision.transforms import functional

__all__ = ["functional"]
__getattr__ = holder(__name__)
