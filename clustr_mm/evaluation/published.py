"""Published figures: the paper's and those of other backbones, none measured here.

The source at hand is a summary of the paper. It has one figure for each downstream
task and does not say which variant it belongs to.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

#: What a row is told where the source leaves open what the figure belongs to.
VARIANT_UNKNOWN = 'the source does not say which variant the paper figure belongs to'

#: And what a row is told whose config the figure cannot belong to: of another backbone,
#: or of ClusTR with another clustering than the paper's (``-linear``).
NOT_THIS_CONFIG = 'the paper figure is not of this config'


@dataclass(frozen=True)
class Metric:
    """A figure of a task, in percent.

    Attributes:
        key (str): Its name in the file that the runner writes.
        name (str): Its name in tables.
        factor (float): Makes percent of what the runner writes. Defaults to 1.
        paper (float, optional): The figure of ClusTR's paper.
        paper_configs (str): Pattern of the configs that it may be held against.
            Defaults to all.
    """

    key: str
    name: str
    factor: float = 1.0
    paper: float | None = None
    paper_configs: str = '*'


@dataclass(frozen=True)
class Peer:
    """Published figures of another backbone.

    Attributes:
        name (str): The backbone.
        figures (tuple[float]): In the order of the task's metrics, in percent.
        note (str): Parameters, operations. Defaults to none.
    """

    name: str
    figures: tuple[float, ...]
    note: str = ''


@dataclass(frozen=True)
class Task:
    """A benchmark: which configs belong to it, what it measures, what is known.

    Attributes:
        title (str): Its name in tables.
        configs (str): Pattern of ``toolbox/name``.
        metrics (tuple[Metric]): What is measured.
        remark (str): On the paper's figures. Defaults to none.
        peers (tuple[Peer]): Published figures of other backbones.
        peers_note (str): What these have in common. Defaults to nothing.
    """

    title: str
    configs: str
    metrics: tuple[Metric, ...]
    remark: str = ''
    peers: tuple[Peer, ...] = ()
    peers_note: str = ''


TASKS = (
    Task(
        'ImageNet-1K',
        'mmpretrain/*_8xb128_in1k*',
        (
            Metric(
                *('accuracy/top1', 'top-1'),
                paper=83.2,
                paper_configs='mmpretrain/clustr-s_*',
            ),
        ),
        'the source has a paper figure for small only',
        (
            Peer('Swin-T', (81.3,), '29M parameters, 4.5 GFLOPs'),
            Peer('PVTv2-B1', (78.7,), '14M, 2.1 GFLOPs'),
            Peer('PVTv2-B2', (82.0,), '25M, 4.0 GFLOPs'),
            Peer('PVTv2-B3', (83.1,), '45M, 6.9 GFLOPs'),
            Peer('Dual-ViT-S', (84.1,), 'with token labelling'),
            Peer('Dual-ViT-B', (85.2,), 'with token labelling'),
            Peer('Dual-ViT-L', (85.7,), 'with token labelling'),
            Peer('LinGlo-b0', (72.5,), '3.4M'),
            Peer('LinGlo-b1', (79.7,), '13.1M'),
            Peer('LinGlo-b2', (82.7,), '25.4M'),
            Peer('STT-S25', (83.5,), '49M'),
        ),
    ),
    Task(
        'Mask R-CNN 1x, COCO',
        'mmdet/mask-rcnn_*_fpn_1x_coco*',
        (
            Metric('coco/bbox_mAP', 'box AP', 100),
            Metric('coco/segm_mAP', 'mask AP', 100),
        ),
        'the source has no paper figure',
        (
            Peer('PVTv2-B1', (41.8, 38.8)),
            Peer('PVTv2-B2', (45.3, 41.2), '45M parameters, 309 GFLOPs'),
            Peer('PVTv2-B3', (47.0, 42.5)),
            Peer('Swin-T', (42.7, 39.3), '48M, 267 GFLOPs, one scale'),
            Peer('Swin-S', (44.8, 40.9)),
            Peer('Twins-SVT-S', (43.4, 40.3)),
            Peer('ConvNeXt-T', (44.2, 40.1)),
            Peer('Dual-ViT-S', (46.5, 42.2)),
            Peer('Dual-ViT-B', (48.4, 43.4)),
        ),
        '12 epochs.',
    ),
    Task(
        'RetinaNet 1x, COCO',
        'mmdet/retinanet_*_fpn_1x_coco*',
        (Metric('coco/bbox_mAP', 'box AP', 100),),
        'the source has no paper figure',
        (
            Peer('LinGlo-b0', (38.0,)),
            Peer('LinGlo-b1', (41.5,)),
            Peer('LinGlo-b2', (44.7,)),
        ),
        '12 epochs.',
    ),
    Task(
        'Semantic FPN, ADE20K',
        'mmseg/fpn_*_ade20k-512x512*',
        (Metric('mIoU', 'mIoU', paper=48.0, paper_configs='mmseg/fpn_clustr-?_*'),),
        VARIANT_UNKNOWN,
        (
            Peer('PVTv2-B1', (42.5,), '18M parameters, 34 GFLOPs at 512 x 512'),
            Peer('PVTv2-B2', (45.2,), '29M, 46 GFLOPs'),
            Peer('PVTv2-B3', (47.3,), '49M, 62 GFLOPs'),
            Peer('Swin-T', (41.5,)),
            Peer('Swin-S', (45.2,)),
            Peer('Twins-SVT-S', (43.2,)),
            Peer('LinGlo-b0', (37.3,)),
            Peer('LinGlo-b1', (42.5,)),
            Peer('LinGlo-b2', (45.2,)),
        ),
    ),
    Task(
        'UPerNet, ADE20K',
        'mmseg/upernet_*_ade20k-512x512*',
        (Metric('mIoU', 'mIoU', paper=49.6, paper_configs='mmseg/upernet_clustr-?_*'),),
        VARIANT_UNKNOWN,
        (
            Peer('Swin-T', (44.5,), '60M parameters, 945 GFLOPs at 512 x 2048'),
            Peer('Swin-S', (47.6,)),
            Peer('ConvNeXt-T', (46.0,)),
            Peer('ConvNeXt-S', (48.7,)),
            Peer('Twins-SVT-S', (46.2,)),
            Peer('Dual-ViT-S', (49.2,)),
            Peer('Dual-ViT-B', (51.7,)),
        ),
        'One scale.',
    ),
    Task(
        'Whole-body pose, COCO-WholeBody V1.0',
        'mmpose/td-hm_*_coco-wholebody-*',
        (
            Metric('coco-wholebody/AP', 'whole AP', 100, 59.4, 'mmpose/*_clustr-?_*'),
            Metric('coco-wholebody/AR', 'whole AR', 100, 69.7, 'mmpose/*_clustr-?_*'),
        ),
        'the source does not say which variant, head and input size the paper '
        'figure belongs to',
        (
            Peer('SimpleBaseline-R50', (52.0, 63.3)),
            Peer('HRNet-w32', (55.3, 62.6)),
            Peer('HRNet-w48', (57.9, 68.1)),
            Peer('TCFormer', (57.6, 68.1)),
        ),
        'Input of 256 x 192.',
    ),
)


def find_task(config: str) -> Task:
    """Find the benchmark that a config belongs to.

    Args:
        config (str): ``toolbox/name``.

    Returns:
        Task: One of ``TASKS``; for any other config one that knows all metrics
        and no published figure.
    """
    for task in TASKS:
        if fnmatchcase(config, task.configs):
            return task
    metrics = {m.key: replace(m, paper=None) for task in TASKS for m in task.metrics}
    return Task('other', config, tuple(metrics.values()), 'not a published benchmark')
