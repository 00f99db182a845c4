_base_ = './fpn_clustr-t_4xb4-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='LinGlo',
        arch='b2',
        drop_path_rate=0.1,
        init_cfg=_base_.pretrained,
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
