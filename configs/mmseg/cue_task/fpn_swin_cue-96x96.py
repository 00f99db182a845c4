_base_ = './fpn_dpcknn_cue-96x96.py'

backbone = dict(
    _delete_=True,
    type='SwinTransformer',
    embed_dims=32,
    depths=[2, 2, 2, 1],
    num_heads=[1, 2, 4, 8],
    window_size=7,
    drop_path_rate=0.0,
)
model = dict(backbone=backbone)
