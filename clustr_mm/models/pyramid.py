"""What pyramid backbones have in common: arguments, stages, freezing."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checkpoint import MisfitError, check_readable, translate_names
from .layers import DropPath, PatchEmbed, build_norm, init_weights, to_map


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

    def forward(self, x: Tensor, hw: tuple[int, int], *kept: Any) -> Tensor:
        """Map tokens (B, h * w, C) to tokens of the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x), hw, *kept))
        return x + self.drop_path(self.ffn(self.norm2(x), hw))

    def keep(self, x: Tensor, *args: Any) -> tuple:
        """What neither the backward pass nor another block shall find again.

        That is the clusters of an attention that has some, as a further argument of
        :meth:`forward`: labels are small, and take long to find. None if ``args``
        has them already.
        """
        if not hasattr(self.attn, 'cluster') or len(args) > 1:
            return ()
        with torch.no_grad():
            return (self.attn.cluster(self.norm1(x), *args),)


def run_block(block: Block, with_cp: bool, *args: Any) -> Any:
    """Run a block, recomputing it in the backward pass if ``with_cp``."""
    if with_cp and torch.is_grad_enabled():
        return checkpoint(block, *args, *block.keep(*args), use_reentrant=False)
    return block(*args)


class Stage(nn.Module):
    """One level of the pyramid: patch embedding, blocks, norm of the tokens.

    With ``with_cp`` the backward pass computes the blocks anew. With ``share_clusters``
    all blocks attend to the clusters that the first one finds.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        with_cp: bool,
        share_clusters: bool = False,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.with_cp = with_cp
        self.share_clusters = share_clusters

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C, h, w), both channels last in memory."""
        x, hw = self.patch_embed(x)
        shared = self.blocks[0].keep(x, hw) if self.share_clusters else ()
        for block in self.blocks:
            x = run_block(block, self.with_cp, x, hw, *shared)
        return to_map(self.norm(x), hw)


class PyramidBackbone(BaseModule):
    """Base of backbones that return maps at strides 4, 8, 16 and 32.

    A subclass names its sizes in ``arch_zoo`` and the entries of such a dict in
    ``arch_keys``, of which ``embed_dims`` and ``depths`` are needed here. It defines
    :meth:`make_stage`, and :meth:`feature` if its stages hand on more than the map.

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
        **options (Any): What :meth:`make_stage` of the subclass takes.

    Raises:
        TypeError: If there is no such argument.
        ValueError: If an argument or an input is not as stated, or a file named in
            ``init_cfg`` cannot be read.
    """

    #: Name -> arch dict.
    arch_zoo: dict[str, dict] = {}

    #: Entries of an ``arch`` dict.
    arch_keys: tuple[str, ...] = ('embed_dims', 'depths')

    #: Those of them that are one number for the whole network.
    arch_numbers: tuple[str, ...] = ()

    #: Parameter names of public code, see :func:`.checkpoint.rename`.
    public_names: tuple[tuple[str, str], ...] = ()

    #: Beginnings of the names of parameters that a checkpoint may lack, all of them.
    optional_names: tuple[str, ...] = ()

    #: Arguments of former versions -> what to write instead.
    moved_arguments: dict[str, str] = {}

    #: Whether weights that are being loaded must be complete.
    requires_all = False

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
        **options: Any,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.check_options(options)
        self.arch_settings = self.check_arch(arch)
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f'in_channels must be at least 1, got {in_channels!r}')
        rates = dict(
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        for name, rate in rates.items():
            if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise ValueError(f'{name} must be in [0, 1), got {rate!r}')
        depths = self.arch_settings['depths']
        stages = list(range(len(depths)))
        wanted = out_indices if isinstance(out_indices, (list, tuple)) else []
        self.out_indices = tuple(index for index in stages if index in wanted)
        if not wanted or tuple(wanted) != self.out_indices:
            raise ValueError(
                f'out_indices must be rising stages of {stages}, got {out_indices!r}'
            )
        if frozen_stages not in [-1, *stages]:
            raise ValueError(
                f'frozen_stages must be one of {[-1, *stages]}, got {frozen_stages!r}'
            )
        self.in_channels = in_channels
        self.drop_rate = drop_rate
        self.attn_drop_rate = attn_drop_rate
        self.drop_path_rate = drop_path_rate
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.norm_cfg = norm_cfg or dict(type='LN', eps=1e-6)
        if not isinstance(self.norm_cfg, dict):
            raise ValueError(
                f"norm_cfg must be a dict like dict(type='LN'), got {norm_cfg!r}"
            )
        #: For norms that keep PyTorch's eps.
        self.inner_norm_cfg = {k: v for k, v in self.norm_cfg.items() if k != 'eps'}

        last_block = max(1, sum(depths) - 1)
        rates = [drop_path_rate * block / last_block for block in range(sum(depths))]
        self.stages = nn.ModuleList()
        for index in stages[: self.out_indices[-1] + 1]:
            own, rates = rates[: depths[index]], rates[depths[index] :]
            self.stages.append(self.make_stage(index, own, **options))
        self.apply(init_weights)
        self._freeze_stages()
        # The public method of this name came with torch 2.5.
        self._register_load_state_dict_pre_hook(translate_names, with_module=True)

    def make_stage(
        self, index: int, drop_path_rates: Sequence[float], **options: Any
    ) -> nn.Module:
        """Build stage ``index``, from 0, with as many blocks as there are rates.

        It maps what the stage before returns, the image for stage 0, to what the next
        one takes. A subclass names the options that it takes.
        """
        raise NotImplementedError

    def feature(self, index: int, state: Any) -> Tensor:
        """Map (B, C, h, w) in what stage ``index`` returned."""
        return state

    def init_weights(self) -> None:
        """Initialise by ``init_cfg``; weights of a file must be complete."""
        try:
            with self.complete_weights():
                super().init_weights()
        except MisfitError:
            raise
        except Exception:
            # torch does not name a broken file, and advises to read it unsafely.
            check_readable(self.init_cfg)
            raise

    @contextmanager
    def complete_weights(self) -> Iterator[None]:
        """Within this context it is an error to load incomplete weights."""
        self.requires_all = True
        try:
            yield
        finally:
            self.requires_all = False

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter and number of depths, for layer-wise learning rates.

        The depth is 0 before the first block, one more with each block, and highest
        after all of them; what stands between two blocks belongs to the one before.
        ``prefix`` is what the names of the backbone begin with in the model.
        """
        depths = self.arch_settings['depths'][: len(self.stages)]
        number = sum(depths) + 2
        if not param_name.startswith(f'{prefix}stages.'):
            return number - 1, number
        stage, part, *rest = param_name[len(f'{prefix}stages.') :].split('.')
        depth = sum(depths[: int(stage)])
        if part == 'blocks':
            depth += int(rest[0]) + 1
        elif part in ('norm', 'semantic_norm'):
            depth += depths[int(stage)]
        return depth, number

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

    def check_options(self, options: dict) -> None:
        """Refuse arguments that :meth:`make_stage` does not take."""
        unknown = options.keys() - inspect.getfullargspec(self.make_stage).args
        if not unknown:
            return
        message = f'{type(self).__name__}: unexpected keyword argument '
        message += ', '.join(map(repr, sorted(unknown)))
        for name in sorted(unknown & self.moved_arguments.keys()):
            message += f'; {name!r} is {self.moved_arguments[name]} now'
        known = inspect.getfullargspec(type(self).__init__).args[1:]
        raise TypeError(
            f'{message}; its arguments are {", ".join(known)}. Keys of another '
            'backbone that a config inherits are dropped by _delete_=True beside type'
        )

    @classmethod
    def check_arch(cls, arch: str | dict) -> dict:
        """Return the ``arch`` dict, after a check."""
        if isinstance(arch, str) and arch in cls.arch_zoo:
            return cls.arch_zoo[arch]
        if not isinstance(arch, dict) or set(arch) != set(cls.arch_keys):
            raise ValueError(
                f'arch must be one of {list(cls.arch_zoo)} or a dict with the keys '
                f'{list(cls.arch_keys)}, got {arch!r}'
            )
        for key in cls.arch_numbers:
            if not isinstance(arch[key], int) or arch[key] < 1:
                raise ValueError(
                    f'arch {key} must be a positive number, got {arch[key]!r}'
                )
        sequences = [key for key in cls.arch_keys if key not in cls.arch_numbers]
        for key in sequences:
            kind = (int, float) if key == 'mlp_ratios' else int
            given = arch[key]
            values = given if isinstance(given, (list, tuple)) else [None]
            if not all(isinstance(value, kind) and value > 0 for value in values):
                what = 'whole numbers' if kind is int else 'numbers'
                raise ValueError(
                    f'arch {key} must be a list of positive {what}, got {given!r}'
                )
        lengths = {key: len(arch[key]) for key in sequences}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(
                f'arch entries must be equally long and not empty, got {lengths}'
            )
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
            x (Tensor): (B, in_channels, H, W), B, H, W at least 1, of floating point:
                images that a data preprocessor has normalised.

        Returns:
            tuple[Tensor]: For each of ``out_indices`` a contiguous map
            (B, embed_dims[i], h, w) with ``h = ceil(H / stride)``, strides
            4, 8, 16, 32.
        """
        if not x.is_floating_point():
            raise ValueError(
                'input must be float images, as the data preprocessor normalises them, '
                f'got {x.dtype}'
            )
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape:
            raise ValueError(
                f'input must have shape (B, {self.in_channels}, H, W) with no '
                f'empty axis, got {tuple(x.shape)}'
            )
        # Channels last in memory, whatever the caller's layout: convolutions then write
        # tokens, and take the same kernels for every layout.
        x = x.clone(memory_format=torch.channels_last)
        outs = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.out_indices:
                outs.append(self.feature(index, x).contiguous())
        return tuple(outs)
