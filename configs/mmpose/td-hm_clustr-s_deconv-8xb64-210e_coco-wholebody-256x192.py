_base_ = './td-hm_clustr-s_8xb64-210e_coco-wholebody-256x192.py'
# Deconvolutions on the last stage alone, the head of SimpleBaseline.
deconv = dict(
    in_channels=512,
    deconv_out_channels=(256, 256, 256),
    conv_out_channels=None,
    conv_kernel_sizes=None,
)
model = dict(neck=None, head=deconv)
