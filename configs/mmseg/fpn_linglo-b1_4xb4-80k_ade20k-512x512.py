_base_ = './fpn_linglo-b2_4xb4-80k_ade20k-512x512.py'
model = dict(backbone=dict(arch='b1'))
