_base_ = './mask-rcnn_clustr-b_fpn_1x_coco.py'
model = dict(backbone=dict(clusterer=dict(type='DPCKNN', window=224)))
