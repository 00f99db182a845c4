_base_ = './fpn_dpcknn_cue-96x96.py'

backbone = dict(
    _delete_=True, type='ResNet', depth=18, base_channels=24, norm_cfg=dict(type='BN')
)
neck = dict(in_channels=[24, 48, 96, 192])
model = dict(backbone=backbone, neck=neck)
