_base_ = './td-hm_clustr-t_8xb64-210e_coco-wholebody-256x192.py'
neck = _base_.model.neck
neck['necks'][0]['in_channels'] = [64, 128, 320, 512]
model = dict(backbone=dict(arch='base', drop_path_rate=0.3), neck=neck)
