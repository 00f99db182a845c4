"""The recipe for a new backbone in CONTRIBUTING.md."""

import re
from pathlib import Path

import pytest
import torch
from backbones import find_backbone, our_types, presets
from get_flops import count_flops, load_model
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from test_models.variants import ARCHS

PAGE = Path(__file__).parents[1] / 'CONTRIBUTING.md'


SIBLINGS = PAGE.with_name('docs') / 'backbones.md'


def blocks(page):
    return re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)


@pytest.fixture
def pool_net():
    """The class of the page, registered for one test."""
    code = blocks(PAGE)[0]
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


@pytest.mark.parametrize(
    ('text', 'base'),
    [
        (blocks(PAGE)[1], 'mask-rcnn_clustr-s_fpn_1x_coco.py'),
        (blocks(SIBLINGS)[0], 'retinanet_clustr-s_fpn_1x_coco.py'),
        (blocks(SIBLINGS)[0], 'mask-rcnn_clustr-b-w224_fpn_1x_coco.py'),
    ],
)
def test_configs_of_the_pages(pool_net, tmp_path, text, base):
    base = PAGE.with_name('configs') / 'mmdet' / base
    text = re.sub(r'^_base_ = .*\n', '', text)
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {str(base)!r}\n{text}')
    config = Config.fromfile(path)
    init_default_scope('mmdet')
    model = MODELS.build(config.model)
    maps = model.extract_feat(torch.rand(1, 3, 64, 96))
    assert [x.shape[1] for x in maps] == [256] * 5


def test_every_backbone_goes_through_the_shared_tests():
    ours = [c for c in our_types().values() if c.__module__.startswith('clustr_mm.')]
    assert set(ARCHS) == {cls.__name__ for cls in ours}


def test_tools_know_it_by_name(pool_net):
    assert 'poolnet-tiny' in presets()
    assert find_backbone('poolnet-tiny').cfg == dict(type='PoolNet', arch='tiny')
    _, model = load_model('poolnet-tiny')
    assert count_flops(model, 64, 64).layers > 0
