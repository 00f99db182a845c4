"""Weights of other origin: which names and files load, and what is said of others."""

import pytest
import torch
from mmengine.model import BaseModule
from test_models.variants import for_all, golden, load_all, make_model, random_model
from torch import nn


class Detector(BaseModule):
    """What a toolbox makes of a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, state_dict):
    return all(
        torch.equal(value, state_dict[name])
        for name, value in model.state_dict().items()
    )


def public_weights(name):
    return golden(dict(ClusTR='clustr', DualViT='dual_vit')[name])[1]


def with_prefix(prefix):
    return lambda weights: {prefix + name: value for name, value in weights.items()}


WRAPPINGS = {
    'bare': lambda weights: weights,
    'module.': with_prefix('module.'),
    'module.backbone.': with_prefix('module.backbone.'),
    'model': lambda weights: dict(model=weights, epoch=3),
    'model, module.': lambda weights: dict(model=with_prefix('module.')(weights)),
    'state_dict, backbone.': lambda weights: dict(
        state_dict=with_prefix('backbone.')(weights), meta={}, optimizer={}
    ),
}


@pytest.mark.parametrize('wrap', WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize('names', ['own', 'public'])
@pytest.mark.parametrize('name', ['ClusTR', 'DualViT'])
def test_init_cfg(tmp_path, name, names, wrap):
    reference = make_model(name)
    reference.load_state_dict(public_weights(name), strict=False)
    expected = reference.state_dict()
    source = dict(expected if names == 'own' else public_weights(name))
    # A public classifier has more than the backbone.
    for extra in ('aux_head.bias', 'post_network.0.attn.kv.weight'):
        source[extra] = torch.zeros(10, 64)
    path = str(tmp_path / 'weights.pth')
    torch.save(wrap(source), path)

    model = make_model(name, init_cfg=dict(type='Pretrained', checkpoint=path))
    assert not same(model, expected)
    model.init_weights()
    assert same(model, expected)
    detector = Detector(make_model(name))
    detector.backbone.init_cfg = model.init_cfg
    detector.init_weights()
    assert same(detector.backbone, expected)


def test_init_cfg_with_a_prefix(tmp_path):
    detector = Detector(random_model('ClusTR'))
    path = str(tmp_path / 'detector.pth')
    torch.save(dict(state_dict=detector.state_dict()), path)
    cfg = dict(type='Pretrained', checkpoint=path, prefix='backbone')
    model = make_model('ClusTR', init_cfg=cfg)
    model.init_weights()
    assert same(model, detector.backbone.state_dict())


@pytest.mark.parametrize('more', [{}, dict(prefix='backbone')])
@pytest.mark.parametrize('content', [b'', b'<html>Not found</html>', b'\x80\x02' * 99])
@for_all
def test_unreadable_file(tmp_path, name, content, more):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    cfg = dict(type='Pretrained', checkpoint=str(path), **more)
    model = make_model(name, init_cfg=[cfg])
    with pytest.raises(ValueError, match=f"^checkpoint '{path}' (is|can)") as error:
        model.init_weights()
    said = str(error.value)
    assert '\n' not in said and 'weights_only' not in said
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth'):
        make_model(name, init_cfg={**cfg, 'checkpoint': 'nowhere.pth'}).init_weights()


def test_every_public_name_is_known():
    """As many parameters as names, none of them twice."""
    model = make_model('DualViT')
    weights = dict(public_weights('DualViT'))
    assert len(model.state_dict()) == len(weights)
    model.load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*head\.weight'):
        model.load_state_dict({**weights, 'head.weight': torch.zeros(1)})
    assert 'head.weight' not in weights and 'norm4.bias' in weights


def test_not_strict_is_partial():
    """As torch says: what is missing stays, what is unknown is reported."""
    model = make_model('ClusTR')
    before = copy_of(model)
    weights = {'norm4.bias': torch.ones(64), 'head.weight': torch.zeros(1)}
    keys = model.load_state_dict(weights, strict=False)
    assert keys.unexpected_keys == ['head.weight']
    assert 'stages.3.norm.bias' not in keys.missing_keys
    assert same(model, {**before, 'stages.3.norm.bias': torch.ones(64)})
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict(weights)


def test_two_names_for_one_parameter():
    names = ['norm4.bias', 'backbone.stages.3.norm.bias']
    message = r'norm4\.bias and .* are both stages\.3\.norm\.bias'
    with pytest.raises(RuntimeError, match=message):
        make_model('ClusTR').load_state_dict(
            dict.fromkeys(names, torch.ones(64)), strict=False
        )


@for_all
def test_wrong_checkpoint_counts_and_names(name):
    model = make_model(name)
    before = copy_of(model)
    total, kind = len(before), type(model).__name__
    with pytest.raises(
        RuntimeError,
        match=rf'does not fit this {kind}: 0 of {total} parameters match; missing: '
        r'stages\.0\.\S+, .* and \d+ more',
    ):
        load_all(model, {'conv1.weight': torch.zeros(3)})
    # One missing and one of another shape.
    missing, other = 'stages.0.patch_embed.proj.bias', 'stages.1.blocks.0.norm1.bias'
    lacking = {k: v for k, v in before.items() if k != missing}
    with pytest.raises(
        RuntimeError,
        match=f'{total - 2} of {total} .*missing: {missing}; of other shape: {other} '
        rf'\(99,\) instead of',
    ):
        load_all(model, {**lacking, other: torch.zeros(99)})
    assert same(model, before)


def test_checkpoints_load_across_clusterers():
    model = make_model('ClusTR, linear')
    weights = random_model('ClusTR').state_dict()
    load_all(model, weights)
    assert same(model, weights)
