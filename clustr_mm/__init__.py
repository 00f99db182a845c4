"""ClusTR for MMDetection, MMSegmentation, MMPose and MMPretrain."""

from . import compat, hooks  # noqa: F401 (registers the hook)
from .models import STT, ClusTR, DualViT, LinGlo, SequentialNeck

__version__ = '0.1.0'

compat.activate()

__all__ = ['STT', 'ClusTR', 'DualViT', 'LinGlo', 'SequentialNeck', '__version__']
