_base_ = './retinanet_clustr-s_fpn_1x_coco.py'
model = dict(backbone=dict(clusterer=dict(type='KMeans'), max_clusters=49))
