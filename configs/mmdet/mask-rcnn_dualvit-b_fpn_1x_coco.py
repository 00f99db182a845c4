_base_ = './mask-rcnn_dualvit-s_fpn_1x_coco.py'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
