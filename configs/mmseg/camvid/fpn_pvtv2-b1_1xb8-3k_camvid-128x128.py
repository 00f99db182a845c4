_base_ = './fpn_clustr-t_1xb8-3k_camvid-128x128.py'
custom_imports = dict(imports=['clustr_mm', 'clustr_mm.evidence', 'mmdet.models'])
backbone = dict(
    _delete_=True,
    type='mmdet.PyramidVisionTransformerV2',
    embed_dims=64,
    num_layers=[2, 2, 2, 2],
    drop_path_rate=0.1,
)
model = dict(backbone=backbone, neck=dict(in_channels=[64, 128, 320, 512]))
