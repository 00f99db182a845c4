_base_ = './fpn_clustr-t_4xb4-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(type='LinGlo', arch='b2'),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
