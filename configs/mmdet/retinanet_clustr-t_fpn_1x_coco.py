_base_ = './retinanet_clustr-s_fpn_1x_coco.py'
model = dict(backbone=dict(arch='tiny'))
