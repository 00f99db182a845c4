"""The recipe for a new backbone in CONTRIBUTING.md."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

import clustr_mm  # noqa: F401 (registers the backbones)
from clustr_mm.benchmark.backbones import find_backbone, presets
from clustr_mm.flops import count_flops, load_model

PAGE = Path(__file__).parents[1] / 'CONTRIBUTING.md'


@pytest.fixture
def pool_net():
    """The class of the page, registered for one test."""
    code = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)[0]
    namespace = {'__name__': 'example'}
    exec(compile(code, str(PAGE), 'exec'), namespace)
    yield namespace['PoolNet']
    MODELS._module_dict.pop('PoolNet')


def test_one_file_makes_a_backbone(pool_net):
    model = MODELS.build(dict(type='PoolNet', out_indices=(0, 2), frozen_stages=0))
    maps = model(torch.rand(2, 3, 50, 70))
    assert [tuple(x.shape) for x in maps] == [(2, 32, 13, 18), (2, 160, 4, 5)]
    assert not any(p.requires_grad for p in model.stages[0].parameters())
    with pytest.raises(ValueError, match="arch must be one of \\['tiny'\\]"):
        MODELS.build(dict(type='PoolNet', arch='huge'))


def test_tools_know_it_by_name(pool_net):
    assert 'poolnet-tiny' in presets()
    assert find_backbone('poolnet-tiny').cfg == dict(type='PoolNet', arch='tiny')
    _, model = load_model('poolnet-tiny')
    assert count_flops(model, 64, 64).layers > 0
