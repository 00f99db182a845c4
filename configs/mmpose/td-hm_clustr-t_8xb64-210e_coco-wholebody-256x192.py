_base_ = [
    'mmpose::wholebody_2d_keypoint/topdown_heatmap/coco-wholebody/'
    'td-hm_res50_8xb64-210e_coco-wholebody-256x192.py',
    '../_base_/pretrained.py',
]
custom_imports = dict(imports=['clustr_mm'])

# All four stages meet in one map of stride 4, as in TCFormer; by an FPN, the nearest
# stock neck to TCFormer's own (a transformer over the tokens of all stages).
model = dict(
    backbone=dict(
        _delete_=True,
        type='ClusTR',
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=_base_.pretrained,
    ),
    neck=dict(
        type='SequentialNeck',
        necks=[
            dict(
                type='FPN',
                in_channels=[64, 128, 256, 512],
                out_channels=256,
                num_outs=4,
            ),
            dict(type='FeatureMapProcessor', concat=True),
        ],
    ),
    head=dict(
        in_channels=4 * 256,
        deconv_out_channels=None,
        conv_out_channels=(256,),
        conv_kernel_sizes=(1,),
    ),
)

# The recipe of TCFormer: AdamW, steps at epochs 170 and 200.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=5e-4, weight_decay=0.01)
)
