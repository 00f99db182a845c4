"""The backbones to compare: presets, and whatever a config file describes."""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.registry import MODELS
from mmengine.utils import import_modules_from_strings
from textbook import TextbookDPCKNN
from torch import nn

from clustr_mm.files import read_config
from clustr_mm.models import PyramidBackbone

#: Stock peers of about the size of ClusTR-small, by their toolbox.
PEERS = {
    'pvtv2-b2': (
        'mmdet',
        dict(type='PyramidVisionTransformerV2', embed_dims=64, num_layers=[3, 4, 6, 3]),
    ),
    'swin-t': (
        'mmdet',
        dict(
            type='SwinTransformer',
            embed_dims=96,
            depths=[2, 2, 6, 2],
            num_heads=[3, 6, 12, 24],
            window_size=7,
            drop_path_rate=0.2,
        ),
    ),
    # All norms and stages train, as in the other backbones.
    'resnet-50': ('mmdet', dict(type='ResNet', depth=50, norm_eval=False)),
    'convnext-t': (
        'mmpretrain',
        dict(
            type='ConvNeXt',
            arch='tiny',
            drop_path_rate=0.1,
            gap_before_final_norm=False,
            out_indices=(0, 1, 2, 3),
        ),
    ),
}

#: Other clusterings of ClusTR, by the suffix that asks for them.
WAYS = {
    '-textbook': dict(clusterer=dict(type=TextbookDPCKNN)),
    '-linear': dict(clusterer=dict(type='KMeans'), max_clusters=49),
    '-grid': dict(clusterer=dict(type='GridCells')),
}

#: Our own backbones: <type>-<arch>, and what only some of them know.
OURS = re.compile(
    r'(?P<type>[a-z]+)-(?P<arch>[a-z0-9]+)'
    r'(?:(-w(?P<window>[1-9]\d*))?(?P<textbook>-textbook)?|(?P<way>-linear|-grid))'
)


def our_types() -> dict[str, type[PyramidBackbone]]:
    """The backbones of this package, by their names in lower case."""
    return {cls.__name__.lower(): cls for cls in PyramidBackbone.__subclasses__()}


def presets() -> tuple[str, ...]:
    """What can be asked for by name, for messages; 224 stands for any number."""
    ours = []
    for name, cls in our_types().items():
        # Of several names of one size, the shortest.
        sizes = {id(size): arch for arch, size in cls.arch_zoo.items()}
        for arch, size in cls.arch_zoo.items():
            if len(arch) < len(sizes[id(size)]):
                sizes[id(size)] = arch
        ours += [f'{name}-{arch}' for arch in sizes.values()]
    ways = [f'clustr-s{way}' for way in ('-w224', *WAYS)]
    return (*ours, *ways, *PEERS)


@dataclass(frozen=True)
class Backbone:
    """How to build a backbone, in a form that another process can be sent.

    Attributes:
        name (str): What tables call it.
        cfg (dict): Config of the module.
        scope (str, optional): Toolbox whose registry knows it.
        imports (tuple[str]): Modules that register it.
    """

    name: str
    cfg: dict
    scope: str | None = None
    imports: tuple[str, ...] = ()

    def load(self) -> None:
        """Import what building needs."""
        import_modules_from_strings(list(self.imports))
        if self.scope not in (None, 'mmengine'):
            importlib.import_module(f'{self.scope}.models')

    def build(self) -> nn.Module:
        """Build the backbone with random weights; nothing is downloaded."""
        self.load()
        cfg = without_weights(self.cfg)
        if self.scope is not None:
            cfg.setdefault('_scope_', self.scope)
        return MODELS.build(cfg)


def find_backbone(name: str) -> Backbone:
    """Look up a preset, or read a config file of any OpenMMLab toolbox.

    Args:
        name (str): One of :func:`presets`, where ClusTR takes the suffixes
            ``-w<pixels>`` (clustering in windows), ``-textbook``, ``-linear``
            (k-means, 49 coarse clusters at most) and ``-grid``; or the path of a
            config whose ``model``, or the ``backbone`` in it, is
            a registered backbone.

    Returns:
        Backbone: How to build it.

    Raises:
        ValueError: If there is no such preset or no backbone in the file.
    """
    if name in PEERS:
        scope, cfg = PEERS[name]
        return Backbone(name, cfg, scope)
    preset = OURS.fullmatch(name)
    cls = preset and our_types().get(preset['type'])
    if cls and preset['arch'] in cls.arch_zoo:
        cfg = dict(type=cls.__name__, arch=preset['arch'])
        cfg.update(WAYS.get(preset['way'] or preset['textbook'], {}))
        if preset['window']:
            clusterer = cfg.get('clusterer', dict(type='DPCKNN'))
            cfg['clusterer'] = dict(clusterer, window=int(preset['window']))
        return Backbone(name, cfg)
    if Path(name).is_file():
        return _of_config(Path(name))
    raise ValueError(
        f'unknown backbone {name!r}: neither a config file nor one of '
        f'{", ".join(presets())}'
    )


def _of_config(path: Path) -> Backbone:
    config = read_config(path)
    model = config.get('model')
    cfg = model.get('backbone', model) if isinstance(model, dict) else {}
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise ValueError(f'{path} has no model.backbone, nor is its model a backbone')
    custom_imports = config.get('custom_imports') or {}
    imports = custom_imports.get('imports') or ()
    return Backbone(
        path.stem,
        cfg.to_dict(),
        config.get('default_scope'),
        imports=(imports,) if isinstance(imports, str) else tuple(imports),
    )


def without_weights(cfg: Any) -> Any:
    """A copy of a config in which nothing asks for pretrained weights."""
    if isinstance(cfg, dict):
        return {
            key: without_weights(value)
            for key, value in cfg.items()
            if key not in ('init_cfg', 'pretrained')
        }
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(without_weights(value) for value in cfg)
    return cfg
