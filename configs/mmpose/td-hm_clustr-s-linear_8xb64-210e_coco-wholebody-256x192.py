_base_ = './td-hm_clustr-s_8xb64-210e_coco-wholebody-256x192.py'
model = dict(backbone=dict(clusterer=dict(type='KMeans'), max_clusters=49))
