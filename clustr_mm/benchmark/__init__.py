"""Time and memory of backbones and of the clustering, side by side."""

from .backbones import Backbone, find_backbone, presets
from .cases import BackboneCase, OperatorCase, SweepCase
from .report import Report
from .runner import Row, Settings, add_ratios, run
from .textbook import textbook_dpc_knn, use_textbook

__all__ = [
    'presets',
    'Backbone',
    'BackboneCase',
    'OperatorCase',
    'Report',
    'Row',
    'Settings',
    'SweepCase',
    'add_ratios',
    'find_backbone',
    'run',
    'textbook_dpc_knn',
    'use_textbook',
]
