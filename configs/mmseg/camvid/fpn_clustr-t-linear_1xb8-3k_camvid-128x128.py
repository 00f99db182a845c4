# For pictures as small as these the limit is none: only the kind of clusters differs.
_base_ = './fpn_clustr-t_1xb8-3k_camvid-128x128.py'
model = dict(backbone=dict(clusterer=dict(type='KMeans'), max_clusters=49))
