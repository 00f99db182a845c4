"""Says what is installed, whether it works together, and what to do if not.

``python -m clustr_mm.doctor`` prints it all.
"""

from .checks import run_checks
from .records import Check

__all__ = ['Check', 'run_checks']
