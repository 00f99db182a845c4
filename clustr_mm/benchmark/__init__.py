"""Time and memory of backbones and of the clustering, side by side."""

from backbones import Backbone, find_backbone, presets
from textbook import TextbookDPCKNN, textbook_dpc_knn

from .cases import BackboneCase, OperatorCase, SweepCase
from .report import Report
from .runner import Row, Settings, add_ratios, run

__all__ = [
    'presets',
    'Backbone',
    'BackboneCase',
    'OperatorCase',
    'Report',
    'Row',
    'Settings',
    'SweepCase',
    'TextbookDPCKNN',
    'add_ratios',
    'find_backbone',
    'run',
    'textbook_dpc_knn',
]
