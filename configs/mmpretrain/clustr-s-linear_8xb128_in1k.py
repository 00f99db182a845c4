_base_ = './clustr-s_8xb128_in1k.py'
model = dict(backbone=dict(clusterer=dict(type='KMeans'), max_clusters=49))
