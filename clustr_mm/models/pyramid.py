"""What pyramid backbones have in common: arguments, stages, freezing."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checkpoint import accept_checkpoints
from .layers import DropPath, PatchEmbed, build_norm, init_weights


def run_block(block: nn.Module, with_cp: bool, *args: Any) -> Any:
    """Run a block, recomputing it in the backward pass if ``with_cp``."""
    if with_cp and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


class Block(nn.Module):
    """Transformer block: attention, then a feed-forward layer.

    Args:
        attn (nn.Module): Takes tokens (B, h * w, C) and (h, w).
        ffn (nn.Module): Takes the same.
        embed_dims (int): Channels C of the tokens.
        drop_path_rate (float): Stochastic depth of both branches.
        norm_cfg (dict): Norm before each branch.
    """

    def __init__(
        self,
        attn: nn.Module,
        ffn: nn.Module,
        embed_dims: int,
        drop_path_rate: float,
        norm_cfg: dict,
    ) -> None:
        super().__init__()
        self.norm1 = build_norm(norm_cfg, embed_dims)
        self.attn = attn
        self.norm2 = build_norm(norm_cfg, embed_dims)
        self.ffn = ffn
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
            x = run_block(block, self.with_cp, x, hw)
        return self.norm(x).transpose(1, 2).unflatten(2, hw).contiguous()


class PyramidBackbone(BaseModule):
    """Base of backbones that return maps at strides 4, 8, 16 and 32.

    A subclass names its sizes in ``arch_zoo`` and the entries of such a dict in
    ``arch_keys``, of which ``embed_dims`` and ``depths`` are needed here; its
    constructor calls this one, keeps its own arguments, and ends with
    :meth:`build_stages`. It defines :meth:`make_stage`, and :meth:`feature` if
    its stages hand on more than the map.

    Args:
        arch (str | dict): A key of ``arch_zoo``, or a dict of equally long
            sequences, one entry per stage, with the keys ``arch_keys``; those in
            ``arch_numbers`` are one number instead.
        in_channels (int): Channels of the input. Defaults to 3.
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
    """

    #: Name -> arch dict.
    arch_zoo: dict[str, dict] = {}

    #: Entries of an ``arch`` dict.
    arch_keys: tuple[str, ...] = ('embed_dims', 'depths')

    #: Those of them that are one number for the whole network.
    arch_numbers: tuple[str, ...] = ()

    #: Parameter names of public code, as (pattern, replacement); ``{}`` in a
    #: replacement is the stage's number less one.
    public_names: tuple[tuple[str, str], ...] = ()

    #: What the names of parameters begin with that a checkpoint may lack.
    optional_names: tuple[str, ...] = ()

    def __init__(
        self,
        arch: str | dict,
        in_channels: int = 3,
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
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f'in_channels must be at least 1, got {in_channels!r}')
        for name, rate in [
            ('drop_rate', drop_rate),
            ('attn_drop_rate', attn_drop_rate),
            ('drop_path_rate', drop_path_rate),
        ]:
            if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise ValueError(f'{name} must be in [0, 1), got {rate!r}')
        stages = list(range(len(self.arch_settings['depths'])))
        known = isinstance(out_indices, Sequence)
        self.out_indices = tuple(out_indices) if known else ()
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
        self.drop_rate = drop_rate
        self.attn_drop_rate = attn_drop_rate
        self.drop_path_rate = drop_path_rate
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.norm_cfg = dict(norm_cfg or dict(type='LN', eps=1e-6))
        #: For norms that keep PyTorch's eps.
        self.inner_norm_cfg = {k: v for k, v in self.norm_cfg.items() if k != 'eps'}

    def make_stage(self, index: int, drop_path_rates: Sequence[float]) -> nn.Module:
        """Build stage ``index`` with as many blocks as there are rates.

        Args:
            index (int): From 0.
            drop_path_rates (Sequence[float]): Stochastic depth of its blocks.

        Returns:
            nn.Module: Maps what the stage before returns, the image for stage
            0, to what the next one takes.
        """
        raise NotImplementedError

    def feature(self, index: int, state: Any) -> Tensor:
        """Contiguous map (B, C, h, w) in what stage ``index`` returned."""
        return state

    def build_stages(self) -> None:
        """Build, initialise and freeze the stages that are needed."""
        depths = self.arch_settings['depths']
        last = max(1, sum(depths) - 1)
        self.stages = nn.ModuleList()
        for index in range(self.out_indices[-1] + 1):
            first = sum(depths[:index])
            rates = [
                self.drop_path_rate * block / last
                for block in range(first, first + depths[index])
            ]
            self.stages.append(self.make_stage(index, rates))
        self.apply(init_weights)
        accept_checkpoints(self, self.public_names, self.optional_names)
        self._freeze_stages()

    def arch_entries(self, index: int, *keys: str) -> tuple:
        """Entries ``keys`` of the ``arch`` dict for stage ``index``."""
        return tuple(self.arch_settings[key][index] for key in keys)

    def make_patch_embed(self, index: int) -> PatchEmbed:
        """Overlapping patch embedding of stage ``index``, as in PVTv2."""
        embed_dims = self.arch_settings['embed_dims']
        return PatchEmbed(
            embed_dims[index - 1] if index else self.in_channels,
            embed_dims[index],
            kernel_size=3 if index else 7,
            stride=2 if index else 4,
            norm_cfg=self.inner_norm_cfg,
        )

    def make_norm(self, index: int) -> nn.Module:
        """Norm of the tokens of stage ``index``."""
        return build_norm(self.norm_cfg, self.arch_settings['embed_dims'][index])

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
        for key in cls.arch_numbers:
            if not isinstance(arch[key], int) or arch[key] < 1:
                raise ValueError(
                    f'arch {key} must be a positive number, got {arch[key]!r}'
                )
        sequences = [key for key in cls.arch_keys if key not in cls.arch_numbers]
        for key in sequences:
            if not isinstance(arch[key], (list, tuple)):
                raise ValueError(f'arch {key} must be a sequence, got {arch[key]!r}')
        lengths = {key: len(arch[key]) for key in sequences}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(
                f'arch entries must be equally long and not empty, got {lengths}'
            )
        for key in sequences:
            kind = (int, float) if key == 'mlp_ratios' else int
            if not all(isinstance(v, kind) and v > 0 for v in arch[key]):
                what = 'positive' if kind is not int else 'positive whole numbers'
                raise ValueError(f'arch {key} must be {what}, got {arch[key]}')
        for dims, heads in zip(arch['embed_dims'], arch.get('num_heads', ())):
            if dims % heads:
                raise ValueError(
                    f'embed_dims must be divisible by num_heads, got {dims} and {heads}'
                )
        return arch

    def _freeze_stages(self) -> None:
        for stage in self.stages[: self.frozen_stages + 1]:
            stage.eval()
            stage.requires_grad_(False)

    def train(self, mode: bool = True) -> 'PyramidBackbone':
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
        # Other layouts would take other convolution kernels and round differently.
        x = x.contiguous()
        outs = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.out_indices:
                outs.append(self.feature(index, x))
        return tuple(outs)
