# Where the backbone starts from, for the configs of all tasks: the path of an
# ImageNet classifier, or of any other checkpoint that holds this backbone, set once in
# the environment:
#   export CLUSTR_CHECKPOINT=work_dirs/clustr-s_8xb128_in1k/epoch_300.pth
# Without it training starts from random weights.
checkpoint = '{{$CLUSTR_CHECKPOINT:none}}'
pretrained = (
    None if checkpoint == 'none' else dict(type='Pretrained', checkpoint=checkpoint)
)
