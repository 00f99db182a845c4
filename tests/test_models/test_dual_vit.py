from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from test_models import variants
from test_models.test_checkpoint import WRAPPINGS, wrappings
from test_models.variants import ARCHS, load_all, loss_of, randn
from torch import nn

from clustr_mm.models.dual_vit import DualViT, SemanticTokens

GOLDEN = Path(__file__).parents[1] / 'data' / 'dual_vit_tiny.npz'
ARCH = ARCHS['DualViT']
random_model = partial(variants.random_model, 'DualViT')


@pytest.fixture(scope='module')
def golden():
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope='module')
def public(golden):
    """The weights under the public code's names."""
    return {
        name.removeprefix('param/'): value
        for name, value in golden.items()
        if name.startswith('param/')
    }


# ---- the numbers of the public code


@pytest.mark.parametrize('size', ['64x64', '112x112', '96x160'])
def test_golden_features(golden, public, size):
    model = DualViT(ARCH).eval()
    model.load_state_dict(public)
    with torch.no_grad():
        outs = model(golden[f'input/{size}'])
    assert len(outs) == 4
    for i, out in enumerate(outs, start=1):
        # Far below the agreement asked for, 1e-4.
        torch.testing.assert_close(out, golden[f'stage{i}/{size}'], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('names', 'count'),
    [
        (['small', 's'], 21_741_280),
        (['base', 'b'], 38_448_128),
        (['large', 'l'], 68_787_648),
    ],
)
def test_parameter_count(names, count):
    for name in names:
        with torch.device('meta'):
            model = MODELS.build(dict(type='DualViT', arch=name))
        assert sum(param.numel() for param in model.parameters()) == count


def test_feed_forward_widths():
    with torch.device('meta'):
        model = DualViT('small')
    ratios = [
        [block.ffn.fc1.out_features / dims for block in stage.blocks]
        for stage, dims in zip(model.stages, [64, 128, 320, 448])
    ]
    assert ratios == [[8] * 3, [8] * 4, [4, 3, 4, 3, 4, 3], [3] * 3]


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


def test_queries_as_they_are_at_224():
    tokens = SemanticTokens(4, 0.0, dict(type='LN'))
    seen = []
    tokens.q_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens(randn(2, 56 * 56, 4), (56, 56))
    torch.testing.assert_close(seen[0][0], tokens.queries)


def test_pixels_see_the_whole_image_in_the_first_stage():
    model = random_model(out_indices=(0,)).eval()
    x = randn(1, 3, 128, 128).requires_grad_()
    model(x)[0][0, :, 0, 0].sum().backward()
    # The convolutions alone reach less than 32 pixels.
    assert (x.grad[0, :, 32:, 32:].abs().sum(dim=0) > 0).all()


# ---- training


def test_drop_path_drops_every_branch_of_a_sample(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'bernoulli_', lambda self, _: self.zero_())
    model = random_model(drop_path_rate=0.5).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    first = model.stages[0].blocks[0]
    assert first.drop_path.prob == first.attn.drop_path.prob == 0
    x, semantics = randn(2, 16, 32), randn(2, 5, 32, seed=2)
    for block in model.stages[1].blocks:
        assert block.drop_path.prob == block.attn.drop_path.prob > 0
        for before, after in zip((x, semantics), block(x, semantics, (4, 4))):
            assert torch.equal(before, after)
    x, semantics = randn(2, 16, 48), randn(2, 5, 48, seed=2)
    for block in model.stages[2].blocks:
        for before, after in zip((x, semantics), block(x, semantics, (4, 4))):
            assert torch.equal(before, after)
    rates = [b.drop_path.prob for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([i / 12 for i in range(7)])


# ---- initialisation


def test_initialisation():
    torch.manual_seed(0)
    model = DualViT(ARCH)
    scales = {k: v for k, v in model.named_parameters() if '.gamma' in k}
    assert len(scales) == 3 * 5 + 4 * 2
    for name, scale in scales.items():
        assert torch.equal(scale, torch.full_like(scale, 1e-6)), name
    semantics = model.stages[0].semantic_embed
    assert semantics.queries.std().item() == pytest.approx(0.02, rel=0.1)
    attn = model.stages[1].blocks[0].attn
    assert attn.semantic_qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    stem = model.stages[0].patch_embed.stem
    assert stem[3].weight.std().item() == pytest.approx((2 / 72) ** 0.5, rel=0.1)
    assert stem[0].bias is None


def test_norm_cfg():
    model = DualViT(ARCH, norm_cfg=dict(type='LN', eps=1e-3))
    custom = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.eps == 1e-3
    }
    others = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.eps == 1e-5
    }
    blocks = {
        f'stages.{i}.blocks.{j}.{norm}'
        for i, depth in enumerate(ARCH['depths'])
        for j in range(depth)
        for norm in ('norm1', 'norm2')
    }
    stages = {f'stages.{i}.norm' for i in range(4)}
    semantic = {f'stages.{i}.semantic_norm' for i in range(3)}
    assert custom == blocks | stages | semantic
    assert len(others) == 2 + 3 * 4 + 4 + 3


# ---- checkpoints


class Detector(BaseModule):
    def __init__(self):
        super().__init__()
        self.backbone = DualViT(ARCH)
        self.head = nn.Linear(2, 2)


def equal(model, state_dict):
    return all(
        torch.equal(value, state_dict[name])
        for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize('wrapping', WRAPPINGS)
def test_public_checkpoint(public, tmp_path, wrapping):
    reference = DualViT(ARCH)
    reference.load_state_dict(public)
    expected = reference.state_dict()
    assert not equal(DualViT(ARCH), expected)
    # The public classifier has more than the backbone: a block of class attention,
    # two heads, and semantics after its last attention.
    source = dict(public)
    for name in [
        *('head.weight', 'aux_head.bias', 'post_network.0.attn.kv.weight'),
        *(f'block4.1.mlp.fc_proxy.{layer}.weight' for layer in (0, 2)),
    ]:
        source[name] = torch.zeros(10, 64)
    path = str(tmp_path / 'weights.pth')
    torch.save(wrappings(source)[wrapping], path)

    model = DualViT(ARCH, init_cfg=dict(type='Pretrained', checkpoint=path))
    model.init_weights()
    assert equal(model, expected)
    # Ours, as a runner saves and resumes it.
    detector, again = Detector(), Detector()
    again.load_state_dict(detector.state_dict())
    assert equal(again, detector.state_dict())


def test_every_public_name_is_known(public):
    """As many parameters as names, none of them twice."""
    model = DualViT(ARCH)
    assert len(model.state_dict()) == len(public)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*head\.weight'):
        model.load_state_dict({**public, 'head.weight': torch.zeros(1)})


def test_wrong_checkpoint_counts_and_names(public):
    model = DualViT(ARCH)
    total = len(public)
    with pytest.raises(
        RuntimeError,
        match=rf'does not fit this DualViT: 0 of {total} parameters match; missing: '
        r'stages\.0\.patch_embed\.proj\.weight, .* and \d+ more',
    ):
        load_all(model, {'conv1.weight': torch.zeros(3)})
    wrong = {**public, 'block2.1.attn.gamma3': torch.zeros(17)}
    del wrong['norm_proxy3.bias']
    with pytest.raises(
        RuntimeError,
        match=rf'{total - 2} of {total} .*missing: stages\.2\.semantic_norm\.bias; of '
        r'other shape: stages\.1\.blocks\.1\.attn\.gamma3 \(17,\) instead of \(32,\)',
    ):
        load_all(model, wrong)


# ---- wrong arguments


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch={k: v for k, v in ARCH.items() if k != 'stem_width'}), 'keys'),
        (dict(arch={**ARCH, 'sr_ratios': [1] * 4}), 'got .*sr_ratios'),
        (dict(arch={**ARCH, 'stem_width': 0}), 'stem_width .*positive.*got 0'),
        (dict(arch={**ARCH, 'stem_width': [8]}), r'stem_width .*got \[8\]'),
        (dict(arch={**ARCH, 'mlp_ratios': [2, 2, 1, 2]}), r'above 1.*\[2, 2, 1, 2\]'),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DualViT(**{'arch': ARCH, **kwargs})


def test_one_pixel_cannot_train_the_batch_norms():
    model = DualViT(ARCH).train()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model(randn(1, 3, 2, 2))
    loss_of(model(randn(2, 3, 2, 2))).backward()
