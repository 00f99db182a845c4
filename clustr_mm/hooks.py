"""Hooks of trainings, by name."""

from __future__ import annotations

from typing import Any

from mmengine.registry import HOOKS


@HOOKS.register_module(name='ClusterVisualizationHook')
def build_cluster_visualization_hook(**kwargs: Any) -> Any:
    """Build a :class:`clustr_mm.visualization.hook.ClusterVisualizationHook`.

    It is imported only when a config asks for it, because MMEngine's hooks import
    OpenCV, which a backbone does not need.
    """
    from .visualization.hook import ClusterVisualizationHook

    return ClusterVisualizationHook(**kwargs)
