"""The cue task: a controlled experiment on which tokens attention should look at.

Needs MMSegmentation and scikit-image; ``import clustr_mm`` does not import it. Configs
name it in ``custom_imports``. See docs/evidence.md.
"""

from .clusterers import RandomGroups
from .controls import ControlClusTR
from .cue_task import CueTask
from .metric import ClassIoUMetric

__all__ = [
    'ClassIoUMetric',
    'ControlClusTR',
    'CueTask',
    'RandomGroups',
]
