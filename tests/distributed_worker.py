"""Trains a small segmentation model in one of two processes.

Run by test_distributed.py, which trains the same model in one process with the
functions of this file:

    python distributed_worker.py RANK FOLDER
"""

import copy
import functools
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from test_models.variants import ARCHS
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

RANKS = 2
IMAGES_PER_RANK = 2
STEPS = 2
#: Of the image; odd.
SIZE = (75, 61)
CLASSES = 5
CHANNELS = 32
#: Seconds after which a process stops waiting for the other.
PATIENCE = 60

CONFIG = (
    Path(__file__).parents[1] / 'configs/mmseg/fpn_clustr-t_4xb4-80k_ade20k-512x512.py'
)
ARCH = {**ARCHS['ClusTR'], 'depths': [1, 1, 1, 1]}

#: Arguments of the backbone.
CASES = {
    'plain': dict(),
    'frozen': dict(frozen_stages=1),
    'checkpointed': dict(with_cp=True),
    'two_stages': dict(out_indices=(0, 1)),
}


@functools.cache
def load_config() -> Config:
    """Load our config, which takes a second."""
    return Config.fromfile(CONFIG)


def make_model(out_indices: Sequence[int] = (0, 1, 2, 3), **backbone: Any) -> nn.Module:
    """Build the model of our config, smaller and without chance."""
    model = copy.deepcopy(load_config().model)
    model.backbone.update(
        arch=ARCH, drop_path_rate=0.0, out_indices=out_indices, **backbone
    )
    model.neck.update(
        in_channels=[ARCH['embed_dims'][i] for i in out_indices],
        out_channels=CHANNELS,
        num_outs=len(out_indices),
    )
    model.decode_head.update(
        in_channels=[CHANNELS] * len(out_indices),
        in_index=list(range(len(out_indices))),
        feature_strides=[4 * 2**i for i in out_indices],
        channels=CHANNELS,
        num_classes=CLASSES,
        dropout_ratio=0.0,
        # A norm of each image by itself: a batch norm depends on who is in the batch.
        norm_cfg=dict(type='GN', num_groups=4),
    )
    init_default_scope('mmseg')
    torch.manual_seed(0)
    # In float32 rounding, which differs with the batch size, could decide which
    # cluster a token joins.
    return MODELS.build(model).train().double()


def make_batch(step: int, ranks: Sequence[int]) -> dict[str, Any]:
    """Make the images and labels that some ranks see in one step."""
    from mmseg.structures import SegDataSample

    inputs, samples = [], []
    for rank in ranks:
        generator = torch.Generator().manual_seed(10 * step + rank)
        for _ in range(IMAGES_PER_RANK):
            image = torch.randn(3, *SIZE, generator=generator, dtype=torch.float64)
            labels = torch.randint(CLASSES, (1, *SIZE), generator=generator)
            sample = SegDataSample(metainfo=dict(img_shape=SIZE))
            sample.gt_sem_seg = PixelData(data=labels)
            inputs.append(image)
            samples.append(sample)
    return dict(inputs=torch.stack(inputs), data_samples=samples, mode='loss')


def train(forward: nn.Module, model: nn.Module, ranks: Sequence[int]) -> dict[str, Any]:
    """Train for a few steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    losses: list[Tensor] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, _ = model.parse_losses(forward(**make_batch(step, ranks)))
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    parameters = dict(model.named_parameters())
    return dict(
        losses=losses,
        parameters={name: p.detach().clone() for name, p in parameters.items()},
        with_gradient={name for name, p in parameters.items() if p.grad is not None},
    )


def train_distributed(model: nn.Module, rank: int) -> dict[str, Any]:
    """Train on the images of one rank, with gradients averaged over all."""
    names = {p: name for name, p in model.named_parameters()}
    exchanged = set()

    def hook(
        group: dist.ProcessGroup, bucket: dist.GradBucket
    ) -> torch.futures.Future[Tensor]:
        exchanged.update(names[p] for p in bucket.parameters())
        return allreduce_hook(group, bucket)

    # As the runner wraps a model.
    wrapped = MMDistributedDataParallel(model, find_unused_parameters=False)
    wrapped.register_comm_hook(dist.group.WORLD, hook)
    return dict(train(wrapped, model, [rank]), exchanged=exchanged)


def main(rank: int, folder: Path) -> None:
    """Train all cases and save what came of them."""
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/meeting',
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=PATIENCE),
    )
    results = {
        name: train_distributed(make_model(**backbone), rank)
        for name, backbone in CASES.items()
    }

    # The check itself: a parameter without use must not go unnoticed.
    model = make_model()
    model.backbone.unused = nn.Parameter(torch.zeros(1))
    try:
        train_distributed(model, rank)
        results['unused'] = 'no error'
    except RuntimeError as error:
        results['unused'] = str(error)
    torch.save(results, folder / f'rank{rank}.pth')
    dist.barrier()
    # The exchange that the check left unfinished holds up an orderly end of torch 2.1.
    os._exit(0)


if __name__ == '__main__':
    main(int(sys.argv[1]), Path(sys.argv[2]))
