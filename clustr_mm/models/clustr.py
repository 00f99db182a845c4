"""ClusTR backbone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import Clusters, merge_tokens
from ..ops.dpc_knn import check_number
from .layers import ConvFFN, FullAttention, attend
from .pyramid import Block, PyramidBackbone, Stage

#: exp() of an importance above this is beyond use and near overflow.
MAX_IMPORTANCE = 60.0


class ClusteredAttention(nn.Module):
    """Multi-head attention of all tokens to token clusters of two scales.

    The tokens are clustered into ``M1 = N // sr_ratio**2`` and ``M2 = 4 * M1``
    clusters; each cluster becomes one token, its mean weighted by a learned
    importance. The queries attend to each scale with a softmax of its own, and the
    results are added (ClusTR, arXiv 2208.13138, multi-scale clustered
    self-attention).

    Args:
        embed_dims (int): Channels C of the tokens.
        num_heads (int): Attention heads, a divisor of C.
        sr_ratio (int): Square root of the tokens per coarse cluster.
        clusterer (Callable): Finds the clusters, see :mod:`clustr_mm.ops.clusterers`.
        max_clusters (int, optional): Most coarse clusters M1. None for no limit.
        attn_drop_rate, drop_rate (float): Dropout of the weights and of the output.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        sr_ratio: int,
        clusterer: Callable,
        max_clusters: int | None = None,
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.clusterer = clusterer
        self.max_clusters = max_clusters
        self.attn_drop_rate = attn_drop_rate
        self.q = nn.Linear(embed_dims, embed_dims)
        self.importance = nn.Linear(embed_dims, 1)
        self.kv1 = nn.Linear(embed_dims, 2 * embed_dims)
        self.kv2 = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(
        self, x: Tensor, hw: tuple[int, int], clusters: Clusters | None = None
    ) -> Tensor:
        """Map tokens (B, h * w, C) to the same shape; clusters may be known already."""
        if clusters is None:
            clusters = self.cluster(x, hw)
        q = self.q(x)
        coarse, fine = self.merge(x, clusters)
        drop_rate = self.attn_drop_rate if self.training else 0.0
        attended = attend(q, self.kv1(coarse), self.num_heads, drop_rate)
        attended = attended + attend(q, self.kv2(fine), self.num_heads, drop_rate)
        return self.drop(self.proj(attended))

    def cluster(self, x: Tensor, hw: tuple[int, int]) -> Clusters:
        """Cluster tokens (B, h * w, C) at both scales, the coarse one first."""
        with torch.no_grad():
            counts = self.cluster_counts(x.shape[1])
            return Clusters(*self.clusterer(x, hw, counts))

    def cluster_counts(self, num_tokens: int) -> tuple[int, int]:
        """Coarse and fine cluster count (M1, M2) to ask for, of N tokens."""
        coarse = max(1, num_tokens // self.sr_ratio**2)
        if self.max_clusters is not None:
            coarse = min(coarse, self.max_clusters)
        return coarse, min(4 * coarse, num_tokens)

    def merge(self, x: Tensor, clusters: Clusters) -> tuple[Tensor, ...]:
        """Merge tokens (B, N, C) to (B, M, C), for each scale."""
        # Not by a matrix product: one of a single column rounds differently from
        # row to row, so that equal tokens would get different weights.
        scores = (x * self.importance.weight[0]).sum(dim=-1, keepdim=True)
        scores = scores + self.importance.bias
        # In float32, or exp() of a score above 11 overflows in float16.
        weights = scores.float().clamp(max=MAX_IMPORTANCE).exp()
        return merge_tokens(x, clusters, weights)


def arch_of(depths: list[int], third: int = 256) -> dict:
    """The sizes of the paper, which differ in depths and the width of stage 3."""
    return dict(
        embed_dims=[64, 128, third, 512],
        num_heads=[1, 2, third // 64, 8],
        mlp_ratios=[8, 8, 4, 4],
        depths=depths,
        sr_ratios=[8, 4, 2, 1],
    )


@MODELS.register_module()
class ClusTR(PyramidBackbone):
    """ClusTR: a pyramid transformer with content-based clustered attention.

    A PyTorch implementation of `ClusTR: Exploring Efficient Self-attention
    via Clustering for Vision Transformers <https://arxiv.org/abs/2208.13138>`_.

    Takes images of any size from 1 x 1 pixel, in batches of any size, and
    returns maps at strides 4, 8, 16 and 32. The same input gives the same
    output, apart from dropout and stochastic depth in training. Parameters are
    the same with every clusterer, so checkpoints load across.

    Args:
        arch (str | dict): 'tiny' ('t', 'b1'), 'small' ('s', 'b2') or 'base'
            ('b', 'b3'), or a dict of equally long sequences, one entry per
            stage:

            - **embed_dims**: channels;
            - **num_heads**: attention heads, divisors of ``embed_dims``;
            - **mlp_ratios**: hidden channels of the feed-forward layers over
              ``embed_dims``;
            - **depths**: number of blocks;
            - **sr_ratios**: square root of the tokens per coarse cluster; at
              1 the attention is full.

            Defaults to 'tiny'.
        clusterer (dict, optional): Config of what finds the clusters, built for each
            stage by MMEngine's ``MODELS``: ``dict(type='DPCKNN', k=5, window=None)``,
            ``dict(type='KMeans', steps=2)``, ``dict(type='GridCells')``,
            ``dict(type='SortedTokens')``, or a class of your own, see
            :mod:`clustr_mm.ops.clusterers`. Defaults to None, which is
            ``dict(type='DPCKNN')``, as in the paper.
        max_clusters (int, optional): Most coarse clusters of an image in a stage, at
            least 1; there are up to four times as many fine ones. With 49, as many as
            every stage has at 224 x 224, and k-means the cost is linear in the
            pixels, but for the full attention at stride 32. Defaults to None, no
            limit, as in the paper.
        share_clusters (bool): Whether the blocks of a stage share the clusters that
            its first block finds, so that three clusterings do for the network.
            Defaults to False, as in the paper: each block finds its own.
        in_channels, drop_rate, attn_drop_rate, drop_path_rate, out_indices,
        frozen_stages, with_cp, norm_cfg, init_cfg: See :class:`PyramidBackbone`. With
            ``with_cp`` the clusters are kept, and not found again.

    Examples:
        >>> import torch
        >>> from clustr_mm import ClusTR
        >>> model = ClusTR('tiny').eval()
        >>> with torch.no_grad():
        ...     [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 64, 16, 24), (1, 128, 8, 12), (1, 256, 4, 6), (1, 512, 2, 3)]
    """

    arch_zoo = {
        **dict.fromkeys(['tiny', 't', 'b1'], arch_of([1, 2, 6, 1])),
        **dict.fromkeys(['small', 's', 'b2'], arch_of([3, 5, 13, 2])),
        **dict.fromkeys(['base', 'b', 'b3'], arch_of([3, 5, 18, 3], 320)),
    }

    #: Entries of an ``arch`` dict.
    arch_keys = ('embed_dims', 'num_heads', 'mlp_ratios', 'depths', 'sr_ratios')

    #: Parameter names of the authors' public code, as (pattern, replacement);
    #: ``{}`` in a replacement is the stage's number less one.
    public_names = (
        (r'^patch_embed(\d)\.', 'stages.{}.patch_embed.'),
        (r'^block(\d)\.(?=\d+\.)', 'stages.{}.blocks.'),
        (r'^norm(\d)\.(?=(?:weight|bias)$)', 'stages.{}.norm.'),
        (r'\.attn\.weight_layer\.', '.attn.importance.'),
        (r'\.mlp\.dwconv\.dwconv\.', '.ffn.dwconv.'),
        (r'\.mlp\.', '.ffn.'),
    )

    moved_arguments = dict(
        num_neighbors="clusterer=dict(type='DPCKNN', k=...)",
        cluster_window="clusterer=dict(type='DPCKNN', window=...)",
    )

    def __init__(
        self,
        arch: str | dict = 'tiny',
        clusterer: dict | None = None,
        max_clusters: int | None = None,
        share_clusters: bool = False,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        check_number('max_clusters', max_clusters, optional=True)
        super().__init__(
            arch, in_channels, drop_rate, attn_drop_rate, drop_path_rate, out_indices,
            frozen_stages, with_cp, norm_cfg, init_cfg,
            clusterer=clusterer or dict(type='DPCKNN'), max_clusters=max_clusters,
            share_clusters=share_clusters, **unknown,
        )  # fmt: skip

    def make_stage(
        self,
        index: int,
        drop_path_rates: Sequence[float],
        clusterer: dict,
        max_clusters: int | None,
        share_clusters: bool,
    ) -> Stage:
        """Build stage ``index`` with as many blocks as there are rates."""
        embed_dims, num_heads, sr_ratio, mlp_ratio = self.arch_entries(
            index, 'embed_dims', 'num_heads', 'sr_ratios', 'mlp_ratios'
        )
        find_clusters = build_clusterer(clusterer, 4 * 2**index, max_clusters)
        blocks = []
        for rate in drop_path_rates:
            if sr_ratio == 1:
                attn = FullAttention(
                    embed_dims, num_heads, self.attn_drop_rate, self.drop_rate
                )
            else:
                attn = ClusteredAttention(
                    embed_dims,
                    num_heads,
                    sr_ratio,
                    find_clusters,
                    max_clusters,
                    self.attn_drop_rate,
                    self.drop_rate,
                )
            ffn = ConvFFN(embed_dims, int(embed_dims * mlp_ratio), self.drop_rate)
            blocks.append(Block(attn, ffn, embed_dims, rate, self.norm_cfg))
        return Stage(
            self.make_patch_embed(index),
            blocks,
            self.make_norm(index),
            self.with_cp,
            share_clusters,
        )


def build_clusterer(cfg: dict, stride: int, max_clusters: int | None) -> Callable:
    """Build the clusterer of a stage, and tell it the stride if it has such a thing.

    Raises:
        ValueError: If the config is none, or at odds with ``max_clusters``.
    """
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise ValueError(
            f"clusterer must be a dict with a 'type' like 'DPCKNN', got {cfg!r}"
        )
    try:
        clusterer = MODELS.build(cfg)
    except KeyError as error:
        raise ValueError(
            "clusterer must have the type 'DPCKNN', 'KMeans', 'GridCells', "
            f"'SortedTokens' or a registered one of your own, got {cfg!r}"
        ) from error
    if max_clusters is not None and getattr(clusterer, 'window', None) is not None:
        raise ValueError(
            f'max_clusters={max_clusters} limits a whole map, and every window has '
            "clusters of its own: take one of the two, or dict(type='KMeans'), which "
            'is linear in the pixels without windows'
        )
    if hasattr(clusterer, 'stride'):
        clusterer.stride = stride
    return clusterer
