# ClusTR's recipe. The class embedding comes from the backbone's super tokens.
_base_ = './clustr-t_8xb128_in1k.py'
model = dict(
    backbone=dict(type='STT', arch='s25', with_cls=True),
    neck=None,
    head=dict(in_channels=384),
)
