_base_ = './fpn_linglo-b2_4xb4-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(arch='b0'),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
