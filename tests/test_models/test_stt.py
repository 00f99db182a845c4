import math
from functools import partial

import pytest
import torch
from get_flops import count_flops
from test_models import variants
from test_models.variants import ARCHS, count_parameters, load_all, randn

from clustr_mm.models.stt import STT, ClassAttention

ARCH = ARCHS['STT']
random_model = partial(variants.random_model, 'STT')


# ---- what is returned


def test_parameter_count():
    with torch.device('meta'):
        backbone, classifier = STT('s25'), STT('s25', with_cls=True)
    for model in (backbone, classifier):
        assert count_parameters(model.stages) == 44_653_056
    assert count_parameters(backbone.levels) == 593_280
    assert count_parameters(classifier.cls) == 3_550_080
    assert not hasattr(backbone, 'cls') and not hasattr(classifier, 'levels')
    count = count_parameters(classifier) + 1000 * 385
    assert count == pytest.approx(49e6, rel=0.03)
    assert count_flops(classifier, 224, 224).total == pytest.approx(9.4e9, rel=0.01)


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


def test_class_attention_by_definition():
    torch.manual_seed(0)
    attn = ClassAttention(16, 4, 0.0, 0.0).double()
    x = randn(2, 5, 16).double()
    for b in range(2):
        expected = softmax_attention(attn, x[b, :1], x[b])
        torch.testing.assert_close(attn(x)[b], expected, rtol=0, atol=1e-5)


# ---- checkpoints


def test_classifier_starts_a_detector(tmp_path):
    """Its checkpoint has no levels: those stay as they were."""
    classifier = random_model(with_cls=True).state_dict()
    path = str(tmp_path / 'classifier.pth')
    torch.save({f'backbone.{k}': v for k, v in classifier.items()}, path)
    detector = STT(ARCH, init_cfg=dict(type='Pretrained', checkpoint=path))
    levels = {k: v.clone() for k, v in detector.levels.state_dict().items()}
    detector.init_weights()
    for name, value in detector.state_dict().items():
        kept = levels.get(name.removeprefix('levels.'))
        assert torch.equal(value, classifier[name] if kept is None else kept)


def test_no_other_gaps_in_a_checkpoint():
    weights = random_model().state_dict()
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
    block = random_model(drop_path_rate=0.5).train().stages[3].blocks[1]
    x = randn(16, 6, 10, 16)
    # With both branches of a sample dropped, with a chance of a quarter each.
    changed = (block(x) != x).any(-1).any(-1)
    assert 0 < changed[:, 0].sum() < 16
    assert torch.equal(changed, changed[:, :1].expand(-1, 6))
