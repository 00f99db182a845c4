_base_ = './mask-rcnn_clustr-t_fpn_1x_coco.py'
# Drop path 0.1 as with the smaller ones, and as PVTv2-B3 has it for detection; 0.3 is
# for the 300 epochs of pre-training.
model = dict(
    backbone=dict(arch='base'),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
