# ClusTR's recipe; the published accuracy of Dual-ViT needs token labelling as well.
_base_ = './clustr-t_8xb128_in1k.py'
model = dict(
    backbone=dict(type='DualViT', arch='small', drop_path_rate=0.15),
    head=dict(in_channels=448),
)
