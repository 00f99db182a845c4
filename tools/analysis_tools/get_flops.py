"""Count parameters and multiply-adds of backbones and of whole models.

Stock counters see neither the products of attention nor the distances of the
clustering; here they have columns of their own. "Layers" are linear layers and
convolutions. Weights are random, and nothing is downloaded.

Examples:
    get_flops.py tiny small base --shape 224 224
    get_flops.py clustr-s clustr-s-w224 pvtv2-b2 --shape 800 1344
    get_flops.py configs/mmdet/retinanet_clustr-s_fpn_1x_coco.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from backbones import find_backbone, presets, without_weights
from common import command_line, import_extra
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from clustr_mm.files import read_config, shorten, write_whole
from clustr_mm.models import ClusTR
from clustr_mm.models.clustr import ClusteredAttention
from clustr_mm.ops import DPCKNN, Clusters, KMeans, grid_cells

#: Operators whose two factors are both activations: products of attention. All
#: others that the counter knows have weights in them.
PRODUCTS = ('bmm', 'baddbmm', 'scaled_dot_product', 'efficient_attention')

TITLES = (
    *('model', 'input', 'parameters, M', 'layers, G', 'attention products, G'),
    *('clustering distances, G', 'sum, G', 'as published, G'),
)
AS_PUBLISHED = (
    'As published: what the figures of the paper count, layers and the products of the '
    'coarse scale.'
)


def _count_attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)


#: Attention on a CPU, which PyTorch's counter does not know; there since torch 2.2.
_NAME = '_scaled_dot_product_flash_attention_for_cpu'
CPU_ATTENTION = {}
if hasattr(torch.ops.aten, _NAME):
    CPU_ATTENTION[getattr(torch.ops.aten, _NAME)] = _count_attention


@dataclass
class Flops:
    """Multiply-adds, each counted once, of one forward pass on one image.

    Norms, activations, interpolation and the like are left out, as everybody does.

    Attributes:
        name (str): Preset, or name of the config.
        height, width (int): Of the image, in pixels.
        parameters (int): Of the model.
        layers (int): Linear layers and convolutions.
        attention (int): Queries times keys, and weights times values.
        clustering (int): Squared distances that the clustering looks at: of all
            pairs of tokens for DPC-kNN, N * N * C as the definition has it; of
            tokens and means for k-means, N * M * C in every step.
        published (int, optional): What the paper's figures count: the layers and the
            products of the coarse scale. (Inferred: they are met within 0.5 %, and
            PVT's script, which knows one scale, counts so.) None for other models and
            other clusterings.
    """

    name: str
    height: int
    width: int
    parameters: int
    layers: int
    attention: int
    clustering: int
    published: int | None = None

    @property
    def total(self) -> int:
        """Sum of all three."""
        return self.layers + self.attention + self.clustering


def count_flops(
    model: nn.Module, height: int, width: int, name: str = 'model'
) -> Flops:
    """Count the multiply-adds of a backbone or of a whole model, in a copy of it.

    Clusters are not computed for it, because their number does not depend on the
    result. What does not depend on numbers is counted on the meta device, in no time.
    In two-stage detectors the counts depend on the number of proposals, which for
    random weights is near its limit.

    Raises:
        ValueError: If a side of the image is below 1.
    """
    if height < 1 or width < 1:
        raise ValueError(f'the image must be at least 1 x 1, got {height} x {width}')
    parameters = sum(p.numel() for p in model.parameters())
    channels = getattr(getattr(model, 'backbone', model), 'in_channels', 3)
    device = 'cpu' if needs_numbers(model) else 'meta'
    image = torch.zeros(1, channels, height, width, device=device)
    model = deepcopy(model).to(device)
    model.eval()  # which returns None in some toolboxes
    clustering: list[int] = []
    attentions = [m for m in model.modules() if isinstance(m, ClusteredAttention)]
    for attention in attentions:
        spare_search(attention.clusterer, clustering)
    # With gradients, lest nn.MultiheadAttention takes a fused way that the counter
    # does not know.
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter, torch.enable_grad():
        forward(model, image)
    layers = products = 0
    for operator, count in counter.get_flop_counts().get('Global', {}).items():
        if any(product in str(operator) for product in PRODUCTS):
            products += count // 2
        else:
            layers += count // 2
    flops = Flops(name, height, width, parameters, layers, products, sum(clustering))
    if isinstance(model, ClusTR) and all(map(_is_papers, attentions)):
        flops.published = layers + _coarse_products(model, height, width)
    return flops


def _is_papers(attention: ClusteredAttention) -> bool:
    """Whether it clusters as the paper does: whole maps, without a limit."""
    clusterer = attention.clusterer
    whole = isinstance(clusterer, DPCKNN) and clusterer.window is None
    return whole and attention.max_clusters is None


def _coarse_products(backbone: ClusTR, height: int, width: int) -> int:
    """Multiply-adds of attention to N / sr^2 clusters of the whole map."""
    arch = backbone.arch_settings
    total = 0
    for i in range(len(backbone.stages)):
        stride = 4 * 2**i
        tokens = -(-height // stride) * -(-width // stride)
        clusters = max(1, tokens // arch['sr_ratios'][i] ** 2)
        total += arch['depths'][i] * 2 * tokens * clusters * arch['embed_dims'][i]
    return total


def needs_numbers(model: nn.Module) -> bool:
    """Whether the course of the forward pass depends on values, as in detectors."""
    return any(hasattr(model, name) for name in ('bbox_head', 'rpn_head', 'roi_head'))


def forward(model: nn.Module, image: Tensor) -> None:
    """Run a backbone, or a model of any toolbox without data samples of its own."""
    if not hasattr(model, 'extract_feat'):
        model(image)
        return
    samples = None
    if needs_numbers(model):
        from mmdet.structures import DetDataSample

        size = tuple(image.shape[2:])
        names = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
        metainfo = dict.fromkeys(names, size) | dict(scale_factor=(1.0, 1.0))
        samples = [DetDataSample(metainfo=metainfo)]
    model(image, samples, mode='tensor')


def spare_search(clusterer: nn.Module, found: list[int]) -> None:
    """Have a clusterer note its distances in ``found`` instead of computing them.

    One of a user's own runs as it is, and nothing is noted.
    """

    def find(tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        batch, length, channels = tokens.shape
        found.append(batch * length * length * channels)
        index = torch.arange(length, device=tokens.device).expand(batch, -1)
        return tuple(index % count for count in counts)

    def cells(tokens: Tensor, hw: tuple[int, int], counts: Sequence[int]) -> Clusters:
        clusters = Clusters(*grid_cells(tokens, hw, counts))
        sizes = [tokens.shape[1], *reversed(clusters.counts)]
        pairs = sum(n * m for n, m in zip(sizes, sizes[1:]) if m < n)
        found.append(len(tokens) * clusterer.steps * pairs * tokens.shape[2])
        return clusters

    if isinstance(clusterer, DPCKNN):
        clusterer.find = find
    elif isinstance(clusterer, KMeans):
        clusterer.forward = cells


def load_model(name: str, whole: bool = True) -> tuple[str, nn.Module]:
    """Build what the command line names, with random weights.

    Args:
        name (str): A preset of :func:`backbones.presets`, an ``arch`` of ClusTR
            ('tiny', 's', 'b2', ...), or the path of a config.
        whole (bool): Whether a config gives the whole model or its backbone.
            Defaults to True.

    Returns:
        tuple[str, nn.Module]: Its name in tables, and the model.

    Raises:
        ValueError: If there is no such preset, or the config cannot be read, has no
            model, or its model cannot be built.
    """
    if name in ClusTR.arch_zoo:
        return name, ClusTR(name)
    if whole and Path(name).is_file():
        label, build = Path(name).stem, model_of(name)
    else:
        backbone = find_backbone(name)
        label, build = backbone.name, backbone.build
    try:
        return label, build()
    # What a config of somebody's raises may be anything.
    except Exception as error:
        raise ValueError(f'cannot build {name}: {shorten(error)}') from error


def model_of(path: str) -> Callable[[], nn.Module]:
    """What builds the model of a config, without weights."""
    config = read_config(Path(path))
    model = config.get('model')
    if not isinstance(model, dict) or 'type' not in model:
        raise ValueError(f'{path} has no model')

    def build() -> nn.Module:
        if config.get('default_scope'):
            init_default_scope(config.default_scope)
        return MODELS.build(ConfigDict(without_weights(model.to_dict())))

    return build


def to_markdown(rows: Sequence[Flops]) -> str:
    """One table of all counts, in millions of parameters and 1e9 multiply-adds."""
    tabulate = import_extra('tabulate').tabulate
    lines = []
    for row in rows:
        counts = (row.layers, row.attention, row.clustering, row.total, row.published)
        billions = (None if count is None else count / 1e9 for count in counts)
        size = f'{row.height}x{row.width}'
        lines.append([row.name, size, row.parameters / 1e6, *billions])
    table = tabulate(lines, TITLES, 'pipe', floatfmt='.2f', missingval='')
    note = f'\n{AS_PUBLISHED}\n' if any(row.published for row in rows) else ''
    return f'{table}\n{note}'


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    parser = command_line('get_flops.py', __doc__)
    names = f'tiny, small, base, a preset ({", ".join(presets())}), or a config file'
    shape = 'height and width of the image, or one number for both (224)'
    whole = 'count only the backbone of a config, not the whole model'
    add = parser.add_argument
    add('models', nargs='+', metavar='CONFIG|ARCH', help=names)
    add('--shape', type=int, nargs='+', default=[224], metavar='PIXELS', help=shape)
    add('--backbone', action='store_true', help=whole)
    add('--out', type=Path, help='write the counts here, as JSON')
    args = parser.parse_args(argv)
    if len(args.shape) > 2:
        parser.error(f'--shape takes one or two numbers, got {args.shape}')
    if args.out and not args.out.parent.is_dir():
        parser.error(f'there is no folder {args.out.parent}')
    rows = []
    for given in args.models:
        try:
            name, model = load_model(given, whole=not args.backbone)
            rows.append(count_flops(model, args.shape[0], args.shape[-1], name))
        except ValueError as error:
            parser.error(str(error))
    print(to_markdown(rows), end='')
    if args.out:
        text = json.dumps([asdict(row) for row in rows], indent=2) + '\n'
        write_whole(args.out, text.encode())


if __name__ == '__main__':
    main()
