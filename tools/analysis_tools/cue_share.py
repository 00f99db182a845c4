"""Show how much of a cluster the cue of the cue task can fill.

For each network and each size of the cue: the share that the cue has of that cluster
of the first block's tokens where its share is largest, for the finest clusters. With 1
there is a cluster of the cue alone. Networks are untrained, and equal weights make
equal tokens. Mean over pictures of the validation and over seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from common import at_least, command_line
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from clustr_mm import ClusTR
from clustr_mm.evidence import CueTask
from clustr_mm.files import read_config, shorten
from clustr_mm.models.clustr import ClusteredAttention


def cue_mask(image: np.ndarray) -> Tensor:
    """Where the cue is in a picture (H, W, 3): all in its rim, all that is white."""
    mask = torch.zeros(image.shape[:2])
    y, x = np.nonzero((image == 255).all(axis=2))
    mask[y.min() : y.max() + 1, x.min() : x.max() + 1] = 1
    return mask


def largest_share(labels: Tensor, cue: Tensor) -> Tensor:
    """Largest share (B,) of any cluster that is cue.

    Args:
        labels (Tensor): The cluster (B, N) of each token.
        cue (Tensor): What part (B, N) of each token is cue, from 0 to 1.
    """
    sums = cue.new_zeros(len(cue), int(labels.max()) + 1)
    sizes = sums.scatter_add(1, labels, torch.ones_like(cue))
    return (sums.scatter_add(1, labels, cue) / sizes.clamp(min=1)).amax(dim=1)


def measure(model: Config, data: CueTask) -> float:
    """Mean over pictures of the largest share that the cue has of a fine cluster.

    Raises:
        ValueError: If its queries do not attend to clusters.
    """
    backbone = MODELS.build(model.backbone)
    backbone.eval()
    module = backbone
    if isinstance(backbone, ClusTR):
        module = backbone.stages[0].blocks[0].attn
    if not isinstance(module, ClusteredAttention):
        raise ValueError(f'{type(module).__name__} has no clusters')
    seen = {}
    module.register_forward_pre_hook(lambda _, x: seen.update(x=x[:2]))
    images = MODELS.build(model.data_preprocessor)(pseudo_collate([*data]))['inputs']
    with torch.no_grad():
        backbone(images)
        tokens, hw = seen['x']
        labels = module.cluster(tokens, hw).labels[-1]
    masks = torch.stack([cue_mask(data.draw(index)[0]) for index in range(len(data))])
    cue = F.adaptive_avg_pool2d(masks, hw).flatten(1)
    return largest_share(labels, cue).mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; an error takes one line and exits with status 2."""
    parser = command_line('cue_share.py', __doc__)
    add = parser.add_argument
    add('configs', nargs='+', type=Path, help='of clusters, in configs/mmseg/cue_task')
    sizes = [4, 6, 10, 14, 16]
    add(
        '--cue-sizes',
        nargs='+',
        type=at_least(3),
        default=sizes,
        help='pixels (%(default)s)',
    )
    add('--pictures', type=at_least(1), default=32, help='of each size (%(default)s)')
    add('--seeds', type=at_least(1), default=3, help='of the weights (%(default)s)')
    add(
        '--cfg-options', nargs='+', action=DictAction, default={}, help='of all configs'
    )
    args = parser.parse_args(arguments)
    rows = []
    try:
        for path in args.configs:
            config = read_config(path)
            config.merge_from_dict(args.cfg_options)
            init_default_scope(config.default_scope)
            settings = dict(config.val_dataloader.dataset)
            if settings.pop('type') != 'CueTask':
                raise ValueError(f'{path} is not of the cue task')
            row = [path.stem.removeprefix('fpn_').removesuffix('_cue-96x96')]
            for size in args.cue_sizes:
                settings.update(cue_size=size, num_pictures=args.pictures)
                data = CueTask(**settings)
                shares = []
                for seed in range(args.seeds):
                    torch.manual_seed(seed)
                    shares.append(measure(config.model, data))
                row.append(f'{fmean(shares):.2f}')
            rows.append(row)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        parser.error(shorten(error))
    headers = ['network', *(f'{size} px' for size in args.cue_sizes)]
    print(tabulate(rows, headers, 'github', disable_numparse=True))


if __name__ == '__main__':
    main()
