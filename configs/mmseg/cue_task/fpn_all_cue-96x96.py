_base_ = './fpn_dpcknn_cue-96x96.py'

# Full attention: one kv for each token, no importance, and so fewer parameters.
model = dict(backbone=dict(arch=dict(sr_ratios=[1, 1, 1, 1])))
