# BCCD (blood cells under a microscope) at half its size, from scratch. data/bccd is the
# folder BCCD of github.com/Shenggan/BCCD_Dataset. Neck and head are small: one core.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['clustr_mm'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='ClusTR',
        arch='tiny',
        clusterer=dict(type='KMeans'),
        max_clusters=49,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=64),
    bbox_head=dict(num_classes=3, in_channels=64, feat_channels=64, stacked_convs=2),
)

scale = (320, 240)
resize = dict(type='Resize', scale=scale)
load = dict(type='LoadImageFromFile')
load_boxes = dict(type='LoadAnnotations', with_bbox=True)
dataset = dict(
    type='XMLDataset',
    metainfo=dict(classes=('RBC', 'WBC', 'Platelets')),
    data_root='data/bccd',
    data_prefix=dict(sub_data_root=''),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        ann_file='ImageSets/Main/trainval.txt',
        # Ignores two boxes without area, with which the loss would be infinite.
        filter_cfg=dict(bbox_min_size=1),
        pipeline=[
            load,
            load_boxes,
            resize,
            dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
            dict(type='PackDetInputs'),
        ],
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        ann_file='ImageSets/Main/test.txt',
        test_mode=True,
        # Boxes are loaded last: like predictions they are of the whole picture.
        pipeline=[load, resize, load_boxes, dict(type='PackDetInputs')],
    ),
)
val_dataloader = test_dataloader
test_evaluator = dict(type='VOCMetric', metric='mAP', eval_mode='area')
val_evaluator = test_evaluator

max_iters = 2000
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.01),
    clip_grad=dict(max_norm=1),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=200),
    dict(type='PolyLR', eta_min=0, by_epoch=False, begin=200, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    # Two: MMEngine removes the oldest before the new one is written.
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=500, max_keep_ckpts=2
    ),
)
log_processor = dict(by_epoch=False)
