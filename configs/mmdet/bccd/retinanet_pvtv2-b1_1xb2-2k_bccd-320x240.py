_base_ = './retinanet_clustr-t-linear_1xb2-2k_bccd-320x240.py'
backbone = dict(
    _delete_=True,
    type='PyramidVisionTransformerV2',
    embed_dims=64,
    num_layers=[2, 2, 2, 2],
    drop_path_rate=0.1,
)
model = dict(backbone=backbone, neck=dict(in_channels=[64, 128, 320, 512]))
