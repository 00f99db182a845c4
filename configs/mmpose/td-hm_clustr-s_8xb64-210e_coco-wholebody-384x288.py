_base_ = './td-hm_clustr-s_8xb64-210e_coco-wholebody-256x192.py'
# Sigma 3 is what MMPose's whole-body configs have at this size.
codec = dict(type='MSRAHeatmap', input_size=(288, 384), heatmap_size=(72, 96), sigma=3)
train_pipeline = _base_.train_pipeline
train_pipeline[5]['input_size'] = codec['input_size']
train_pipeline[6]['encoder'] = codec
val_pipeline = _base_.val_pipeline
val_pipeline[2]['input_size'] = codec['input_size']
model = dict(head=dict(decoder=codec))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = val_dataloader
