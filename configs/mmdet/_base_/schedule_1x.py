# The recipe of PVT's Mask R-CNN: AdamW, batch size 16 (8 GPUs x 2), steps at epochs
# 8 and 11.
_base_ = 'mmdet::_base_/schedules/schedule_1x.py'
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=1e-4)
)
