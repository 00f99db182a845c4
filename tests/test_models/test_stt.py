import math
from functools import partial

import pytest
import torch
from get_flops import count_flops
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint
from test_models import variants
from test_models.variants import ARCHS, load_all, randn
from torch import nn

from clustr_mm.models import stt
from clustr_mm.models.stt import STT, ClassAttention

ARCH = ARCHS['STT']
random_model = partial(variants.random_model, 'STT')


def parts(model):
    return {
        name: sum(param.numel() for param in child.parameters())
        for name, child in model.named_children()
    }


# ---- sizes


def test_parameter_count():
    with torch.device('meta'):
        backbone, classifier = STT('s25'), STT('s25', with_cls=True)
    assert parts(backbone) == dict(levels=593_280, stages=44_653_056)
    assert parts(classifier) == dict(cls=3_550_080, stages=44_653_056)
    count = sum(parts(classifier).values()) + 1000 * 385
    assert count == pytest.approx(49e6, rel=0.03)
    assert count_flops(classifier, 224, 224).total == pytest.approx(9.4e9, rel=0.01)


@pytest.mark.parametrize('size', [(1, 1), (50, 70)])
def test_class_embedding(size):
    model = random_model(with_cls=True).eval()
    assert not hasattr(model, 'levels')
    with torch.no_grad():
        (out,) = model(randn(2, 3, *size))
    assert out.shape == (2, 16) and out.isfinite().all()
    assert not torch.equal(out[0], out[1])


def test_class_embedding_of_the_last_stage():
    model = random_model(with_cls=True, out_indices=(0, 1))
    assert len(model.stages) == 2
    assert model.cls.blocks[0].attn.num_heads == 2
    (out,) = model(randn(1, 3, 32, 32))
    assert out.shape == (1, 16)


def test_levels_are_resampled_patches():
    model = random_model().eval()
    states = []
    for stage in model.stages:
        stage.register_forward_hook(lambda *args: states.append(args[2]))
    with torch.no_grad():
        outs = model(randn(1, 3, 44, 60))
        maps = [
            level.norm(x).permute(0, 3, 1, 2)
            for level, (x, _, _) in zip(model.levels.values(), states)
        ]
        assert [tuple(x.shape[2:]) for x in maps] == [(6, 8)] * 4
        # Each patch of stride 8 becomes 2 x 2 pixels, of its own alone.
        deconv = model.levels['0'].resample
        pixel = torch.einsum('c,cdij->dij', maps[0][0, :, 5, 2], deconv.weight)
        pixel = pixel + deconv.bias[:, None, None]
        # Of the last row there is only the first half: 44 / 4 = 11.
        torch.testing.assert_close(outs[0][0, :, 10, 4:6], pixel[:, 0])
        assert outs[0].shape[2:] == (11, 15)
        assert torch.equal(outs[1], maps[1])
        assert torch.equal(outs[2][0, :, 2, 1], maps[2][0, :, 4:6, 2:4].amax((1, 2)))
        assert torch.equal(outs[3][0, :, 1, 1], maps[3][0, :, 4:, 4:].amax((1, 2)))


# ---- the trunk by its definition


def layer_norm(norm, x):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return x * norm.weight + norm.bias


def softmax_attention(attn, queries, keys):
    """Of (N, C) to (M, C), head by head."""
    channels = keys.shape[1]
    dims = channels // attn.num_heads
    q, kv = attn.q(queries), attn.kv(keys)
    heads = []
    for h in range(attn.num_heads):
        part = slice(h * dims, (h + 1) * dims)
        score = q[:, part] @ kv[:, part].T / math.sqrt(dims)
        heads.append(score.softmax(1) @ kv[:, channels:][:, part])
    return attn.proj(torch.cat(heads, dim=1))


def block_by_definition(block, x):
    normed = layer_norm(block.norm1, x)
    x = x + softmax_attention(block.attn, normed, normed)
    return x + block.ffn(layer_norm(block.norm2, x))


def stage_by_definition(stage, patches, supers, kinds):
    """Window by window, without padding. One image: (h, w, C), (gh, gw, C)."""
    m = stage.window
    patches, supers = (
        x + conv(x.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        for x, conv in [
            (patches, stage.position.conv),
            (supers, stage.super_position.conv),
        ]
    )
    patches, supers = patches.clone(), supers.clone()
    for block, kind in zip(stage.blocks, kinds):
        if kind == 'global':
            supers = block_by_definition(block, supers.flatten(0, 1)).view_as(supers)
            continue
        for i in range(supers.shape[0]):
            for j in range(supers.shape[1]):
                window = patches[i * m : (i + 1) * m, j * m : (j + 1) * m]
                tokens = torch.cat([window.flatten(0, 1), supers[i, j][None]])
                tokens = block_by_definition(block, tokens)
                window.copy_(tokens[:-1].view_as(window))
                supers[i, j] = tokens[-1]
    return patches, supers


@pytest.mark.parametrize('hw', [(6, 3), (5, 8), (1, 1), (2, 7)])
def test_stages_by_definition(hw):
    model = random_model().double().eval()
    grid = [-(-side // 3) for side in hw]
    patches, supers = randn(2, *hw, 16).double(), randn(2, *grid, 16, seed=2).double()
    kinds = ['local', 'global', 'global', 'local'], ['global', 'local'], ['local']
    for i, kind in enumerate([*kinds, ['local', 'local']]):
        stage = model.stages[i]
        stage.patch_embed = None
        with torch.no_grad():
            out = stage((patches, supers, (40, 60)))
            for b in range(2):
                expected = stage_by_definition(stage, patches[b], supers[b], kind)
                torch.testing.assert_close(out[0][b], expected[0], rtol=0, atol=1e-5)
                torch.testing.assert_close(out[1][b], expected[1], rtol=0, atol=1e-5)
        assert out[2] == (40, 60)


def test_first_super_tokens_are_the_learned_one(monkeypatch):
    model = random_model().eval()
    seen = []
    model.stages[0].super_position.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    model(randn(2, 3, 50, 30))
    # 7 x 4 patches.
    expected = model.stages[0].super_token.expand(2, 3, 2, 16)
    assert torch.equal(seen[0], expected)


def test_class_attention_by_definition():
    torch.manual_seed(0)
    attn = ClassAttention(16, 4, 0.0, 0.0).double()
    x = randn(2, 5, 16).double()
    for b in range(2):
        expected = softmax_attention(attn, x[b, :1], x[b])
        torch.testing.assert_close(attn(x)[b], expected, rtol=0, atol=1e-5)


def test_class_block_by_definition():
    block = random_model(with_cls=True).double().eval().cls.blocks[1]
    token, supers = randn(1, 1, 16).double(), randn(1, 6, 16, seed=2).double()
    normed = layer_norm(block.norm1, torch.cat([token, supers], dim=1))[0]
    expected = token[0] + softmax_attention(block.attn, normed[:1], normed)
    expected = expected + block.ffn(layer_norm(block.norm2, expected))
    torch.testing.assert_close(block(token, supers)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('with_cls', [False, True])
def test_padding_has_no_influence(monkeypatch, with_cls):
    model = random_model(with_cls=with_cls).eval()
    x = randn(2, 3, 50, 70)
    real = stt.to_windows
    padded = []

    def to_windows(x, side):
        if x.dtype != torch.bool:
            height, width = x.shape[1:3]
            padding = (0, 0, 0, -width % side, 0, -height % side)
            # Not equal, or the norm would make nothing of it.
            noise = 100 * randn(*nn.functional.pad(x, padding).shape)
            noise[:, :height, :width] = x
            padded.append(noise.shape != x.shape)
            x = noise
        return real(x, side)

    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(stt, 'to_windows', to_windows)
        outs = model(x)
        assert padded == [True] * 4
        for a, b in zip(outs, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        # It would be seen without the mask.
        monkeypatch.setattr(stt, 'window_mask', lambda x, side: None)
        assert (model(x)[-1] - expected[-1]).abs().max() > 1e-2


def test_mask_only_where_there_is_padding():
    x = torch.zeros(2, 4, 6, 8)
    assert stt.window_mask(x, 2) is None
    mask = stt.window_mask(x, 4)
    assert mask.shape == (2, 17) and mask.dtype == torch.bool
    assert mask[0].all()
    assert torch.equal(mask[1, 1:].view(4, 4).sum(1), torch.tensor([2] * 4))
    assert mask[1, 0]


@pytest.mark.parametrize('hw', [(6, 9), (7, 2), (1, 1)])
def test_windows_and_back(hw):
    x = randn(2, *hw, 5)
    windows = stt.to_windows(x, 3)
    assert windows.shape[:3] == (2, -(-hw[0] // 3) * -(-hw[1] // 3), 9)
    assert torch.equal(stt.from_windows(windows, hw, 3), x)
    if hw == (6, 9):
        assert torch.equal(windows[1, 4].view(3, 3, 5), x[1, 3:6, 3:6])


def test_windows_speak_through_super_tokens():
    """From one corner to the other, but not without global blocks."""
    x = randn(1, 3, 240, 240)
    changed = x.clone()
    changed[:, :, :8, :8] += 1
    change = []
    for local in (2, 4):
        arch = {**ARCH, 'local_depths': [local, 1, 1, 2]}
        model = random_model(arch=arch, out_indices=(0,)).eval()
        with torch.no_grad():
            difference = model(x)[0] - model(changed)[0]
        change.append(difference[..., -1, -1].abs().max().item())
    assert change[0] > 0 and change[1] == 0


def test_what_the_blocks_work_on():
    with torch.device('meta'):
        model = STT('s25').eval()
        seen = []
        for stage in model.stages:
            for block in stage.blocks:
                block.register_forward_pre_hook(
                    lambda module, args: seen.append(tuple(args[0].shape[1:3]))
                )
        model(torch.empty(1, 3, 224, 224))
    local, all_supers = (16, 50), (1, 16)
    assert seen == [
        *([local] * 2 + [all_supers] * 4 + [local]),
        *([all_supers] * 5 + [local]) * 3,
    ]


# ---- checkpoints


class Parent(BaseModule):
    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = random_model(**kwargs)


@pytest.mark.parametrize('form', ['bare', 'whole', 'file'])
def test_classifier_starts_a_detector(form, tmp_path):
    """Its checkpoint has no levels: those stay as they were."""
    classifier = Parent(with_cls=True)
    for param in classifier.parameters():
        param.data += 1
    detector = Parent()
    before = {k: v.clone() for k, v in detector.backbone.levels.state_dict().items()}
    if form == 'bare':
        weights = classifier.backbone.state_dict()
        detector.backbone.load_state_dict(weights, strict=False)
    elif form == 'whole':
        weights = dict(state_dict=classifier.state_dict())
        detector.backbone.load_state_dict(weights, strict=False)
    else:
        torch.save(dict(state_dict=classifier.state_dict()), tmp_path / 'x.pth')
        load_checkpoint(detector, str(tmp_path / 'x.pth'))
    trunk = detector.backbone.stages.state_dict()
    for name, value in classifier.backbone.stages.state_dict().items():
        assert torch.equal(trunk[name], value)
    for name, value in detector.backbone.levels.state_dict().items():
        assert torch.equal(value, before[name])


def test_no_other_gaps_in_a_checkpoint():
    weights = random_model().state_dict()
    other = STT(ARCH)
    other.load_state_dict(weights)
    assert torch.equal(other.levels['2'].norm.bias, weights['levels.2.norm.bias'])
    for gap in ('levels.2.norm.bias', 'stages.0.super_token'):
        lacking = {k: v for k, v in weights.items() if k != gap}
        with pytest.raises(RuntimeError, match=f'missing: {gap}'):
            load_all(STT(ARCH), lacking)
    trunk = {k: v for k, v in weights.items() if k.startswith('stages')}
    del trunk['stages.0.super_token']
    # Not taken for a classifier's: the trunk is not complete.
    with pytest.raises(RuntimeError, match='146 of 157.*and 8 more'):
        load_all(STT(ARCH), trunk)
    with pytest.raises(RuntimeError, match='cls.token'):
        load_all(STT(ARCH, with_cls=True), weights)


# ---- training


def test_drop_path_drops_whole_samples():
    model = random_model(drop_path_rate=0.5).train()
    block = model.stages[3].blocks[1]
    assert block.drop_path.prob == 0.5
    x = randn(16, 6, 10, 16)
    changed = (block(x) != x).flatten(1).any(1)
    # With both branches of a sample dropped, with a chance of a quarter each.
    assert 0 < changed.sum() < 16
    per_window = (block(x) != x).any(-1).any(-1)
    assert torch.equal(per_window, per_window[:, :1].expand(-1, 6))


# ---- wrong arguments


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch={**ARCH, 'stem': 3}), 'keys.*got .*stem'),
        (dict(arch={**ARCH, 'window_size': 0}), 'window_size.*got 0'),
        (dict(arch={**ARCH, 'embed_dims': [16, 16, 16, 32]}), 'embed_dims.*same.*32'),
        (
            dict(arch={**ARCH, 'local_depths': [2, 1, 2, 2]}),
            r'local_depths.*at most.*\[2, 1, 2, 2\] and \[4, 2, 1, 2\]',
        ),
        (dict(arch={**ARCH, 'local_depths': [2, 0, 1, 2]}), 'local_depths.*positive'),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        STT(**{'arch': ARCH, **kwargs})
