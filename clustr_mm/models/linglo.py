"""LinGlo backbone."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ConvFFN, to_map, to_tokens
from .pyramid import Block, PyramidBackbone, Stage

#: exp() of a saliency this large outweighs all other tokens; float32 still holds
#: the sums of it over any map, and its inverse.
MAX_SALIENCY = 30.0


class KeyOnlyAttention(nn.Module):
    """Attention whose weights come from the keys alone, without queries.

    Per head, a token's saliency is a learned vector times ``GELU(key)``, and
    its weight ``exp(saliency)``. The mean of the values with these weights is
    taken twice, over all tokens (that is a softmax over the map) and over the
    square of tokens around each (a softmax over the neighbourhood, of which
    only the part inside the map counts); each token lets the sum of both pass
    through a gate of its own, a sigmoid per channel. Time and memory are linear
    in the number of tokens (a reading of arXiv 2207.00188, see :class:`LinGlo`).
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window: int,
        attn_drop_rate: float,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.gate = nn.Linear(embed_dims, embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        # No bias: it would not change a softmax.
        head_dims = embed_dims // num_heads
        self.saliency = nn.Parameter(torch.empty(num_heads, head_dims))
        nn.init.normal_(self.saliency, std=head_dims**-0.5)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Map tokens (B, h * w, C) to tokens of the same shape."""
        keys, values = self.kv(x).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        weights = self.weigh(keys)
        # The sums are float32: half precision has neither the range of the
        # weights nor the digits for a sum over the map.
        weighted = self.attn_drop(weights) * values
        total = weighted.sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
        near = self.pool(weighted, hw) / self.pool(weights, hw)
        context = (total + near).flatten(2).to(values.dtype)
        return self.drop(self.proj(self.gate(x).sigmoid() * context))

    def weigh(self, keys: Tensor) -> Tensor:
        """Map keys (B, N, heads, head_dim) to weights (B, N, heads, 1), float32.

        Saliencies beyond +-30 are cut off there. So no maximum needs to be taken
        off before exp(), which the maximum of the map could not do for a
        neighbourhood far below it: all its weights might round to zero.
        """
        saliency = (F.gelu(keys).float() * self.saliency).sum(dim=-1, keepdim=True)
        return saliency.clamp(-MAX_SALIENCY, MAX_SALIENCY).exp()

    def pool(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Neighbourhood sums of (B, h * w, heads, D), all divided by one number."""
        grid = to_map(x.flatten(2), hw)
        # Zeros outside of the map add nothing to either sum.
        pooled = F.avg_pool2d(grid, self.window, stride=1, padding=self.window // 2)
        return to_tokens(pooled).unflatten(2, x.shape[2:])

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f'num_heads={self.num_heads}, window={self.window}'


def arch_of(embed_dims: list[int], depths: list[int]) -> dict:
    """Sizes that meet the published ones, with the heads and ratios of PVTv2."""
    return dict(
        embed_dims=embed_dims,
        num_heads=[1, 2, 5, 8],
        mlp_ratios=[8, 8, 4, 4],
        depths=depths,
    )


@MODELS.register_module()
class LinGlo(PyramidBackbone):
    """LinGlo: a pyramid of key-only attention and depth-wise convolution.

    After `Rethinking Query-Key Pairwise Interactions in Vision Transformers
    <https://arxiv.org/abs/2207.00188>`_ (Li, Liu), of which there is no public
    code. What its abstract states:

    - attention is key-only: a compute-efficient saliency gate gives the
      attention weights, without products of queries and keys;
    - time and memory are linear in the size of the input;
    - all stages have local and global interactions;
    - layers of convolution and of attention alternate, where others have the
      convolutions first.

    The rest is a reading of it, so weights of others do not fit and published
    accuracies are no promise:

    - the gate (:class:`KeyOnlyAttention`): the saliency, its softmax over the
      map and over a neighbourhood of 3 x 3, the sigmoid gate of each token;
    - the order: blocks of each stage alternate such that attention is the
      last. Where one stage ends and the next begins with it, the strided
      convolution of the patch embedding lies between;
    - the blocks: a block of convolution is one of attention with
      ``Linear, depth-wise 3 x 3, GELU, Linear`` in its place; the overlapping
      patch embeddings, heads and feed-forward layers are PVTv2's as in ClusTR;
    - widths and depths, chosen to meet the published sizes: with a linear
      classifier of 1000 classes b0, b1 and b2 have 3.44M, 13.05M and 25.75M
      parameters, instead of 3.4M, 13.1M and 25.4M.

    Args:
        arch (str | dict): 'b0', 'b1' or 'b2', or a dict of equally long sequences,
            one entry per stage: ``embed_dims``, ``num_heads``, ``mlp_ratios`` as of
            :class:`ClusTR`, and ``depths``, which counts blocks of both kinds.
            Defaults to 'b2'.
        window (int): Side of the neighbourhood of the local interaction, in
            tokens, odd. Defaults to 3.
        in_channels, drop_rate, attn_drop_rate, drop_path_rate, out_indices,
        frozen_stages, with_cp, norm_cfg, init_cfg: See :class:`PyramidBackbone`.

    Examples:
        >>> import torch
        >>> from clustr_mm.models.linglo import LinGlo
        >>> model = LinGlo('b0').eval()
        >>> with torch.no_grad():
        ...     [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 32, 16, 24), (1, 64, 8, 12), (1, 160, 4, 6), (1, 256, 2, 3)]
    """

    arch_zoo = {
        'b0': arch_of([32, 64, 160, 256], [3, 3, 3, 2]),
        'b1': arch_of([64, 128, 320, 512], [3, 3, 3, 2]),
        'b2': arch_of([64, 128, 320, 512], [3, 3, 9, 4]),
    }

    arch_keys = tuple(arch_zoo['b2'])

    def __init__(
        self,
        arch: str | dict = 'b2',
        window: int = 3,
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
        if not isinstance(window, int) or window < 1 or window % 2 == 0:
            raise ValueError(
                f'window must be an odd number of tokens from 1 up, got {window!r}'
            )
        super().__init__(
            arch, in_channels, drop_rate, attn_drop_rate, drop_path_rate, out_indices,
            frozen_stages, with_cp, norm_cfg, init_cfg,
            window=window, **unknown,
        )  # fmt: skip

    def make_stage(
        self, index: int, drop_path_rates: Sequence[float], window: int
    ) -> Stage:
        """Build stage ``index`` with as many blocks as there are rates."""
        embed_dims, num_heads, mlp_ratio = self.arch_entries(
            index, 'embed_dims', 'num_heads', 'mlp_ratios'
        )
        blocks = []
        for number, rate in enumerate(drop_path_rates):
            # Counted from the end: no stage is too short to have attention.
            if (len(drop_path_rates) - number) % 2 == 0:
                mixer = ConvFFN(embed_dims, embed_dims, self.drop_rate, residual=False)
            else:
                mixer = KeyOnlyAttention(
                    embed_dims, num_heads, window, self.attn_drop_rate, self.drop_rate
                )
            ffn = ConvFFN(embed_dims, int(embed_dims * mlp_ratio), self.drop_rate)
            blocks.append(Block(mixer, ffn, embed_dims, rate, self.norm_cfg))
        return Stage(
            self.make_patch_embed(index), blocks, self.make_norm(index), self.with_cp
        )
