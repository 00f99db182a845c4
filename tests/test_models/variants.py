"""Small variants of every backbone, for the tests that hold for all of them."""

import pytest
import torch
from mmengine.registry import MODELS

import clustr_mm  # noqa: F401  registers the backbones

ARCHS = dict(
    ClusTR=dict(
        embed_dims=[16, 32, 48, 64],
        num_heads=[1, 2, 3, 4],
        mlp_ratios=[2, 2, 2, 2],
        depths=[1, 2, 2, 1],
        sr_ratios=[8, 4, 2, 1],
    ),
    DualViT=dict(
        stem_width=8,
        embed_dims=[16, 32, 48, 64],
        num_heads=[1, 2, 3, 4],
        mlp_ratios=[2, 2, 3, 2],
        depths=[1, 2, 2, 2],
    ),
    LinGlo=dict(
        embed_dims=[16, 32, 48, 64],
        num_heads=[1, 2, 3, 4],
        mlp_ratios=[2, 2, 2, 2],
        depths=[1, 2, 3, 2],
    ),
    STT=dict(
        window_size=3,
        embed_dims=[16, 16, 16, 16],
        num_heads=[2, 2, 2, 4],
        mlp_ratios=[2, 2, 2, 2],
        depths=[4, 2, 1, 2],
        local_depths=[2, 1, 1, 2],
    ),
)

#: What returns maps.
MAPS = {
    **{name: dict(type=name) for name in ARCHS},
    'ClusTR, windows': dict(type='ClusTR', clusterer=dict(type='DPCKNN', window=32)),
    'ClusTR, linear': dict(
        type='ClusTR', clusterer=dict(type='KMeans'), max_clusters=4
    ),
}
CASES = {**MAPS, 'STT, class': dict(type='STT', with_cls=True)}

for_maps = pytest.mark.parametrize('name', MAPS)
for_all = pytest.mark.parametrize('name', CASES)


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_model(name, **kwargs):
    """By a name out of ``CASES``, without stochastic depth unless asked for."""
    case = CASES[name]
    cfg = {'arch': ARCHS[case['type']], 'drop_path_rate': 0.0, **case, **kwargs}
    torch.manual_seed(0)
    return MODELS.build(cfg)


def random_model(name, **kwargs):
    """A model whose biases, norms and scales do something, too."""
    model = make_model(name, **kwargs)
    for param in model.parameters():
        param.data += 0.05 * torch.randn_like(param)
    return model


def loss_of(outs):
    """Some number; the mean of squares hardly depends on what is before a norm."""
    return sum((out.float() * randn(*out.shape)).sum() for out in outs)


def load_all(model, state_dict):
    """Load weights as ``init_cfg`` does: what is missing is an error."""
    with model.complete_weights():
        model.load_state_dict(state_dict, strict=False)
