_base_ = './fpn_clustr-t_1xb8-3k_camvid-128x128.py'
backbone = dict(_delete_=True, type='ResNet', depth=18)
model = dict(backbone=backbone, neck=dict(in_channels=[64, 128, 256, 512]))
optim_wrapper = dict(optimizer=dict(lr=1.2e-3))
