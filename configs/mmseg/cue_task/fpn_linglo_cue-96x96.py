_base_ = './fpn_dpcknn_cue-96x96.py'

arch = dict(
    embed_dims=[32, 64, 128, 256],
    num_heads=[1, 2, 4, 8],
    mlp_ratios=[4, 4, 4, 4],
    depths=[1, 1, 2, 1],
)
model = dict(backbone=dict(_delete_=True, type='LinGlo', arch=arch, drop_path_rate=0.0))
