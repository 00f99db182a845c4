# ClusTR's recipe; nobody has published a figure of LinGlo for this task.
_base_ = './mask-rcnn_clustr-t_fpn_1x_coco.py'
model = dict(
    backbone=dict(type='LinGlo', arch='b2'),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
