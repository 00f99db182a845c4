"""ClusTR backbone."""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import merge_tokens, window_dpc_knn
from ..ops.merge import EPS
from .checkpoint import accept_checkpoints
from .layers import (
    ConvFFN,
    DropPath,
    PatchEmbed,
    attend,
    build_norm,
    init_weights,
    split_heads,
)

#: exp() of an importance above this is beyond use and near overflow.
MAX_IMPORTANCE = 60.0


class FullAttention(nn.Module):
    """Multi-head attention of all tokens to all tokens.

    Args:
        embed_dims (int): Channels C of the tokens.
        num_heads (int): Attention heads, a divisor of C.
        attn_drop_rate (float): Dropout of the attention weights.
        drop_rate (float): Dropout of the output.
    """

    def __init__(
        self, embed_dims: int, num_heads: int, attn_drop_rate: float, drop_rate: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop_rate = attn_drop_rate
        self.q = nn.Linear(embed_dims, embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Map tokens (B, h * w, C) to tokens of the same shape."""
        q = split_heads(self.q(x), self.num_heads)
        drop_rate = self.attn_drop_rate if self.training else 0.0
        x = attend(q, self.kv(x), self.num_heads, drop_rate)
        return self.drop(self.proj(x))


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
        q = split_heads(self.q(x), self.num_heads)
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
        # In float32, or exp() of a score above 11 overflows in float16.
        weights = self.importance(x).float().clamp(max=MAX_IMPORTANCE).exp()
        merged = []
        for labels, count in zip(*self.cluster(x, hw)):
            if count == x.shape[1]:
                # Each token is merged with itself alone, and attention does
                # not care in which order.
                merged.append((x * (weights / (weights + EPS))).to(x.dtype))
            else:
                merged.append(merge_tokens(x, labels, count, weights))
        return merged


class Block(nn.Module):
    """Transformer block: attention, then a convolutional feed-forward layer.

    Args:
        attn (nn.Module): Takes tokens (B, h * w, C) and (h, w).
        embed_dims (int): Channels C of the tokens.
        mlp_ratio (float): Hidden channels of the feed-forward layer over C.
        drop_rate (float): Dropout of the feed-forward layer.
        drop_path_rate (float): Stochastic depth of both branches.
        norm_cfg (dict): Norm before each branch.
    """

    def __init__(
        self,
        attn: nn.Module,
        embed_dims: int,
        mlp_ratio: float,
        drop_rate: float,
        drop_path_rate: float,
        norm_cfg: dict,
    ) -> None:
        super().__init__()
        self.norm1 = build_norm(norm_cfg, embed_dims)
        self.attn = attn
        self.norm2 = build_norm(norm_cfg, embed_dims)
        self.ffn = ConvFFN(embed_dims, int(embed_dims * mlp_ratio), drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Map tokens (B, h * w, C) to tokens of the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x), hw))
        return x + self.drop_path(self.ffn(self.norm2(x), hw))


class Stage(nn.Module):
    """One level of the pyramid: patch embedding, blocks, norm.

    Args:
        patch_embed (nn.Module): Makes tokens of the map before.
        blocks (Sequence[nn.Module]): Take tokens and (h, w).
        norm (nn.Module): Norm of the tokens.
        with_cp (bool): Whether to recompute the blocks in the backward pass.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C, h, w), contiguous."""
        x, hw = self.patch_embed(x)
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, hw, use_reentrant=False)
            else:
                x = block(x, hw)
        return self.norm(x).transpose(1, 2).unflatten(2, hw).contiguous()


@MODELS.register_module()
class ClusTR(BaseModule):
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
        in_channels (int): Channels of the input. Defaults to 3.
        num_neighbors (int): k of the density of the clustering. Defaults to 5.
        cluster_window (int, optional): Side, in input pixels, of the windows
            that are clustered each by itself, at least 1. None clusters the
            whole image, as in the paper; 224, the size of pre-training, makes
            large images much cheaper and leaves those up to 224 as they are.
            Defaults to None.
        drop_rate (float): Dropout after attention and in the feed-forward
            layers, in [0, 1). Defaults to 0.
        attn_drop_rate (float): Dropout of the attention weights, in [0, 1).
            Defaults to 0.
        drop_path_rate (float): Stochastic depth of the last block, in [0, 1);
            it grows linearly from 0 over all blocks. Defaults to 0.1.
        out_indices (Sequence[int]): Stages to return, from 0, rising. Stages
            after the last one are not built. Defaults to (0, 1, 2, 3).
        frozen_stages (int): Stages 0 to ``frozen_stages`` get no gradient and
            stay in evaluation mode; -1 freezes none. Defaults to -1.
        with_cp (bool): Whether to save memory by recomputing each block in
            the backward pass. Defaults to False.
        norm_cfg (dict, optional): Norm of the tokens. ``eps`` does not apply
            to the patch embeddings, whose norms keep PyTorch's default (1e-5),
            as in the public code. Defaults to ``dict(type='LN', eps=1e-6)``.
        init_cfg (dict | list[dict], optional): Initialisation by MMEngine.
            With ``type='Pretrained'``, ``checkpoint`` may hold this package's
            parameter names or the public code's, of a backbone, classifier or
            detector; a file that lacks a parameter of the backbone is an
            error. Defaults to None.

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

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        num_neighbors: int = 5,
        cluster_window: int | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.arch_settings = self._check_arch(arch)
        embed_dims, num_heads, mlp_ratios, depths, sr_ratios = (
            self.arch_settings[key] for key in self.arch_keys
        )
        if in_channels < 1:
            raise ValueError(f'in_channels must be at least 1, got {in_channels}')
        if num_neighbors < 1:
            raise ValueError(f'num_neighbors must be at least 1, got {num_neighbors}')
        if cluster_window is not None and (
            not isinstance(cluster_window, int) or cluster_window < 1
        ):
            raise ValueError(
                'cluster_window must be None or a number of pixels from 1 up, got '
                f'{cluster_window}'
            )
        for name, rate in [
            ('drop_rate', drop_rate),
            ('attn_drop_rate', attn_drop_rate),
            ('drop_path_rate', drop_path_rate),
        ]:
            if not 0 <= rate < 1:
                raise ValueError(f'{name} must be in [0, 1), got {rate}')
        stages = list(range(len(depths)))
        self.out_indices = tuple(out_indices)
        if not self.out_indices or self.out_indices != tuple(
            index for index in stages if index in self.out_indices
        ):
            raise ValueError(
                f'out_indices must be rising stages out of {stages}, got {out_indices}'
            )
        if frozen_stages not in [-1, *stages]:
            raise ValueError(
                f'frozen_stages must be one of {[-1, *stages]}, got {frozen_stages}'
            )
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        norm_cfg = dict(norm_cfg or dict(type='LN', eps=1e-6))
        patch_norm_cfg = {k: v for k, v in norm_cfg.items() if k != 'eps'}

        last = max(1, sum(depths) - 1)
        drop_path_rates = (drop_path_rate * i / last for i in range(sum(depths)))
        self.stages = nn.ModuleList()
        for i in range(self.out_indices[-1] + 1):
            patch_embed = PatchEmbed(
                embed_dims[i - 1] if i else in_channels,
                embed_dims[i],
                kernel_size=3 if i else 7,
                stride=2 if i else 4,
                norm_cfg=patch_norm_cfg,
            )
            blocks = [
                Block(
                    FullAttention(
                        embed_dims[i], num_heads[i], attn_drop_rate, drop_rate
                    )
                    if sr_ratios[i] == 1
                    else ClusteredAttention(
                        embed_dims[i],
                        num_heads[i],
                        sr_ratios[i],
                        num_neighbors,
                        cluster_window and max(1, cluster_window // (4 * 2**i)),
                        attn_drop_rate,
                        drop_rate,
                    ),
                    embed_dims[i],
                    mlp_ratios[i],
                    drop_rate,
                    next(drop_path_rates),
                    norm_cfg,
                )
                for _ in range(depths[i])
            ]
            norm = build_norm(norm_cfg, embed_dims[i])
            self.stages.append(Stage(patch_embed, blocks, norm, with_cp))
        self.apply(init_weights)
        accept_checkpoints(self, self.public_names)
        self._freeze_stages()

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

    @classmethod
    def _check_arch(cls, arch: str | dict) -> dict:
        if isinstance(arch, str):
            if arch not in cls.arch_zoo:
                raise ValueError(
                    f'arch must be one of {list(cls.arch_zoo)} or a dict, got {arch!r}'
                )
            return cls.arch_zoo[arch]
        if not isinstance(arch, dict) or set(arch) != set(cls.arch_keys):
            keys = sorted(arch) if isinstance(arch, dict) else arch
            raise ValueError(
                f'arch must be a dict with the keys {list(cls.arch_keys)}, got {keys}'
            )
        lengths = {key: len(arch[key]) for key in cls.arch_keys}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(
                f'arch entries must be equally long and not empty, got {lengths}'
            )
        for key in cls.arch_keys:
            if min(arch[key]) <= 0:
                raise ValueError(f'arch {key} must be positive, got {arch[key]}')
        for dims, heads in zip(arch['embed_dims'], arch['num_heads']):
            if dims % heads:
                raise ValueError(
                    f'embed_dims must be divisible by num_heads, got {dims} and {heads}'
                )
        return arch

    def _freeze_stages(self) -> None:
        for stage in self.stages[: self.frozen_stages + 1]:
            stage.eval()
            stage.requires_grad_(False)

    def train(self, mode: bool = True) -> 'ClusTR':
        """Set the training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            x (Tensor): (B, in_channels, H, W), B, H, W at least 1.

        Returns:
            tuple[Tensor]: For each of ``out_indices`` a contiguous map
            (B, embed_dims[i], h, w) with ``h = ceil(H / stride)``, strides
            4, 8, 16, 32.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape:
            raise ValueError(
                f'input must have shape (B, {self.in_channels}, H, W) with no '
                f'empty axis, got {tuple(x.shape)}'
            )
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)
