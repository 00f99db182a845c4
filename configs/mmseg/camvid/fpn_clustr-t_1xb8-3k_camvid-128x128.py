# CamVid at 240 x 180, from scratch; tools/dataset_converters/camvid.py makes the data.
# Neck and head have 64 channels: with 256 they take more time than the backbone.
# The learning rate was chosen for each network on a held-out part of train, see
# docs/evidence.md. The IoU of each class is from clustr_mm.evidence, which needs
# scikit-image (`clustr_mm[tools]`).
_base_ = ['mmseg::_base_/models/fpn_r50.py', 'mmseg::_base_/default_runtime.py']
custom_imports = dict(imports=['clustr_mm', 'clustr_mm.evidence'])

crop_size = (128, 128)
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    backbone=dict(_delete_=True, type='ClusTR', arch='tiny', drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=64),
    decode_head=dict(
        in_channels=[64] * 4, channels=64, num_classes=11, norm_cfg=dict(type='BN')
    ),
)

names = 'sky building pole road pavement tree sign fence car pedestrian bicyclist'
palette = [
    *([128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128]),
    *([60, 40, 222], [128, 128, 0], [192, 128, 128], [64, 64, 128]),
    *([64, 0, 128], [64, 64, 0], [0, 128, 192]),
]
dataset = dict(
    type='BaseSegDataset',
    metainfo=dict(classes=names.split(), palette=palette),
    data_root='data/camvid',
    img_suffix='.png',
    seg_map_suffix='.png',
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackSegInputs'),
        ],
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/test', seg_map_path='annotations/test'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='ResizeToMultiple', size_divisor=32),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    ),
)
val_dataloader = test_dataloader
test_evaluator = dict(type='ClassIoUMetric', iou_metrics=['mIoU'])
val_evaluator = test_evaluator

max_iters = 3000
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=6e-4, weight_decay=0.01)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=300),
    dict(type='PolyLR', eta_min=0, by_epoch=False, begin=300, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=1000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    # Two: MMEngine removes the oldest before the new one is written.
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=500, max_keep_ckpts=2
    ),
)
