"""Hooks of trainings, by name.

The hook itself stands in :mod:`clustr_mm.visualization.hook`. It is imported when a
config asks for it, because MMEngine's hooks import OpenCV, which a backbone does not
need.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import HOOKS


@HOOKS.register_module(name='ClusterVisualizationHook')
def build_cluster_visualization_hook(**kwargs: Any) -> Any:
    """Build a :class:`clustr_mm.visualization.hook.ClusterVisualizationHook`.

    Args:
        **kwargs: Its arguments.

    Returns:
        ClusterVisualizationHook: The hook.
    """
    from .visualization.hook import ClusterVisualizationHook

    return ClusterVisualizationHook(**kwargs)
