"""Backbones, each in a file of its own, and what their configs need."""

import importlib
import pkgutil

from .clustr import ClusTR
from .dual_vit import DualViT
from .linglo import LinGlo
from .pyramid import PyramidBackbone
from .sequential_neck import SequentialNeck
from .stt import STT

# A new backbone registers itself: its file here is all that it takes.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_module.name}')

__all__ = ['STT', 'ClusTR', 'DualViT', 'LinGlo', 'PyramidBackbone', 'SequentialNeck']
