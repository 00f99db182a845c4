_base_ = './td-hm_clustr-t_8xb64-210e_coco-wholebody-256x192.py'
model = dict(backbone=dict(arch='small'))
