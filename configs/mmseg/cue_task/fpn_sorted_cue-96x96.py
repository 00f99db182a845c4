_base_ = './fpn_dpcknn_cue-96x96.py'

model = dict(backbone=dict(clusterer=dict(_delete_=True, type='SortedTokens')))
