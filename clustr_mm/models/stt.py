"""STT backbone."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import FFN, FullAttention, PatchEmbed, init_weights
from .pyramid import Block, PyramidBackbone, run_block

#: Stride of the patches.
STRIDE = 8

#: Patches and super tokens, (B, h, w, C) each, and height and width of the image.
State = tuple[Tensor, Tensor, tuple[int, int]]


def to_windows(x: Tensor, side: int) -> Tensor:
    """Cut a map (B, h, w, C) into windows (B, S, side * side, C), padded by zeros."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(windows: Tensor, hw: tuple[int, int], side: int) -> Tensor:
    """Undo :func:`to_windows`, given h and w of the map."""
    height, width = hw
    x = windows.unflatten(2, (side, side)).unflatten(1, (-(-height // side), -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


def window_mask(x: Tensor, side: int) -> Tensor | None:
    """Tell which tokens in the windows of a map (B, h, w, C) are not padding.

    Returns (S, 1 + side * side) bool: for each window its super token, always True,
    and its patches. None if there is no padding.
    """
    if x.shape[1] % side == 0 and x.shape[2] % side == 0:
        return None
    inside = x.new_ones(1, *x.shape[1:3], 1, dtype=torch.bool)
    return F.pad(to_windows(inside, side)[0, :, :, 0], (1, 0), value=True)


class PositionEncoding(nn.Module):
    """Position from a depth-wise 3x3 convolution, added (CPVT, arXiv 2102.10882).

    It sees where it is by the zeros beyond the border, at any size of the map.
    """

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, w, C) to the same shape."""
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class GroupBlock(Block):
    """Block of :class:`FullAttention` inside groups and a plain :class:`FFN`.

    Stochastic depth drops all groups of a sample at once.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, groups, N, C) to the same shape.

        The mask is (groups, N) bool, False for tokens that nobody attends to.
        """
        batch = x.shape[0]
        if mask is not None:
            mask = mask.repeat(batch, 1)
        attended = self.attn(self.norm1(x).flatten(0, 1), mask=mask)
        x = x + self.drop_path(attended.unflatten(0, (batch, -1)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class SuperTokenStage(nn.Module):
    """A quarter of the trunk: ``local_depth`` local blocks, the others global.

    In a local block the super token and the patches of each window attend to
    each other. In a global one all super tokens attend to each other, without the
    patches. The stage begins with its local blocks, but one is kept for its end: it
    tells the patches what their super token has learned of the other windows. Only
    the first stage has a ``patch_embed``; its super tokens start as a learned vector.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        local_depth: int,
        embed_dims: int,
        window: int,
        patch_embed: nn.Module | None,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        if patch_embed is not None:
            self.super_token = nn.Parameter(torch.empty(embed_dims))
            nn.init.trunc_normal_(self.super_token, std=0.02)
        self.position = PositionEncoding(embed_dims)
        self.super_position = PositionEncoding(embed_dims)
        self.blocks = nn.ModuleList(blocks)
        last = len(self.blocks) - 1
        self.is_local = [i < local_depth - 1 or i == last for i in range(last + 1)]
        self.window = window
        self.with_cp = with_cp

    def forward(self, state: Tensor | State) -> State:
        """Map the image (B, C_in, H, W), or the state before, to the next state."""
        if self.patch_embed is None:
            x, supers, image = state
        else:
            image = (state.shape[2], state.shape[3])
            tokens, hw = self.patch_embed(state)
            x = tokens.unflatten(1, hw)
            grid = [-(-side // self.window) for side in hw]
            supers = self.super_token.expand(x.shape[0], *grid, -1)
        x, supers = self.position(x), self.super_position(supers)
        hw, grid = x.shape[1:3], supers.shape[1:3]
        mask = window_mask(x, self.window)
        x, supers = to_windows(x, self.window), supers.flatten(1, 2)
        for block, is_local in zip(self.blocks, self.is_local):
            if is_local:
                tokens = torch.cat([supers[:, :, None], x], dim=2)
                tokens = run_block(block, self.with_cp, tokens, mask)
                supers, x = tokens[:, :, 0], tokens[:, :, 1:]
            else:
                # One group of all super tokens.
                supers = run_block(block, self.with_cp, supers[:, None])[:, 0]
        return from_windows(x, hw, self.window), supers.unflatten(1, grid), image


class Level(nn.Module):
    """Map of a level of the pyramid, made of the patches.

    A norm, then for stride 4 a transposed convolution, from 16 on a maximum over
    squares, as in BEiT and ViTDet.
    """

    def __init__(self, norm: nn.Module, embed_dims: int, stride: int) -> None:
        super().__init__()
        self.norm = norm
        self.stride = stride
        if stride < STRIDE:
            factor = STRIDE // stride
            self.resample = nn.ConvTranspose2d(embed_dims, embed_dims, factor, factor)
        else:
            # Squares that stick out count what they have.
            self.resample = nn.MaxPool2d(stride // STRIDE, ceil_mode=True)

    def forward(self, x: Tensor, image: tuple[int, int]) -> Tensor:
        """Map patches (B, h, w, C) of an image (H, W) to (B, C, h', w')."""
        x = self.resample(self.norm(x).permute(0, 3, 1, 2))
        height, width = (-(-side // self.stride) for side in image)
        return x[:, :, :height, :width]


class ClassAttention(FullAttention):
    """Attention of the first token alone to all (CaiT, arXiv 2103.17239)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, 1, C)."""
        return self.drop(self.proj(self.attend(self.q(x[:, :1]), self.kv(x))))


class ClassBlock(Block):
    """Block of :class:`ClassAttention` and a plain :class:`FFN`, never dropped."""

    def forward(self, token: Tensor, supers: Tensor) -> Tensor:
        """Map the class token (B, 1, C), with super tokens (B, S, C), to its next."""
        x = torch.cat([token, supers], dim=1)
        token = token + self.attn(self.norm1(x))
        return token + self.ffn(self.norm2(token))


class ClassEmbedding(nn.Module):
    """Class embedding, learned from the super tokens only."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        embed_dims: int,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(embed_dims))
        nn.init.trunc_normal_(self.token, std=0.02)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.with_cp = with_cp

    def forward(self, supers: Tensor) -> Tensor:
        """Map super tokens (B, h, w, C) to (B, C)."""
        supers = supers.flatten(1, 2)
        token = self.token.expand(supers.shape[0], 1, -1)
        for block in self.blocks:
            token = run_block(block, self.with_cp, token, supers)
        return self.norm(token)[:, 0]


@MODELS.register_module()
class STT(PyramidBackbone):
    """STT: an isotropic transformer whose windows speak through super tokens.

    After `Global Interaction Modelling in Vision Transformer via Super Tokens
    <https://arxiv.org/abs/2111.13156>`_ (Farooq, Awais, Ahmed, Kittler), of which
    there is no public code. What its abstract states:

    - the network is isotropic: one resolution, one width;
    - each window of M x M patches has one super token, which attends together
      with them; across windows the super tokens communicate;
    - the higher layers work mostly on the super tokens, and the class
      embedding is learned from these alone;
    - STT-S25 has about 49M parameters, as accurate as Swin-B and about twice
      as fast.

    The rest is a reading of it, so weights of others do not fit and published
    accuracies are no promise:

    - the width of 384, the 25 blocks and two of class attention come from the
      published size and the name; heads of 48 channels, as in CaiT, of which
      these numbers remind;
    - patches of stride 8 and windows of 7 x 7: an image of 224 pixels is cut
      into 4 x 4 windows without padding, and the strides 4 to 32 of dense
      prediction lie about the stride of the patches;
    - of the 25 blocks 6 are local, half of them in the first quarter, which
      brings 224 pixels to 9.4G multiply-adds (Swin-B: 15.4G). Each quarter ends
      with one, for without it its map would not know what the super tokens do
      (:class:`SuperTokenStage`);
    - position: depth-wise convolutions of the patches and of the grid of super
      tokens, added where a quarter begins. So any size will do; apart from them
      and the overlap of the patches, windows speak only through super tokens;
    - windows that stick out of the map are padded with tokens that nobody
      attends to.

    Returns maps at strides 4, 8, 16 and 32, which an isotropic network does not
    have by itself: each quarter of the blocks is a stage, whose patches are
    resampled to its stride (:class:`Level`), as in BEiT. With ``with_cls`` it
    returns the class embedding instead. The parameters belong to

    - ``stages``, the trunk: 44.7M, what a classifier and a detector share;
    - ``levels``, the maps only: 0.6M, nearly all of it the transposed
      convolution of stride 4; not there with ``with_cls``. A checkpoint with
      the trunk but without any ``levels``, that of a classifier, loads, and
      they stay as they were; ``frozen_stages`` leaves them trainable;
    - ``cls``, the class token and its attention, 3.6M, only with
      ``with_cls``. With a linear classifier of 1000 classes that makes 48.6M.

    Args:
        arch (str | dict): 's25', or a dict of a number, ``window_size``, the side of
            the windows in patches, and of equally long sequences, one entry per
            stage: ``embed_dims`` (all the same), ``num_heads``, ``mlp_ratios`` and
            ``depths`` as of :class:`ClusTR`, and ``local_depths``, how many of the
            blocks are local, at least one. Defaults to 's25'.
        with_cls (bool): Whether to return the class embedding, a tuple of one
            tensor (B, C), instead of maps, for mmpretrain's ``ImageClassifier``
            without a neck. It is made of the super tokens of the last stage in
            ``out_indices``. Defaults to False.
        in_channels, drop_rate, attn_drop_rate, drop_path_rate, out_indices,
        frozen_stages, with_cp, norm_cfg, init_cfg: See :class:`PyramidBackbone`.

    Examples:
        >>> import torch
        >>> from clustr_mm.models.stt import STT
        >>> model = STT('s25').eval()
        >>> with torch.no_grad():
        ...     [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 96))]
        [(1, 384, 16, 24), (1, 384, 8, 12), (1, 384, 4, 6), (1, 384, 2, 3)]
    """

    arch_zoo = {
        's25': dict(
            window_size=7,
            embed_dims=[384, 384, 384, 384],
            num_heads=[8, 8, 8, 8],
            mlp_ratios=[4, 4, 4, 4],
            depths=[7, 6, 6, 6],
            local_depths=[3, 1, 1, 1],
        ),
    }

    arch_keys = tuple(arch_zoo['s25'])
    arch_numbers = ('window_size',)

    #: A classifier has none.
    optional_names = ('levels.',)

    def __init__(
        self,
        arch: str | dict = 's25',
        with_cls: bool = False,
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
        self.with_cls = with_cls
        embed_dims = self.arch_settings['embed_dims'][0]
        if with_cls:
            self.out_indices = self.out_indices[-1:]
            index = self.out_indices[0]
            blocks = self._make_blocks(index, ClassBlock, ClassAttention, [0.0, 0.0])
            norm = self.make_norm(index)
            self.cls = ClassEmbedding(blocks, norm, embed_dims, with_cp)
            self.cls.apply(init_weights)
        else:
            # Only those that are returned: others would get no gradient.
            self.levels = nn.ModuleDict()
            for index in self.out_indices:
                norm = self.make_norm(index)
                self.levels[str(index)] = Level(norm, embed_dims, 4 * 2**index)
            self.levels.apply(init_weights)

    @classmethod
    def check_arch(cls, arch: str | dict) -> dict:
        """Return the ``arch`` dict, after a check."""
        settings = super().check_arch(arch)
        embed_dims, depths = settings['embed_dims'], settings['depths']
        local_depths = settings['local_depths']
        if len(set(embed_dims)) > 1:
            raise ValueError(f'arch embed_dims must be all the same, got {embed_dims}')
        if any(local > depth for local, depth in zip(local_depths, depths)):
            raise ValueError(
                f'arch local_depths must be at most depths, got {local_depths} and '
                f'{depths}'
            )
        return settings

    def _make_blocks(
        self, index: int, block: type, attn: type, rates: Sequence[float]
    ) -> list[Block]:
        embed_dims, num_heads, mlp_ratio = self.arch_entries(
            index, 'embed_dims', 'num_heads', 'mlp_ratios'
        )
        return [
            block(
                attn(embed_dims, num_heads, self.attn_drop_rate, self.drop_rate),
                FFN(embed_dims, int(embed_dims * mlp_ratio), self.drop_rate),
                embed_dims,
                rate,
                self.norm_cfg,
            )
            for rate in rates
        ]

    def make_stage(
        self, index: int, drop_path_rates: Sequence[float]
    ) -> SuperTokenStage:
        """Build stage ``index`` with as many blocks as there are rates."""
        embed_dims, local_depth = self.arch_entries(index, 'embed_dims', 'local_depths')
        blocks = self._make_blocks(index, GroupBlock, FullAttention, drop_path_rates)
        patch_embed = None
        if index == 0:
            patch_embed = PatchEmbed(
                self.in_channels,
                embed_dims,
                2 * STRIDE - 1,
                STRIDE,
                self.inner_norm_cfg,
            )
        return SuperTokenStage(
            blocks,
            local_depth,
            embed_dims,
            self.arch_settings['window_size'],
            patch_embed,
            self.with_cp,
        )

    def feature(self, index: int, state: State) -> Tensor:
        """What is returned of stage ``index``: (B, C, h, w), or (B, C) of a class."""
        x, supers, image = state
        if self.with_cls:
            return self.cls(supers)
        return self.levels[str(index)](x, image)
