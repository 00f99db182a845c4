"""What ``tools/evaluate.py`` does: checkpoints to a table beside published figures."""

from .plan import Plan, find_configs, make_plan
from .published import TASKS, find_task
from .report import Report, describe
from .runs import Job, Row, evaluate

__all__ = [
    'Job',
    'Plan',
    'Report',
    'Row',
    'TASKS',
    'describe',
    'evaluate',
    'find_configs',
    'find_task',
    'make_plan',
]
