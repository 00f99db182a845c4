_base_ = './retinanet_linglo-b2_fpn_1x_coco.py'
model = dict(
    backbone=dict(arch='b0'),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
