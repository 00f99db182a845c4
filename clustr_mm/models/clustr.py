"""ClusTR backbone."""

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import merge_tokens, window_dpc_knn
from ..ops.merge import EPS
from .layers import ConvFFN, FullAttention, attend
from .pyramid import Block, PyramidBackbone, Stage

#: exp() of an importance above this is beyond use and near overflow.
MAX_IMPORTANCE = 60.0


class ClusteredAttention(nn.Module):
    """Multi-head attention of all tokens to token clusters of two scales.

    The tokens are clustered by content (:func:`clustr_mm.ops.dpc_knn`) into
    ``M1 = N // sr_ratio**2`` and ``M2 = 4 * M1`` clusters; each cluster
    becomes one token, its mean weighted by a learned importance. The queries
    attend to each scale with a softmax of its own, and the results are added
    (ClusTR, arXiv 2208.13138, multi-scale clustered self-attention).

    Args:
        embed_dims (int): Channels C of the tokens.
        num_heads (int): Attention heads, a divisor of C.
        sr_ratio (int): Square root of the tokens per coarse cluster.
        num_neighbors (int): k of the clustering.
        window (int, optional): Side, in tokens, of the windows that are
            clustered each by itself; None for one window of any size. All
            queries attend to the clusters of all windows.
        attn_drop_rate (float): Dropout of the attention weights.
        drop_rate (float): Dropout of the output.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        sr_ratio: int,
        num_neighbors: int,
        window: int | None,
        attn_drop_rate: float,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.num_neighbors = num_neighbors
        self.window = window
        self.attn_drop_rate = attn_drop_rate
        self.q = nn.Linear(embed_dims, embed_dims)
        self.importance = nn.Linear(embed_dims, 1)
        self.kv1 = nn.Linear(embed_dims, 2 * embed_dims)
        self.kv2 = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def cluster_counts(self, num_tokens: int) -> tuple[int, int]:
        """Coarse and fine cluster count (M1, M2) for N tokens."""
        coarse = max(1, num_tokens // self.sr_ratio**2)
        return coarse, min(4 * coarse, num_tokens)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Map tokens (B, h * w, C) to tokens of the same shape."""
        q = self.q(x)
        drop_rate = self.attn_drop_rate if self.training else 0.0
        attended = [
            attend(q, kv(merged), self.num_heads, drop_rate)
            for kv, merged in zip((self.kv1, self.kv2), self.merge(x, hw))
        ]
        return self.drop(self.proj(attended[0] + attended[1]))

    def cluster(
        self, x: Tensor, hw: tuple[int, int]
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Cluster tokens (B, h * w, C) at both scales, the coarse one first.

        Returns:
            tuple[tuple[Tensor], tuple[int]]: Labels (B, h * w) int64 and the
            number of clusters, for each scale.
        """
        return window_dpc_knn(
            x, hw, self.window, self.cluster_counts, self.num_neighbors
        )

    def merge(self, x: Tensor, hw: tuple[int, int]) -> list[Tensor]:
        """Cluster and merge tokens (B, N, C) to (B, M1, C) and (B, M2, C)."""
        # Not by a matrix product: one of a single column rounds differently from
        # row to row, so that equal tokens would get different weights.
        scores = (x * self.importance.weight[0]).sum(dim=-1, keepdim=True)
        scores = scores + self.importance.bias
        # In float32, or exp() of a score above 11 overflows in float16.
        weights = scores.float().clamp(max=MAX_IMPORTANCE).exp()
        merged = []
        for labels, count in zip(*self.cluster(x, hw)):
            if count == x.shape[1]:
                # Each token is merged with itself alone, and attention does
                # not care in which order.
                merged.append((x * (weights / (weights + EPS))).to(x.dtype))
            else:
                merged.append(merge_tokens(x, labels, count, weights))
        return merged


@MODELS.register_module()
class ClusTR(PyramidBackbone):
    """ClusTR: a pyramid transformer with content-based clustered attention.

    A PyTorch implementation of `ClusTR: Exploring Efficient Self-attention
    via Clustering for Vision Transformers <https://arxiv.org/abs/2208.13138>`_.

    Takes images of any size from 1 x 1 pixel, in batches of any size, and
    returns maps at strides 4, 8, 16 and 32. The same input gives the same
    output, apart from dropout and stochastic depth in training.

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
        num_neighbors (int): k of the density of the clustering. Defaults to 5.
        cluster_window (int, optional): Side, in input pixels, of the windows
            that are clustered each by itself, at least 1. None clusters the
            whole image, as in the paper; 224, the size of pre-training, makes
            large images much cheaper and leaves those up to 224 as they are.
            Defaults to None.
        **kwargs: Arguments of :class:`PyramidBackbone`: ``in_channels``,
            ``drop_rate``, ``attn_drop_rate``, ``drop_path_rate``, ``out_indices``,
            ``frozen_stages``, ``with_cp``, ``norm_cfg``, ``init_cfg``.

    Raises:
        ValueError: If an argument, or the shape of an input, is not as stated.

    Examples:
        >>> import torch
        >>> from clustr_mm import ClusTR
        >>> model = ClusTR('tiny').eval()
        >>> with torch.no_grad():
        ...     [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 64, 16, 24), (1, 128, 8, 12), (1, 256, 4, 6), (1, 512, 2, 3)]
    """

    arch_zoo = {
        **dict.fromkeys(
            ['tiny', 't', 'b1'],
            dict(
                embed_dims=[64, 128, 256, 512],
                num_heads=[1, 2, 4, 8],
                mlp_ratios=[8, 8, 4, 4],
                depths=[1, 2, 6, 1],
                sr_ratios=[8, 4, 2, 1],
            ),
        ),
        **dict.fromkeys(
            ['small', 's', 'b2'],
            dict(
                embed_dims=[64, 128, 256, 512],
                num_heads=[1, 2, 4, 8],
                mlp_ratios=[8, 8, 4, 4],
                depths=[3, 5, 13, 2],
                sr_ratios=[8, 4, 2, 1],
            ),
        ),
        **dict.fromkeys(
            ['base', 'b', 'b3'],
            dict(
                embed_dims=[64, 128, 320, 512],
                num_heads=[1, 2, 5, 8],
                mlp_ratios=[8, 8, 4, 4],
                depths=[3, 5, 18, 3],
                sr_ratios=[8, 4, 2, 1],
            ),
        ),
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

    def __init__(
        self,
        arch: str | dict = 'tiny',
        num_neighbors: int = 5,
        cluster_window: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(arch, **kwargs)
        if num_neighbors < 1:
            raise ValueError(f'num_neighbors must be at least 1, got {num_neighbors}')
        if cluster_window is not None and (
            not isinstance(cluster_window, int) or cluster_window < 1
        ):
            raise ValueError(
                'cluster_window must be None or a number of pixels from 1 up, got '
                f'{cluster_window}'
            )
        self.num_neighbors = num_neighbors
        self.cluster_window = cluster_window
        self.build_stages()

    def make_stage(self, index: int, drop_path_rates: Sequence[float]) -> Stage:
        """Build stage ``index`` with as many blocks as there are rates."""
        embed_dims, num_heads, sr_ratio, mlp_ratio = self.arch_entries(
            index, 'embed_dims', 'num_heads', 'sr_ratios', 'mlp_ratios'
        )
        # In tokens of this stage.
        window = self.cluster_window and max(1, self.cluster_window // (4 * 2**index))

        def make_attention() -> nn.Module:
            if sr_ratio == 1:
                return FullAttention(
                    embed_dims, num_heads, self.attn_drop_rate, self.drop_rate
                )
            return ClusteredAttention(
                embed_dims,
                num_heads,
                sr_ratio,
                self.num_neighbors,
                window,
                self.attn_drop_rate,
                self.drop_rate,
            )

        blocks = [
            Block(
                make_attention(),
                ConvFFN(embed_dims, int(embed_dims * mlp_ratio), self.drop_rate),
                embed_dims,
                rate,
                self.norm_cfg,
            )
            for rate in drop_path_rates
        ]
        return Stage(
            self.make_patch_embed(index), blocks, self.make_norm(index), self.with_cp
        )
