# Where the backbone starts from, for the configs of all tasks: the path of an
# ImageNet classifier, or of any other checkpoint that holds this backbone, set once in
# the environment:
#   export CLUSTR_CHECKPOINT=work_dirs/clustr-s_8xb128_in1k/epoch_300.pth
# Without it training starts from random weights, and says so.
checkpoint = '{{$CLUSTR_CHECKPOINT:none}}'
pretrained = dict(type='Pretrained', checkpoint=checkpoint)
if checkpoint in ('none', ''):
    pretrained = dict(
        type='RandomStart',
        warning='CLUSTR_CHECKPOINT is not set: the backbone starts from random '
        'weights, with which this recipe does not come near published figures',
    )
