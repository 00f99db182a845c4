"""ClusTR for MMDetection, MMSegmentation, MMPose and MMPretrain."""

from . import compat
from .models import ClusTR

__version__ = '0.1.0'

compat.activate()

__all__ = ['ClusTR', '__version__']
