# In float32; the public code trains in float16 with a loss scale of 512 (--amp).
_base_ = './upernet_clustr-t_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(type='DualViT', arch='small', drop_path_rate=0.15),
    decode_head=dict(in_channels=[64, 128, 320, 448]),
    auxiliary_head=dict(in_channels=320),
)
# As in the public segmentors: the stem normalises over the images of all GPUs.
sync_bn = 'torch'
