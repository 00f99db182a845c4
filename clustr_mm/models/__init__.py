"""Backbones and what their configs need."""

from .clustr import ClusTR
from .sequential_neck import SequentialNeck

__all__ = ['ClusTR', 'SequentialNeck']
