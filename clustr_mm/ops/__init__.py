"""Clustering operators of ClusTR, independent of the model."""

from .dpc_knn import dpc_knn
from .merge import merge_tokens
from .windows import window_dpc_knn

__all__ = ['dpc_knn', 'merge_tokens', 'window_dpc_knn']
