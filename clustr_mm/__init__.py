"""ClusTR for MMDetection, MMSegmentation, MMPose and MMPretrain."""

from . import compat, hooks  # noqa: F401 (registers the hook)
from .models import ClusTR, DualViT, SequentialNeck

__version__ = '0.1.0'

compat.activate()

__all__ = ['ClusTR', 'DualViT', 'SequentialNeck', '__version__']
