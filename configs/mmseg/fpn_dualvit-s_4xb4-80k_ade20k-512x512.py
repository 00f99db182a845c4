_base_ = './fpn_clustr-t_4xb4-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(type='DualViT', arch='small', drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 320, 448]),
)
# As in the public segmentors: the stem normalises over the images of all GPUs.
sync_bn = 'torch'
