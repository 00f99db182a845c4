# ClusTR's recipe. Dual-ViT's own has 310 epochs, token labelling and no mixup, and its
# published accuracy needs them.
_base_ = './clustr-t_8xb128_in1k.py'
model = dict(
    backbone=dict(type='DualViT', arch='small', drop_path_rate=0.15),
    head=dict(in_channels=448),
)
