_base_ = './fpn_clustr-t_4xb4-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='STT',
        arch='s25',
        drop_path_rate=0.1,
        init_cfg=_base_.pretrained,
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
