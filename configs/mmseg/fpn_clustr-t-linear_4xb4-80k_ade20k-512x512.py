_base_ = './fpn_clustr-t_4xb4-80k_ade20k-512x512.py'
model = dict(backbone=dict(clusterer=dict(type='KMeans'), max_clusters=49))
