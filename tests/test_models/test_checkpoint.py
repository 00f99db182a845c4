import pytest
import torch
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint, save_checkpoint
from test_models.test_clustr import ARCH, golden, randn, random_model  # noqa: F401
from test_models.variants import load_all
from torch import nn

from clustr_mm import ClusTR


class Detector(BaseModule):
    """What a toolbox makes of a backbone."""

    def __init__(self):
        super().__init__()
        self.backbone = ClusTR(ARCH)
        self.head = nn.Linear(2, 2)


def equal(model, state_dict):
    return all(
        torch.equal(value, state_dict[name])
        for name, value in model.state_dict().items()
    )


def public(golden):  # noqa: F811
    return {
        name.removeprefix('param/'): value
        for name, value in golden.items()
        if name.startswith('param/')
    }


def wrappings(state_dict):
    prefixed = {
        prefix: {prefix + name: value for name, value in state_dict.items()}
        for prefix in ['module.', 'backbone.', 'module.backbone.']
    }
    return {
        'bare': state_dict,
        **prefixed,
        'state_dict': dict(state_dict=state_dict),
        'model': dict(model=state_dict, epoch=3),
        'model, module.': dict(model=prefixed['module.']),
        'state_dict, backbone.': dict(
            state_dict=prefixed['backbone.'], meta={}, optimizer={}
        ),
    }


WRAPPINGS = list(wrappings({}))


@pytest.mark.parametrize('wrapping', WRAPPINGS)
@pytest.mark.parametrize('names', ['ours', 'public'])
def test_init_cfg(golden, tmp_path, names, wrapping):  # noqa: F811
    reference = ClusTR(ARCH)
    reference.load_state_dict(public(golden), strict=False)
    expected = reference.state_dict()
    source = expected if names == 'ours' else public(golden)
    path = str(tmp_path / 'weights.pth')
    torch.save(wrappings(source)[wrapping], path)

    model = ClusTR(ARCH, init_cfg=dict(type='Pretrained', checkpoint=path))
    assert not equal(model, expected)
    model.init_weights()
    assert equal(model, expected)

    detector = Detector()
    detector.backbone.init_cfg = model.init_cfg
    detector.init_weights()
    assert equal(detector.backbone, expected)


def test_public_names_mean_the_right_parameters(golden):  # noqa: F811
    model = ClusTR(ARCH)
    model.load_state_dict(public(golden), strict=False)
    for ours, theirs in [
        ('stages.0.patch_embed.proj.weight', 'patch_embed1.proj.weight'),
        ('stages.1.blocks.1.attn.importance.bias', 'block2.1.attn.weight_layer.bias'),
        ('stages.2.blocks.0.attn.kv2.weight', 'block3.0.attn.kv2.weight'),
        ('stages.3.blocks.0.attn.kv.weight', 'block4.0.attn.kv.weight'),
        ('stages.3.blocks.0.ffn.dwconv.bias', 'block4.0.mlp.dwconv.dwconv.bias'),
        ('stages.3.norm.weight', 'norm4.weight'),
    ]:
        assert torch.equal(model.state_dict()[ours], golden[f'param/{theirs}'])


def test_fewer_stages_take_a_full_checkpoint():
    full = random_model()
    part = ClusTR(ARCH, out_indices=(0, 1))
    part.load_state_dict(full.state_dict(), strict=False)
    assert equal(part, full.state_dict())


def test_own_checkpoint_round_trip(tmp_path):
    detector = Detector()
    path = str(tmp_path / 'detector.pth')
    save_checkpoint(dict(state_dict=detector.state_dict()), path)
    again = Detector()
    load_checkpoint(again, path, strict=True)
    assert equal(again, detector.state_dict())
    again = Detector()
    again.load_state_dict(detector.state_dict())
    assert equal(again, detector.state_dict())


def test_strict_still_reports_unknown_keys():
    model = random_model()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*head\.weight'):
        model.load_state_dict({**model.state_dict(), 'head.weight': torch.zeros(1)})


def test_not_strict_is_partial():
    """As torch says: what is missing stays, what is unknown is reported."""
    model = ClusTR(ARCH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {'norm4.bias': torch.ones(64), 'head.weight': torch.zeros(1)}
    keys = model.load_state_dict(weights, strict=False)
    assert keys.unexpected_keys == ['head.weight']
    assert 'stages.3.norm.bias' not in keys.missing_keys
    before['stages.3.norm.bias'] = torch.ones(64)
    assert equal(model, before)
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict(weights)


def test_two_names_for_one_parameter():
    model = ClusTR(ARCH)
    weights = {
        'norm4.bias': torch.ones(64),
        'backbone.stages.3.norm.bias': torch.ones(64),
    }
    with pytest.raises(
        RuntimeError, match=r'norm4\.bias and .* are both stages\.3\.norm\.bias'
    ):
        model.load_state_dict(weights, strict=False)


def test_buffers_that_are_not_saved_are_not_missed():
    model = ClusTR(ARCH)
    weights = model.state_dict()
    model.register_buffer('scratch', torch.zeros(3), persistent=False)
    load_all(model, weights)


def test_wrong_checkpoint_counts_and_names(tmp_path):
    model = ClusTR(ARCH)
    total = len(model.state_dict())
    path = str(tmp_path / 'other.pth')

    torch.save({'conv1.weight': torch.zeros(3)}, path)
    message = (
        rf'does not fit this ClusTR: 0 of {total} parameters match; missing: '
        r'stages\.0\.patch_embed\.proj\.weight, .* and \d+ more'
    )
    pretrained = ClusTR(ARCH, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(RuntimeError, match=message):
        pretrained.init_weights()

    # One missing and one of another shape.
    state_dict = dict(model.state_dict())
    del state_dict['stages.3.norm.bias']
    state_dict['stages.0.norm.bias'] = torch.zeros(17)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        RuntimeError,
        match=rf'{total - 2} of {total} .*missing: stages\.3\.norm\.bias; of other '
        r'shape: stages\.0\.norm\.bias \(17,\) instead of \(16,\)',
    ):
        load_all(model, state_dict)
    assert equal(model, before)


def test_checkpoint_of_another_variant():
    with torch.device('meta'):
        tiny, small = ClusTR('tiny'), ClusTR('small')
    with pytest.raises(RuntimeError, match=r'of \d+ parameters match; missing'):
        load_all(small, tiny.state_dict())
    # All of tiny's names are in small, with the same shapes.
    with pytest.raises(RuntimeError, match=r'of more blocks: stages\.0\.blocks\.1\.'):
        load_all(tiny, small.state_dict())


def test_checkpoints_load_across_clusterers():
    model = ClusTR(ARCH, clusterer=dict(type='KMeans'), max_clusters=4)
    weights = random_model().state_dict()
    load_all(model, weights)
    assert equal(model, weights)


def test_loading_leaves_the_given_dict_alone(golden):  # noqa: F811
    given = public(golden)
    names = list(given)
    ClusTR(ARCH).load_state_dict(given, strict=False)
    assert list(given) == names


def test_other_models_are_not_touched():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(1, 1)

    model = Plain()
    assert not model._load_state_dict_pre_hooks
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({'weight': torch.zeros(1, 1), 'bias': torch.zeros(1)})
