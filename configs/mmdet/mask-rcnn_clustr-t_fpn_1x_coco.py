_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/default_runtime.py',
    './_base_/schedule_1x.py',
    '../_base_/pretrained.py',
]
custom_imports = dict(imports=['clustr_mm'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='ClusTR',
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=_base_.pretrained,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

# Smaller images for a trial: CLUSTR_IMG_SCALE=320,192 mim train mmdet ...
img_scale = '{{$CLUSTR_IMG_SCALE:1333,800}}'
img_scale = tuple(map(int, img_scale.split(',')))
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
train_dataloader['dataset']['pipeline'][2]['scale'] = img_scale
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
val_dataloader['dataset']['pipeline'][1]['scale'] = img_scale
test_dataloader = val_dataloader
