_base_ = './fpn_dpcknn_cue-96x96.py'
custom_imports = dict(imports=['clustr_mm', 'clustr_mm.evidence', 'mmdet.models'])

backbone = dict(
    _delete_=True,
    type='mmdet.PyramidVisionTransformerV2',
    embed_dims=32,
    num_layers=[1, 1, 2, 1],
    num_heads=[1, 2, 4, 8],
    mlp_ratios=[4, 4, 4, 4],
    drop_path_rate=0.0,
)
model = dict(backbone=backbone)
