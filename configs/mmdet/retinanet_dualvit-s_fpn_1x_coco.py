_base_ = './retinanet_clustr-s_fpn_1x_coco.py'
model = dict(
    backbone=dict(type='DualViT', arch='small', drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 320, 448]),
)
