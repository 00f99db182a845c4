"""Dual-ViT backbone."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import (
    FFN,
    ConvFFN,
    DropPath,
    FullAttention,
    PatchEmbed,
    attend,
    build_norm,
    to_map,
    to_tokens,
)
from .pyramid import Block, PyramidBackbone, Stage, run_block

#: Learned queries per side of their grid, and pixels of the first stage per
#: semantic token: an image of 224 pixels has as many tokens as queries.
GRID = 8
POOLING = 7


def make_scale(embed_dims: int) -> nn.Parameter:
    """Learned scale of a branch, one number per channel."""
    return nn.Parameter(torch.full((embed_dims,), 1e-6))


class StemPatchEmbed(PatchEmbed):
    """Patch embedding of stride 4: three convolutions, then a strided one."""

    def __init__(
        self, in_channels: int, stem_width: int, embed_dims: int, norm_cfg: dict
    ) -> None:
        super().__init__(stem_width, embed_dims, 3, 2, norm_cfg)
        layers = []
        for size, stride in [(7, 2), (3, 1), (3, 1)]:
            layers += [
                nn.Conv2d(in_channels, stem_width, size, stride, size // 2, bias=False),
                nn.BatchNorm2d(stem_width),
                nn.ReLU(inplace=True),
            ]
            in_channels = stem_width
        self.stem = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map (B, C, H, W) to tokens (B, h * w, embed_dims) and (h, w)."""
        return super().forward(self.stem(x))


class SemanticTokens(nn.Module):
    """The first semantic tokens: learned queries and the pooled map, fused.

    The map is averaged over squares of 7 x 7 pixels, as many as fit, or over
    what there is of a side below 7. The queries, an 8 x 8 grid, are resized to
    as many and attend to the pooled pixels with a single head. Both are added
    with channel-wise weights, a softmax over the two (Dual-ViT, arXiv
    2207.04976).
    """

    def __init__(self, embed_dims: int, attn_drop_rate: float, norm_cfg: dict) -> None:
        super().__init__()
        self.attn_drop_rate = attn_drop_rate
        self.queries = nn.Parameter(torch.empty(GRID**2, embed_dims))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.q_norm = build_norm(norm_cfg, embed_dims)
        self.q = nn.Linear(embed_dims, embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.fuse = nn.Sequential(
            nn.Linear(embed_dims, embed_dims),
            nn.ReLU(),
            nn.Linear(embed_dims, 2 * embed_dims),
        )
        self.norm = build_norm(norm_cfg, embed_dims)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Map pixels (B, h * w, C) to semantics (B, M, C)."""
        squares = [min(POOLING, side) for side in hw]
        pooled = F.avg_pool2d(to_map(x, hw), squares, POOLING)
        queries = self.queries.transpose(0, 1).view(1, -1, GRID, GRID)
        queries = F.interpolate(queries, pooled.shape[2:], mode='bicubic')
        pooled, queries = to_tokens(pooled), to_tokens(queries)
        q = self.q(self.q_norm(queries)).expand_as(pooled)
        drop_rate = self.attn_drop_rate if self.training else 0.0
        attended = attend(q, self.kv(pooled), 1, drop_rate)
        weights = self.fuse((attended + pooled).mean(dim=1, keepdim=True))
        first, second = weights.unflatten(2, (2, -1)).softmax(dim=2).unbind(2)
        return self.norm(first * attended + second * pooled)


class DualAttention(FullAttention):
    """Semantics attend to themselves, then to the pixels, then the pixels to them.

    The cost grows with the number of pixels times that of semantics (Dual-ViT, arXiv
    2207.04976). The norms and the stochastic depth in here are those of the semantics.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop_rate: float,
        drop_rate: float,
        drop_path_rate: float,
        norm_cfg: dict,
    ) -> None:
        # Keys and values go by the name of their queries: ``kv`` is what the
        # pixels look at, made of semantics.
        super().__init__(embed_dims, num_heads, attn_drop_rate, drop_rate)
        self.semantic_norm1 = build_norm(norm_cfg, embed_dims)
        self.semantic_qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.semantic_norm2 = build_norm(norm_cfg, embed_dims)
        self.semantic_q = nn.Linear(embed_dims, embed_dims)
        self.semantic_kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.semantic_norm3 = build_norm(norm_cfg, embed_dims)
        self.semantic_ffn = FFN(embed_dims, 4 * embed_dims, drop_rate, nn.ReLU())
        self.semantic_norm4 = build_norm(norm_cfg, embed_dims)
        self.gamma1 = make_scale(embed_dims)
        self.gamma2 = make_scale(embed_dims)
        self.gamma3 = make_scale(embed_dims)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, semantics: Tensor) -> tuple[Tensor, Tensor]:
        """Map normalised pixels (B, N, C) and semantics (B, M, C).

        Returns the branch to add to the pixels, and the new semantics.
        """
        channels = x.shape[2]
        q, kv = self.semantic_qkv(self.semantic_norm1(semantics)).split(
            [channels, 2 * channels], dim=2
        )
        semantics = semantics + self.drop_path(self.gamma1 * self.attend(q, kv))
        q = self.semantic_q(self.semantic_norm2(semantics))
        branch = self.gamma2 * self.attend(q, self.semantic_kv(x))
        semantics = semantics + self.drop_path(branch)
        branch = self.gamma3 * self.semantic_ffn(self.semantic_norm3(semantics))
        semantics = semantics + self.drop_path(branch)
        kv = self.kv(self.semantic_norm4(semantics))
        return self.drop(self.proj(self.attend(self.q(x), kv))), semantics


class DualBlock(Block):
    """:class:`DualAttention`, then a feed-forward layer of the pixels.

    Takes the arguments of :class:`Block`, and ``semantic_ffn`` for :class:`MergeBlock`.
    """

    def __init__(
        self,
        attn: nn.Module,
        ffn: nn.Module,
        embed_dims: int,
        drop_path_rate: float,
        norm_cfg: dict,
        semantic_ffn: nn.Module | None = None,
    ) -> None:
        super().__init__(attn, ffn, embed_dims, drop_path_rate, norm_cfg)
        self.semantic_ffn = semantic_ffn
        self.gamma1 = make_scale(embed_dims)
        self.gamma2 = make_scale(embed_dims)

    def forward(
        self, x: Tensor, semantics: Tensor, hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Map pixels (B, h * w, C) and semantics (B, M, C) to the same shapes."""
        branch, semantics = self.attn(self.norm1(x), semantics)
        x = x + self.drop_path(self.gamma1 * branch)
        return x + self.drop_path(self.gamma2 * self.ffn(self.norm2(x), hw)), semantics


class MergeBlock(DualBlock):
    """:class:`FullAttention` of pixels and semantics together, then a layer for each.

    The last block has no ``semantic_ffn`` and returns None for the semantics.
    """

    def forward(
        self, x: Tensor, semantics: Tensor, hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Map pixels (B, h * w, C) and semantics (B, M, C) to the same shapes."""
        sizes = [x.shape[1], semantics.shape[1]]
        tokens = torch.cat([x, semantics], dim=1)
        tokens = tokens + self.drop_path(self.gamma1 * self.attn(self.norm1(tokens)))
        if self.semantic_ffn is None:
            x = tokens[:, : sizes[0]]
            return x + self.drop_path(self.gamma2 * self.ffn(self.norm2(x), hw)), None
        x, semantics = self.norm2(tokens).split(sizes, dim=1)
        branch = torch.cat([self.ffn(x, hw), self.semantic_ffn(semantics)], dim=1)
        tokens = tokens + self.drop_path(self.gamma2 * branch)
        return tokens.split(sizes, dim=1)


class DualStage(Stage):
    """One level of the pyramid, of pixels and of semantics.

    ``semantic_embed`` makes semantics of the pixels in the first stage, of the
    semantics before in the others. The last stage has no ``semantic_norm``.
    """

    def __init__(
        self,
        patch_embed: PatchEmbed,
        semantic_embed: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        semantic_norm: nn.Module | None,
        with_cp: bool,
    ) -> None:
        super().__init__(patch_embed, blocks, norm, with_cp)
        self.semantic_embed = semantic_embed
        self.semantic_norm = semantic_norm

    def forward(
        self, state: Tensor | tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Map the image (B, C_in, H, W), or the state before, to the next state.

        That is a map (B, C, h, w), channels last in memory, and semantics (B, M, C),
        None in the last stage.
        """
        if isinstance(state, Tensor):
            x, hw = self.patch_embed(state)
            semantics = self.semantic_embed(x, hw)
        else:
            x, hw = self.patch_embed(state[0])
            semantics = self.semantic_embed(state[1])
        for block in self.blocks:
            x, semantics = run_block(block, self.with_cp, x, semantics, hw)
        x = to_map(self.norm(x), hw)
        if self.semantic_norm is None:
            return x, None
        return x, self.semantic_norm(semantics)


def arch_of(stem_width: int, embed_dims: list[int], depths: list[int]) -> dict:
    """The sizes of the paper, with 32 channels per head."""
    return dict(
        stem_width=stem_width,
        embed_dims=embed_dims,
        num_heads=[dims // 32 for dims in embed_dims],
        mlp_ratios=[8, 8, 4, 3],
        depths=depths,
    )


@MODELS.register_module()
class DualViT(PyramidBackbone):
    """Dual-ViT: a pyramid transformer of pixels and a few semantic tokens.

    A PyTorch implementation of `Dual Vision Transformer
    <https://arxiv.org/abs/2207.04976>`_. In the first two stages the pixels
    attend to semantic tokens only, which gather from all pixels: at strides 4
    and 8 that is 1/49 and 4/49 of what full attention costs there, twice. The
    later stages run full attention on both together. There is one semantic token
    per 28 x 28 pixels, and at least one per side. The stem has batch norms: one
    image of at most 2 x 2 pixels cannot train it.

    Args:
        arch (str | dict): 'small' ('s'), 'base' ('b') or 'large' ('l'), or a dict
            of a number, ``stem_width``, the channels of the first three
            convolutions, and of equally long sequences, one entry per stage:
            ``embed_dims``, ``num_heads`` and ``depths`` as of :class:`ClusTR`, and
            ``mlp_ratios``, that of the pixels' feed-forward layers; in every second
            block of the third stage it is one less, so above 1 there. Defaults to
            'small'.
        in_channels, drop_rate, attn_drop_rate, drop_path_rate, out_indices,
        frozen_stages, with_cp, norm_cfg, init_cfg: See :class:`PyramidBackbone`.
            The ``eps`` of ``norm_cfg`` applies to the norms before the branches of the
            pixels and to those at the end of the stages, as in the public code.

    Examples:
        >>> import torch
        >>> from clustr_mm.models.dual_vit import DualViT
        >>> model = DualViT('small').eval()
        >>> with torch.no_grad():
        ...     [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 64, 16, 24), (1, 128, 8, 12), (1, 320, 4, 6), (1, 448, 2, 3)]
    """

    arch_zoo = {
        **dict.fromkeys(['small', 's'], arch_of(32, [64, 128, 320, 448], [3, 4, 6, 3])),
        **dict.fromkeys(['base', 'b'], arch_of(64, [64, 128, 320, 512], [3, 4, 15, 3])),
        **dict.fromkeys(
            ['large', 'l'], arch_of(64, [96, 192, 384, 512], [3, 6, 21, 3])
        ),
    }

    arch_keys = tuple(arch_zoo['small'])
    arch_numbers = ('stem_width',)

    public_names = (
        (r'^q$', 'stages.0.semantic_embed.queries'),
        (r'^q_embed\.0\.', 'stages.0.semantic_embed.q_norm.'),
        (r'^q_embed\.1\.', 'stages.0.semantic_embed.q.'),
        (r'^kv\.', 'stages.0.semantic_embed.kv.'),
        (r'^proxy_ln\.', 'stages.0.semantic_embed.norm.'),
        (r'^se\.', 'stages.0.semantic_embed.fuse.'),
        (r'^patch_embed1\.conv\.', 'stages.0.patch_embed.stem.'),
        (r'^patch_embed(\d)\.', 'stages.{}.patch_embed.'),
        (r'^proxy_embed(\d)\.proj_proxy\.0\.', 'stages.{}.semantic_embed.proj.'),
        (r'^proxy_embed(\d)\.proj_proxy\.1\.', 'stages.{}.semantic_embed.norm.'),
        (r'^block(\d)\.(?=\d+\.)', 'stages.{}.blocks.'),
        (r'^norm(\d)\.(?=(?:weight|bias)$)', 'stages.{}.norm.'),
        (r'^norm_proxy(\d)\.', 'stages.{}.semantic_norm.'),
        (r'\.attn\.qkv_proxy\.0\.', '.attn.semantic_norm1.'),
        (r'\.attn\.qkv_proxy\.1\.', '.attn.semantic_qkv.'),
        (r'\.attn\.q_proxy_ln\.', '.attn.semantic_norm2.'),
        (r'\.attn\.q_proxy\.', '.attn.semantic_q.'),
        (r'\.attn\.p_ln\.', '.attn.semantic_norm3.'),
        (r'\.attn\.mlp_proxy\.0\.', '.attn.semantic_ffn.fc1.'),
        (r'\.attn\.mlp_proxy\.2\.', '.attn.semantic_ffn.fc2.'),
        (r'\.attn\.proxy_ln\.', '.attn.semantic_norm4.'),
        (r'\.attn\.kv_proxy\.', '.attn.semantic_kv.'),
        (r'\.mlp\.fc_proxy\.0\.', '.semantic_ffn.fc1.'),
        (r'\.mlp\.fc_proxy\.2\.', '.semantic_ffn.fc2.'),
        (r'\.mlp\.dwconv\.dwconv\.', '.ffn.dwconv.'),
        (r'\.mlp\.', '.ffn.'),
    )

    def __init__(
        self,
        arch: str | dict = 'small',
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
        super().__init__(
            arch, in_channels, drop_rate, attn_drop_rate, drop_path_rate, out_indices,
            frozen_stages, with_cp, norm_cfg, init_cfg, **unknown,
        )  # fmt: skip

    @classmethod
    def check_arch(cls, arch: str | dict) -> dict:
        """Return the ``arch`` dict, after a check."""
        settings = super().check_arch(arch)
        ratios = settings['mlp_ratios']
        if len(ratios) > 2 and ratios[2] <= 1:
            raise ValueError(f'arch mlp_ratios[2] must be above 1, got {ratios}')
        return settings

    def make_stage(self, index: int, drop_path_rates: Sequence[float]) -> DualStage:
        """Build stage ``index`` with as many blocks as there are rates."""
        embed_dims, num_heads, mlp_ratio = self.arch_entries(
            index, 'embed_dims', 'num_heads', 'mlp_ratios'
        )
        norm_cfg = self.inner_norm_cfg
        if index:
            patch_embed = self.make_patch_embed(index)
            before = self.arch_settings['embed_dims'][index - 1]
            semantic_embed = nn.Sequential()
            semantic_embed.proj = nn.Linear(before, embed_dims)
            semantic_embed.norm = build_norm(norm_cfg, embed_dims)
        else:
            width = self.arch_settings['stem_width']
            patch_embed = StemPatchEmbed(self.in_channels, width, embed_dims, norm_cfg)
            semantic_embed = SemanticTokens(embed_dims, self.attn_drop_rate, norm_cfg)
        last = index == self.out_indices[-1]
        attn_args = (embed_dims, num_heads, self.attn_drop_rate, self.drop_rate)
        blocks = []
        for number, rate in enumerate(drop_path_rates):
            ratio = mlp_ratio - 1 if index == 2 and number % 2 else mlp_ratio
            ffn = ConvFFN(
                embed_dims, int(embed_dims * ratio), self.drop_rate, residual=False
            )
            block_args = (ffn, embed_dims, rate, self.norm_cfg)
            if index < 2:
                attn = DualAttention(*attn_args, rate, norm_cfg)
                blocks.append(DualBlock(attn, *block_args))
                continue
            attn = FullAttention(*attn_args)
            semantic_ffn = None
            if not last or number < len(drop_path_rates) - 1:
                semantic_ffn = FFN(embed_dims, 2 * embed_dims, self.drop_rate)
            blocks.append(MergeBlock(attn, *block_args, semantic_ffn))
        return DualStage(
            patch_embed,
            semantic_embed,
            blocks,
            self.make_norm(index),
            None if last else self.make_norm(index),
            self.with_cp,
        )

    def feature(self, index: int, state: tuple[Tensor, Tensor | None]) -> Tensor:
        """Map (B, C, h, w) in what stage ``index`` returned."""
        return state[0]
