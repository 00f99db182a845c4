# In float32; the public code trains in float16 with a loss scale of 512 (--amp).
_base_ = './mask-rcnn_clustr-t_fpn_1x_coco.py'
model = dict(
    backbone=dict(type='DualViT', arch='small', drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 320, 448]),
)
