_base_ = './mask-rcnn_clustr-t_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='LinGlo',
        arch='b2',
        drop_path_rate=0.1,
        init_cfg=_base_.pretrained,
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
