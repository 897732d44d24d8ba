"""Every name is there, as an empty class."""

from torchvision import holder
from torchvision.models import resnet

__all__ = ["resnet"]
__getattr__ = holder(__name__)
