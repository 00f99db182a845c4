# ClusTR's recipe.
_base_ = './clustr-t_8xb128_in1k.py'
model = dict(backbone=dict(type='LinGlo', arch='b2'))
