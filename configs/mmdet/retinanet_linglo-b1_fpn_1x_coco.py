_base_ = './retinanet_linglo-b2_fpn_1x_coco.py'
model = dict(backbone=dict(arch='b1'))
