_base_ = './fpn_dpcknn_cue-96x96.py'

model = dict(backbone=dict(type='ControlClusTR', keys='itself'))
