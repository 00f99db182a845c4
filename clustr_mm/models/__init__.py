"""Backbones, registered in the root registry of MMEngine."""

from .clustr import ClusTR

__all__ = ['ClusTR']
