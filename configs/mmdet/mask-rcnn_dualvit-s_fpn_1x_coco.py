_base_ = './mask-rcnn_clustr-t_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DualViT',
        arch='small',
        drop_path_rate=0.15,
        init_cfg=_base_.pretrained,
    ),
    neck=dict(in_channels=[64, 128, 320, 448]),
)
