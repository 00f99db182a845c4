# ClusTR's recipe; nobody has published a figure of LinGlo for this task.
_base_ = './upernet_clustr-t_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(type='LinGlo', arch='b2'),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
