_base_ = './mask-rcnn_clustr-t_fpn_1x_coco.py'
model = dict(
    backbone=dict(type='STT', arch='s25'),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
