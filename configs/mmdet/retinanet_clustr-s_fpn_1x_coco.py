_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/default_runtime.py',
    './_base_/schedule_1x.py',
    '../_base_/pretrained.py',
]
custom_imports = dict(imports=['clustr_mm'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='ClusTR',
        arch='small',
        drop_path_rate=0.1,
        init_cfg=_base_.pretrained,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
# Half of Mask R-CNN's, as for PVT.
optim_wrapper = dict(optimizer=dict(lr=1e-4))
