_base_ = './upernet_clustr-t_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(type='STT', arch='s25'),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
