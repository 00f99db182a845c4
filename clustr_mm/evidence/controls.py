"""ClusTR with one thing about its attention exchanged, all else equal."""

from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from ..models import ClusTR
from ..models.clustr import ClusteredAttention
from ..models.layers import (
    FullAttention,
    attend,
    build_norm,
    init_weights,
    to_map,
    to_tokens,
)

KEYS = ('clusters', 'itself', 'strided')


class SelfOnly(nn.Module):
    """Lets every token attend to itself alone, as a map of one token.

    The parameters are those of the attention inside; its queries, keys and importance
    have no effect.
    """

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Map tokens (B, N, C) to the same shape."""
        return self.attn(x.flatten(0, 1).unsqueeze(1), (1, 1)).view_as(x)


class StridedAttention(FullAttention):
    """PVTv2's attention: to the tokens of a map that a convolution has made smaller.

    Args:
        sr_ratio (int): Size and stride of the convolution.
        norm_cfg (dict): Norm after it.
        embed_dims, num_heads, attn_drop_rate, drop_rate: See :class:`FullAttention`.
    """

    def __init__(self, sr_ratio: int, norm_cfg: dict, embed_dims: int, *args: Any):
        super().__init__(embed_dims, *args)
        self.sr = nn.Conv2d(embed_dims, embed_dims, sr_ratio, sr_ratio)
        self.norm = build_norm(norm_cfg, embed_dims)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Map tokens (B, h * w, C) to the same shape."""
        reduced = self.norm(to_tokens(self.sr(to_map(x, hw))))
        return self.drop(self.proj(self.attend(self.q(x), self.kv(reduced))))


class OneScaleAttention(ClusteredAttention):
    """Attention to the clusters of one scale: 0 is the coarse one, 1 the fine one."""

    def __init__(self, scale: int, *args: Any) -> None:
        super().__init__(*args)
        self.scale = scale
        del self.kv2

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Map tokens (B, h * w, C) to the same shape."""
        (merged,) = self.merge(x, self.cluster(x, hw))
        drop_rate = self.attn_drop_rate if self.training else 0.0
        attended = attend(self.q(x), self.kv1(merged), self.num_heads, drop_rate)
        return self.drop(self.proj(attended))

    def cluster_counts(self, num_tokens: int) -> tuple[int]:
        """Cluster count of the scale."""
        return (super().cluster_counts(num_tokens)[self.scale],)


@MODELS.register_module()
class ControlClusTR(ClusTR):
    """ClusTR with one thing about its attention exchanged.

    Args:
        keys (str): What the queries attend to. 'clusters' as ever; 'itself', nothing
            else than their own token, in every stage, with as many parameters;
            'strided', PVTv2's strided convolution, with ``sr_ratio**2 * C**2`` and a
            norm more, and the fine scale and the importance less. Defaults to
            'clusters'.
        scale (int, optional): The one scale of clusters that is there, 0 the coarse or
            1 the fine one. ``2 * C**2 + 2 * C`` parameters less in each block. Defaults
            to None, both.
        learned_weights (bool): Whether the tokens of a cluster have learned weights.
            False freezes the importance at nothing, so that all weigh the same.
            Defaults to True.
        *args, **kwargs: See :class:`ClusTR`.

    Raises:
        ValueError: If an argument is not as stated.
    """

    def __init__(
        self,
        *args: Any,
        keys: str = 'clusters',
        scale: int | None = None,
        learned_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        if keys not in KEYS:
            raise ValueError(f'keys must be one of {KEYS}, got {keys!r}')
        if scale not in (None, 0, 1):
            raise ValueError(f'scale must be 0, 1 or None, got {scale!r}')
        super().__init__(*args, **kwargs)
        for block in (block for stage in self.stages for block in stage.blocks):
            if keys == 'itself':
                block.attn = SelfOnly(block.attn)
            elif isinstance(block.attn, ClusteredAttention):
                if not learned_weights:
                    nn.init.zeros_(block.attn.importance.weight)
                    block.attn.importance.requires_grad_(False)
                block.attn = self._exchange(block.attn, keys, scale)

    def _exchange(
        self, attn: ClusteredAttention, keys: str, scale: int | None
    ) -> nn.Module:
        sizes = (attn.q.in_features, attn.num_heads)
        rates = (self.attn_drop_rate, self.drop_rate)
        if keys == 'strided':
            new = StridedAttention(attn.sr_ratio, self.norm_cfg, *sizes, *rates)
            return new.apply(init_weights)
        if scale is not None:
            clusters = (attn.sr_ratio, attn.clusterer, attn.max_clusters)
            new = OneScaleAttention(scale, *sizes, *clusters, *rates)
            new.load_state_dict(attn.state_dict(), strict=False)
            new.importance.requires_grad_(attn.importance.weight.requires_grad)
            return new
        return attn
