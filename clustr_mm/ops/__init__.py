"""Clustering operators of ClusTR, independent of the model."""

from .dpc_knn import dpc_knn
from .merge import merge_tokens

__all__ = ['dpc_knn', 'merge_tokens']
