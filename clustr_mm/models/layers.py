"""Layers that pyramid vision transformers share."""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.backend import exporting
from ..ops.search import limit_of

#: How many hidden values a feed-forward layer without gradients computes at a time: on
#: a CPU as many as its cache holds, elsewhere as many as keep the device busy.
SLICE_ELEMENTS = {'cpu': 3 * 2**19, 'cuda': 2**24}

#: Such a slice has at least this many channels, and a multiple of a quarter of it.
SLICE_CHANNELS = 64


def to_map(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
    """View tokens (B, h * w, C) as a map (B, C, h, w), channels last in memory."""
    # Not transpose() and unflatten(), after which a batch of one does not look like
    # channels last to a convolution.
    return tokens.unflatten(1, hw).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """View a map (B, C, h, w) as tokens (B, h * w, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def build_norm(cfg: dict, num_features: int) -> nn.Module:
    """Build a norm over the ``num_features`` channels of (B, N, C) tokens.

    The ``type`` in ``cfg`` is 'LN' or a registered class whose first argument is the
    number of channels; ``requires_grad=False`` freezes the parameters; the other
    entries are arguments of the class.

    Raises:
        ValueError: If there is no such type.
    """
    cfg = dict(cfg)
    name = cfg.pop('type', None)
    requires_grad = cfg.pop('requires_grad', True)
    norm_type = nn.LayerNorm if name == 'LN' else name and MODELS.get(name)
    if norm_type is None:
        raise ValueError(
            f"norm_cfg must name 'LN' or a norm of the registry in 'type', got {name!r}"
        )
    norm = norm_type(num_features, **cfg)
    for param in norm.parameters():
        param.requires_grad = requires_grad
    return norm


class DropPath(nn.Module):
    """Stochastic depth: drop the whole branch of a sample (arXiv 1603.09382)."""

    def __init__(self, prob: float) -> None:
        super().__init__()
        self.prob = prob

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to the same shape; the mean stays as it was."""
        if not self.training or self.prob == 0:
            return x
        keep = 1 - self.prob
        mask = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f'prob={self.prob:.3f}'


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: a strided convolution, then a norm.

    The kernel is odd and padded by half of it, so that no input is too small.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        kernel_size: int,
        stride: int,
        norm_cfg: dict,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            in_channels, embed_dims, kernel_size, stride, kernel_size // 2
        )
        self.norm = build_norm(norm_cfg, embed_dims)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map (B, C, H, W) to tokens (B, h * w, embed_dims) and (h, w)."""
        x = self.proj(x)
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


class FFN(nn.Module):
    """Feed-forward layer of single tokens: ``fc2(act(fc1(x)))``, by default with GELU.

    There is dropout after the activation and at the end.
    """

    def __init__(
        self,
        embed_dims: int,
        hidden_dims: int,
        drop_rate: float = 0.0,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.act = act or nn.GELU()
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to tokens of the same shape."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class ConvFFN(nn.Module):
    """Feed-forward layer with a depth-wise 3x3 convolution in the middle.

    ``fc2(GELU(h + DWConv(h)))`` with ``h = fc1(x)``. Without gradients ``h`` is
    computed in slices of its channels, each small enough for the cache and gone before
    the next.

    Args:
        embed_dims (int): Channels of the tokens.
        hidden_dims (int): Channels of ``h``.
        drop_rate (float): Dropout after the activation and at the end.
        residual (bool): Whether ``h`` is added to its convolution, as ClusTR
            does; False is PVTv2's form ``fc2(GELU(DWConv(h)))``.
    """

    def __init__(
        self,
        embed_dims: int,
        hidden_dims: int,
        drop_rate: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.dwconv = nn.Conv2d(
            hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims
        )
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)
        self.residual = residual

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Map tokens (B, h * w, C) to tokens of the same shape."""
        kernel = self.dwconv.weight
        if self.residual:
            # h + DWConv(h) is a convolution, too: one more in the middle.
            kernel = kernel.clone()
            kernel[..., 1, 1] += 1
        size = self.slice_size(x)
        slices = zip(
            self.fc1.weight.split(size),
            self.fc1.bias.split(size),
            kernel.split(size),
            self.dwconv.bias.split(size),
            self.fc2.weight.split(size, dim=1),
        )
        out = None
        for weight1, bias1, kernel, bias, weight2 in slices:
            hidden = to_map(F.linear(x, weight1, bias1), hw)
            hidden = F.conv2d(hidden, kernel, bias, padding=1, groups=len(kernel))
            hidden = self.drop(self.act(to_tokens(hidden)))
            part = F.linear(hidden, weight2, self.fc2.bias if out is None else None)
            # Parts in half precision are added up in float32.
            out = part if out is None else out + part.float()
        return self.drop(out.to(part.dtype))

    def slice_size(self, x: Tensor) -> int:
        """Hidden channels computed at a time for tokens (B, N, C)."""
        hidden_dims = len(self.fc1.weight)
        if torch.is_grad_enabled() or exporting():
            return hidden_dims
        slices = -(-x.shape[:2].numel() * hidden_dims // limit_of(SLICE_ELEMENTS, x))
        step = SLICE_CHANNELS // 4
        size = -(-hidden_dims // (slices * step)) * step
        return min(hidden_dims, max(SLICE_CHANNELS, size))


def init_weights(module: nn.Module) -> None:
    """Initialise one layer as the PVT family does; for ``Module.apply``.

    Linear: truncated normal of std 0.02, zero bias. Convolution, transposed
    or not: normal of std ``sqrt(2 / fan_out)`` with
    ``fan_out = k * k * out / groups``, zero bias. Norm: ones and zeros, as
    built.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """View (B, N, C) as (B, heads, N, C / heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(
    q: Tensor,
    kv: Tensor,
    num_heads: int,
    drop_rate: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Multi-head softmax attention with scale ``head_dim ** -0.5``.

    Args:
        q (Tensor): (B, N, heads * head_dim), the shape of the result.
        kv (Tensor): (B, M, 2 * heads * head_dim), keys before values.
        num_heads (int): Number of heads.
        drop_rate (float): Dropout of the attention weights.
        mask (Tensor, optional): (B, M) bool, False for keys that nobody
            attends to; every row has a True. None stands for all True.
    """
    q, k, v = (split_heads(part, num_heads) for part in (q, *kv.chunk(2, dim=-1)))
    if mask is not None:
        mask = mask[:, None, None]
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop_rate)
    return x.transpose(1, 2).flatten(2)


class FullAttention(nn.Module):
    """Multi-head attention of all tokens to all tokens, with dropout of the attention
    weights and of the output."""

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

    def forward(
        self, x: Tensor, hw: tuple[int, int] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Map tokens (B, N, C) to the same shape, whatever their order.

        ``mask``, (B, N) bool, is that of :func:`attend`. ``hw`` is not used: it is
        there because other kinds of attention need it.
        """
        return self.drop(self.proj(self.attend(self.q(x), self.kv(x), mask)))

    def attend(self, q: Tensor, kv: Tensor, mask: Tensor | None = None) -> Tensor:
        """:func:`attend` with the heads and the dropout of this module."""
        drop_rate = self.attn_drop_rate if self.training else 0.0
        return attend(q, kv, self.num_heads, drop_rate, mask)
