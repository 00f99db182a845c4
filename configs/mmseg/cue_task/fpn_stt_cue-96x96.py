_base_ = './fpn_dpcknn_cue-96x96.py'

arch = dict(
    window_size=4,  # 12 x 12 patches: 3 x 3 windows
    embed_dims=[128] * 4,
    num_heads=[4] * 4,
    mlp_ratios=[4] * 4,
    depths=[2] * 4,
    local_depths=[1] * 4,
)
backbone = dict(_delete_=True, type='STT', arch=arch, drop_path_rate=0.0)
model = dict(backbone=backbone, neck=dict(in_channels=[128] * 4))
