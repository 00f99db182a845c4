import pytest
import torch
from test_models.variants import (
    ARCHS,
    count_parameters,
    golden,
    loss_of,
    randn,
    random_model,
)
from torch import nn

from clustr_mm.models.dual_vit import DualViT, SemanticTokens

ARCH = ARCHS['DualViT']

# ---- the numbers of the public code


@pytest.mark.parametrize('size', ['64x64', '112x112', '96x160'])
def test_golden_features(size):
    arrays, weights = golden('dual_vit')
    model = DualViT(ARCH).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        outs = model(arrays[f'input/{size}'])
    assert len(outs) == 4
    for i, out in enumerate(outs, start=1):
        # Far below the agreement asked for, 1e-4.
        torch.testing.assert_close(out, arrays[f'stage{i}/{size}'], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('names', 'count'),
    [
        (['small', 's'], 21_741_280),
        (['base', 'b'], 38_448_128),
        (['large', 'l'], 68_787_648),
    ],
)
def test_parameter_count(names, count):
    with torch.device('meta'):
        assert {count_parameters(DualViT(name)) for name in names} == {count}


# ---- the parts against their definition


@pytest.mark.parametrize(
    ('hw', 'grid'), [((1, 1), (1, 1)), ((3, 20), (1, 2)), ((25, 40), (3, 5))]
)
def test_pooling(hw, grid):
    tokens = SemanticTokens(4, 0.0, dict(type='LN'))
    seen = []
    tokens.kv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = randn(2, hw[0] * hw[1], 4)
    assert tokens(x, hw).shape == (2, grid[0] * grid[1], 4)
    x = x.view(2, *hw, 4)
    expected = [
        x[:, 7 * i : 7 * i + 7, 7 * j : 7 * j + 7].mean(dim=(1, 2))
        for i in range(grid[0])
        for j in range(grid[1])
    ]
    torch.testing.assert_close(seen[0], torch.stack(expected, dim=1))


def test_drop_path_drops_every_branch_of_a_sample(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'bernoulli_', lambda self, _: self.zero_())
    model = random_model('DualViT', drop_path_rate=0.5).train()
    for stage, channels in zip(model.stages[1:3], (32, 48)):
        state = randn(2, 16, channels), randn(2, 5, channels, seed=2)
        for block in stage.blocks:
            for before, after in zip(state, block(*state, (4, 4))):
                assert torch.equal(before, after)


def test_initialisation():
    torch.manual_seed(0)
    model = DualViT(ARCH)
    scales = {k: v for k, v in model.named_parameters() if '.gamma' in k}
    assert len(scales) == 3 * 5 + 4 * 2
    for name, scale in scales.items():
        assert torch.equal(scale, torch.full_like(scale, 1e-6)), name
    stem = model.stages[0].patch_embed.stem
    assert stem[0].bias is None
    for param, std in [
        (model.stages[0].semantic_embed.queries, 0.02),
        (model.stages[1].blocks[0].attn.semantic_qkv.weight, 0.02),
        (stem[3].weight, (2 / 72) ** 0.5),
    ]:
        assert param.std().item() == pytest.approx(std, rel=0.1)


def test_norm_cfg():
    model = DualViT(ARCH, norm_cfg=dict(type='LN', eps=1e-3))
    own = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.eps == 1e-3
    ]
    blocks = sum(ARCH['depths'])
    assert sum('.blocks.' in name for name in own) == 2 * blocks
    assert not any('attn' in name or 'embed' in name for name in own)
    assert len(own) == 2 * blocks + 4 + 3  # ends of the stages


def test_one_pixel_cannot_train_the_batch_norms():
    model = DualViT(ARCH).train()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model(randn(1, 3, 2, 2))
    loss_of(model(randn(2, 3, 2, 2))).backward()
