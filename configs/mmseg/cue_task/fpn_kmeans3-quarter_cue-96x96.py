_base_ = './fpn_kmeans3_cue-96x96.py'

# A quarter of 9 coarse clusters, and of 36 fine ones.
model = dict(backbone=dict(max_clusters=2))
