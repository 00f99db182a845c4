"""Small variants of every backbone, for the tests that hold for all of them."""

from functools import cache, partial
from pathlib import Path

import naive
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS

import clustr_mm  # noqa: F401  registers the backbones

PYRAMID = dict(
    embed_dims=[16, 32, 48, 64], num_heads=[1, 2, 3, 4], mlp_ratios=[2, 2, 2, 2]
)
ARCHS = dict(
    ClusTR=dict(**PYRAMID, depths=[1, 2, 2, 1], sr_ratios=[8, 4, 2, 1]),
    DualViT=dict(
        **{**PYRAMID, 'mlp_ratios': [2, 2, 3, 2]}, depths=[1, 2, 2, 2], stem_width=8
    ),
    LinGlo=dict(**PYRAMID, depths=[1, 2, 3, 2]),
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


#: Other numbers than the weights have, which are drawn with seed 0.
randn = partial(naive.randn, seed=1)


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


def run(model, x):
    with torch.no_grad():
        return model(x)


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b)
    )


@cache
def fixed_model(name):
    """For evaluation only: the same in all tests."""
    return random_model(name).eval()


def loss_of(outs):
    """Some number; the mean of squares hardly depends on what is before a norm."""
    return sum((out.float() * randn(*out.shape)).sum() for out in outs)


def load_all(model, state_dict):
    """Load weights as ``init_cfg`` does: what is missing is an error."""
    with model.complete_weights():
        model.load_state_dict(state_dict, strict=False)


@cache
def golden(name):
    """Inputs and outputs of the public code, and its weights under its own names."""
    with np.load(Path(__file__).parents[1] / 'data' / f'{name}_tiny.npz') as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    weights = {
        key.removeprefix('param/'): value
        for key, value in arrays.items()
        if key.startswith('param/')
    }
    return arrays, weights


def count_parameters(model):
    return sum(param.numel() for param in model.parameters())
