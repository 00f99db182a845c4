_base_ = './upernet_clustr-b_8xb2-160k_ade20k-512x512.py'
model = dict(backbone=dict(clusterer=dict(type='KMeans'), max_clusters=49))
