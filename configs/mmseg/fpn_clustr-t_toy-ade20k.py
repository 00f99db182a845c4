# The demo: a few minutes from scratch on a CPU, on data that
# tools/dataset_converters/make_toy_data.py draws.
_base_ = './fpn_clustr-t_4xb4-80k_ade20k-512x512.py'

data_root = 'data/toy/ADEChallengeData2016'
size = (112, 112)
max_iters = 500

load = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
]
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        pipeline=[*load, dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')],
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=[*load, dict(type='PackSegInputs')]),
)
test_dataloader = val_dataloader

model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(drop_path_rate=0.0, init_cfg=None),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, end=30, by_epoch=False),
    dict(type='PolyLR', power=0.9, begin=30, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=100, max_keep_ckpts=1),
)
randomness = dict(seed=0)
