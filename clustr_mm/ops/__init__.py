"""Clustering operators of ClusTR, independent of the model."""

from .backend import get_search_backend, set_search_backend
from .clusterers import DPCKNN, GridCells, KMeans, SortedTokens
from .dpc_knn import dpc_knn
from .kmeans import grid_cells, kmeans
from .merge import Clusters, merge_tokens

__all__ = [
    'DPCKNN',
    'Clusters',
    'GridCells',
    'KMeans',
    'SortedTokens',
    'dpc_knn',
    'get_search_backend',
    'grid_cells',
    'kmeans',
    'merge_tokens',
    'set_search_backend',
]
