"""Pictures of what ClusTR clusters, of the weights in clusters, and of attention."""

from .attention import attention_maps, cluster_shares, token_at
from .clusters import (
    ClusterMap,
    clustered_attention,
    clustered_stages,
    compute_clusters,
    compute_maps,
    evaluating,
    record_clusters,
)
from .drawing import (
    draw_clusters,
    draw_dots,
    draw_heat,
    draw_point,
    find_borders,
    resize_image,
    resize_labels,
)
from .loading import Pixels, find_clustr, load_backbone, read_image, stretch
from .sheet import Line, draw_sheet

__all__ = [
    'ClusterMap',
    'Line',
    'Pixels',
    'attention_maps',
    'cluster_shares',
    'clustered_attention',
    'clustered_stages',
    'compute_clusters',
    'compute_maps',
    'draw_clusters',
    'draw_dots',
    'draw_heat',
    'draw_point',
    'draw_sheet',
    'evaluating',
    'find_borders',
    'find_clustr',
    'load_backbone',
    'read_image',
    'record_clusters',
    'resize_image',
    'resize_labels',
    'stretch',
    'token_at',
]
