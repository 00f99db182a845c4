"""Backbones, each in a file of its own, and what their configs need."""

from .clustr import ClusTR
from .dual_vit import DualViT
from .linglo import LinGlo
from .pyramid import PyramidBackbone
from .sequential_neck import SequentialNeck
from .stt import STT

__all__ = ['STT', 'ClusTR', 'DualViT', 'LinGlo', 'PyramidBackbone', 'SequentialNeck']
