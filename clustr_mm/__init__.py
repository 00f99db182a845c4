"""ClusTR for MMDetection, MMSegmentation, MMPose and MMPretrain."""

from . import compat
from .models import ClusTR, SequentialNeck

__version__ = '0.1.0'

compat.activate()

__all__ = ['ClusTR', 'SequentialNeck', '__version__']
