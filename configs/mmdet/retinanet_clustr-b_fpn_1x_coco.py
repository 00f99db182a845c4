_base_ = './retinanet_clustr-s_fpn_1x_coco.py'
model = dict(
    backbone=dict(arch='base'),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
