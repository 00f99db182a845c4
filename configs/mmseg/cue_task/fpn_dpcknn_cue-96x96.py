# The cue task, see docs/evidence.md. Other configs of this folder exchange what the
# queries attend to, or the backbone.
_base_ = ['mmseg::_base_/default_runtime.py']
custom_imports = dict(
    imports=['clustr_mm', 'clustr_mm.evidence'], allow_failed_imports=False
)

max_iters = 1000

model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size_divisor=32,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='ClusTR',
        arch=dict(
            embed_dims=[32, 64, 128, 256],
            num_heads=[1, 2, 4, 8],
            mlp_ratios=[4, 4, 4, 4],
            depths=[1, 1, 2, 1],
            sr_ratios=[8, 4, 2, 1],
        ),
        clusterer=dict(type='DPCKNN', k=5),
        drop_path_rate=0.0,
    ),
    neck=dict(type='FPN', in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4),
    decode_head=dict(
        type='FPNHead',
        in_channels=[64],
        in_index=[0],
        feature_strides=[4],
        channels=64,
        dropout_ratio=0.0,
        num_classes=3,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', class_weight=[0.3, 1.0, 1.0]),
    ),
    test_cfg=dict(mode='whole'),
)

pipeline = [dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='CueTask', split='train', num_pictures=20000, pipeline=pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CueTask', split='val', num_pictures=128, pipeline=pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='ClassIoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
# One cycle, of two parts: MMEngine's OneCycleLR writes a method into checkpoints, which
# the safe loading of torch 2.6 and later refuses.
warmup = max_iters * 3 // 10
param_scheduler = [
    dict(type='LinearLR', start_factor=0.04, end=warmup, by_epoch=False),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        begin=warmup,
        end=max_iters,
        by_epoch=False,
    ),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=125)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    # Two: MMEngine removes the oldest before the new one is written.
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=125, max_keep_ckpts=2
    ),
)
randomness = dict(seed=0)
