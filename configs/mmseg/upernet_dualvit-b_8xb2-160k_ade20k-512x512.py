_base_ = './upernet_dualvit-s_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
)
