_base_ = './fpn_clustr-t_4xb4-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(type='STT', arch='s25'),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
