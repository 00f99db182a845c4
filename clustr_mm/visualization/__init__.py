"""Pictures of what ClusTR clusters, of the weights in clusters, and of attention."""

from .clusters import (
    ClusterMap,
    clustered_attention,
    clustered_stages,
    compute_clusters,
    compute_maps,
    evaluating,
    token_at,
)
from .figure import draw_clusters, draw_figure, import_libraries, resize_labels
from .loading import Pixels, load_backbone, read_image, resize_image

__all__ = [
    'ClusterMap',
    'Pixels',
    'clustered_attention',
    'clustered_stages',
    'compute_clusters',
    'compute_maps',
    'draw_clusters',
    'draw_figure',
    'evaluating',
    'import_libraries',
    'load_backbone',
    'read_image',
    'resize_image',
    'resize_labels',
    'token_at',
]
